"""Transforms of images together with their targets, for supervised networks; built on torchvision's v2."""

import cmath
import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

from dinov2.config.schema import leaf
from dinov2.data import photometric
from dinov2.data.augmentations import normalize
from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.decoding import MAX_PIXELS
from dinov2.data.photometric import UInt8Array
from dinov2.data.task_dataset import Depth, TaskSample
from dinov2.data.transforms import channel_statistics
from dinov2.utils.seeds import derive_seed

RESIZE_MODES = ("stretch", "shorter_side", "original")
MIN_BOX_VISIBILITY = 0.25

TaskTransform = Callable[[TaskSample], TaskSample]

_BLUR_SIGMA = (0.1, 2.0)  # pixels
_LEVELS = np.arange(256, dtype=np.float64) / 255
_MAX_ASPECT_CHANGE = 4 / 3  # of a random resized crop, as published
_MIN_BOX_SIDE = 1.0  # pixels


class _Inside(tv_tensors.Mask):  # type: ignore[misc]  # torchvision ships no types
    """Where a transformed image comes from the original and not from beyond its edges: 1 or 0, uint8 ``[H, W]``."""


# What stands beyond the edges of an image, by the kind of target; of images it is the mean. A further kind of target
# has its line here.
_FILLS: dict[type, Any] = {
    tv_tensors.Mask: IGNORED,
    Depth: math.nan,
    _Inside: 0,
}


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """Everything random about training images; all draws are uniform but where something else is said.

    Of a strength s: brightness, contrast and saturation are multiplied by 1 - s .. 1 + s (not below 0), the hue turns
    by -s .. s of the colour circle, the logarithm of gamma's exponent and that of the zoom are uniform. A blur has a
    deviation of 0.1 .. 2 pixels. ``rotate90`` of 0.75 makes all four positions equally likely.
    """

    hflip: float = leaf(0.5, "Chance of a left-right flip.", minimum=0, maximum=1)
    vflip: float = leaf(0.0, "Chance of a top-bottom flip.", minimum=0, maximum=1)
    rotate90: float = leaf(0.0, "Chance of a turn by 90, 180 or 270 degrees.", minimum=0, maximum=1)
    rotation: float = leaf(0.0, "Largest rotation either way, in degrees.", minimum=0, maximum=180)
    random_resized_crop: tuple[float, float] = leaf(
        (0.0, 0.0), "Share of the area in a crop that is resized to image_size; [0, 0] for none.", minimum=0, maximum=1
    )
    scale_jitter: tuple[float, float] = leaf((1.0, 1.0), "Zoom before image_size is cut out.", above=0)
    foreground_crop_prob: float = leaf(
        0.0, "Masks and boxes: chance that the crop shows a defect.", minimum=0, maximum=1
    )
    multi_scale: tuple[float, float] = leaf(
        (1.0, 1.0), "Factors on image_size, one for each batch; [1, 1] for none.", above=0
    )
    mosaic: float = leaf(
        0.0,
        "Masks and boxes: chance of a mosaic of four images; none in the last tenth of the run.",
        minimum=0,
        maximum=1,
    )
    copy_paste: float = leaf(
        0.0, "Masks and boxes: chance that defects of another image are pasted.", minimum=0, maximum=1
    )
    brightness: float = leaf(0.2, "Strength; 0 leaves it as it is.", minimum=0)
    contrast: float = leaf(0.2, "Strength.", minimum=0)
    saturation: float = leaf(0.0, "Strength.", minimum=0)
    hue: float = leaf(0.0, "Strength.", minimum=0, maximum=0.5)
    gamma: float = leaf(0.0, "Exponents from 1 / (1 + strength) to 1 + strength.", minimum=0)
    blur: float = leaf(0.0, "Chance of a Gaussian blur.", minimum=0, maximum=1)
    noise: float = leaf(0.0, "Largest standard deviation of Gaussian noise, for values of 0..1.", minimum=0, maximum=1)


