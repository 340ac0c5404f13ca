"""Decoding image files into RGB as a person would see them, and keeping encoded files in memory."""

import functools
import io
import itertools
import logging
import os
import queue
import struct
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin

logger = logging.getLogger("dinov2")

_Result = TypeVar("_Result")

_MOST_NAMES = 20_000  # of a folder, looked at for one like a missing file's

MAX_PIXELS = 1_000_000_000  # 3 GB as RGB; past it a file is taken for a decompression bomb

# Raster formats only: others that Pillow opens run programs (EPS), hold no picture or no single one.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000", "GIF", "AVIF", "DIB", "PCX", "SGI", "TGA")
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNED = frozenset(
    (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
)
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG keeps its orientation
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANES, _TIFF_SAMPLE_FORMAT = 258, 262, 284, 339
_WHITE_IS_ZERO, _SEPARATE, _SIGNED = 0, 2, 2


class UnreadableImageError(OSError):
    """An image that cannot be shown: missing, empty, truncated, no image, or too large.

    Attributes:
        path: the file, as it was named.
        cause: what is wrong with it.
    """

    def __init__(self, path: str | Path, cause: str) -> None:
        """Names the file and the cause."""
        super().__init__(f"cannot read image {path}: {cause}")
        self.path = str(path)
        self.cause = cause

    def __reduce__(self) -> tuple[type["UnreadableImageError"], tuple[str, str]]:
        """Lets the error travel from a worker process."""
        return type(self), (self.path, self.cause)


def load_image(path: str | Path) -> Image.Image:
    """Reads an image file into RGB (see `decode_image`).

    Raises:
        UnreadableImageError: when the file is missing, truncated or no image.
    """
    return decode_image(read_image_bytes(path), str(path))


@functools.cache
def readable_endings() -> frozenset[str]:
    """Endings, in lower case, of the files that `decode_image` reads, such as ``.jpg`` and ``.jfif``."""
    Image.init()
    known = {*_FORMATS} & Image.OPEN.keys() | {"MPO"}  # an MPO is a JPEG with further images behind it
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in known)


def read_image_bytes(path: str | Path) -> bytes:
    """Reads a whole file; of a name whose accents are stored in the other form of Unicode, the file that is there.

    Raises:
        UnreadableImageError: when it is missing, a folder, or cannot be read.
    """
    try:
        return find_file(Path(path)).read_bytes()
    except FileNotFoundError:
        raise UnreadableImageError(path, f"no such file{_near_name(Path(path))}") from None
    except IsADirectoryError:
        raise UnreadableImageError(path, "it is a folder") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise UnreadableImageError(path, str(error)) from error


def find_file(path: Path) -> Path:
    """The path as it is on disk: macOS stores ``ö`` as ``o`` and an accent, lists mostly name it as one character.

    A path that is there, or in neither form, is given back as it is.
    """
    text = str(path)
    if text.isascii() or path.exists():
        return path
    found = Path(path.anchor)
    for part in path.parts[1:] if path.anchor else path.parts:
        forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
        inner = next((found / form for form in forms if (found / form).exists()), None)
        if inner is None:
            return path
        found = inner
    _say_form(str(path.parent))
    return found


@functools.cache  # said once per folder and process
def _say_form(folder: str) -> None:
    logger.info("%s: names are stored in another form of Unicode (accents composed or decomposed) than listed", folder)


