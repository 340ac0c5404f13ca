"""Decoding image files into RGB as a person would see them."""

import functools
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin
from torch import Tensor

from dinov2.data.array_files import (
    DICOM_ENDINGS,
    RAW_ENDING,
    SIDECAR_EXAMPLE,
    ArrayFile,
    DicomFile,
    RawFile,
    has_dicom_reader,
    is_dicom,
    is_raw,
)
from dinov2.data.jpeg_end import with_end_marker
from dinov2.data.reading import UnreadableImageError, read_image_bytes
from dinov2.data.value_range import ValueRange, Values, in_bands, on_white, warn_once

_Result = TypeVar("_Result")

# Past either a file is taken for a decompression bomb. Whoever has larger images raises them before any is read:
# ``dinov2.data.decoding.MAX_BYTES = 32 * 2**30``. Every loading process may need as much.
MAX_BYTES = 8 * 2**30  # of memory that decoding takes at its peak, beside the file itself
MAX_PIXELS = 1_000_000_000


# Raster formats only: others that Pillow opens run programs (EPS), hold no picture or no single one.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000", "GIF", "AVIF", "DIB", "PCX", "SGI", "TGA")
_CHANNELS = (1, 3, 4)
_COLOURS = ("RGB", "RGBA", "LA")
_DECODER_BYTES = {"WEBP": 8, "AVIF": 4, "JPEG2000": 12}  # per pixel, beside what Pillow keeps
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS: dict[Image.Transpose | None, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {  # the same of arrays
    Image.Transpose.FLIP_LEFT_RIGHT: np.fliplr,
    Image.Transpose.ROTATE_180: lambda array: np.rot90(array, 2),
    Image.Transpose.FLIP_TOP_BOTTOM: np.flipud,
    Image.Transpose.TRANSPOSE: lambda array: array.swapaxes(0, 1),
    Image.Transpose.ROTATE_270: lambda array: np.rot90(array, -1),
    Image.Transpose.TRANSVERSE: lambda array: np.rot90(array, 2).swapaxes(0, 1),
    Image.Transpose.ROTATE_90: np.rot90,
}
_TURNED = frozenset(
    (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
)
_PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # where a PNG keeps its orientation
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_CHANNELS, _TIFF_COMPRESSION = 256, 257, 277, 259
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANES, _TIFF_SAMPLE_FORMAT = 258, 262, 284, 339
_WHITE_IS_ZERO, _SEPARATE, _SIGNED, _BIG_TIFF = 0, 2, 2, 43
_TIFF_KINDS = {1: "uint", 2: "int", 3: "float"}
_TIFF_KIND_NAMES = {1: "unsigned integers", 2: "signed integers", 3: "floating-point numbers", 5: "complex integers",
                    6: "complex numbers"}  # fmt: skip
_TIFF_DTYPES = ("int8", "int16", "int32", "uint32", "int64", "uint64", "float32", "float64")
_PLANES = "Pillow cannot read 16-bit TIFF with separate colour planes; save it interleaved"


class _TiffArray(ArrayFile):
    """A TIFF of a kind that Pillow does not know, but OpenCV may: 64-bit numbers, or colours that are not 8-bit.

    Raises:
        ValueError: neither does; it says what kind it is.
    """

    format = "TIFF"

    def __init__(self, data: bytes) -> None:
        self.data = data
        file = io.BytesIO(data)
        head = file.read(8)
        head += file.read(8) if _BIG_TIFF in head[2:4] else b""
        self.tag_v2 = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(self.tag_v2.next)
        self.tag_v2.load(file)
        self.width, self.height = _tiff_tag(self, _TIFF_WIDTH) or 0, _tiff_tag(self, _TIFF_HEIGHT) or 0
        self.channels = _tiff_tag(self, _TIFF_CHANNELS) or 1
        bits, kind = _tiff_tag(self, _TIFF_BITS) or 1, _tiff_tag(self, _TIFF_SAMPLE_FORMAT) or 1
        self.dtype = f"{_TIFF_KINDS.get(kind, '?')}{bits}"
        if self.width < 1 or self.height < 1:
            raise ValueError("a TIFF that names no size")
        shown = f"a TIFF with {self.channels} channel(s) of {bits}-bit {_TIFF_KIND_NAMES.get(kind, f'kind {kind}')}"
        self._refusal = (
            f"{shown}, compression {_tiff_tag(self, _TIFF_COMPRESSION) or 1}, which cannot be read; save it as 8-, "
            "16- or 32-bit grey, or as 8- or 16-bit RGB"
        )
        if _tiff_tag(self, _TIFF_PLANES) == _SEPARATE and self.channels > 1:
            raise ValueError(f"{shown} in separate colour planes, which cannot be read; save it interleaved")
        if self.channels not in _CHANNELS or self.dtype not in _TIFF_DTYPES:
            raise ValueError(self._refusal)

    def read_values(self) -> Values:
        array = _read_with_opencv(self.data)
        if array is None or sorted(array.shape[:2]) != sorted((self.height, self.width)):
            raise ValueError(self._refusal)
        if array.shape[2:] != (() if self.channels == 1 else (self.channels,)) or array.dtype != np.dtype(self.dtype):
            raise ValueError(self._refusal)
        return Values.of_array(array, are_upright=True)


_Opened = Image.Image | ArrayFile
AnyImage = Image.Image | npt.NDArray[Any] | Tensor


def load_image(path: str | Path, value_range: ValueRange | None = None) -> Image.Image:
    """Reads an image file into RGB (see `decode_image`).

    Raises:
        UnreadableImageError: when the file is missing, truncated or no image.
    """
    return decode_image(read_image_bytes(path), str(path), value_range)


@functools.cache
def readable_endings() -> frozenset[str]:
    """Endings, in lower case, of the files that `decode_image` reads, such as ``.jpg`` and ``.jfif``."""
    Image.init()
    known = {*_FORMATS} & Image.OPEN.keys() | {"MPO"}  # an MPO is a JPEG with further images behind it
    others = (RAW_ENDING, *(DICOM_ENDINGS if has_dicom_reader() else ()))
    return frozenset([*others, *(ending for ending, name in Image.registered_extensions().items() if name in known)])


def decode_image(data: bytes, name: str, value_range: ValueRange | None = None) -> Image.Image:
    """Decodes an encoded image into 8-bit RGB, upright, as a person would see it.

    Transparency is laid on white. The EXIF orientation is applied. Of several frames the first is taken. Values of more
    than 8 bits, with a sign, or of floating-point numbers are scaled by ``value_range``, which the images of a set
    share so that they stay comparable. Without one, unsigned values of 16 bits are scaled by 0-65535 (12-bit TIFF by
    0-4095, PPM by what it names). Of all others the file does not say what is white: the range is that of this image
    alone, found robustly (see `robust_range`), and a warning says so once. Not-a-number is black.

    DICOM and raw values are read as `dinov2.data.array_files` says.

    A JPEG that lacks nothing but its end marker is read, as browsers do, with a warning once.

    Pillow's global size limit is not consulted; `MAX_BYTES` and `MAX_PIXELS` are.

    Args:
        data: content of the file.
        name: names the image in errors; of raw values the path, beside which their description lies.
        value_range: of the set that the image belongs to; levels of 8 bits are none of its business.

    Raises:
        UnreadableImageError: when the data are empty, truncated, no image, of a kind that cannot be read, or past the
            limits.
    """

    def convert(image: _Opened, data: bytes) -> Image.Image:
        values = _read_values(image, data, colours=value_range is not None)
        return _upright(image, values, lambda: _to_rgb(image, values, value_range, name))

    return _decode(data, name, convert)


def decode_values(data: bytes, name: str) -> Image.Image:
    """Decodes an encoded image upright in the mode of its file: palette indices, 16-bit and float values stay.

    Of kinds that Pillow has no mode for, integers come as ``I`` where that holds them, other numbers as ``F``.

    Args:
        data: content of the file.
        name: names the image in errors.

    Raises:
        UnreadableImageError: as for `decode_image`.
    """

    def convert(image: _Opened, data: bytes) -> Image.Image:
        if isinstance(image, ArrayFile) or _is_signed_8_bit(image):
            values = _read_values(image, data)
            assert values is not None
            return _upright(image, values, values.as_image)
        image.load()
        return _upright(image, None, lambda: image)

    return _decode(data, name, convert)


def decode_levels(data: bytes, name: str, value_range: ValueRange | None = None) -> npt.NDArray[Any]:
    """Decodes an encoded image upright without cutting 16 bits to 8.

    Args:
        data: content of the file.
        name: names the image in errors.
        value_range: of the set that the image belongs to: values of more than 8 bits, with a sign, or of floating-point
            numbers that become black and white. Without it, unsigned values of 16 bits are as they are, and 12-bit TIFF
            spans 0-4095.

    Returns:
        Grey ``[H, W]`` or RGB ``[H, W, 3]``: uint8 where the file holds levels of 8 bits, uint16 for others, scaled to
        0-65535. Transparency is laid on white.

    Raises:
        UnreadableImageError: as for `decode_image`; of numbers whose file does not say what is white, and no range is
            given.
    """

    def convert(image: _Opened, data: bytes) -> npt.NDArray[Any]:
        return _upright_levels(image, _read_values(image, data, colours=True), value_range, name)

    return _decode(data, name, convert)


def _upright_levels(
    image: _Opened, values: Values | None, value_range: ValueRange | None, name: str
) -> npt.NDArray[Any]:
    if values is not None:
        levels: npt.NDArray[Any] = values.to_levels(value_range)
    else:
        rgb = _to_rgb(image, None, None, name)
        is_grey = isinstance(image, Image.Image) and image.mode in ("1", "L")
        levels = np.asarray(rgb.getchannel(0) if is_grey else rgb)
    turn = _ORIENTATIONS.get(_orientation(image))
    is_upright = turn is None or (values is not None and values.are_upright)
    return np.ascontiguousarray(levels if is_upright else _TURNS[turn](levels))


def sample_values(
    data: bytes, name: str, *, unnamed_only: bool = False
) -> tuple[npt.NDArray[Any], ValueRange | None] | None:
    """Some of the values of an image of more than 8 bits, with a sign, or of floating-point numbers; None for others.

    Args:
        data: content of the file.
        name: names the image in errors.
        unnamed_only: whether a file that says what is white is not decoded, and gives no values.

    Returns:
        Values spread over the image, and the range that its kind of file stands for: None where the file does not say
        what is white, and needs the range of its set.

    Raises:
        UnreadableImageError: as for `decode_image`.
    """

    def convert(image: _Opened, data: bytes) -> tuple[npt.NDArray[Any], ValueRange | None] | None:
        if isinstance(image, Image.Image) and not _has_values(image):
            return None  # known by the header, without decoding
        if unnamed_only and isinstance(image, Image.Image) and _says_what_is_white(image):
            return np.zeros(0), ValueRange.of_bits(16)
        values = _read_values(image, data, colours=True)
        assert values is not None
        return values.sample(), values.full

    return _decode(data, name, convert)


def read_image_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width that `decode_image` will give, from the header alone.

    Args:
        data: content of the file.
        name: names the image in errors.

    Raises:
        UnreadableImageError: when the data are empty, no image, or have a damaged header.
    """

    def measure(image: _Opened) -> tuple[int, int]:
        has_exif = True
        if image.format == "PNG":
            # Pillow decodes a whole PNG to find its EXIF, which may stand at the end. Few have any.
            has_exif = any(mark in data for mark in _PNG_EXIF)
            if has_exif:
                _check_size(image)
        turned = has_exif and _ORIENTATIONS.get(_orientation(image)) in _TURNED
        # Some versions of Pillow turn a TIFF's size before it is decoded, others do not; the tags say what is stored.
        width, height = _tiff_tag(image, _TIFF_WIDTH) or image.width, _tiff_tag(image, _TIFF_HEIGHT) or image.height
        return (width, height) if turned else (height, width)

    return _with_image(data, name, measure)


def count_stored_pixels(data: bytes, name: str) -> int:
    """Pixels that an image announces, from the header alone: nothing is decoded, whatever it claims.

    Args:
        data: content of the file.
        name: names the image in errors.

    Raises:
        UnreadableImageError: when the data are empty, no image, or have a damaged header.
    """
    return _with_image(data, name, lambda image: image.width * image.height)


def to_upright_rgb(image: AnyImage, value_range: ValueRange | None = None) -> Image.Image:
    """Converts an image in memory as `decode_image` does a file: both give the same pixels.

    Args:
        image: opened by Pillow; an array ``[H, W]`` or ``[H, W, C]``; or a tensor ``[H, W]`` or ``[C, H, W]``,
            also ``[H, W, C]`` where ``H`` is no number of channels. ``C`` is 1 (grey), 3 (RGB) or 4 (RGB and
            transparency). Values are levels (uint8), black and white (bool), or
            integers and floating-point numbers as files have them.
        value_range: of the set that the image belongs to, see `decode_image`.

    Raises:
        ValueError: for an array of another shape or kind; for a range with colours of 16 bits that Pillow has opened,
            which cuts them to 8.
    """
    if isinstance(image, Image.Image):
        _check_range(image, value_range)
        values = _read_values(image, b"")
        return _upright(image, values, lambda: _to_rgb(image, values, value_range, "an image"))
    array = _as_array(image)
    if array.dtype == np.uint8:
        levels = Image.fromarray(array)
        return levels if levels.mode == "RGB" else _to_rgb(levels, None, None, "an array")
    return Values.of_array(array).to_rgb(value_range, "an array")


def to_levels(image: AnyImage, value_range: ValueRange | None = None) -> npt.NDArray[Any]:
    """Converts an image in memory as `decode_levels` does a file: both give the same levels.

    Args:
        image: see `to_upright_rgb`.
        value_range: of the set that the image belongs to, see `decode_levels`.

    Raises:
        ValueError: as for `to_upright_rgb`; numbers that do not say what is white, and no range is given.
    """
    if isinstance(image, Image.Image):
        _check_range(image, value_range)
        return _upright_levels(image, _read_values(image, b""), value_range, "an image")
    array = _as_array(image)
    if array.dtype == np.uint8:
        return array if array.ndim == 2 or array.shape[2] == 3 else np.asarray(on_white(Image.fromarray(array)))
    return Values.of_array(array).to_levels(value_range)


def _check_range(image: Image.Image, value_range: ValueRange | None) -> None:
    if value_range is not None and image.mode in _COLOURS and _has_values(image):
        raise ValueError("Pillow cuts colours of 16 bits to 8, so no range of values fits: give the file or an array")


def _as_array(image: npt.NDArray[Any] | Tensor) -> npt.NDArray[Any]:
    """Numbers as ``[H, W]`` or ``[H, W, C]``, C 3 or 4."""
    if isinstance(image, Tensor):
        order, found = "[C, H, W]", image.detach().cpu()
        found = found.float() if found.dtype == torch.bfloat16 else found
        if found.ndim == 3 and (found.shape[0] in _CHANNELS or found.shape[2] not in _CHANNELS):
            found = found.permute(1, 2, 0)
        array = found.contiguous().numpy()
    else:
        order, array = "[H, W, C]", np.ascontiguousarray(image)
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in _CHANNELS)
    if not is_image or 0 in array.shape or array.dtype.kind not in "biuf":
        raise ValueError(
            f"an image must be [H, W] or {order} of numbers, with 1, 3 or 4 channels C, found {image.dtype} "
            f"{list(image.shape)}"
        )
    array = array.astype(np.uint8) * np.uint8(255) if array.dtype == np.bool_ else array
    return array[..., 0] if array.shape[2:] == (1,) else array


def _decode(data: bytes, name: str, convert: Callable[[_Opened, bytes], _Result]) -> _Result:
    """Hands an image that is not too large to what decodes it."""

    def decode(image: _Opened) -> _Result:
        _check_size(image)
        return convert(image, data)

    try:
        return _with_image(data, name, decode)
    except UnreadableImageError:
        _with_image(data, name, _check_size)  # or looking for its end would decode what is too large
        ended = with_end_marker(data)
        if ended is None:
            raise
    warn_once("no end", "%s lacks its end marker; it is whole, and read. Further ones are not reported", name)
    return _with_image(ended, name, lambda image: convert(image, ended))


def _upright(image: _Opened, values: Values | None, convert: Callable[[], Image.Image]) -> Image.Image:
    upright = None if values is not None and values.are_upright else _ORIENTATIONS.get(_orientation(image))
    converted = convert()  # first, as turning forgets the file's format and tags
    return converted if upright is None else converted.transpose(upright)


def _with_image(data: bytes, name: str, use: Callable[[_Opened], _Result]) -> _Result:
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
    except (MemoryError, OverflowError, ZeroDivisionError, cv2.error) as error:
        raise UnreadableImageError(name, f"{type(error).__name__} while decoding") from error


def _open(data: bytes, name: str) -> _Opened:
    """Opens by content like ``Image.open``, without its size check, whose limit is one global for the whole process."""
    if is_dicom(data):
        return DicomFile(data)
    if is_raw(name):
        return RawFile(data, Path(name))
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
            if format_name == "TIFF":
                return _TiffArray(data)
    if name.lower().endswith(RAW_ENDING):
        raise UnreadableImageError(
            name, f"raw values need a description in {Path(name).name}.json, such as {SIDECAR_EXAMPLE}"
        )
    raise UnreadableImageError(name, "not an image of a known format")


def _read_with_opencv(data: bytes) -> npt.NDArray[Any] | None:
    array = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.ndim == 2:
        return array
    return array[..., ::-1] if array.shape[2] == 3 else array[..., [2, 1, 0, 3]]


def _orientation(image: _Opened) -> int:
    """EXIF orientation 1-8; 1 where there is none or the tag is damaged."""
    try:
        if isinstance(image, ArrayFile) and not isinstance(image, _TiffArray):
            return 1
        tags = image.tag_v2 if isinstance(image, _TiffArray) else image.getexif()
        return int(tags.get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, OSError, KeyError, IndexError, EOFError, struct.error):
        return 1


def _check_size(image: _Opened) -> None:
    """Refuses what would take too much memory, before it is decoded.

    Raises:
        ValueError: saying how much.
    """
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ValueError(f"{pixels} pixels are more than the limit of {MAX_PIXELS} (dinov2.data.decoding.MAX_PIXELS)")
    needed = pixels * _bytes_per_pixel(image)
    if needed > MAX_BYTES:
        raise ValueError(
            f"{image.width}x{image.height} pixels take {needed / 2**30:.2f} GiB to decode, more than the limit of "
            f"{MAX_BYTES / 2**30:.2f} GiB (dinov2.data.decoding.MAX_BYTES)"
        )


def _bytes_per_pixel(image: _Opened) -> int:
    """Memory at the peak of decoding, as measured: the file's pixels, RGB (4 bytes), and what lies between."""
    if isinstance(image, ArrayFile):
        return 2 * image.channels * np.dtype(image.dtype).itemsize + 4
    if image.mode in _COLOURS and _has_values(image):
        stored = 8
    else:
        stored = 1 if image.mode in ("1", "L", "P") else 2 if image.mode.startswith("I;16") else 4
        stored += _DECODER_BYTES.get(image.format or "", 0) + (2 if image.info.get("progressive") else 0)
    # Pillow decodes a whole PNG to find its orientation.
    turned = "exif" in image.info if image.format == "PNG" else _orientation(image) != 1
    return stored + (8 if turned else 4)


def _is_signed_8_bit(image: Image.Image) -> bool:
    return image.mode == "L" and _tiff_tag(image, _TIFF_SAMPLE_FORMAT) == _SIGNED


def _has_values(image: Image.Image) -> bool:
    """Whether the file holds other values than levels of 8 bits; of colours that is known until they are decoded."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16") or _is_signed_8_bit(image):
        return True
    arguments = _tile_arguments(image)
    if image.mode not in _COLOURS or not arguments:
        return False
    return ";16" in str(arguments[0]) or (image.format == "PPM" and _ppm_top(image) > 255)


def _says_what_is_white(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or image.mode in _COLOURS or image.format in ("PNG", "PPM")


def _tile_arguments(image: Image.Image) -> tuple[Any, ...]:
    """What Pillow tells its decoder: first the order of the file's bytes; empty when it is done."""
    tile = getattr(image, "tile", None)
    found = tile[0][3] if tile else ()
    return found if isinstance(found, tuple) else (found,)


def _ppm_top(image: Image.Image) -> int:
    """The value of white that a PPM names, in a file that is not decoded yet."""
    arguments = _tile_arguments(image)
    return int(arguments[1]) if len(arguments) > 1 else 65535


def _read_values(image: _Opened, data: bytes, *, colours: bool = False) -> Values | None:
    """Decodes an image; returns its values, or None where it holds levels of 8 bits, which are in the image itself.

    Args:
        image: opened; decoded, unless its values are read by OpenCV, which leaves it as it lies in the file.
        data: its file.
        colours: whether those of 16 bits are wanted, of which Pillow keeps 8.
    """
    if isinstance(image, ArrayFile):
        return image.read_values()
    if colours and image.mode in _COLOURS and _has_values(image):
        if _tiff_tag(image, _TIFF_PLANES) == _SEPARATE:
            raise ValueError(_PLANES)
        array = _read_with_opencv(data)
        if array is None or array.ndim < 3 or sorted(array.shape[:2]) != sorted(image.size):
            raise ValueError("its colours of 16 bits cannot be read")
        return Values.of_array(array, are_upright=image.format == "TIFF")  # which OpenCV turns, as it does no PNG
    ppm_top = _ppm_top(image) if image.format == "PPM" else 65535  # Pillow scales it to 65535
    image.load()
    size, mode = image.size, image.mode
    if not _has_values(image):
        return None

    def band(top: int, bottom: int) -> npt.NDArray[Any]:
        return np.asarray(image if (top, bottom) == (0, size[1]) else image.crop((0, top, size[0], bottom)))

    if mode.startswith("I;16"):
        full = ValueRange.of_bits(12 if _tiff_tag(image, _TIFF_BITS) == 12 else 16)
        # Pillow inverts 8-bit images only.
        return Values(size, band, full, white_is_zero=_tiff_tag(image, _TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO)
    if mode == "L":
        return Values(size, lambda top, bottom: band(top, bottom).view(np.int8))
    if mode == "I" and _says_what_is_white(image):  # 16 bits are all that PNG and PPM hold
        return Values(size, band, ValueRange(0, ppm_top), unit=65535 / ppm_top)
    if mode == "I" and image.format == "TIFF" and _tiff_tag(image, _TIFF_SAMPLE_FORMAT) != _SIGNED:
        return Values(size, lambda top, bottom: band(top, bottom).view(np.uint32))
    return Values(size, band)


def _to_rgb(image: _Opened, values: Values | None, value_range: ValueRange | None, name: str) -> Image.Image:
    """Converts a decoded image; the result carries no metadata that others could act on."""
    if values is not None:
        return values.to_rgb(value_range, name)
    assert isinstance(image, Image.Image)
    mode = image.mode
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
        rgb = in_bands(image.size, lambda top, bottom: _applied(transform, _cut(image, top, bottom)))
    elif mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgb = in_bands(image.size, lambda top, bottom: on_white(_cut(image, top, bottom)))
    else:
        if mode == "RGB" and _tiff_tag(image, _TIFF_PLANES) == _SEPARATE and _tiff_tag(image, _TIFF_BITS) == 16:
            raise ValueError(_PLANES)
        rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _cut(image: Image.Image, top: int, bottom: int) -> Image.Image:
    return image if (top, bottom) == (0, image.height) else image.crop((0, top, image.width, bottom))


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # only in-place transforms give None
    return converted


def _tiff_tag(image: _Opened, tag: int) -> int | None:
    """First value of a TIFF tag; None for other formats and absent tags."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile | _TiffArray):
        return None
    value = image.tag_v2.get(tag)
    return value[0] if isinstance(value, tuple) else value
