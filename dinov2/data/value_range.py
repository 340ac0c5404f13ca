"""Values of more than 8 bits: which of them become black and white, by one range for all images of a set."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

logger = logging.getLogger("dinov2")

MIN_BITS, MAX_BITS = 8, 16

_NATURAL_TOPS = (1, 255, 65535)  # white by convention, where values begin at 0
_MIN_FILLED = 1 / 16  # of such a range; values that span less of it are another quantity
_OUTLIERS = 0.1  # per cent of the values at either end
_HEADROOM = 0.1  # of the span between them: what lies no further off is no outlier
_BAND = 2**18  # pixels that are converted at once
_SAMPLE = 2**18  # values of an image that tell its range


@dataclass(frozen=True)
class ValueRange:
    """Values of files that become black and white; what lies outside is cut off.

    It is about files of more than 8 bits, with a sign, or of floating-point numbers; 8-bit files are as they are. A set
    has one range, which its dataset string names (``range=LO,HI`` or ``bits=12``) or which is estimated once over the
    images of training. From there it goes wherever images of the run are read: into the dataset strings of
    ``config.yaml``, into every checkpoint, and into teachers and ``best.pth`` as ``value_range``.

    Attributes:
        low: becomes black.
        high: becomes white; above ``low``.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range of values is LO,HI with LO below HI, both finite, found {self}")

    def __str__(self) -> str:
        """``LO,HI``, which `parse` reads back without loss."""
        return ",".join(str(int(end)) if float(end).is_integer() else repr(float(end)) for end in (self.low, self.high))

    @classmethod
    def parse(cls, text: str) -> "ValueRange":
        """Reads ``LO,HI``.

        Raises:
            ValueError: for anything else.
        """
        try:
            low, high = (float(end) for end in text.split(","))
        except ValueError:
            raise ValueError(f"a range of values is LO,HI, such as 0,4095 or -0.5,2, found {text!r}") from None
        return cls(low, high)

    @classmethod
    def of_bits(cls, bits: int) -> "ValueRange":
        """All values of so many bits, as cameras store 10, 12 or 14 of them in 16.

        Raises:
            ValueError: outside of 8 to 16.
        """
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"bits must be {MIN_BITS} to {MAX_BITS}, found {bits}")
        return cls(0, 2**bits - 1)

    @classmethod
    def of(cls, ends: Sequence[float] | None) -> "ValueRange | None":
        """From what checkpoints hold: two numbers, or nothing."""
        return cls(float(ends[0]), float(ends[1])) if ends else None

    @property
    def ends(self) -> list[float]:
        """For checkpoints, see `of`."""
        return [float(self.low), float(self.high)]


