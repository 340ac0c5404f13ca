"""Where training crops lie, and how large and how turned the photo appears in them."""

import math
from typing import Protocol

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.task_geometry import Geometry, canvas_of
from dinov2.data.task_photometric import uniform
from dinov2.data.task_samples import TaskSample

RESIZE_MODES = ("stretch", "shorter_side", "original")

_LARGEST_ASPECT_CHANGE = 4 / 3  # of a random resized crop, as published
_TRIES = 10


class CroppingOptions(Protocol):
    """What is random about the place, the size and the direction of training crops."""

    @property
    def hflip(self) -> float:
        """Probability of a left-right flip."""

    @property
    def vflip(self) -> float:
        """Probability of a top-bottom flip."""

    @property
    def rotate90(self) -> float:
        """Probability of a turn by 90, 180 or 270 degrees; 0.75 makes all four positions equally likely."""

    @property
    def rotation(self) -> float:
        """Largest turn in degrees, either way, 0..180."""

    @property
    def scale_jitter(self) -> tuple[float, float]:
        """Smallest and largest zoom; its logarithm is uniform between them."""

    @property
    def random_resized_crop(self) -> tuple[float, float]:
        """Smallest and largest share of the photo's area in a crop; (0, 0) leaves random resized crops out."""

    @property
    def foreground_crop_prob(self) -> float:
        """Share of crops placed so that they show a pixel of a class other than 0, or of a box."""


class RandomCropping:
    """Draws a `Geometry` per photo, from torch's global generator alone.

    Args:
        options: what is random and how much.
        image_size: height and width of the crops, in pixels.
        resize: one of ``RESIZE_MODES``: the size at which photos appear before ``scale_jitter``.

    Raises:
        ValueError: for options out of range, or that exclude each other.
    """

    def __init__(self, options: CroppingOptions, image_size: tuple[int, int], resize: str) -> None:
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


def _check_options(options: CroppingOptions) -> None:
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
