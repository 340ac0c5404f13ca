"""What a photo and its targets go through before a supervised network sees them."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from dinov2.config.schema import leaf
from dinov2.data import photometric
from dinov2.data.augmentations import normalize
from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.decoding import MAX_PIXELS
from dinov2.data.photometric import UInt8Array
from dinov2.data.task_dataset import Depth, TaskSample
from dinov2.data.transforms import IMAGENET_MEAN

_MEAN_COLOUR = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
_SMALLEST_BOX_SIDE = 1.0  # pixels


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
    foreground_crop_prob: float = leaf(0.0, "Segmentation: chance that the crop shows a defect.", minimum=0, maximum=1)
    brightness: float = leaf(0.2, "Strength; 0 leaves it as it is.", minimum=0)
    contrast: float = leaf(0.2, "Strength.", minimum=0)
    saturation: float = leaf(0.0, "Strength.", minimum=0)
    hue: float = leaf(0.0, "Strength.", minimum=0, maximum=0.5)
    gamma: float = leaf(0.0, "Exponents from 1 / (1 + strength) to 1 + strength.", minimum=0)
    blur: float = leaf(0.0, "Chance of a Gaussian blur.", minimum=0, maximum=1)
    noise: float = leaf(0.0, "Largest standard deviation of Gaussian noise, for values of 0..1.", minimum=0, maximum=1)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A part of the photo, resized, turned about its middle, cut, turned by right angles and mirrored, in this order.

    All pairs are (height, width) in pixels; a pixel ``i`` covers ``[i, i + 1)``.

    Attributes:
        box: Top, left, height and width of the part. It may reach beyond the photo: images are filled with the mean
            colour of ImageNet there, masks with ``IGNORED``, depth with NaN.
        canvas: Size that the part is resized to; bicubic with antialiasing for images, the nearest pixel for targets.
        angle: Degrees that the canvas is turned by, counter-clockwise; bilinear for images.
        window: Size that is cut from the middle of the turned canvas. The canvas is larger by an even number of pixels,
            and large enough that no corner of the window leaves it.
        quarter_turns: Counter-clockwise right angles, 0..3; the result is ``output`` pixels large.
        horizontal_flip: Whether left and right are exchanged, at the end.
        vertical_flip: Whether top and bottom are exchanged, at the end.
    """

    box: tuple[int, int, int, int]
    canvas: tuple[int, int]
    window: tuple[int, int]
    angle: float = 0.0
    quarter_turns: int = 0
    horizontal_flip: bool = False
    vertical_flip: bool = False

    @property
    def output(self) -> tuple[int, int]:
        """Size of the result."""
        return self.window if self.quarter_turns % 2 == 0 else (self.window[1], self.window[0])

    def leaves(self, image_size: tuple[int, int]) -> bool:
        """Whether the box reaches beyond a photo of this size."""
        top, left, height, width = self.box
        return top < 0 or left < 0 or top + height > image_size[0] or left + width > image_size[1]

    def map_points(self, points: Tensor) -> Tensor:
        """Places ``[..., 2]`` (x, y) of the result that places of the photo come to lie at."""
        top, left, height, width = self.box
        x = (points[..., 0] - left) * (self.canvas[1] / width) - self.canvas[1] / 2
        y = (points[..., 1] - top) * (self.canvas[0] / height) - self.canvas[0] / 2
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        x, y = cos * x + sin * y, cos * y - sin * x  # rows count downwards
        for _ in range(self.quarter_turns):
            x, y = y, -x
        x = -x if self.horizontal_flip else x
        y = -y if self.vertical_flip else y
        return torch.stack([x + self.output[1] / 2, y + self.output[0] / 2], dim=-1)

    def shows(self, row: int, column: int) -> bool:
        """Whether the middle of this pixel of the photo lies in the result."""
        x, y = self.map_points(torch.tensor([column + 0.5, row + 0.5], dtype=torch.float64)).tolist()
        return bool(0 <= x < self.output[1] and 0 <= y < self.output[0])


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


