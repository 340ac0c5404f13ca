"""Datasets that know something about every pixel: its class, or its depth."""

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.decoding import UnreadableImageError, decode_values, read_image_bytes

IGNORED = 255  # value of pixels without a class, in every mask that this library hands out


class BadTargetError(ValueError):
    """A mask or depth map that cannot be used: unreadable, of another size than its image, or with wrong values.

    Attributes:
        path: the file, as it was named.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        """Names the file and the reason."""
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadTargetError"], tuple[str, str]]:
        """Lets the error travel from a worker process."""
        return type(self), (self.path, self.reason)


class MaskSource(ABC):
    """A dataset that knows the class of every pixel.

    Attributes:
        mask_classes: names of the classes by value; where there is a background, it is value 0.
    """

    mask_classes: tuple[str, ...]

    @abstractmethod
    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        """Class of every pixel ``[H, W]``: below ``len(mask_classes)``, or `IGNORED`; of the size of the image.

        Raises:
            BadTargetError: when the file is missing, damaged, of another size, or holds other values.
        """


class DepthSource(ABC):
    """A dataset that knows the depth, or the height, at every pixel.

    Attributes:
        depth_unit: unit of the values, such as ``m`` or ``um``.
    """

    depth_unit: str

    @abstractmethod
    def get_depth(self, index: int) -> npt.NDArray[np.float32]:
        """Depth of every pixel ``[H, W]``, NaN where nothing was measured; of the size of the image.

        Raises:
            BadTargetError: when the file is missing, damaged, of another size, or holds other values.
        """


logger = logging.getLogger("dinov2")

BINARY_CLASSES = ("background", "defect")

_GREY_MODES = ("L", "I", "F")  # and those that begin with I;16


def read_class_mask(path: Path, size: tuple[int, int], num_classes: int) -> npt.NDArray[np.uint8]:
    """Reads a mask whose values are class indices.

    Palette images keep their indices, whatever the palette's colours; one-bit images hold 0 and 1; RGB is read where
    its three channels are equal.

    Args:
        path: 8-bit, 16-bit, one-bit or palette image.
        size: height and width of the image.
        num_classes: values are below it, or `IGNORED`.

    Returns:
        Class of every pixel ``[H, W]``.

    Raises:
        BadTargetError: when the file cannot be read, has another size, or holds another value.
    """
    mask = _read_mask(path, size)
    for value in _values(mask):
        if value >= num_classes and value != IGNORED:
            raise BadTargetError(
                path,
                f"holds the value {value}; allowed are 0 to {num_classes - 1} (the classes), and {IGNORED} (ignored)",
            )
    return mask


def read_binary_mask(path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Reads a mask of background and defect: 0 and 255, or 0 and 1.

    Args:
        path: as for `read_class_mask`.
        size: height and width of the image.

    Returns:
        0 on the background, 1 on defects ``[H, W]``.

    Raises:
        BadTargetError: when the file cannot be read, has another size, or holds another value.
    """
    mask = _read_mask(path, size)
    found = _values(mask)
    wrong = [value for value in found if value not in (0, 1, 255)]
    if wrong:
        raise BadTargetError(
            path,
            f"holds the value {wrong[0]}; a mask of background and defect has 0 and 255, or 0 and 1 (where values are "
            "class indices, the set must name its classes)",
        )
    if 1 in found and 255 in found:
        raise BadTargetError(path, "holds both 1 and 255; a mask of background and defect has 0 and 255, or 0 and 1")
    return np.minimum(mask, 1)