def make_train_transform(
    options: AugmentationOptions,
    image_size: tuple[int, int],
    resize: str = "shorter_side",
    *,
    min_box_visibility: float = MIN_BOX_VISIBILITY,
) -> TaskTransform:
    """Random crop, zoom, turns and flips of image and targets together, then light, colour, blur and noise.

    The image is resized as it will be for evaluation (``resize``), zoomed by ``scale_jitter``, and a window of
    ``image_size`` is cut from it at random; what the window shows beyond the image counts for nothing: image 0 (after
    normalisation), mask ``IGNORED``, depth NaN. With ``random_resized_crop`` the window covers a random share of the
    image's area instead, with an aspect ratio changed by up to 4/3, and lies in the image (but for turned corners).

    Depth keeps its values when the image is zoomed, as in most of the literature since DORN (Fu et al., 2018). Eigen et
    al. (2014) divide it by the zoom, which is right where zooming in stands for going closer. Networks for metric depth
    are therefore best trained with ``scale_jitter`` (1, 1); heights of a surface below a fixed camera do not mind.

    All draws come from torch's global generator, so that a seeded worker, or `TaskDataset`, repeats them.

    Args:
        options: what is random and how much.
        image_size: height and width of the result, in pixels.
        resize: ``stretch``, ``shorter_side`` or ``original``; see `make_eval_transform`.
        min_box_visibility: share, 0..1, of a box that must be visible for it to stay; with 0 all boxes stay.

    Returns:
        Maps a sample to a new one, whose tensors are what `TaskSample` says of them after a transform. It raises
        ValueError where crops should show foreground and the sample has neither a mask nor boxes.

    Raises:
        ValueError: for a size or share out of range, or options that exclude each other.
    """
    if not 0 <= min_box_visibility <= 1:
        raise ValueError(f"min_box_visibility must lie in 0..1, got {min_box_visibility}")
    transform: TaskTransform = v2.Compose(
        [
            _begin,
            RandomWindow(options, image_size, resize),
            v2.RandomHorizontalFlip(options.hflip),
            v2.RandomVerticalFlip(options.vflip),
            PhotometricJitter(options),
            functools.partial(_finish, min_box_visibility=min_box_visibility),
        ]
    )
    return transform


@dataclass(frozen=True, kw_only=True)
class MultiScale:
    """Training transforms of an image size that changes with the batch; it follows from seed and position alone.

    Attributes:
        options: what is random and how much; the logarithm of a size's factor is uniform in ``multi_scale``.
        image_size: height and width that factors multiply, in pixels.
        resize: see `make_train_transform`.
        unit: height and width are multiples of it, such as those of a patch.
        batch: samples in a row, over all processes, that share a size.
        start: a position at which a batch begins.
        seed: the run's seed.
    """

    options: AugmentationOptions
    image_size: tuple[int, int]
    resize: str
    unit: tuple[int, int]
    batch: int
    start: int
    seed: int

    def __call__(self, position: int) -> TaskTransform:
        """The transform of the sample at a position of the run's stream."""
        number = (position - self.start % self.batch) // self.batch
        low, high = self.options.multi_scale
        share = random.Random(derive_seed(self.seed, "image size", number)).random()
        factor = low ** (1 - share) * high**share
        height, width = (
            max(1, round(side * factor / unit)) * unit for side, unit in zip(self.image_size, self.unit, strict=True)
        )
        return make_train_transform(self.options, (height, width), self.resize)


def make_eval_transform(image_size: tuple[int, int], resize: str, *, center_crop: bool = False) -> TaskTransform:
    """Resizes an image and its targets in a fixed way and normalises the image.

    Args:
        image_size: height and width in pixels.
        resize: ``stretch`` squeezes the image into exactly ``image_size``; ``shorter_side`` scales it so that its
            shorter side is the smaller of the two; ``original`` leaves its size.
        center_crop: whether ``image_size`` is then cut from the middle; where the resized image is smaller, image 0,
            mask ``IGNORED`` and depth NaN surround it. For classification with ``shorter_side``.

    Returns:
        Maps a sample to a new one, whose tensors are what `TaskSample` says of them after a transform. It raises
        ValueError where the resized image would have more than ``MAX_PIXELS`` pixels.

    Raises:
        ValueError: for an unknown mode, a size below 1, or options that exclude each other.
    """
    if center_crop and resize != "shorter_side":
        raise ValueError(f"center_crop goes with resize=shorter_side only, got {resize}")
    window = _FixedWindow(image_size, resize, center_crop=center_crop)
    transform: TaskTransform = v2.Compose([_begin, window, _finish])
    return transform


