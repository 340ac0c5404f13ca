"""What a photo and its targets go through before a supervised network sees them."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from torch import Tensor

from dinov2.data.augmentations import normalize
from dinov2.data.decoding import MAX_PIXELS
from dinov2.data.task_cropping import CroppingOptions, RandomCropping, check_resize, zoom_of
from dinov2.data.task_geometry import Geometry, apply_geometry, inside_photo
from dinov2.data.task_photometric import PhotometricJitter, PhotometricOptions
from dinov2.data.task_samples import TaskSample

MIN_BOX_VISIBILITY = 0.25

TaskTransform = Callable[[TaskSample], TaskSample]


class AugmentationOptions(CroppingOptions, PhotometricOptions, Protocol):
    """Everything random about training images."""


def make_train_transform(
    options: AugmentationOptions,
    image_size: tuple[int, int],
    resize: str = "shorter_side",
    *,
    min_box_visibility: float = MIN_BOX_VISIBILITY,
) -> TaskTransform:
    """Builds the random transform of training samples; see `TrainTransform`."""
    return TrainTransform(options, image_size, resize, min_box_visibility=min_box_visibility)


def make_eval_transform(image_size: tuple[int, int], resize: str, *, center_crop: bool = False) -> TaskTransform:
    """Builds the fixed transform of evaluation and inference; see `EvalTransform`."""
    return EvalTransform(image_size, resize, center_crop=center_crop)


class TrainTransform:
    """Random crop, zoom, turns and flips of photo and targets together, then light, colour, blur and noise.

    The photo is resized as it will be for evaluation (``resize``), zoomed by ``scale_jitter``, and a window of
    ``image_size`` is cut from it at random; what the window shows beyond the photo counts for nothing: image 0 (after
    normalisation), mask ``IGNORED``, depth NaN. With ``random_resized_crop`` the window covers a random share of the
    photo's area instead, with an aspect ratio changed by up to 4/3, and lies in the photo (but for turned corners).

    Depth keeps its values when the photo is zoomed, as in most of the literature since DORN (Fu et al., 2018). Eigen et
    al. (2014) divide it by the zoom, which is right where zooming in stands for going closer. Networks for metric depth
    are therefore best trained with ``scale_jitter`` (1, 1); heights of a surface below a fixed camera do not mind.

    All draws come from torch's global generator, so that a seeded worker, or `TaskDataset`, repeats them.

    Args:
        options: what is random and how much.
        image_size: height and width of the result, in pixels.
        resize: ``stretch``, ``shorter_side`` or ``original``; see `EvalTransform`.
        min_box_visibility: share, 0..1, of a box that must be visible for it to stay.

    Raises:
        ValueError: for options out of range, or that exclude each other.
    """

    def __init__(
        self,
        options: AugmentationOptions,
        image_size: tuple[int, int],
        resize: str = "shorter_side",
        *,
        min_box_visibility: float = MIN_BOX_VISIBILITY,
    ) -> None:
        if not 0 <= min_box_visibility <= 1:
            raise ValueError(f"min_box_visibility must lie in 0..1, got {min_box_visibility}")
        self.cropping = RandomCropping(options, image_size, resize)
        self.jitter = PhotometricJitter(options)
        self.min_box_visibility = min_box_visibility

    def __call__(self, sample: TaskSample) -> TaskSample:
        """Returns a new sample; its tensors are what `TaskSample` says of them after a transform.

        Raises:
            ValueError: crops should show foreground, but the sample has neither a mask nor boxes.
        """
        geometry = self.cropping.draw(sample)
        moved = apply_geometry(sample, geometry, min_box_visibility=self.min_box_visibility)
        moved["image"] = self.jitter(moved["image"].as_subclass(Tensor))
        return _finish(moved, geometry, _size(sample))


class EvalTransform:
    """Resizes a photo and its targets in a fixed way and normalises the image.

    Args:
        image_size: height and width in pixels.
        resize: ``stretch`` squeezes the photo into exactly ``image_size``; ``shorter_side`` scales it so that its
            shorter side is the smaller of the two; ``original`` leaves its size.
        center_crop: whether ``image_size`` is then cut from the middle; where the resized photo is smaller, image 0,
            mask ``IGNORED`` and depth NaN surround it. For classification with ``shorter_side``.

    Raises:
        ValueError: for an unknown mode, a size below 1, or options that exclude each other.
    """

    def __init__(self, image_size: tuple[int, int], resize: str, *, center_crop: bool = False) -> None:
        check_resize(image_size, resize)
        if center_crop and resize != "shorter_side":
            raise ValueError(f"center_crop goes with resize=shorter_side only, got {resize}")
        self.image_size = image_size
        self.resize = resize
        self.center_crop = center_crop

    def __call__(self, sample: TaskSample) -> TaskSample:
        """Returns a new sample; its tensors are what `TaskSample` says of them after a transform.

        Raises:
            ValueError: the resized photo would have more than ``MAX_PIXELS`` pixels.
        """
        size = _size(sample)
        zoom = zoom_of(size, self.image_size, self.resize)
        resized = max(1, round(size[0] * zoom[0])), max(1, round(size[1] * zoom[1]))
        if resized[0] * resized[1] > MAX_PIXELS:
            raise ValueError(
                f"a photo of {size[0]} x {size[1]} pixels would be resized to {resized[0]} x {resized[1]} "
                f"(resize={self.resize}), more than {MAX_PIXELS} pixels"
            )
        geometry = Geometry(box=(0, 0, *size), canvas=resized, window=resized)
        moved = apply_geometry(sample, geometry)
        if not self.center_crop:
            return _finish(moved, geometry, size)
        top, left = ((whole - part) // 2 for whole, part in zip(resized, self.image_size, strict=True))
        crop = Geometry(box=(top, left, *self.image_size), canvas=self.image_size, window=self.image_size)
        return _finish(apply_geometry(moved, crop), crop, resized)


def _size(sample: TaskSample) -> tuple[int, int]:
    height, width = sample["image"].shape[-2:]
    return height, width


def _finish(sample: TaskSample, geometry: Geometry, size: tuple[int, int]) -> TaskSample:
    """Plain tensors for the network; ``size`` is that of the photo that ``geometry`` was applied to."""
    result = sample.copy()
    image = normalize(np.asarray(sample["image"].as_subclass(Tensor).permute(1, 2, 0)))
    if geometry.leaves(size):
        image[:, ~inside_photo(size, geometry)] = 0
    result["image"] = image
    if "mask" in sample:
        result["mask"] = sample["mask"].as_subclass(Tensor).long()
    if "depth" in sample:
        result["depth"] = sample["depth"].as_subclass(Tensor).float()
    return result
