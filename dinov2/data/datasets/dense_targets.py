"""Datasets that know something about every pixel: its class, or its depth."""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.decoding import decode_values
from dinov2.data.reading import UnreadableImageError, find_file, read_image_bytes

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
        mask_values: what values in the files mean, as it was given; empty where they mean what they usually do.
    """

    mask_classes: tuple[str, ...]
    mask_values: str = ""

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
_MASKS_LOOKED_AT = 300  # to find out what 255 means
_MOST_LEVEL = 65535  # of files with whole numbers
_UNKNOWN = -1  # in the place of a class
_MOST_VALUES = 8  # that an error lists

_GREY_MODES = ("L", "I", "F")  # and those that begin with I;16


class MaskReader:
    """Reads the masks of one set: which value in the files means which class."""

    def __init__(self, num_classes: int, *, named: bool, values: "MaskValues | None" = None) -> None:
        """Keeps how values are meant.

        Args:
            num_classes: of the set.
            named: whether the set names its classes; without, masks have the conventions of `read_binary_mask`.
            values: what values mean where these are not the classes themselves.

        Raises:
            ValueError: when ``values`` are of another number of classes.
        """
        if values is not None and len(values.classes) != num_classes:
            raise ValueError(
                f"{values} has values for {len(values.classes)} classes, the set has {num_classes}: give the value of "
                "each class, in order and divided by commas (0,1+2 joins two values in one class)"
            )
        self.num_classes = num_classes
        self.named = named
        self.values = values
        self._ignores = False  # whether 255 is known to mean ignored

    def read(self, path: Path, size: tuple[int, int], others: Iterable[Path]) -> npt.NDArray[np.uint8]:
        """Reads a mask.

        Args:
            path: as for `read_class_mask`.
            size: height and width of the image.
            others: all masks of the set; some are looked at where one alone does not tell what 255 means.

        Returns:
            Class of every pixel, or `IGNORED` ``[H, W]``.

        Raises:
            BadTargetError: when the file cannot be read, has another size, or values that mean no class for sure.
        """
        if self.values is not None:
            return self.values.read(path, size)
        if not self.named:
            return read_binary_mask(path, size)
        mask = read_class_mask(path, size, self.num_classes)
        found = _values(mask)
        if not self._ignores and IGNORED in found:
            if not set(found) <= {0, IGNORED}:
                self._ignores = True
            else:
                self._look_at(path, found, list(others))
        return mask

    def _look_at(self, path: Path, found: list[int], others: list[Path]) -> None:
        """Looks for a class in other masks: where none has one, 255 is as likely to be the defects as to be ignored."""
        places = np.unique(np.linspace(0, len(others) - 1, min(len(others), _MASKS_LOOKED_AT)).astype(int))
        only = " and ".join(map(str, found))
        for place in places.tolist():
            try:
                values = _values(_read_values(others[place]))
            except BadTargetError:
                continue  # told when it is its turn
            if any(0 < value < self.num_classes for value in values):
                self._ignores = True
                logger.warning(
                    "%s holds only %s: its pixels of %d are ignored, as other masks of the set hold classes; where "
                    "they mean a class, say so with mask_values (further such masks are not reported)",
                    path, only, IGNORED,
                )  # fmt: skip
                return
        meanings = f"mask_values={','.join(map(str, range(self.num_classes)))} where they are ignored"
        if self.num_classes == 2:
            meanings = f"mask_values=0,{IGNORED} where they are class 1, {meanings}"
        raise BadTargetError(
            path,
            f"holds only {only}, and none of the {len(places)} masks looked at holds one of the classes 1 to "
            f"{self.num_classes - 1}: say in the dataset string what pixels of {IGNORED} mean: {meanings}, or the "
            "value of each class in order",
        )


class MaskValues:
    """Which values of mask files mean which class: ``0,255``, ``0,1+2,ignore=9`` or ``#000000,#ff0000``.

    Entries are the values of class 0, of class 1 and so on; ``+`` joins several in one class, and ``ignore=`` names
    those of pixels without a class. Values are levels of 0 to 65535, or colours of the form ``#rrggbb`` throughout. 255
    is ignored unless it is named.

    Attributes:
        classes: the values of each class.
    """

    def __init__(self, text: str) -> None:
        """Reads the text.

        Raises:
            ValueError: when it is not of the form, or names a value twice.
        """
        self.text = text
        self.classes: list[list[int]] = []
        ignored: list[int] = []
        entries = [entry.strip() for entry in text.split(",")]
        self.are_colours = "#" in text
        for entry in entries:
            words = entry.removeprefix("ignore=").split("+")
            values = [self._parse(word.strip()) for word in words]
            if entry.startswith("ignore="):
                ignored += values
            else:
                self.classes.append(values)
        pairs = [(value, number) for number, values in enumerate(self.classes) for value in values]
        pairs += [(value, IGNORED) for value in ignored]
        meanings = dict(pairs)
        if len(meanings) < len(pairs):
            raise ValueError(f"{self} names a value twice")
        if not self.are_colours:
            meanings.setdefault(IGNORED, IGNORED)
        known = sorted(meanings)
        self._known: npt.NDArray[np.int64] = np.array(known, dtype=np.int64)
        self._meanings: npt.NDArray[np.int16] = np.array([meanings[value] for value in known], dtype=np.int16)
        if not self.are_colours:  # many times faster than a search
            self._table: npt.NDArray[np.int16] = np.full(_MOST_LEVEL + 1, _UNKNOWN, dtype=np.int16)
            self._table[self._known] = self._meanings

    def __str__(self) -> str:
        return f"mask_values={self.text}"

    @classmethod
    def from_json(cls, values: object) -> "MaskValues":
        """Reads ``[0, 255]`` or ``[0, [1, 2]]``: a value, or a list of them, per class.

        Raises:
            ValueError: for anything else.
        """
        if not isinstance(values, list) or not values:
            raise ValueError(f"must list the value of each class, such as [0, 255], found {values!r:.80}")
        entries = [entry if isinstance(entry, list) else [entry] for entry in values]
        return cls(",".join("+".join(map(str, entry)) for entry in entries))

    def read(self, path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """Reads a mask; see `MaskReader.read`."""
        values = _read_values(path, colours=self.are_colours)
        _check_size(path, values.shape, size)
        if self.are_colours:
            places = np.searchsorted(self._known, values).clip(max=len(self._known) - 1)
            codes = np.where(self._known[places] == values, self._meanings[places], _UNKNOWN)
        elif values.dtype.kind != "f" and 0 <= values.min() <= values.max() <= _MOST_LEVEL:
            codes = np.take(self._table, values)
        else:
            codes = np.array([_UNKNOWN])
        if codes.min() == _UNKNOWN:
            found = np.setdiff1d(values, self._known).tolist()
            shown = [f"#{value:06x}" for value in found] if self.are_colours else found
            raise BadTargetError(path, f"holds {_list_values(shown)}, which {self} does not name")
        return codes.astype(np.uint8)

    def _parse(self, word: str) -> int:
        try:
            value = int(word.removeprefix("#"), 16 if self.are_colours else 10)
        except ValueError:
            value = -1
        fits = re.fullmatch("#[0-9a-fA-F]{6}", word) if self.are_colours else re.fullmatch("[0-9]+", word)
        if not fits or not 0 <= value <= (0xFFFFFF if self.are_colours else _MOST_LEVEL):
            raise ValueError(
                f"{self}: {word!r} is no value; write the value of each class in order, such as 0,255 or "
                "0,1+2,ignore=9 (0 to 65535), or all as colours, such as #000000,#ff0000"
            )
        return value


def read_class_mask(path: Path, size: tuple[int, int], num_classes: int) -> npt.NDArray[np.uint8]:
    """Reads a mask whose values are class indices.

    Palette images keep their indices, whatever the palette's colours; one-bit images hold 0 and 1; RGB is read where
    its three channels are equal, and transparency where nothing is transparent.

    Args:
        path: 8-bit, 16-bit, one-bit or palette image.
        size: height and width of the image.
        num_classes: values are below it, or `IGNORED`.

    Returns:
        Class of every pixel ``[H, W]``.

    Raises:
        BadTargetError: when the file cannot be read, has another size, or holds another value.
    """
    values = _read_values(path)
    _check_size(path, values.shape, size)
    found = _values(values)
    if all(0 <= value < num_classes or value == IGNORED for value in found):
        return values.astype(np.uint8)
    allowed = f"allowed are 0 to {num_classes - 1} (the classes), and {IGNORED} (ignored)"
    raise BadTargetError(path, f"holds {_list_values(found)}; {allowed}; {_advice(found, num_classes)}")


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
    values = _read_values(path)
    _check_size(path, values.shape, size)
    found = _values(values)
    if not set(found) <= {0, 1, 255}:
        raise BadTargetError(
            path,
            f"holds {_list_values(found)}; a mask of background and defect has 0 and 255, or 0 and 1; "
            f"{_advice(found, 2)} (where values are class indices, the set must name its classes)",
        )
    if 1 in found and 255 in found:
        raise BadTargetError(
            path,
            "holds both 1 and 255; a mask of background and defect has 0 and 255, or 0 and 1; mask_values=0,1+255 "
            "takes both for defects, mask_values=0,1 ignores pixels of 255",
        )
    return values.astype(np.bool_).astype(np.uint8)


def _list_values(found: Sequence[int | str]) -> str:
    shown = ", ".join(map(str, found[:_MOST_VALUES]))
    more = f" and {len(found) - _MOST_VALUES} more" if len(found) > _MOST_VALUES else ""
    return f"the value{'s' * (len(found) > 1)} {shown}{more}"


def _advice(found: Sequence[int], num_classes: int) -> str:
    """How to say what values mean."""
    if len(found) > max(_MOST_VALUES, 2 * num_classes):
        return "so many values come of saving as JPEG or of resizing with interpolation: save it again, without either"
    meant = [str(value) for value in found if value >= 0 and (value != IGNORED or len(found) <= num_classes)]
    meant[num_classes - 1 :] = ["+".join(meant[num_classes - 1 :])] if len(meant) >= num_classes else ["..."]
    return (
        "where other values mean the classes, name them in order in the dataset string, such as mask_values="
        f"{','.join(meant)}"
    )


class DepthReader:
    """Reads the depth maps of one set.

    Attributes:
        num_empty: how many maps were read, in this process, in which nothing was measured. The first one is logged.
    """

    def __init__(
        self, *, scale: float = 1, invalid: float | None = None, allow_zero: bool = False, assumed: str = ""
    ) -> None:
        """Keeps how values are meant.

        Args:
            scale: depth = raw value x scale.
            invalid: raw value that means nothing was measured.
            allow_zero: whether a depth of 0 is one, as for heights above a table; else depths are above 0.
            assumed: what a layout takes for granted of 16-bit files, for errors about others; empty where the scale is
                known for every kind of file.
        """
        self.scale = scale
        self.invalid = invalid
        self.allow_zero = allow_zero
        self.assumed = assumed
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
        if self.assumed and (raw.dtype.kind == "f" or raw.dtype.itemsize == 1):
            self._refuse_kind(path, raw)
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

    def _refuse_kind(self, path: Path, raw: npt.NDArray[Any]) -> NoReturn:
        top = raw.max(where=np.isfinite(raw), initial=0)
        is_float = raw.dtype.kind == "f"
        kind = "floating-point numbers" if is_float else "8-bit values"
        example = "depth_scale=1 for metres" if is_float else "depth_scale=0.0392 where 255 means 10 m"
        raise BadTargetError(
            path,
            f"holds {kind} (up to {top:g}), where this layout has {self.assumed}; say in the dataset string what they "
            f"mean: depth = value x depth_scale, such as {example}",
        )


def _read_values(path: Path, *, colours: bool = False) -> npt.NDArray[Any]:
    """The whole numbers that a mask holds ``[H, W]``; for ``colours`` those of ``0xrrggbb``."""
    image = _decode(path)
    has_alpha = image.mode in ("RGBA", "LA", "PA")
    alpha = np.asarray(image.getchannel("A")) if has_alpha else None
    if alpha is not None and alpha.min() < 255 and not (colours and np.isin(alpha, (0, 255)).all()):
        raise BadTargetError(
            path,
            f"is transparent in places{_list_colours(image.convert('RGBA'))}; save it without transparency, or name "
            "the colour of each class in the dataset string, such as mask_values=#000000,#ff0000, where pixels that "
            "are wholly transparent count as black",
        )
    if colours:
        channels: npt.NDArray[Any] = np.array(image.convert("RGB"), dtype=np.int64)
        if alpha is not None:
            channels[alpha == 0] = 0
        packed: npt.NDArray[Any] = channels @ np.array([1 << 16, 1 << 8, 1])
        return packed
    if has_alpha:
        image = image.convert("RGB") if image.mode == "RGBA" else image.getchannel(0)
    if image.mode in ("P", "1"):
        return np.asarray(image)
    if image.mode == "RGB":
        red, green, blue = image.split()
        values: npt.NDArray[Any] = np.asarray(red)
        if np.array_equal(values, np.asarray(green)) and np.array_equal(values, np.asarray(blue)):
            return values
        raise BadTargetError(
            path,
            f"is a colour image{_list_colours(image)}; a mask has one channel (or a palette) with class indices, or "
            "the dataset string names the colour of each class in order, such as mask_values=#000000,#ff0000",
        )
    values = _grey_values(path, image)
    if values.dtype.kind == "f":
        raise BadTargetError(path, "holds floating-point numbers; a mask holds class indices")
    return values


def _list_colours(image: Image.Image) -> str:
    colours = image.getcolors(_MOST_VALUES) or ()
    names = sorted(f"#{bytes(colour).hex()}" for _, colour in colours if isinstance(colour, tuple))
    return f" with the colours {', '.join(names)}" if names else ""


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
        with find_file(path).open("rb") as file:
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


def _values(values: npt.NDArray[Any]) -> list[int]:
    """The distinct values, sorted; Pillow counts those of bytes without a copy in larger integers."""
    if 0 <= values.min() <= values.max() <= 255:
        return [value for value, count in enumerate(Image.fromarray(values.astype(np.uint8)).histogram()) if count]
    found: list[int] = np.unique(values).tolist()
    return found
