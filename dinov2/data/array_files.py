"""Image files that hold an array of numbers: DICOM, and raw values with a description beside them."""

import importlib.util
import io
import json
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.data.value_range import ValueRange, Values

RAW_ENDING = ".raw"
DICOM_ENDINGS = (".dcm", ".dicom")
_DICOM_MARK = slice(128, 132)  # where its four letters stand
_DEFLATED = b"1.2.840.10008.1.2.1.99"  # the transfer syntax whose content is inflated before anything is known of it
_META_BYTES = 4096  # among the first of which it stands
_REQUIRED = (
    *("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "PixelRepresentation", "PixelData"),
)  # of what pixels are read by
_PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2", "RGB")
_KINDS = ("uint8", "uint16", "int16", "uint32", "int32", "float32", "float64")
_BYTE_ORDERS = ("little", "big")
_SIDECAR: Mapping[str, type] = MappingProxyType(
    {"width": int, "height": int, "dtype": str, "channels": int, "byte_order": str, "header_bytes": int, "bits": int}
)
SIDECAR_EXAMPLE = '{"width": 2048, "height": 1024, "dtype": "uint16", "bits": 12}'


class ArrayFile(AbstractContextManager["ArrayFile"]):
    """An image file that is opened by its header; in the place of an image that Pillow has opened.

    Attributes:
        format: of the file.
        width: columns.
        height: rows.
        channels: 1, 3 or 4.
        dtype: of the values that are stored.
        mode: empty, as Pillow has none for it.
    """

    format: str
    width: int
    height: int
    channels: int
    dtype: str
    mode = ""

    def __exit__(self, *error: object) -> None:
        """Closes nothing, as nothing is open."""
        return

    @abstractmethod
    def read_values(self) -> Values:
        """All values, upright.

        Raises:
            ValueError: they cannot be read.
        """


def is_dicom(data: bytes) -> bool:
    """Whether the content of a file is DICOM."""
    return data[_DICOM_MARK] == b"DICM"


def is_raw(name: str) -> bool:
    """Whether a name is that of a file of raw values whose description lies beside it; no other name is looked at."""
    path = Path(name)
    return path.suffix.lower() == RAW_ENDING and path.is_file() and _sidecar_of(path).is_file()


def _sidecar_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def has_dicom_reader() -> bool:
    """Whether pydicom is installed."""
    return importlib.util.find_spec("pydicom") is not None


class DicomFile(ArrayFile):
    """One uncompressed image of a DICOM file, by pydicom.

    Values are rescaled by the file's slope and intercept. White and black are the ends of its first window; without a
    window, those of the bits that are stored. ``MONOCHROME1`` is inverted: its low values are white.

    Raises:
        ValueError: it lacks what an image needs, is compressed, of several frames, of colours other than RGB, or has a
            table of values; pydicom is not installed.

    Reference: DICOM PS3.3, C.7.6.3 (image pixel), C.11.1 (modality LUT), C.11.2 (VOI LUT).
    """

    format = "DICOM"

    def __init__(self, data: bytes) -> None:
        if not has_dicom_reader():
            raise ValueError("reading DICOM needs pydicom, which is not installed: pip install 'dinov2[dicom]'")
        if _DEFLATED in data[:_META_BYTES]:
            raise ValueError(
                "deflated DICOM is not read, as it may be of any size; write it with explicit little endian"
            )
        import pydicom  # an extra
        from pydicom.errors import InvalidDicomError

        try:
            self._content = pydicom.dcmread(io.BytesIO(data))
        except (InvalidDicomError, EOFError) as error:
            raise ValueError(f"damaged DICOM: {error}") from error
        content = self._content
        syntax = getattr(content.file_meta, "TransferSyntaxUID", None)
        if syntax is not None and syntax.is_compressed:
            raise ValueError(
                f"DICOM compressed as {syntax.name} is not read; decompress it before, as by gdcmconv --raw or dcmdjpeg"
            )
        frames = int(content.get("NumberOfFrames") or 1)
        if frames != 1:
            raise ValueError(f"DICOM of {frames} frames is not read; write each frame as a file of its own")
        missing = [name for name in _REQUIRED if name not in content]
        if missing:
            raise ValueError(f"DICOM without {', '.join(missing)}: it holds no image, or is damaged")
        self._photometric = str(content.PhotometricInterpretation)
        if self._photometric not in _PHOTOMETRIC:
            raise ValueError(f"DICOM of {self._photometric} is not read; allowed are {', '.join(_PHOTOMETRIC)}")
        if "ModalityLUTSequence" in content:
            raise ValueError("DICOM with a table of values (Modality LUT Sequence) is not read")
        self.width, self.height = int(content.Columns), int(content.Rows)
        self.channels = int(content.SamplesPerPixel)
        kind = "int" if content.PixelRepresentation else "uint"
        self.dtype = f"{kind}{max(8, int(content.BitsAllocated))}"

    def read_values(self) -> Values:
        array = self._content.pixel_array
        slope, intercept = (float(self._content.get(name, one)) for name, one in _RESCALE)
        if (slope, intercept) != (1.0, 0.0):
            array = array.astype(np.float64) * slope + intercept
        return Values(
            size=(self.width, self.height),
            rows=lambda top, bottom: array[top:bottom],
            full=self._window() or self._stored_range(slope, intercept),
            white_is_zero=self._photometric == "MONOCHROME1",
        )

    def _window(self) -> ValueRange | None:
        """The ends of the first window; None for none."""
        centre, width = (_first(self._content.get(name)) for name in ("WindowCenter", "WindowWidth"))
        if centre is None or width is None:
            return None
        function = str(self._content.get("VOILUTFunction", "LINEAR"))
        if function == "LINEAR_EXACT":
            return ValueRange(centre - width / 2, centre + width / 2)
        if function != "LINEAR":
            raise ValueError(f"DICOM whose window is {function} is not read; allowed are LINEAR and LINEAR_EXACT")
        half = max(width - 1, 1) / 2
        return ValueRange(centre - 0.5 - half, centre - 0.5 + half)

    def _stored_range(self, slope: float, intercept: float) -> ValueRange:
        bits, signed = int(self._content.BitsStored), bool(self._content.PixelRepresentation)
        lowest = -(2 ** (bits - 1)) if signed else 0
        ends = (lowest * slope + intercept, (lowest + 2**bits - 1) * slope + intercept)
        return ValueRange(min(ends), max(ends))


_RESCALE = (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))