def apply_geometry(sample: TaskSample, geometry: Geometry, *, min_box_visibility: float = 0.0) -> TaskSample:
    """The sample seen through a geometry; the one given is left as it is.

    Args:
        sample: as datasets give it.
        geometry: what happens to it.
        min_box_visibility: share, 0..1, of a box's area that must lie in the result. Boxes of which less is left, or
            that are thinner than a pixel then, go with their labels; with 0 all stay. All are clipped. A turned box
            becomes the upright box around it.
    """
    result = sample.copy()
    result["image"] = tv_tensors.Image(
        _move(sample["image"].as_subclass(Tensor), geometry, torch.tensor(_MEAN_COLOUR), smooth=True)
    )
    if "mask" in sample:
        result["mask"] = tv_tensors.Mask(_move_plane(sample["mask"], geometry, IGNORED))
    if "depth" in sample:
        result["depth"] = Depth(_move_plane(sample["depth"], geometry, math.nan))
    if "boxes" in sample:
        result["boxes"], kept = _move_boxes(sample["boxes"], geometry, min_box_visibility)
        if "box_labels" in sample:
            result["box_labels"] = sample["box_labels"][kept]
    return result


def inside_photo(image_size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Bool ``[h, w]``: which pixels of the result come from the photo, and not from beyond its edges."""
    photo = torch.ones(1, 1, 1, dtype=torch.uint8).expand(1, *image_size)
    return _move(photo, geometry, torch.zeros(1), smooth=False)[0].bool()


def _move_plane(plane: Tensor, geometry: Geometry, fill: float) -> Tensor:
    return _move(plane.as_subclass(Tensor)[None], geometry, torch.tensor([fill]), smooth=False)[0]


def _move(planes: Tensor, geometry: Geometry, fill: Tensor, *, smooth: bool) -> Tensor:
    """``[C, H, W]`` to ``[C, h, w]``; ``fill [C]`` stands beyond the edges."""
    planes = _cut(planes, geometry.box, fill)
    if planes.shape[-2:] != geometry.canvas:
        # Nearest-exact takes the pixel in the middle, as bicubic has it; plain nearest would shift targets by half one.
        mode = InterpolationMode.BICUBIC if smooth else InterpolationMode.NEAREST_EXACT
        planes = TF.resize_image(planes, list(geometry.canvas), interpolation=mode, antialias=smooth)
    if geometry.angle != 0:
        mode = InterpolationMode.BILINEAR if smooth else InterpolationMode.NEAREST
        planes = TF.rotate_image(planes, geometry.angle, interpolation=mode)
    height, width = geometry.window
    top, left = (planes.shape[-2] - height) // 2, (planes.shape[-1] - width) // 2
    planes = planes[..., top : top + height, left : left + width]
    planes = torch.rot90(planes, geometry.quarter_turns, dims=(-2, -1)) if geometry.quarter_turns else planes
    flipped = [axis for axis, flip in ((-1, geometry.horizontal_flip), (-2, geometry.vertical_flip)) if flip]
    return planes.flip(flipped).contiguous()


def _cut(planes: Tensor, box: tuple[int, int, int, int], fill: Tensor) -> Tensor:
    top, left, height, width = box
    inside = planes[..., max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)]
    if inside.shape[-2:] == (height, width):
        return inside
    cut = fill.to(planes.dtype)[:, None, None].repeat(1, height, width)
    first_row, first_column = max(-top, 0), max(-left, 0)
    cut[:, first_row : first_row + inside.shape[-2], first_column : first_column + inside.shape[-1]] = inside
    return cut


def _move_boxes(boxes: Tensor, geometry: Geometry, min_visibility: float) -> tuple[Tensor, Tensor]:
    """Boxes of the result, and which of the boxes given they are."""
    corners = TF.convert_bounding_box_format(boxes, new_format=tv_tensors.BoundingBoxFormat.XYXY)
    corners = corners.as_subclass(Tensor).float()
    moved = geometry.map_points(corners[:, [[0, 1], [2, 1], [2, 3], [0, 3]]])
    whole = torch.cat([moved.amin(dim=1), moved.amax(dim=1)], dim=1)
    height, width = geometry.output
    clipped = whole.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    kept = torch.ones(len(clipped), dtype=torch.bool)
    if min_visibility > 0:
        sides, whole_sides = clipped[:, 2:] - clipped[:, :2], whole[:, 2:] - whole[:, :2]
        kept = sides.prod(dim=1) >= min_visibility * whole_sides.prod(dim=1)
        kept &= (sides >= _SMALLEST_BOX_SIDE).all(dim=1)
    format_ = tv_tensors.BoundingBoxFormat.XYXY
    return tv_tensors.BoundingBoxes(clipped[kept], format=format_, canvas_size=geometry.output), kept


_BLUR_SIGMA = (0.1, 2.0)  # pixels
_LEVELS = np.arange(256, dtype=np.float64) / 255


class PhotometricJitter:
    """Changes a photo at random: brightness, contrast, saturation, hue and gamma in any order, then blur, then noise.

    Draws from torch's global generator alone.

    Args:
        options: strengths.

    Raises:
        ValueError: for a strength out of range.
    """

    def __init__(self, options: AugmentationOptions) -> None:
        for name in ("brightness", "contrast", "saturation", "gamma", "noise"):
            if getattr(options, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(options, name)}")
        if not 0 <= options.hue <= 0.5:
            raise ValueError(f"hue must lie in 0..0.5, got {options.hue}")
        if not 0 <= options.blur <= 1:
            raise ValueError(f"blur is a probability and must lie in 0..1, got {options.blur}")
        low_gamma = -math.log1p(options.gamma)
        self.blur, self.noise = options.blur, options.noise
        self._operations = [
            (change, low, high)
            for change, low, high in (
                (photometric.adjust_brightness, max(0.0, 1 - options.brightness), 1 + options.brightness),
                (photometric.adjust_contrast, max(0.0, 1 - options.contrast), 1 + options.contrast),
                (photometric.adjust_saturation, max(0.0, 1 - options.saturation), 1 + options.saturation),
                (photometric.adjust_hue, -options.hue, options.hue),
                (_adjust_log_gamma, low_gamma, -low_gamma),
            )
            if low < high
        ]

    def __call__(self, image: Tensor) -> Tensor:
        """Maps uint8 ``[3, H, W]`` to the same kind."""
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        for number in torch.randperm(len(self._operations)).tolist():
            change, low, high = self._operations[number]
            pixels = change(pixels, uniform(low, high))
        if self.blur > uniform(0, 1):
            pixels = photometric.gaussian_blur(pixels, uniform(*_BLUR_SIGMA))
        changed = torch.from_numpy(pixels).permute(2, 0, 1)
        if self.noise > 0:
            deviation = 255 * uniform(0, self.noise)
            changed = (changed + deviation * torch.randn(changed.shape)).round().clamp(0, 255).to(torch.uint8)
        return changed


def uniform(low: float, high: float) -> float:
    """A number between ``low`` and ``high`` from torch's global generator."""
    return low + (high - low) * float(torch.rand((), dtype=torch.float64))


def _adjust_log_gamma(pixels: UInt8Array, log_gamma: float) -> UInt8Array:
    table: UInt8Array = np.rint(255 * _LEVELS ** math.exp(log_gamma)).astype(np.uint8)
    return table[pixels]


RESIZE_MODES = ("stretch", "shorter_side", "original")

_LARGEST_ASPECT_CHANGE = 4 / 3  # of a random resized crop, as published
_TRIES = 10


class RandomCropping:
    """Draws a `Geometry` per photo, from torch's global generator alone.

    Args:
        options: what is random and how much.
        image_size: height and width of the crops, in pixels.
        resize: one of ``RESIZE_MODES``: the size at which photos appear before ``scale_jitter``.

    Raises:
        ValueError: for options out of range, or that exclude each other.
    """

    def __init__(self, options: AugmentationOptions, image_size: tuple[int, int], resize: str) -> None:
        check_resize(image_size, resize)
        _check_options(options)
        self.options = options
        self.image_size = image_size
        self.resize = resize

    def draw(self, sample: TaskSample) -> Geometry:
        """Draws the geometry of a sample; its image, mask and boxes are looked at.

        Raises:
            ValueError: crops should show foreground, but the sample has neither a mask nor boxes.
        """
        options = self.options
        height, width = sample["image"].shape[-2:]
        focus = draw_foreground(sample) if uniform(0, 1) < options.foreground_crop_prob else None
        turns = int(torch.randint(1, 4, ())) if uniform(0, 1) < options.rotate90 else 0
        window = self.image_size if turns % 2 == 0 else (self.image_size[1], self.image_size[0])
        extent = self._draw_extent((height, width), window)
        angle = uniform(-options.rotation, options.rotation) if options.rotation else 0.0
        flips = uniform(0, 1) < options.hflip, uniform(0, 1) < options.vflip
        for _ in range(_TRIES):
            top = _draw_start(height, extent[0], None if focus is None else focus[0])
            left = _draw_start(width, extent[1], None if focus is None else focus[1])
            middle = top + extent[0] / 2, left + extent[1] / 2
            geometry = place_window(window, extent, middle, angle, turns, flips)
            if focus is None or geometry.shows(*focus):
                return geometry
        assert focus is not None
        # A turned window near a corner of the photo: rather show what lies beyond the corner than miss the pixel.
        return place_window(window, extent, (focus[0] + 0.5, focus[1] + 0.5), angle, turns, flips)

    def _draw_extent(self, size: tuple[int, int], window: tuple[int, int]) -> tuple[float, float]:
        """Height and width, in pixels of the photo, of what a window shows."""
        zoom = zoom_of(size, window, self.resize)
        extent = window[0] / zoom[0], window[1] / zoom[1]
        if not any(self.options.random_resized_crop):
            low, high = self.options.scale_jitter
            factor = math.exp(uniform(math.log(low), math.log(high)))
            return extent[0] / factor, extent[1] / factor
        largest = math.log(_LARGEST_ASPECT_CHANGE)
        for _ in range(_TRIES):
            area = size[0] * size[1] * uniform(*self.options.random_resized_crop)
            aspect = extent[1] / extent[0] * math.exp(uniform(-largest, largest))
            height, width = math.sqrt(area / aspect), math.sqrt(area * aspect)
            if height <= size[0] and width <= size[1]:
                return height, width
        return min(height, size[0]), min(width, size[1])


def place_window(
    window: tuple[int, int],
    extent: tuple[float, float],
    middle: tuple[float, float],
    angle: float = 0.0,
    quarter_turns: int = 0,
    flips: tuple[bool, bool] = (False, False),
) -> Geometry:
    """The geometry of a window that shows a part of the photo.

    Args:
        window: height and width in pixels of the result, before quarter turns.
        extent: height and width of what it shows, in pixels of the photo; rounded to whole ones.
        middle: row and column of its middle in the photo.
        angle: see `Geometry`, like the following.
        quarter_turns: counter-clockwise.
        flips: horizontal and vertical.
    """
    canvas = canvas_of(window, angle)
    height = max(1, round(canvas[0] * extent[0] / window[0]))
    width = max(1, round(canvas[1] * extent[1] / window[1]))
    return Geometry(
        box=(round(middle[0] - height / 2), round(middle[1] - width / 2), height, width),
        canvas=canvas,
        window=window,
        angle=angle,
        quarter_turns=quarter_turns,
        horizontal_flip=flips[0],
        vertical_flip=flips[1],
    )


def draw_foreground(sample: TaskSample) -> tuple[int, int] | None:
    """Row and column of a pixel of the foreground; None where there is none.

    In a mask, that is a class that is neither 0 nor ``IGNORED``: first a class is drawn, then one of its pixels, so
    that small and rare defects are shown as often as large ones. Without a mask, it is a pixel of one of the boxes.

    Raises:
        ValueError: the sample has neither.
    """
    if "mask" in sample:
        mask = sample["mask"].as_subclass(Tensor)
        counts = torch.bincount(mask.flatten(), minlength=256)
        classes = [value for value in counts.nonzero().flatten().tolist() if value not in (0, IGNORED)]
        if not classes:
            return None
        places = (mask == classes[int(torch.randint(len(classes), ()))]).nonzero()
        row, column = places[int(torch.randint(len(places), ()))].tolist()
        return row, column
    if "boxes" not in sample:
        raise ValueError("foreground_crop_prob needs masks or boxes, and this dataset has neither: set it to 0")
    if len(sample["boxes"]) == 0:
        return None
    corners = TF.convert_bounding_box_format(sample["boxes"], new_format=tv_tensors.BoundingBoxFormat.XYXY)
    left, top, right, bottom = corners[int(torch.randint(len(corners), ()))].tolist()
    return int(uniform(top, bottom)), int(uniform(left, right))


def zoom_of(size: tuple[int, int], image_size: tuple[int, int], resize: str) -> tuple[float, float]:
    """Factors on height and width by which a mode of resizing changes a photo of this size."""
    if resize == "stretch":
        return image_size[0] / size[0], image_size[1] / size[1]
    factor = min(image_size) / min(size) if resize == "shorter_side" else 1.0
    return factor, factor


def check_resize(image_size: tuple[int, int], resize: str) -> None:
    """Raises ValueError for a size below 1 or an unknown mode."""
    if min(image_size) < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if resize not in RESIZE_MODES:
        raise ValueError(f"unknown resize {resize!r}; allowed: {', '.join(RESIZE_MODES)}")


def _draw_start(whole: int, part: float, focus: int | None) -> float:
    """Where a window begins along one axis: inside the photo, or around it where the photo is smaller."""
    low, high = min(0.0, whole - part), max(0.0, whole - part)
    if focus is not None and part < whole:
        low, high = max(low, focus + 1 - part), min(high, float(focus))
        if low > high:  # the window is narrower than a pixel
            return focus + 0.5 - part / 2
    return uniform(low, high)


def _check_options(options: AugmentationOptions) -> None:
    for name in ("hflip", "vflip", "rotate90", "foreground_crop_prob"):
        if not 0 <= getattr(options, name) <= 1:
            raise ValueError(f"{name} is a probability and must lie in 0..1, got {getattr(options, name)}")
    if not 0 <= options.rotation <= 180:
        raise ValueError(f"rotation must lie in 0..180 degrees, got {options.rotation}")
    low, high = options.scale_jitter
    if not 0 < low <= high:
        raise ValueError(f"scale_jitter must satisfy 0 < smallest <= largest, got {(low, high)}")
    smallest, largest = options.random_resized_crop
    if smallest == largest == 0:
        return
    if not 0 < smallest <= largest <= 1:
        raise ValueError(
            "random_resized_crop must satisfy 0 < smallest <= largest <= 1, or be (0, 0) for none, got "
            f"{(smallest, largest)}"
        )
    if low != 1 or high != 1:
        raise ValueError(
            f"random_resized_crop={(smallest, largest)} draws the zoom by itself: scale_jitter must be (1, 1), got "
            f"{(low, high)}"
        )


MIN_BOX_VISIBILITY = 0.25

TaskTransform = Callable[[TaskSample], TaskSample]


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