class DepthReader:
    """Reads the depth maps of one set.

    Attributes:
        num_empty: how many maps were read, in this process, in which nothing was measured. The first one is logged.
    """

    def __init__(self, *, scale: float = 1, invalid: float | None = None, allow_zero: bool = False) -> None:
        """Keeps how values are meant.

        Args:
            scale: depth = raw value x scale.
            invalid: raw value that means nothing was measured.
            allow_zero: whether a depth of 0 is one, as for heights above a table; else depths are above 0.
        """
        self.scale = scale
        self.invalid = invalid
        self.allow_zero = allow_zero
        self.num_empty = 0

    def read(self, path: Path, size: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Reads a depth map.

        Args:
            path: 8-bit, 16-bit, 32-bit or float image of one channel, or an array ``[H, W]`` as ``.npy``.
            size: height and width of the image.

        Returns:
            Depths ``[H, W]``, NaN where nothing was measured or the file holds infinity or not-a-number.

        Raises:
            BadTargetError: when the file cannot be read, has another size, or holds depths out of range.
        """
        raw = _load_array(path) if path.suffix.lower() == ".npy" else _grey_values(path, _decode(path))
        _check_size(path, raw.shape, size)
        known: npt.NDArray[np.bool_] = np.isfinite(raw)
        if self.invalid is not None:
            known &= raw != self.invalid
        if not known.any():
            if not self.num_empty:
                logger.warning("%s: nothing was measured in this depth map; further ones are not reported", path)
            self.num_empty += 1
            return np.full(size, np.nan, dtype=np.float32)
        with np.errstate(over="ignore"):  # what does not fit becomes infinity, which is refused below
            depth = raw.astype(np.float32) * np.float32(self.scale)
        lowest, highest = depth.min(where=known, initial=np.inf), depth.max(where=known, initial=-np.inf)
        if lowest < 0 or (lowest == 0 and not self.allow_zero):
            allowed = "0 or more" if self.allow_zero else "above 0"
            raise BadTargetError(
                path,
                f"holds the depth {lowest:g} (raw value x {self.scale:g}); it must be {allowed} where known",
            )
        if highest == np.inf:
            raise BadTargetError(path, "holds a depth that is too large for single precision")
        depth[~known] = np.nan
        return depth


def _read_mask(path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    image = _decode(path)
    values: npt.NDArray[Any]
    if image.mode in ("P", "1"):
        values = np.asarray(image)
    elif image.mode == "RGB":
        red, green, blue = image.split()
        values = np.asarray(red)
        if not (np.array_equal(values, np.asarray(green)) and np.array_equal(values, np.asarray(blue))):
            raise BadTargetError(path, "is a colour image; a mask has one channel (or a palette) with class indices")
    else:
        values = _grey_values(path, image)
    _check_size(path, values.shape, size)
    if values.dtype.kind == "f":
        raise BadTargetError(path, "holds floating-point numbers; a mask holds class indices")
    for value in (int(values.min()), int(values.max())):
        if not 0 <= value <= 255:
            raise BadTargetError(path, f"holds the value {value}; a mask has values of 0 to 255")
    return values.astype(np.uint8)


def _grey_values(path: Path, image: Image.Image) -> npt.NDArray[Any]:
    if image.mode not in _GREY_MODES and not image.mode.startswith("I;16"):
        raise BadTargetError(path, f"is of the kind {image.mode} (as Pillow names it); one channel of numbers is read")
    return np.asarray(image)


def _decode(path: Path) -> Image.Image:
    try:
        return decode_values(read_image_bytes(path), str(path))
    except UnreadableImageError as error:
        raise BadTargetError(path, f"cannot be read: {error.cause}") from error


def _load_array(path: Path) -> npt.NDArray[Any]:
    array: npt.NDArray[Any]
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError:
        raise BadTargetError(path, "cannot be read: no such file") from None
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise BadTargetError(path, f"cannot be read: {error}") from error
    if array.ndim != 2 or array.dtype.kind not in "iuf":
        raise BadTargetError(path, f"must be an array of numbers [height, width], found {array.dtype} {array.shape}")
    return array


def _check_size(path: Path, found: tuple[int, ...], size: tuple[int, int]) -> None:
    if found == size:
        return
    (height, width), (rows, columns) = found, size
    turned = "; it is turned: the image's EXIF orientation counts" if found == size[::-1] else ""
    raise BadTargetError(path, f"is {width}x{height} pixels (width x height), its image is {columns}x{rows}{turned}")


def _values(mask: npt.NDArray[np.uint8]) -> list[int]:
    """The distinct values, sorted; Pillow counts without a copy of the mask in larger integers."""
    return [value for value, count in enumerate(Image.fromarray(mask).histogram()) if count]