def _first(value: Any) -> float | None:
    """The first of several values; None for none."""
    if value is None or value == "":
        return None
    several = not isinstance(value, str) and hasattr(value, "__iter__")
    return float(next(iter(value))) if several else float(value)


class RawFile(ArrayFile):
    """Values without a header, row by row, described by a JSON file beside them: ``a.raw`` by ``a.raw.json``.

    The description has ``width``, ``height`` and ``dtype``, and may have ``channels`` (1; 3 and 4 interleaved),
    ``byte_order`` (``little``), ``header_bytes`` to leave out (0), and ``bits`` that values take (of uint16, all).

    Raises:
        ValueError: the description is wrong, or the file has another length than it says.
    """

    format = "RAW"

    def __init__(self, data: bytes, path: Path) -> None:
        self._sidecar = _sidecar_of(path)
        described = self._describe()
        self.width, self.height, self.channels = described["width"], described["height"], described["channels"]
        self.dtype = described["dtype"]
        self._bits = described["bits"]
        start = described["header_bytes"]
        kind = np.dtype(self.dtype).newbyteorder(">" if described["byte_order"] == "big" else "<")
        expected = start + self.width * self.height * self.channels * kind.itemsize
        if len(data) != expected:
            raise ValueError(f"has {len(data)} bytes, and {self._sidecar.name} describes {expected}")
        shape = (self.height, self.width) if self.channels == 1 else (self.height, self.width, self.channels)
        values = np.frombuffer(data, kind, offset=start).reshape(shape)
        self._array: npt.NDArray[Any] = values.astype(kind.newbyteorder("="), copy=False)

    def read_values(self) -> Values:
        array = self._array
        full = ValueRange.of_bits(self._bits) if array.dtype.kind == "u" and self._bits <= 16 else None
        opaque = 1.0 if array.dtype.kind == "f" else float(np.iinfo(array.dtype).max)
        return Values((self.width, self.height), lambda top, bottom: array[top:bottom], full, opaque=opaque)

    def _describe(self) -> dict[str, Any]:
        name = self._sidecar.name
        try:
            found = json.loads(self._sidecar.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{name} must be such as {SIDECAR_EXAMPLE}, found {str(found)[:80]}")
        for key, value in found.items():
            if type(value) is not _SIDECAR.get(key):
                allowed = ", ".join(f"{known} ({kind.__name__})" for known, kind in _SIDECAR.items())
                raise ValueError(f"{name}: {key}={value!r} is not understood; allowed are {allowed}")
        missing = [key for key in ("width", "height", "dtype") if key not in found]
        if missing:
            raise ValueError(f"{name} lacks {' and '.join(missing)}; it must be such as {SIDECAR_EXAMPLE}")
        described: dict[str, Any] = {"channels": 1, "byte_order": "little", "header_bytes": 0, **found}
        for key, allowed_values in (("dtype", _KINDS), ("byte_order", _BYTE_ORDERS), ("channels", (1, 3, 4))):
            if described[key] not in allowed_values:
                raise ValueError(
                    f"{name}: {key}={described[key]!r} must be one of {', '.join(map(str, allowed_values))}"
                )
        bits = 8 * np.dtype(described["dtype"]).itemsize
        described.setdefault("bits", bits)
        if min(described["width"], described["height"]) < 1 or described["header_bytes"] < 0:
            raise ValueError(f"{name}: width and height must be at least 1, header_bytes at least 0")
        if not 8 <= described["bits"] <= bits:
            raise ValueError(f"{name}: bits={described['bits']} must be 8 to {bits} for {described['dtype']}")
        return described
