"""What a preprocessing step is, and what it is given: an image with the channels and regions that steps before made."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import numpy.typing as npt

from dinov2.config import check_value

Pixels = npt.NDArray[Any]  # uint8 or uint16, [H, W] or [H, W, C]

_LEVELS = (np.uint8, np.uint16)


@dataclass(frozen=True, eq=False)
class Placement:
    """Where what a chain gave lies in the image that it was given, and what of it counts.

    Attributes:
        origin: row and column of its first pixel.
        size: its height and width.
        full_size: height and width of the image.
        valid: which of its pixels count, bool ``[h, w]``; None where all do.
    """

    origin: tuple[int, int]
    size: tuple[int, int]
    full_size: tuple[int, int]
    valid: npt.NDArray[np.bool_] | None = None

    def to_image_points(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Points ``[N, 2]``, x before y, in the coordinates of the image."""
        moved: npt.NDArray[np.float64] = np.asarray(points, dtype=np.float64) + self.origin[::-1]
        return moved

    def to_image_map(self, values: npt.NDArray[Any], fill: float = 0) -> npt.NDArray[Any]:
        """A map ``[h, w, ...]`` laid into the size of the image.

        Args:
            values: a mask or a map of scores.
            fill: value outside, and of pixels that do not count.

        Raises:
            ValueError: it has another size.
        """
        if values.shape[:2] != self.size:
            raise ValueError(f"a map of {values.shape[:2]} does not fit an image of {self.size}")
        whole = np.full((*self.full_size, *values.shape[2:]), fill, dtype=values.dtype)
        top, left = self.origin
        inside = whole[top : top + values.shape[0], left : left + values.shape[1]]
        inside[...] = values
        if self.valid is not None:
            inside[~self.valid] = fill
        return whole

    def share_that_counts(self, values: npt.NDArray[Any]) -> float:
        """Highest value, on pixels that count, of a map ``[h, w]`` from 0 up, as a share of its highest."""
        highest = float(values.max())
        if self.valid is None or not highest:
            return 1.0
        return float(values[self.valid].max(initial=0)) / highest

    def counts_at(self, points: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether points ``[N, 2]`` of what the chain gave, x before y, lie on pixels that count."""
        if self.valid is None:
            return np.ones(len(np.asarray(points)), dtype=np.bool_)
        return points_in(self.valid, points)


def points_in(mask: npt.NDArray[np.bool_], points: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Whether points ``[N, 2]``, x before y, lie in a mask ``[H, W]``; of points beyond it the nearest pixel counts."""
    columns, rows = np.floor(np.asarray(points, dtype=np.float64).reshape(-1, 2)).astype(np.int64).T
    found: npt.NDArray[np.bool_] = mask[rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)]
    return found