def robust_range(values: npt.NDArray[np.generic]) -> ValueRange:
    """The range of values whose file does not say what is white.

    0 to 1, 0 to 255 or 0 to 65535, where all but a thousandth at either end lie inside and span a sixteenth of it at
    least; else what these span, or all values where none is further off than a tenth of that. A value that fills more
    than a thousandth, and lies more than twice as far off as all others span, stands for what was not measured (-9999,
    say), and does not count.

    Args:
        values: of one image or of several, in any shape; infinity and not-a-number do not count.
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    if not finite.size:
        return ValueRange(0, 1)
    found = _natural_range(finite)
    if found is None:
        finite = _without_fill_values(finite)
        found = _natural_range(finite) or _spanned_range(finite)
    return found


def _natural_range(values: npt.NDArray[np.float64]) -> ValueRange | None:
    low, high = np.percentile(values, (_OUTLIERS, 100 - _OUTLIERS))
    for top in _NATURAL_TOPS:
        if low >= 0 and high <= top and high - low >= top * _MIN_FILLED:
            return ValueRange(0, top)
    return None


def _without_fill_values(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    for extreme in (values.min(), values.max()):
        others = values[values != extreme]
        is_frequent = others.size and values.size - others.size > values.size * _OUTLIERS / 100
        if is_frequent and np.abs(others - extreme).min() > 2 * np.ptp(others) > 0:
            values = others
    return values


def _spanned_range(values: npt.NDArray[np.float64]) -> ValueRange:
    low, high = (float(end) for end in np.percentile(values, (_OUTLIERS, 100 - _OUTLIERS)))
    smallest, largest = float(values.min()), float(values.max())
    if high == low:  # all but a few are the same
        low, high = smallest, largest
    room = (high - low) * _HEADROOM
    low = smallest if smallest >= low - room else low
    high = largest if largest <= high + room else high
    if high > low:
        return ValueRange(low, high)
    return (
        ValueRange(low, low + 1)
        if low < 0
        else ValueRange(0, next((top for top in _NATURAL_TOPS if low <= top), 2 * low))
    )


@dataclass(frozen=True)
class Values:
    """Numbers of an image of more than 8 bits, with a sign, or of floating-point numbers.

    Attributes:
        size: width and height.
        rows: the values from one row to before another, ``[h, W]`` or ``[h, W, C]``.
        full: the range that the kind of file stands for; None where it does not say what is white.
        unit: how many of these values are one of the file's, where Pillow has scaled them.
        white_is_zero: whether low values are white.
        opaque: value of no transparency, where there are four channels.
        are_upright: whether the orientation is applied already.
    """

    size: tuple[int, int]
    rows: Callable[[int, int], npt.NDArray[Any]]
    full: ValueRange | None = None
    unit: float = 1.0
    white_is_zero: bool = False
    opaque: float = 1.0
    are_upright: bool = False

    @classmethod
    def of_array(cls, array: npt.NDArray[Any], *, are_upright: bool = False) -> "Values":
        """From all values ``[H, W]`` or ``[H, W, C]``, C 3 or 4."""
        return cls(
            size=(array.shape[1], array.shape[0]),
            rows=lambda top, bottom: array[top:bottom],
            full=ValueRange.of_bits(16) if array.dtype == np.uint16 else None,
            opaque=1.0 if array.dtype.kind == "f" else float(np.iinfo(array.dtype).max),
            are_upright=are_upright,
        )

    def sample(self) -> npt.NDArray[Any]:
        """Some of them in the file's unit, evenly spread, without transparency."""
        width, height = self.size
        step = max(1, math.ceil(math.sqrt(width * height / _SAMPLE)))
        rows = step * max(1, _BAND // (width * step))
        bands = [self.rows(top, min(top + rows, height))[::step, ::step] for top in range(0, height, rows)]
        values = np.concatenate([band[..., :3].ravel() if band.ndim > 2 else band.ravel() for band in bands])
        return values if self.unit == 1 else values / self.unit

    def as_image(self) -> Image.Image:
        """As an image of the mode ``I`` or ``F``.

        Raises:
            ValueError: there are several channels.
        """
        array = self.rows(0, self.size[1])
        if array.ndim > 2:
            raise ValueError(f"{array.shape[2]} channels of {array.dtype}, where one channel of numbers is read")
        fits = array.dtype.kind in "iu" and int(array.min()) >= -(2**31) and int(array.max()) < 2**31
        return Image.fromarray(array.astype(np.int32 if fits else np.float32))

    def to_levels(self, value_range: ValueRange | None) -> npt.NDArray[np.uint16]:
        """As levels of 16 bits, ``[H, W]`` or ``[H, W, 3]``; transparency is laid on white.

        Args:
            value_range: of the set; None for that of the kind of file.

        Raises:
            ValueError: neither is known.
        """
        span = value_range or self.full
        if span is None:
            raise ValueError("it does not say which values are black and white; name them by a range LO,HI")
        low, high = span.low * self.unit, span.high * self.unit
        found = self.rows(0, self.size[1])
        colours = found[..., :3] if found.ndim > 2 else found
        scaled = _unit_share(colours, low, high)
        scaled = 1 - scaled if self.white_is_zero else scaled
        if found.ndim > 2 and found.shape[2] == 4:
            opacity = _unit_share(found[..., 3:], 0, self.opaque)
            scaled = scaled * opacity + (1 - opacity)
        levels: npt.NDArray[np.uint16] = np.rint(scaled * 65535).astype(np.uint16)
        return levels

    def to_rgb(self, value_range: ValueRange | None, name: str) -> Image.Image:
        """As levels, by a range: that of the set, of the kind of file, or of these values, of which a warning says so.

        Args:
            value_range: of the set; None where it is not known.
            name: of the image.
        """
        span = value_range or self.full
        if span is None:
            span = robust_range(self.sample())
            warn_once(
                "own range",
                "%s does not say which values are black and white, and no range of its set is known: it is scaled by "
                "its own (%s), and so are all that are like it, so that they cannot be compared. Name a range for "
                "all: range=LO,HI in the dataset string",
                *(name, span),
            )
        low, high = span.low * self.unit, span.high * self.unit
        table = _levels(np.arange(65536), low, high)  # of values of 16 bits, which are looked up

        def convert(top: int, bottom: int) -> Image.Image:
            found = self.rows(top, bottom)
            colours = found[..., :3] if found.ndim > 2 else found
            is_short = colours.dtype.kind == "u" and colours.dtype.itemsize == 2
            levels = np.take(table, colours) if is_short else _levels(colours, low, high)
            levels = 255 - levels if self.white_is_zero else levels
            if found.ndim > 2 and found.shape[2] == 4:
                return on_white(Image.fromarray(np.dstack([levels, _levels(found[..., 3], 0, self.opaque)])))
            return Image.fromarray(levels).convert("RGB")

        return in_bands(self.size, convert)


def in_bands(size: tuple[int, int], convert: Callable[[int, int], Image.Image]) -> Image.Image:
    """RGB of rows that are converted some at a time, so that what lies between takes little memory.

    Args:
        size: width and height.
        convert: gives the rows from one to before another.
    """
    width, height = size
    rows = max(1, _BAND // width)
    if rows >= height:
        return convert(0, height)
    rgb = Image.new("RGB", size)
    for top in range(0, height, rows):
        rgb.paste(convert(top, min(top + rows, height)), (0, top))
    return rgb


def on_white(image: Image.Image) -> Image.Image:
    """RGB of an image with transparency."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _levels(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Maps ``low`` to 0 and ``high`` to 255, rounding; clips; not-a-number becomes 0."""
    scaled: npt.NDArray[np.float64] = (values.astype(np.float64) - low) * 255 / (high - low)
    levels: npt.NDArray[np.float64] = np.nan_to_num(scaled, nan=0, posinf=255, neginf=0)
    rounded: npt.NDArray[np.float64] = np.rint(levels.clip(0, 255))
    return rounded.astype(np.uint8)


def _unit_share(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.float64]:
    """Maps ``low`` to 0 and ``high`` to 1; clips; not-a-number becomes 0."""
    share: npt.NDArray[np.float64] = (values.astype(np.float64) - low) / (high - low)
    clipped: npt.NDArray[np.float64] = np.nan_to_num(share, nan=0, posinf=1, neginf=0).clip(0, 1)
    return clipped


@functools.cache
def _reported() -> set[str]:
    """What this process has warned of."""
    return set()


def warn_once(what: str, message: str, *arguments: object) -> None:
    """Logs a warning, once per process for each kind ``what``."""
    if what not in _reported():
        _reported().add(what)
        logger.warning(message, *arguments)
