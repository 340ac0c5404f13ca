"""From photos of any size to predictions of that size, with a trained task model."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from dinov2.data.photometric import standardize_light
from dinov2.data.task_transforms import make_eval_transform
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.eval.sliding_window import DenseInference
from dinov2.tasks.package import TaskPackage
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, Prediction, SegmentationPrediction
from dinov2.utils.errors import RunError

_NUMBERS_AT_ONCE = 2**22  # 16 MiB of float32: larger blocks cost more to get from the system than they save


def full_size_bands(
    maps: Tensor, size: tuple[int, int], *, numbers_at_once: int = _NUMBERS_AT_ONCE
) -> Iterator[Tensor]:
    """Resizes maps bilinearly (corners not aligned), as ``F.interpolate`` does; what gets smaller is averaged.

    Args:
        maps: float ``[C, h, w]``.
        size: height and width wanted.
        numbers_at_once: how many numbers a band may hold; it has one row at least.

    Yields:
        ``[C, rows, W]`` from top to bottom, ``H`` rows together.
    """
    height, width = size
    smaller = min(maps.shape[1], height), min(maps.shape[2], width)
    if smaller != maps.shape[1:]:
        maps = F.interpolate(maps[None], smaller, mode="bilinear", antialias=True)[0]
    places = (torch.arange(height, dtype=torch.float64) + 0.5) * (smaller[0] / height) - 0.5
    places = places.clamp(min=0)
    upper = places.floor().long()
    lower = (upper + 1).clamp(max=smaller[0] - 1)
    share = (places - upper).to(maps)[:, None]
    upper, lower = upper.to(maps.device), lower.to(maps.device)
    num_rows = max(numbers_at_once // (maps.shape[0] * width), 1)
    for top in range(0, height, num_rows):
        rows = slice(top, top + num_rows)
        band = torch.lerp(maps[:, upper[rows]], maps[:, lower[rows]], share[rows])
        yield F.interpolate(band[None], (band.shape[1], width), mode="bilinear")[0]


logger = logging.getLogger("dinov2")

Photo = Image.Image | NDArray[np.uint8]
T = TypeVar("T")

_MOST_AT_ONCE = 64
_PIXELS_AT_ONCE_ON_CPU = 400_000  # more do not make a processor faster
_BYTES_PER_PIXEL = 4000  # of a large network, generously: out of memory costs a retry, not the run


@dataclass(frozen=True, eq=False)
class PreparedPhoto:
    """A photo as the network sees it.

    Attributes:
        image: float32 ``[3, h, w]``, normalised; for a dense model that sees photos at their own size uint8, which is
            normalised window by window: a large photo needs a fraction of the memory.
        size: height and width of the photo.
    """

    image: Tensor
    size: tuple[int, int]


class TaskPredictor:
    """Predicts with a task model; photos are prepared as for the evaluation during training.

    Args:
        package: the model and how photos are prepared for it.
        batch_size: photos (or windows of a large one) per forward pass; by default what suits the device. Where it does
            not fit into the device's memory it is halved.
        flips: average with the mirrored photo.
        scales: average over the photo at these sizes, as factors; dense tasks only.

    Attributes:
        batch_size: as it is now.
        device: of the model.

    Raises:
        ValueError: for a batch size below 1, scales that are not above 0, or scales of a classifier.
    """

    def __init__(
        self,
        package: TaskPackage,
        *,
        batch_size: int | None = None,
        flips: bool = False,
        scales: Sequence[float] = (1.0,),
    ) -> None:
        self.package = package
        self.device = next(package.model.parameters()).device
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        self.batch_size = batch_size or choose_batch_size(self.device, package.image_size)
        self.flips = flips
        self.scales = tuple(scales)
        self._classifies = package.task == "classification"
        self._keeps_size = package.resize == "original" and not self._classifies
        self._scale = torch.tensor([1 / (255 * std) for std in IMAGENET_STD], device=self.device).view(3, 1, 1)
        self._bias = torch.tensor(IMAGENET_MEAN, device=self.device).view(3, 1, 1) * -255 * self._scale
        if self._classifies and self.scales != (1.0,):
            raise ValueError(f"scales {list(self.scales)} are for segmentation and depth; this model classifies")
        self._transform = make_eval_transform(
            package.image_size, package.resize, center_crop=self._classifies and package.resize == "shorter_side"
        )
        self._dense_inference(1)  # complains of scales now

    def predict(self, photos: Sequence[Photo]) -> list[Prediction]:
        """Predicts for photos of any size, each in RGB or uint8 ``[H, W, 3]``.

        Raises:
            ValueError: for a photo that cannot be prepared (see `prepare`).
            RunError: when not even one photo fits into the device's memory.
        """
        return self.predict_prepared([self.prepare(photo) for photo in photos])

    def prepare(self, photo: Photo) -> PreparedPhoto:
        """Light, size and normalisation; may run in several threads.

        Raises:
            ValueError: for an array that is no uint8 ``[H, W, 3]``, or a photo so long and thin that it would be
                enlarged beyond all bounds.
        """
        if not isinstance(photo, Image.Image):
            if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or 0 in photo.shape:
                raise ValueError(f"a photo must be uint8 [H, W, 3], found {photo.dtype} {list(photo.shape)}")
            photo = Image.fromarray(photo)
        photo = photo.convert("RGB")
        if self.package.light == "standardized":
            photo = standardize_light(photo)
        image = TF.pil_to_tensor(photo)
        if not self._keeps_size:
            image = self._transform({"image": tv_tensors.Image(image)})["image"]
        return PreparedPhoto(image, (photo.height, photo.width))

    def predict_prepared(self, photos: Sequence[PreparedPhoto]) -> list[Prediction]:
        """Predicts for photos from `prepare`; those of one size go through the network together."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, photo in enumerate(photos):
            by_shape.setdefault(tuple(photo.image.shape), []).append(place)
        predictions: dict[int, Prediction] = {}
        for places in by_shape.values():
            group = [photos[place] for place in places]
            predictions.update(zip(places, self._predict_alike(group), strict=True))
        return [predictions[place] for place in range(len(photos))]

    def _predict_alike(self, photos: Sequence[PreparedPhoto]) -> list[Prediction]:
        """Predicts for photos that are of one size when prepared."""
        predict = self._classify if self._classifies else self._predict_dense
        one_by_one = self._has_windows(photos[0].image)
        done: list[Prediction] = []
        while len(done) < len(photos):
            rest = photos[len(done) : len(done) + 1] if one_by_one else photos[len(done) :]
            done += self._with_less_memory(partial(predict, rest))
        return done

    def _with_less_memory(self, run: Callable[[int], T]) -> T:
        """Calls with the batch size, halving it as long as memory runs out."""
        while True:
            try:
                return run(self.batch_size)
            except RuntimeError as error:
                if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                    raise
                cause = str(error).splitlines()[0]
            if self.batch_size == 1:
                raise RunError(f"not even one photo fits into the memory of {self.device}: {cause}")
            self.batch_size //= 2
            logger.warning("out of memory on %s: going on with a batch size of %d", self.device, self.batch_size)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.no_grad()
    def _classify(self, photos: Sequence[PreparedPhoto], batch_size: int) -> list[Prediction]:
        images = torch.stack([photo.image for photo in photos[:batch_size]]).to(self.device)
        probabilities = self._probabilities(images)
        if self.flips:
            probabilities = (probabilities + self._probabilities(images.flip(-1))) / 2
        rows = probabilities.cpu().numpy()
        return [ClassPrediction(row, self.package.multi_label) for row in rows]

    def _probabilities(self, images: Tensor) -> Tensor:
        if self.package.per_part:
            images = images[:, None]  # every photo is a part of its own
        logits: Tensor = self.package.model(images).float()
        return logits.sigmoid() if self.package.multi_label else logits.softmax(dim=1)

    def _predict_dense(self, photos: Sequence[PreparedPhoto], batch_size: int) -> list[Prediction]:
        inference = self._dense_inference(batch_size)
        photos = photos[:batch_size]
        images = torch.stack([photo.image for photo in photos])
        if not self._has_windows(photos[0].image):
            images = images.to(self.device)
        elif self.package.task == "segmentation":
            maps = inference.labels(self._see, images)
            return [SegmentationPrediction(*(one[0].cpu().numpy() for one in (maps.labels, maps.scores, maps.defect)))]
        outputs = inference.predict(self._see, images)
        if self.package.task == "segmentation":
            return [_segmentation(output, photo.size) for output, photo in zip(outputs, photos, strict=True)]
        unit = self.package.depth_unit
        return [
            DepthPrediction(torch.cat(list(full_size_bands(output, photo.size)), dim=1)[0].cpu().numpy(), unit)
            for output, photo in zip(outputs, photos, strict=True)
        ]

    def _see(self, images: Tensor) -> Tensor:
        """The dense model's output for images as `prepare` gives them."""
        if self._keeps_size:
            images = torch.addcmul(self._bias, images.float(), self._scale)
        outputs: Tensor = self.package.model(images)
        return outputs

    def _has_windows(self, image: Tensor) -> bool:
        """Whether a prepared photo is larger than what the model sees at once."""
        height, width = self.package.image_size
        largest = max(self.scales)
        larger = image.shape[1] * largest > height or image.shape[2] * largest > width
        return self._keeps_size and larger

    def _dense_inference(self, batch_size: int) -> DenseInference:
        return DenseInference(
            window=self.package.image_size if self._keeps_size else None,
            flips=self.flips,
            scales=self.scales,
            activation="softmax" if self.package.task == "segmentation" else "none",
            batch_size=batch_size,
            device=self.device,
        )