@dataclass(frozen=True)
class Frame:
    """An image on its way through a chain.

    Attributes:
        image: ``[H, W]`` or ``[H, W, C]``, uint8 or uint16, black is 0 and white the dtype's largest value.
        channels: maps beside the image, each ``[H, W]`` of its dtype, in the order in which steps made them.
        labels: number of the region that a pixel belongs to, ``[H, W]``, int32, 0 for none; None before any step has
            looked for regions.
        origin: row and column of the first pixel in the image that the chain was given.
        full_size: height and width of that image.
        valid: which pixels count, bool ``[H, W]``; None where all do.
        name: path of the image; empty where it is not known.
    """

    image: Pixels
    channels: tuple[Pixels, ...] = ()
    labels: npt.NDArray[np.int32] | None = None
    origin: tuple[int, int] = (0, 0)
    full_size: tuple[int, int] = (0, 0)
    valid: npt.NDArray[np.bool_] | None = None
    name: str = ""

    @classmethod
    def of(cls, image: Pixels, name: str = "") -> "Frame":
        """An image before the first step.

        Raises:
            ValueError: it is no image of 8 or 16 bits.
        """
        fault = image_fault(image)
        if fault:
            raise ValueError(fault)
        return cls(image, full_size=(image.shape[0], image.shape[1]), name=name)

    @property
    def stacked(self) -> Pixels:
        """The image with the channels that were made beside it, ``[H, W]`` or ``[H, W, C]``."""
        return np.dstack([self.image, *self.channels]) if self.channels else self.image

    @property
    def placement(self) -> Placement | None:
        """Where it lies in the image that the chain was given; None where it is the whole of it, and all counts."""
        found = self._placement
        return None if found.size == self.full_size and self.valid is None else found

    def to_image_points(self, points: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Points ``[N, 2]``, x before y, of what the chain gave, in the coordinates of the image that it was given."""
        return self._placement.to_image_points(points)

    def to_image_map(self, values: npt.NDArray[Any], fill: float = 0) -> npt.NDArray[Any]:
        """A map ``[h, w, ...]`` in the size of ``image``, laid into the size of the image that the chain was given.

        Raises:
            ValueError: it has another size.
        """
        return self._placement.to_image_map(values, fill)

    @property
    def _placement(self) -> Placement:
        return Placement(self.origin, (self.image.shape[0], self.image.shape[1]), self.full_size, self.valid)


@dataclass(frozen=True)
class Step:
    """A step of a chain: deterministic, with parameters that are checked when it is made.

    Attributes:
        name: in YAML.
        changes_channels: whether the image may have another number of channels afterwards.
        changes_dtype: whether it may have another number of bits.
        crops: whether it may be smaller.
    """

    name: ClassVar[str]
    changes_channels: ClassVar[bool] = False
    changes_dtype: ClassVar[bool] = False
    crops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            where = f"{self.name}.{field.name}"
            value = check_value(getattr(self, field.name), hints[field.name], field, where)
            object.__setattr__(self, field.name, value)
        self.check()

    def check(self) -> None:
        """Checks parameters that must agree with one another.

        Raises:
            ConfigError: naming them and their values.
        """

    @property
    def files(self) -> tuple[str, ...]:
        """Files that the step reads beside the image."""
        return ()

    def run(self, frame: Frame) -> Frame:
        """What the step makes of an image; the frame that it is given stays as it is."""
        return dataclasses.replace(frame, image=self.apply(frame.image))

    def apply(self, image: Pixels) -> Pixels:
        """The image after the step, for steps that look at nothing else; the image that it is given stays."""
        raise NotImplementedError(f"{type(self).__name__} has neither run nor apply")

    def to_values(self) -> Mapping[str, Any]:
        """The step as YAML holds it: a mapping of its name to all its parameters."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {self.name: {name: _plain(value) for name, value in values.items()}}


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def image_fault(image: Pixels) -> str:
    """What keeps an array from being an image of a chain, in a sentence; empty for one that is."""
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        return f"{np.count_nonzero(~np.isfinite(image))} of {image.size} values are not-a-number or infinite"
    if image.dtype not in _LEVELS:
        return f"values must be uint8 or uint16, found {image.dtype}"
    if image.ndim not in (2, 3) or 0 in image.shape:
        return f"an image must be [H, W] or [H, W, C], and not empty, found {list(image.shape)}"
    return ""


def top_of(image: Pixels) -> int:
    """The value of white: 255 or 65535."""
    return int(np.iinfo(image.dtype).max)


def as_unit(image: Pixels) -> npt.NDArray[np.float32]:
    """Levels as numbers from 0 to 1."""
    return (image / np.float32(top_of(image))).astype(np.float32)


def as_levels(values: npt.NDArray[Any], dtype: "np.dtype[Any]") -> Pixels:
    """Numbers from 0 to 1 as levels of a dtype, rounded; what lies outside is cut off.

    Raises:
        ValueError: some are not-a-number.
    """
    if np.isnan(values).any():
        raise ValueError(f"{np.count_nonzero(np.isnan(values))} of {values.size} values are not-a-number")
    levels: Pixels = np.rint(np.clip(values, 0, 1).astype(np.float64) * np.iinfo(dtype).max).astype(dtype)
    return levels


def luminance(image: Pixels) -> npt.NDArray[np.float32]:
    """Brightness from 0 to 1, ``[H, W]``: the weights of ITU-R BT.601 for three channels, the mean of others."""
    values = as_unit(image)
    if values.ndim == 2:
        return values
    if values.shape[2] == 3:
        return cv2.cvtColor(values, cv2.COLOR_RGB2GRAY).astype(np.float32, copy=False)
    mean: npt.NDArray[np.float32] = values.mean(axis=2)
    return mean
