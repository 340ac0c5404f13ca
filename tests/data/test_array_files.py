"""DICOM and raw values as image files: their numbers, what is white, and what is refused with the file's name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinov2.data.datasets import ImageFolder
from dinov2.data.decoding import decode_image, decode_levels, read_image_size, readable_endings, sample_values
from dinov2.data.reading import UnreadableImageError
from dinov2.data.value_range import ValueRange

pydicom = pytest.importorskip("pydicom")

VALUES = np.arange(6 * 8, dtype=np.int16).reshape(6, 8) * 50 - 1000
EXPLICIT, JPEG_2000 = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.90"


def dicom(values: np.ndarray, *, syntax: str = EXPLICIT, **tags: Any) -> bytes:
    import io

    from pydicom.dataset import FileDataset, FileMetaDataset

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    file.Rows, file.Columns = values.shape[:2]
    file.SamplesPerPixel = 1 if values.ndim == 2 else 3
    file.BitsAllocated = file.BitsStored = 8 * values.dtype.itemsize
    file.HighBit = file.BitsStored - 1
    file.PixelRepresentation = int(values.dtype.kind == "i")
    file.PhotometricInterpretation = "MONOCHROME2" if values.ndim == 2 else "RGB"
    if values.ndim == 3:
        file.PlanarConfiguration = 0
    for name, value in tags.items():
        if value is None:
            delattr(file, name)
        else:
            setattr(file, name, value)
    if syntax == EXPLICIT:
        file.PixelData = values.tobytes()
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def share(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((values - low) / (high - low), 0, 1) * 65535)


@pytest.mark.parametrize(
    ("tags", "low", "high"),
    [
        ({}, -32768, 32767),
        ({"RescaleSlope": 2, "RescaleIntercept": -24}, 2 * -32768 - 24, 2 * 32767 - 24),
        ({"WindowCenter": 200, "WindowWidth": 401}, -0.5, 399.5),
        ({"WindowCenter": [200, 7], "WindowWidth": [400, 9], "VOILUTFunction": "LINEAR_EXACT"}, 0, 400),
        ({"PhotometricInterpretation": "MONOCHROME1", "WindowCenter": 0, "WindowWidth": 1001}, -500.5, 499.5),
    ],
)
def test_values_of_dicom_are_rescaled_and_windowed(tags: dict[str, Any], low: float, high: float) -> None:
    data = dicom(VALUES, **tags)
    real = VALUES.astype(np.float64) * tags.get("RescaleSlope", 1) + tags.get("RescaleIntercept", 0)
    expected = share(real, low, high)
    inverted = tags.get("PhotometricInterpretation") == "MONOCHROME1"
    found = decode_levels(data, "a.dcm")
    np.testing.assert_allclose(found, 65535 - expected if inverted else expected, atol=1)
    named = share(real, 0, 1000)
    np.testing.assert_allclose(
        decode_levels(data, "a.dcm", ValueRange(0, 1000)), 65535 - named if inverted else named, atol=1
    )
    assert read_image_size(data, "a.dcm") == (6, 8)
    np.testing.assert_allclose(np.asarray(decode_image(data, "a.dcm"))[..., 2], found / 257, atol=1)
    sample = sample_values(data, "a.dcm")
    assert sample is not None
    assert sample[1] == ValueRange(low, high)


def test_colours_of_dicom_and_stored_bits() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(decode_image(dicom(colours), "a.dcm")), colours)
    twelve = dicom(np.full((6, 8), 4095, np.uint16), BitsStored=12, HighBit=11)
    assert (decode_levels(twelve, "a.dcm") == 65535).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dicom(VALUES, syntax=JPEG_2000), "DICOM compressed as JPEG 2000 Image Compression .*decompress it"),
        (dicom(VALUES, NumberOfFrames=3), "DICOM of 3 frames is not read"),
        (
            dicom(VALUES, PhotometricInterpretation="PALETTE COLOR"),
            "DICOM of PALETTE COLOR is not read; allowed",
        ),
        (dicom(VALUES, WindowCenter=1, WindowWidth=2, VOILUTFunction="SIGMOID"), "window is SIGMOID"),
        (dicom(VALUES, Columns=None, BitsStored=None), "DICOM without Columns, BitsStored"),
        (dicom(VALUES)[:-9], "a.dcm"),
    ],
)
def test_dicom_that_is_not_read_is_an_error_with_the_file(data: bytes, message: str) -> None:
    with pytest.raises(UnreadableImageError, match=message) as error:
        decode_levels(data, "part/a.dcm")
    assert error.value.path == "part/a.dcm"


def raw(path: Path, values: np.ndarray, **described: Any) -> bytes:
    content = {"width": values.shape[1], "height": values.shape[0], "dtype": values.dtype.name, **described}
    path.with_name(path.name + ".json").write_text(json.dumps(content))
    kind = values.dtype.newbyteorder(">" if described.get("byte_order") == "big" else "<")
    data = b"x" * described.get("header_bytes", 0) + values.astype(kind).tobytes()
    path.write_bytes(data)
    return data


@pytest.mark.parametrize("more", [{}, {"byte_order": "big", "header_bytes": 5}, {"bits": 12}])
def test_raw_values_are_read_by_their_description(tmp_path: Path, more: dict[str, Any]) -> None:
    values = np.random.default_rng(1).integers(0, 4096, (6, 8)).astype(np.uint16)
    data = raw(tmp_path / "a.raw", values, **more)
    expected = share(values.astype(float), 0, 4095) if "bits" in more else values
    np.testing.assert_array_equal(decode_levels(data, str(tmp_path / "a.raw")), expected)
    dataset = ImageFolder(root=str(tmp_path), labels="none")
    assert [Path(path).name for path in dataset.get_image_paths()] == ["a.raw"]
    np.testing.assert_allclose(np.asarray(dataset.get_image(0))[..., 0], expected / 257, atol=0.51)
    assert dataset.get_image_size(0) == (6, 8)
    assert {".raw", ".dcm"} <= readable_endings()


def test_raw_floats_and_colours(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 48, dtype=np.float32).reshape(6, 8)
    path = str(tmp_path / "a.raw")
    data = raw(tmp_path / "a.raw", values)
    np.testing.assert_allclose(decode_levels(data, path, ValueRange(0, 1)), share(values, 0, 1), atol=1)
    with pytest.raises(UnreadableImageError, match="does not say which values are black and white"):
        decode_levels(data, path)
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    found = np.asarray(decode_image(raw(tmp_path / "a.raw", colours, channels=3), path))
    np.testing.assert_array_equal(found, colours)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (None, r"raw values need a description in a\.raw\.json, such as"),
        ("{", r"a\.raw\.json is no JSON"),
        ('{"width": 8, "height": 6}', r"a\.raw\.json lacks dtype"),
        ('{"width": 8, "height": 6, "dtype": "uint16", "bitz": 12}', "bitz=12 is not understood; allowed are width"),
        ('{"width": 8, "height": 6, "dtype": "complex64"}', "dtype='complex64' must be one of uint8"),
        ('{"width": 8, "height": 7, "dtype": "uint16"}', r"has 96 bytes, and a\.raw\.json describes 112"),
        ('{"width": 8, "height": 6, "dtype": "uint16", "bits": 17}', "bits=17 must be 8 to 16"),
    ],
)
def test_descriptions_of_raw_values_that_are_wrong(tmp_path: Path, described: str | None, message: str) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(96))
    if described is not None:
        (tmp_path / "a.raw.json").write_text(described)
    with pytest.raises(UnreadableImageError, match=message):
        decode_levels(bytes(96), str(tmp_path / "a.raw"))