def _near_name(path: Path) -> str:
    """Names a file beside a missing one that differs in capitals or in the form of Unicode only; empty without one."""

    def fold(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()

    try:
        with os.scandir(path.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
    except (OSError, ValueError):
        return ""
    near = next((name for name in names if fold(name) == fold(path.name)), None)
    if near is None:
        return ""
    composed = [unicodedata.normalize("NFC", name) for name in (near, path.name)]
    reason = "Unicode normalisation, composed or decomposed accents," if composed[0] == composed[1] else "capitals"
    return f"; the folder has {near!r}, which differs in {reason} only"


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decodes an encoded image into 8-bit RGB, upright, as a person would see it.

    Transparency is laid on white. The EXIF orientation is applied. Of several frames the first is taken. Grey levels
    deeper than 8 bits are scaled by a range that does not depend on how bright the scene is, so that the images of one
    set stay comparable:

    - 16-bit grey by 0-65535 (12-bit TIFF by 0-4095);
    - 32-bit integers by the smallest of 0-255, 0-65535 that holds the values;
    - floats by the smallest of 0-1, 0-255, 0-65535 that holds the values;
    - integers and floats outside these, by the image's own minimum and maximum; not-a-number is black.

    Pillow's global size limit is not consulted: up to `MAX_PIXELS` pixels are ordinary here.

    Args:
        data: content of the file.
        name: names the image in errors.

    Raises:
        UnreadableImageError: when the data are empty, truncated, no image, or hold more than `MAX_PIXELS` pixels.
    """
    return _decode(data, name, _to_rgb)


def decode_values(data: bytes, name: str) -> Image.Image:
    """Decodes an encoded image upright in the mode of its file: palette indices, 16-bit and float values stay.

    Args:
        data: content of the file.
        name: names the image in errors.

    Raises:
        UnreadableImageError: as for `decode_image`.
    """
    return _decode(data, name, lambda image: image)


def read_image_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width that `decode_image` will give, from the header alone.

    Args:
        data: content of the file.
        name: names the image in errors.

    Raises:
        UnreadableImageError: when the data are empty, no image, or have a damaged header.
    """

    def measure(image: Image.Image) -> tuple[int, int]:
        # Pillow decodes a whole PNG to find its EXIF, which may stand at the end. Few have any.
        has_exif = image.format != "PNG" or any(mark in data for mark in _PNG_EXIF)
        turned = has_exif and _ORIENTATIONS.get(_orientation(image)) in _TURNED
        # Some versions of Pillow turn a TIFF's size before it is decoded, others do not; the tags say what is stored.
        width, height = _tiff_tag(image, _TIFF_WIDTH) or image.width, _tiff_tag(image, _TIFF_HEIGHT) or image.height
        return (width, height) if turned else (height, width)

    return _with_image(data, name, measure)


def _decode(data: bytes, name: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Decodes, converts and turns an image upright."""

    def load(image: Image.Image) -> Image.Image:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise UnreadableImageError(name, f"{pixels} pixels are more than the limit of {MAX_PIXELS}")
        return _upright(image, convert)

    return _with_image(data, name, load)


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """Converts an image that Pillow has opened as `decode_image` does: an image and its file give the same pixels."""
    return _upright(image, _to_rgb)


def _upright(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    image.load()
    upright = _ORIENTATIONS.get(_orientation(image))
    converted = convert(image)  # first, as turning forgets the file's format and tags
    return converted if upright is None else converted.transpose(upright)


def _with_image(data: bytes, name: str, use: Callable[[Image.Image], _Result]) -> _Result:
    """Opens an image for a function, and gives all its failures one type."""
    if not data:
        raise UnreadableImageError(name, "the file is empty")
    try:
        with _open(data, name) as image:
            return use(image)
    except UnreadableImageError:
        raise
    # Decoders of damaged files raise whatever the damage makes them stumble over.
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError, struct.error) as error:
        raise UnreadableImageError(name, str(error) or type(error).__name__) from error
    except (MemoryError, OverflowError, ZeroDivisionError) as error:
        raise UnreadableImageError(name, f"{type(error).__name__} while decoding") from error


class ByteCache:
    """Keeps encoded files in memory until a budget is used up; what came later is read from disk each time.

    Each process fills its own copy. A cache filled before workers are forked is shared with them. Threads may read it
    at once: at worst a file is read twice.
    """

    def __init__(self, budget_bytes: int) -> None:
        """Starts empty.

        Args:
            budget_bytes: largest sum of the sizes of kept files.
        """
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes must not be negative, got {budget_bytes}")
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._files: dict[str, bytes] = {}
        self._full = False

    def __len__(self) -> int:
        """Number of kept files."""
        return len(self._files)

    def read(self, path: str | Path, read: Callable[[str | Path], bytes] = read_image_bytes) -> bytes:
        """Content of a file, from memory when it is kept there.

        Args:
            path: key of the file.
            read: fetches the content of a file that is not kept.

        Raises:
            UnreadableImageError: when the file cannot be read.
        """
        key = str(path)
        data = self._files.get(key)
        if data is not None:
            return data
        data = read(path)
        if not self._full:
            if self.used_bytes + len(data) > self.budget_bytes:
                self._full = True
            elif self._files.setdefault(key, data) is data:
                self.used_bytes += len(data)
        return data


def _open(data: bytes, name: str) -> Image.Image:
    """Opens by content like ``Image.open``, without its size check, whose limit is one global for the whole process."""
    Image.preinit()
    Image.init()
    for format_name in _FORMATS:
        if format_name not in Image.OPEN:  # Pillow built without it
            continue
        factory, accept = Image.OPEN[format_name]
        if accept is not None and accept(data[:16]) is not True:
            continue
        try:
            return factory(io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # how plugins say "not mine"
            continue
    raise UnreadableImageError(name, "not an image of a known format")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; 1 where there is none or the tag is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, OSError, KeyError, IndexError, EOFError, struct.error):
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts a loaded image of any of Pillow's modes; the result carries no metadata that others could act on."""
    mode = image.mode
    if mode.startswith("I;16"):
        rgb = _from_grey(_scale_16_bit(image))
    elif mode == "I":
        rgb = _from_grey(_scale_integers(image))
    elif mode == "F":
        rgb = _from_grey(_scale_by_range(np.asarray(image), (1, 255, 65535)))
    elif mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.applyTransform(image, ImageCms.buildTransform(lab, srgb, "LAB", "RGB"))
        assert converted is not None  # only in-place transforms give None
        rgb = converted
    elif mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        if mode == "RGB" and _tiff_tag(image, _TIFF_PLANES) == _SEPARATE and _tiff_tag(image, _TIFF_BITS) == 16:
            raise ValueError("Pillow cannot read 16-bit TIFF with separate colour planes; save it interleaved")
        rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _from_grey(grey: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(grey).convert("RGB")


def _scale_16_bit(image: Image.Image) -> npt.NDArray[np.uint8]:
    top = 4095 if _tiff_tag(image, _TIFF_BITS) == 12 else 65535
    table: npt.NDArray[np.uint8] = _scale(np.arange(65536), 0, top)
    if _tiff_tag(image, _TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8-bit images only
        table = 255 - table
    return np.take(table, np.asarray(image))


def _scale_integers(image: Image.Image) -> npt.NDArray[np.uint8]:
    values: npt.NDArray[Any] = np.asarray(image)
    if image.format in ("PNG", "PPM"):  # 16 bits are all that these formats hold
        return _scale(values, 0, 65535)
    if image.format == "TIFF" and _tiff_tag(image, _TIFF_SAMPLE_FORMAT) != _SIGNED:
        values = values.view(np.uint32)
    return _scale_by_range(values, (255, 65535))


def _scale_by_range(values: npt.NDArray[Any], tops: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Scales by the smallest of the ranges from 0 that holds all values, else by their minimum and maximum."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    return _scale(values, low, high) if top is None else _scale(values, 0, top)


def _scale(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Maps ``low`` to 0 and ``high`` to 255, rounding; clips; not-a-number and a range of nothing become 0."""
    if high == low:
        return np.zeros(values.shape, dtype=np.uint8)
    scaled: npt.NDArray[np.float64] = (values.astype(np.float64) - low) * 255 / (high - low)
    levels: npt.NDArray[np.float64] = np.nan_to_num(scaled, nan=0, posinf=255, neginf=0)
    rounded: npt.NDArray[np.float64] = np.rint(levels.clip(0, 255))
    return rounded.astype(np.uint8)


def _tiff_tag(image: Image.Image, tag: int) -> int | None:
    """First value of a TIFF tag; None for other formats and absent tags."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return None
    value = image.tag_v2.get(tag)
    return value[0] if isinstance(value, tuple) else value


T = TypeVar("T")


class Deadline:
    """Runs one call after another in a thread of its own; a call that takes too long is left behind with its thread.

    Works in any thread and process (a fork makes a thread of its own), and needs no signals. A thread that hangs in the
    system cannot be ended, but keeps no process from ending.

    Args:
        seconds: longest time of a call; 0 for no limit, and no thread.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process = 0
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, call: Callable[..., T], *arguments: Any) -> T:
        """Returns or raises what ``call(*arguments)`` does.

        Raises:
            TimeoutError: it has not ended in time.
        """
        if self.seconds <= 0:
            return call(*arguments)
        if self._process != os.getpid():
            self._calls = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._calls,), name="reads images", daemon=True).start()
            self._process = os.getpid()
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._calls.put((call, arguments, answer))
        try:
            value, error = answer.get(timeout=self.seconds)
        except queue.Empty:
            self._process = 0  # the next call gets a new thread
            self._calls.put(None)  # should this one ever come back, it ends
            raise TimeoutError(f"given up after {self.seconds:g} s (data.read_timeout_seconds)") from None
        if error is not None:
            raise error
        result: T = value
        return result

    def __reduce__(self) -> tuple[type["Deadline"], tuple[float]]:
        """Threads do not travel to other processes: what is unpickled begins without one."""
        return Deadline, (self.seconds,)


def _serve(calls: "queue.SimpleQueue[Any]") -> None:
    while (task := calls.get()) is not None:
        call, arguments, answer = task
        try:
            answer.put((call(*arguments), None))
        except BaseException as error:
            answer.put((None, error))
        del call, arguments, answer, task  # an image is not kept until the next one
