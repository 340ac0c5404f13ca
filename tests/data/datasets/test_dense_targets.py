"""Masks and depth maps: every format gives the values that were written, and every wrong file is named."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets.dense_targets import BadTargetError, DepthReader, read_binary_mask, read_class_mask

CLASSES_3 = np.array([[0, 1, 2], [2, 255, 0]], dtype=np.uint8)
SIZE = (2, 3)


def save(path: Path, values: Any, dtype: Any = np.uint8, **options: Any) -> Path:
    """Writes an image, or for the dtype ``P`` a palette image whose colours say nothing: all are the same grey."""
    if dtype == "P":
        image = Image.frombytes("P", values.shape[::-1], values.tobytes())
        image.putpalette([7] * 768)
    else:
        image = Image.fromarray(np.asarray(values, dtype=dtype))
    image.save(path, **options)
    return path


class TestClassMask:
    @pytest.mark.parametrize(
        ("name", "values", "dtype", "bits"),
        [
            ("a.png", CLASSES_3, np.uint8, 8),
            ("a.png", CLASSES_3, "P", 8),
            ("a.png", CLASSES_3, np.uint16, 16),
            ("a.png", np.array([[0, 1, 1]]), np.bool_, 1),
            ("a.png", np.array([[1]]), np.uint8, 8),
            ("a.tif", CLASSES_3, np.uint8, None),
            ("a.bmp", CLASSES_3, np.uint8, None),
            ("a.webp", CLASSES_3, np.uint8, None),
        ],
    )
    def test_values_are_those_of_the_file(
        self, tmp_path: Path, name: str, values: np.ndarray, dtype: Any, bits: int | None
    ) -> None:
        path = save(tmp_path / name, values, dtype, **({"lossless": True} if name == "a.webp" else {}))
        assert bits is None or path.read_bytes()[24] == bits
        mask = read_class_mask(path, values.shape, 3)
        assert (mask.dtype, mask.tolist()) == (np.uint8, values.tolist())

    def test_packed_palettes_and_equal_channels(self, tmp_path: Path) -> None:
        image = Image.frombytes("P", (3, 1), bytes([1, 0, 2]))
        image.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200])
        image.save(tmp_path / "a.png", bits=2)
        assert (tmp_path / "a.png").read_bytes()[24] == 2  # bits per pixel
        assert read_class_mask(tmp_path / "a.png", (1, 3), 3).tolist() == [[1, 0, 2]]
        path = save(tmp_path / "a.png", np.repeat(CLASSES_3[..., None], 3, axis=2))
        assert read_class_mask(path, SIZE, 3).tolist() == CLASSES_3.tolist()

    @pytest.mark.parametrize(
        ("name", "values", "dtype", "message"),
        [
            *(("a.png", np.tile(np.eye(3)[c], (2, 3, 1)), np.uint8, "is a colour image; a mask") for c in range(3)),
            ("a.png", np.zeros((2, 3, 4)), np.uint8, "is of the kind RGBA"),
            ("a.png", CLASSES_3 + (CLASSES_3 == 2), np.uint8, r"holds the value 3; allowed are 0 to 2 .* and 255"),
            ("a.png", [[0, 256]], np.uint16, "holds the value 256"),
            ("a.png", [[0, 65535]], np.uint16, "holds the value 65535"),
            ("a.tif", [[-1, 0]], np.int32, "holds the value -1"),
            ("a.tif", [[0.5, 0]], np.float32, "holds floating-point numbers"),
        ],
    )  # fmt: skip
    def test_what_is_no_mask(self, tmp_path: Path, name: str, values: Any, dtype: Any, message: str) -> None:
        path = save(tmp_path / name, values, dtype)
        with pytest.raises(BadTargetError, match=rf"{name}: {message}"):
            read_class_mask(path, np.shape(values)[:2], 3)

    def test_another_size(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", CLASSES_3)
        with pytest.raises(BadTargetError, match=r"is 3x2 pixels \(width x height\), its image is 7x5$"):
            read_class_mask(path, (5, 7), 3)
        with pytest.raises(BadTargetError, match="its image is 2x3; it is turned: the image's EXIF orientation counts"):
            read_class_mask(path, (3, 2), 3)


class TestBinaryMask:
    def test_both_conventions_and_no_other_value(self, tmp_path: Path) -> None:
        for values in ([0, 1, 0], [0, 0, 0], [1, 1, 1]):
            for factor, dtype in ((1, np.uint8), (255, np.uint8), (1, np.bool_)):
                mask = read_binary_mask(save(tmp_path / "a.png", np.multiply([values], factor), dtype), (1, 3))
                assert (mask.dtype, mask.tolist()) == (np.uint8, [values])
        for values, message in (
            ([0, 2, 255], "holds the value 2; a mask of background and defect"),
            ([0, 254, 255], "holds the value 254"),
            ([0, 1, 255], "holds both 1 and 255"),
        ):
            with pytest.raises(BadTargetError, match=rf"a\.png: {message}"):
                read_binary_mask(save(tmp_path / "a.png", [values]), (1, 3))

    def test_masks_are_not_held_to_pillows_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = save(tmp_path / "a.png", np.ones((100, 100)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert read_binary_mask(path, (100, 100)).all()


class TestDepth:
    def test_images_with_scale_and_unknown_pixels(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", [[0, 1000], [2500, 65535]], np.uint16)
        depth = DepthReader(scale=1 / 1000, invalid=0).read(path, (2, 2))
        assert depth.dtype == np.float32
        np.testing.assert_allclose(depth, [[np.nan, 1], [2.5, 65.535]], rtol=1e-6)
        assert DepthReader(allow_zero=True).read(path, (2, 2)).tolist() == [[0, 1000], [2500, 65535]]
        path = save(tmp_path / "a.tif", [[0.25, 3.5]], np.float32)
        assert DepthReader().read(path, (1, 2)).tolist() == [[0.25, 3.5]]

    def test_arrays_in_which_infinity_and_not_a_number_are_unknown(self, tmp_path: Path) -> None:
        for dtype in (np.float16, np.float32, np.float64, np.uint8, np.int64):
            np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4]], dtype))
            assert DepthReader(scale=0.5).read(tmp_path / "a.npy", (2, 2)).tolist() == [[0.5, 1], [1.5, 2]]
        np.save(tmp_path / "a.npy", np.array([[np.nan, np.inf, -np.inf, -999.9, 2]], np.float32))
        depth = DepthReader(invalid=-999.9).read(tmp_path / "a.npy", (1, 5))
        np.testing.assert_array_equal(depth, [[np.nan, np.nan, np.nan, np.nan, 2]])

    def test_a_map_without_measurements_is_unknown_and_reported_once(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        reader = DepthReader(invalid=0)
        paths = [save(tmp_path / f"{number}.png", [[0, 0]], np.uint16) for number in range(2)]
        for path in paths:
            assert np.isnan(reader.read(path, (1, 2))).all()
        (record,) = caplog.records
        assert (record.levelno, reader.num_empty) == (logging.WARNING, 2)
        assert record.getMessage().startswith(f"{paths[0]}: nothing was measured")

    @pytest.mark.parametrize(
        ("values", "options", "message"),
        [
            ([[0.0, 1.0]], {}, "holds the depth 0 .*must be above 0 where known"),
            ([[-1.5, 1.0]], {"scale": 2}, r"holds the depth -3 \(raw value x 2\); it must be above 0 where known"),
            ([[-1.5, 1.0]], {"allow_zero": True}, "must be 0 or more where known"),
            ([[1e30, 1.0]], {"scale": 1e30}, "too large for single precision"),
            (np.zeros((1, 2, 1)), {}, r"must be an array of numbers \[height, width\], found"),
            (np.zeros(2), {}, "must be an array of numbers"),
            (np.array([["a", "b"]]), {}, "must be an array of numbers"),
            (np.zeros((1, 2), bool), {}, "must be an array of numbers"),
            (np.array([[{}, {}]], object), {}, "cannot be read: .*allow_pickle"),
        ],
    )
    def test_bad_arrays(self, tmp_path: Path, values: Any, options: Any, message: str) -> None:
        np.save(tmp_path / "a.npy", values, allow_pickle=True)
        with pytest.raises(BadTargetError, match=rf"a\.npy: .*{message}"):
            DepthReader(**options).read(tmp_path / "a.npy", (1, 2))

    def test_images_that_are_no_depth_maps(self, tmp_path: Path) -> None:
        for values, dtype, message in (
            (np.ones((2, 3, 3)), np.uint8, "is of the kind RGB"),
            (CLASSES_3, "P", "is of the kind P"),
            ([[1, 2]], np.uint16, r"is 2x1 pixels \(width x height\), its image is 3x2"),
        ):
            with pytest.raises(BadTargetError, match=message):
                DepthReader().read(save(tmp_path / "a.png", values, dtype), SIZE)


class TestDamage:
    def test_missing_and_truncated_files(self, tmp_path: Path) -> None:
        image, array = tmp_path / "a.png", tmp_path / "a.npy"
        for path in (image, array):
            with pytest.raises(BadTargetError, match=rf"{path.name}: cannot be read: no such file"):
                DepthReader().read(path, (1, 1))
        save(image, np.random.default_rng(0).integers(0, 2, (64, 48)))
        os.truncate(image, image.stat().st_size - 60)
        with pytest.raises(BadTargetError, match=r"a\.png: cannot be read: .*truncated"):
            read_binary_mask(image, (64, 48))
        np.save(array, np.ones((16, 16)))
        for kept in (200, 5, 0):
            os.truncate(array, kept)
            with pytest.raises(BadTargetError, match=r"a\.npy: cannot be read: "):
                DepthReader().read(array, (16, 16))

    def test_the_error_is_a_value_error_that_survives_pickling(self) -> None:
        error = pickle.loads(pickle.dumps(BadTargetError(Path("a.png"), "is bad")))
        assert isinstance(error, ValueError)
        assert (error.path, error.reason, str(error)) == ("a.png", "is bad", "a.png: is bad")