def choose_batch_size(device: torch.device, image_size: tuple[int, int]) -> int:
    """Photos per forward pass that suit a device: few on a processor, on a GPU what its free memory should hold."""
    pixels = image_size[0] * image_size[1]
    if device.type == "cpu":
        return min(max(_PIXELS_AT_ONCE_ON_CPU // pixels, 1), 8)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else torch.mps.recommended_max_memory() // 2
    return min(max(free // (_BYTES_PER_PIXEL * pixels), 1), _MOST_AT_ONCE)


def _segmentation(probabilities: Tensor, size: tuple[int, int]) -> SegmentationPrediction:
    """Brings ``[C, h, w]`` to the photo's size, one band after the other."""
    height, width = size
    labels = np.empty((height, width), dtype=np.uint8)
    scores, defect = np.empty((height, width), dtype=np.float32), np.empty((height, width), dtype=np.float32)
    top = 0
    for band in full_size_bands(probabilities, size):
        rows = slice(top, top + band.shape[1])
        best, index = band.max(dim=0)
        labels[rows] = index.to(torch.uint8).cpu().numpy()
        scores[rows] = best.cpu().numpy()
        defect[rows] = (1 - band[0]).clamp(0, 1).cpu().numpy()
        top = rows.stop
    return SegmentationPrediction(labels, scores, defect)


@dataclass(frozen=True, eq=False)
class PreparedPart:
    """The photos of a part as the network sees them: float32 ``[photos, 3, h, w]``."""

    images: Tensor


class PartPredictor:
    """Predicts one class per part with a model that was trained on parts (``head.per_part``).

    Args:
        package: the model and how photos are prepared for it.

    Raises:
        ValueError: for a model of single photos.
    """

    def __init__(self, package: TaskPackage) -> None:
        if not package.per_part:
            raise ValueError("this model takes single photos; train with head.per_part=true for parts")
        self.package = package
        self._photos = TaskPredictor(package)

    def choose(self, photos: Sequence[T]) -> list[T]:
        """At most ``max_photos`` of the photos of a part, evenly spread."""
        count = min(len(photos), self.package.max_photos)
        return [photos[place * len(photos) // count] for place in range(count)]

    def predict(self, parts: Sequence[Sequence[Photo]]) -> list[ClassPrediction]:
        """Predicts for parts, each given by its photos (at least one); more than ``max_photos`` are thinned out.

        Raises:
            ValueError: for a part without photos.
        """
        return self.predict_prepared([self.prepare(self.choose(list(photos))) for photos in parts])

    def prepare(self, photos: Sequence[Photo] | Sequence[Image.Image]) -> PreparedPart:
        """Light, size and normalisation of the photos of one part.

        Raises:
            ValueError: without photos.
        """
        if not photos:
            raise ValueError("a part needs at least one photo")
        return PreparedPart(torch.stack([self._photos.prepare(photo).image for photo in photos]))

    @torch.no_grad()
    def predict_prepared(self, parts: Sequence[PreparedPart]) -> list[ClassPrediction]:
        """Predicts for parts from `prepare`, all in one forward pass."""
        most = max(len(part.images) for part in parts)
        device = self._photos.device
        images = torch.zeros(len(parts), most, *parts[0].images.shape[1:], device=device)
        valid = torch.zeros(len(parts), most, dtype=torch.bool, device=device)
        for row, part in enumerate(parts):
            images[row, : len(part.images)] = part.images.to(device)
            valid[row, : len(part.images)] = True
        rows = self.package.model(images, valid).float().softmax(dim=1).cpu().numpy()
        return [ClassPrediction(row) for row in rows]