class _FixedWindow(v2.Transform):  # type: ignore[misc]
    """Resizes, and cuts the middle out where that is asked for; see `make_eval_transform`."""

    def __init__(self, image_size: tuple[int, int], resize: str, *, center_crop: bool = False) -> None:
        super().__init__()
        _check_resize(image_size, resize)
        self.image_size = image_size
        self.resize = resize
        self.center_crop = center_crop

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """The size after resizing; a ValueError where it is too large."""
        size = TF.get_size(_find(flat_inputs, tv_tensors.Image))
        zoom = zoom_of(size, self.image_size, self.resize)
        resized = [max(1, round(size[axis] * zoom[axis])) for axis in (0, 1)]
        if resized[0] * resized[1] > MAX_PIXELS:
            raise ValueError(
                f"an image of {size[0]} x {size[1]} pixels would be resized to {resized[0]} x {resized[1]} "
                f"(resize={self.resize}), more than {MAX_PIXELS} pixels"
            )
        return {"size": resized}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The image or a target, resized and cut."""
        resized = _resize(inpt, params["size"])
        if not self.center_crop:
            return resized
        top, left = ((whole - part) // 2 for whole, part in zip(params["size"], self.image_size, strict=True))
        return crop(resized, (top, left, *self.image_size))


class RandomWindow(v2.Transform):  # type: ignore[misc]
    """Cuts a random part of the image, resizes it and turns it; torchvision has no crop that shows rare foreground.

    Cutting comes first, as images are often much larger than windows. A window that is turned is cut from the middle of
    a somewhat larger canvas, so that its corners show the image. Turns by right angles come last.

    Args:
        options: what is random and how much.
        image_size: height and width of the windows, in pixels.
        resize: one of ``RESIZE_MODES``: the size at which images appear before ``scale_jitter``.

    Raises:
        ValueError: for options that exclude each other, or an unknown mode.
    """

    def __init__(self, options: AugmentationOptions, image_size: tuple[int, int], resize: str) -> None:
        super().__init__()
        _check_resize(image_size, resize)
        for name in ("scale_jitter", "random_resized_crop"):
            low, high = getattr(options, name)
            if not 0 < low <= high and (name, low, high) != ("random_resized_crop", 0, 0):
                raise ValueError(f"{name} must satisfy 0 < smallest <= largest, got {(low, high)}")
        if any(options.random_resized_crop) and options.scale_jitter != (1, 1):
            raise ValueError(
                f"random_resized_crop={options.random_resized_crop} draws the zoom by itself: scale_jitter must be "
                f"(1, 1), got {options.scale_jitter}"
            )
        self.options = options
        self.image_size = image_size
        self.resize = resize

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws the box to cut (top, left, height, width), the canvas that it is resized to, the window, and the turns.

        Raises:
            ValueError: windows should show foreground, but there is neither a mask nor boxes.
        """
        image = _find(flat_inputs, tv_tensors.Image)
        focus = draw_foreground(flat_inputs) if uniform(0, 1) < self.options.foreground_crop_prob else None
        turns = int(torch.randint(1, 4, ())) if uniform(0, 1) < self.options.rotate90 else 0
        window = self.image_size if turns % 2 == 0 else (self.image_size[1], self.image_size[0])
        extent = self._draw_extent(image, window)
        angle = uniform(-self.options.rotation, self.options.rotation) if self.options.rotation else 0.0
        middle = []
        for axis, whole in enumerate(TF.get_size(image)):
            low, high = sorted((0.0, whole - extent[axis]))  # inside the image, or around it where it is smaller
            if focus is not None and extent[axis] < whole:
                low, high = max(low, focus[axis] + 1 - extent[axis]), min(high, float(focus[axis]))
                if low > high:  # the window is narrower than a pixel
                    low = high = focus[axis] + 0.5 - extent[axis] / 2
            middle.append(uniform(low, high) + extent[axis] / 2)
        if focus is not None and angle:
            middle = _keep_in_sight(focus, middle, extent, window, angle)
        canvas = canvas_of(window, angle)
        height, width = (max(1, round(canvas[axis] * extent[axis] / window[axis])) for axis in (0, 1))
        box = round(middle[0] - height / 2), round(middle[1] - width / 2), height, width
        return {"box": box, "canvas": list(canvas), "window": list(window), "angle": angle, "turns": turns}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The window of the image or of a target."""
        moved = _resize(crop(inpt, params["box"]), params["canvas"])
        if params["angle"]:
            moved = TF.rotate(moved, params["angle"], interpolation=InterpolationMode.BILINEAR)  # targets: nearest
            moved = TF.center_crop(moved, params["window"])
        return TF.rotate(moved, 90.0 * params["turns"], expand=True) if params["turns"] else moved

    def _draw_extent(self, image: Tensor, window: tuple[int, int]) -> tuple[float, float]:
        """Height and width, in pixels of the image, of what the window shows."""
        zoom = zoom_of(TF.get_size(image), window, self.resize)
        extent = window[0] / zoom[0], window[1] / zoom[1]
        if any(self.options.random_resized_crop):
            aspect = extent[1] / extent[0]
            ratio = (aspect / _MAX_ASPECT_CHANGE, aspect * _MAX_ASPECT_CHANGE)
            _, _, height, width = v2.RandomResizedCrop.get_params(image, self.options.random_resized_crop, ratio)
            return height, width
        low, high = self.options.scale_jitter
        factor = math.exp(uniform(math.log(low), math.log(high)))
        return extent[0] / factor, extent[1] / factor


def _keep_in_sight(
    focus: tuple[int, int], middle: list[float], extent: tuple[float, float], window: tuple[int, int], angle: float
) -> list[float]:
    """The middle (row, column) of a turned window, moved as little as needed for it to show a pixel."""
    turn = cmath.rect(1, math.radians(angle))
    zoom = [window[axis] / extent[axis] for axis in (0, 1)]
    # Places relative to the middle, in pixels of the window: x is the real part, y, downwards, the imaginary one.
    place = complex((focus[1] + 0.5 - middle[1]) * zoom[1], (focus[0] + 0.5 - middle[0]) * zoom[0])
    seen = place * turn.conjugate()
    reach = [max(0.0, window[axis] / 2 - 1 - zoom[axis]) for axis in (0, 1)]  # boxes are whole pixels
    kept = complex(min(max(seen.real, -reach[1]), reach[1]), min(max(seen.imag, -reach[0]), reach[0]))
    moved = place - kept * turn
    return [middle[0] + moved.imag / zoom[0], middle[1] + moved.real / zoom[1]]


class PhotometricJitter(v2.Transform):  # type: ignore[misc]
    """Changes images at random: brightness, contrast, saturation, hue and gamma in any order, then blur, then noise.

    Like torchvision's ColorJitter, GaussianBlur and GaussianNoise, but by the operations of pretraining, which take a
    quarter of the time and give the same pixels with any number of threads.

    Args:
        options: strengths.
    """

    def __init__(self, options: AugmentationOptions) -> None:
        super().__init__()
        log_gamma = math.log1p(options.gamma)
        self.blur, self.noise = options.blur, options.noise
        operations = (
            (photometric.adjust_brightness, max(0.0, 1 - options.brightness), 1 + options.brightness),
            (photometric.adjust_contrast, max(0.0, 1 - options.contrast), 1 + options.contrast),
            (photometric.adjust_saturation, max(0.0, 1 - options.saturation), 1 + options.saturation),
            (photometric.adjust_hue, -options.hue, options.hue),
            (_adjust_log_gamma, -log_gamma, log_gamma),
        )
        self.operations = [(change, low, high) for change, low, high in operations if low < high]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draws what happens to all images of a sample."""
        order = [self.operations[number] for number in torch.randperm(len(self.operations)).tolist()]
        return {
            "changes": [(change, uniform(low, high)) for change, low, high in order],
            "sigma": uniform(*_BLUR_SIGMA) if uniform(0, 1) < self.blur else 0.0,
            "deviation": 255 * uniform(0, self.noise),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """The changed image, uint8 ``[C, H, W]``; targets stay as they are."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        pixels = np.ascontiguousarray(inpt.as_subclass(Tensor).permute(1, 2, 0).numpy())
        for change, amount in params["changes"]:
            pixels = change(pixels, amount)
        if params["sigma"]:
            pixels = photometric.gaussian_blur(pixels, params["sigma"])
        # OpenCV drops the axis of a single channel.
        changed = torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)
        if params["deviation"]:
            changed = (changed + params["deviation"] * torch.randn(changed.shape)).round().clamp(0, 255).byte()
        return tv_tensors.Image(changed)


def _adjust_log_gamma(pixels: UInt8Array, log_gamma: float) -> UInt8Array:
    table: UInt8Array = np.rint(255 * _LEVELS ** math.exp(log_gamma)).astype(np.uint8)
    return table[pixels]


def uniform(low: float, high: float) -> float:
    """A number between ``low`` and ``high`` from torch's global generator."""
    return low + (high - low) * float(torch.rand((), dtype=torch.float64))


def canvas_of(window: tuple[int, int], angle: float) -> tuple[int, int]:
    """The canvas from whose turned middle a window can be cut: the window itself where nothing is turned."""
    if angle == 0:
        return window
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    height, width = window
    # One pixel more on each side: bilinear interpolation looks that far.
    rows = max(0, math.ceil((height * cos + width * sin - height) / 2)) + 1
    columns = max(0, math.ceil((width * cos + height * sin - width) / 2)) + 1
    return height + 2 * rows, width + 2 * columns


def draw_foreground(inputs: list[Any]) -> tuple[int, int] | None:
    """Row and column of a pixel of the foreground; None where there is none.

    In a mask, that is a class that is neither 0 nor ``IGNORED``: first a class is drawn, then one of its pixels, so
    that small and rare defects are shown as often as large ones. Without a mask, it is a pixel of one of the boxes.

    Args:
        inputs: tensors of a sample, boxes as XYXY.

    Raises:
        ValueError: there is neither.
    """
    mask, boxes = _find(inputs, tv_tensors.Mask), _find(inputs, tv_tensors.BoundingBoxes)
    if mask is not None:
        mask = mask.as_subclass(Tensor)
        counts = torch.bincount(mask.flatten(), minlength=256)
        classes = [value for value in counts.nonzero().flatten().tolist() if value not in (0, IGNORED)]
        if not classes:
            return None
        places = (mask == classes[int(torch.randint(len(classes), ()))]).nonzero()
        row, column = places[int(torch.randint(len(places), ()))].tolist()
        return row, column
    if boxes is None:
        raise ValueError("foreground_crop_prob needs masks or boxes, and this dataset has neither: set it to 0")
    if len(boxes) == 0:
        return None
    left, top, right, bottom = boxes[int(torch.randint(len(boxes), ()))].tolist()
    return int(uniform(top, bottom)), int(uniform(left, right))


def zoom_of(size: tuple[int, int], image_size: tuple[int, int], resize: str) -> tuple[float, float]:
    """Factors on height and width by which a mode of resizing changes an image of this size."""
    if resize == "stretch":
        return image_size[0] / size[0], image_size[1] / size[1]
    factor = min(image_size) / min(size) if resize == "shorter_side" else 1.0
    return factor, factor


def _check_resize(image_size: tuple[int, int], resize: str) -> None:
    if min(image_size) < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if resize not in RESIZE_MODES:
        raise ValueError(f"unknown resize {resize!r}; allowed: {', '.join(RESIZE_MODES)}")


def _find(inputs: list[Any], kind: type) -> Any:
    """The tensor of exactly this kind, as depth is a kind of mask too; None where there is none."""
    return next((inpt for inpt in inputs if type(inpt) is kind), None)


def crop(inpt: Any, box: tuple[int, int, int, int]) -> Any:
    """Cuts out a box (top, left, height, width), which may reach beyond the edges."""
    top, left, height, width = box
    rows, columns = TF.get_size(inpt)
    padding = [max(-left, 0), max(-top, 0), max(left + width - columns, 0), max(top + height - rows, 0)]
    fill = _FILLS.get(type(inpt))
    if type(inpt) is tv_tensors.Image:
        fill = [round(255 * mean) for mean in channel_statistics(inpt.shape[0])[0]]
    padded = TF.pad(inpt, padding, fill=fill) if any(padding) else inpt
    return TF.crop(padded, top + padding[1], left + padding[0], height, width)


def _resize(inpt: Any, size: list[int]) -> Any:
    """Resizes: bicubic with antialiasing for images, the nearest pixel for targets."""
    if not isinstance(inpt, tv_tensors.Mask):
        return TF.resize(inpt, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    # Nearest-exact takes the pixel in the middle, as bicubic has it; the nearest of v2 would shift targets by half one.
    planes = TF.resize_image(inpt.as_subclass(Tensor)[None], size, interpolation=InterpolationMode.NEAREST_EXACT)
    return tv_tensors.wrap(planes[0], like=inpt)


def _begin(sample: TaskSample) -> dict[str, Any]:
    """A copy of a sample with what the steps need: `_Inside`, and boxes that are not clipped before the end."""
    image = tv_tensors.Image(sample["image"])
    size = image.shape[-2:]
    inside = _Inside(torch.ones(1, 1, dtype=torch.uint8).expand(*size))
    result: dict[str, Any] = {**sample, "image": image, "inside": inside}
    if "boxes" in sample:
        boxes = TF.convert_bounding_box_format(sample["boxes"], new_format="XYXY").as_subclass(Tensor).float()
        result["boxes"] = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size, clamping_mode=None)
    return result


def _finish(sample: dict[str, Any], min_box_visibility: float = 0.0) -> dict[str, Any]:
    """Plain tensors for the network, and boxes clipped; see `TaskSample`."""
    inside = sample.pop("inside").as_subclass(Tensor).bool()
    for key, value in sample.items():
        if isinstance(value, tv_tensors.Image):
            image = normalize(np.asarray(value.as_subclass(Tensor).permute(1, 2, 0)), value.shape[0])
            image[:, ~inside] = 0
            sample[key] = image
        elif isinstance(value, tv_tensors.Mask):
            kind = torch.float32 if isinstance(value, Depth) else torch.int64
            sample[key] = value.as_subclass(Tensor).to(kind).contiguous()
    if "boxes" in sample:
        whole = sample["boxes"]
        clipped = TF.clamp_bounding_boxes(whole, clamping_mode="hard").as_subclass(Tensor)
        sides, whole_sides = (boxes[:, 2:] - boxes[:, :2] for boxes in (clipped, whole.as_subclass(Tensor)))
        kept = torch.ones(len(clipped), dtype=torch.bool)
        if min_box_visibility > 0:
            kept = sides.prod(dim=1) >= min_box_visibility * whole_sides.prod(dim=1)
            kept &= (sides >= _MIN_BOX_SIDE).all(dim=1)
        sample["boxes"] = tv_tensors.BoundingBoxes(clipped[kept], format="XYXY", canvas_size=tuple(inside.shape))
        if "box_labels" in sample:
            sample["box_labels"] = sample["box_labels"][kept]
    return sample
