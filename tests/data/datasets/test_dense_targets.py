"""Masks and depth maps: every format gives the values that were written, and every wrong file is named."""

import logging
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
    Image.fromarray(np.asarray(values, dtype=dtype)).save(path, **options)
    return path


def save_palette(path: Path, values: np.ndarray) -> Path:
    """A palette image whose colours say nothing about its indices: all of them are the same grey."""
    image = Image.frombytes("P", values.shape[::-1], values.tobytes())
    image.putpalette([7] * 768)
    image.save(path)
    return path


class TestClassMask:
    def test_grey(self, tmp_path: Path) -> None:
        mask = read_class_mask(save(tmp_path / "a.png", CLASSES_3), SIZE, 3)
        assert mask.dtype == np.uint8
        assert mask.tolist() == CLASSES_3.tolist()

    def test_palette_images_keep_their_indices(self, tmp_path: Path) -> None:
        assert read_class_mask(save_palette(tmp_path / "a.png", CLASSES_3), SIZE, 3).tolist() == CLASSES_3.tolist()

    def test_palette_of_few_colours_is_packed_and_keeps_its_indices_too(self, tmp_path: Path) -> None:
        image = Image.frombytes("P", (3, 1), bytes([1, 0, 2]))
        image.putpalette([9, 9, 9, 200, 0, 0, 0, 0, 200])
        image.save(tmp_path / "a.png", bits=2)
        assert (tmp_path / "a.png").read_bytes()[24] == 2  # bits per pixel
        assert read_class_mask(tmp_path / "a.png", (1, 3), 3).tolist() == [[1, 0, 2]]

    def test_16_bit(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", CLASSES_3, np.uint16)
        assert path.read_bytes()[24] == 16
        assert read_class_mask(path, SIZE, 3).tolist() == CLASSES_3.tolist()

    def test_one_bit(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", [[0, 1, 1]], np.bool_)
        assert path.read_bytes()[24] == 1
        assert read_class_mask(path, (1, 3), 2).tolist() == [[0, 1, 1]]

    @pytest.mark.parametrize("kind", ["tif", "bmp", "webp"])
    def test_other_lossless_formats(self, tmp_path: Path, kind: str) -> None:
        options = {"lossless": True} if kind == "webp" else {}
        path = save(tmp_path / f"a.{kind}", CLASSES_3, **options)
        assert read_class_mask(path, SIZE, 3).tolist() == CLASSES_3.tolist()

    def test_rgb_of_equal_channels(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", np.repeat(CLASSES_3[..., None], 3, axis=2))
        assert read_class_mask(path, SIZE, 3).tolist() == CLASSES_3.tolist()

    @pytest.mark.parametrize("channel", [0, 1, 2])
    def test_colours_are_refused(self, tmp_path: Path, channel: int) -> None:
        colours = np.zeros((2, 3, 3), np.uint8)
        colours[1, 1, channel] = 1
        with pytest.raises(BadTargetError, match=r"a\.png: is a colour image; a mask has one channel"):
            read_class_mask(save(tmp_path / "a.png", colours), SIZE, 3)

    def test_alpha_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadTargetError, match="is of the kind RGBA"):
            read_class_mask(save(tmp_path / "a.png", np.zeros((2, 3, 4))), SIZE, 3)

    def test_unknown_value(self, tmp_path: Path) -> None:
        with pytest.raises(BadTargetError, match=r"a\.png: holds the value 2; allowed are 0 to 1 .* and 255"):
            read_class_mask(save(tmp_path / "a.png", CLASSES_3), SIZE, 2)

    @pytest.mark.parametrize(("values", "wrong"), [([[0, 256]], 256), ([[0, 65535]], 65535)])
    def test_value_past_8_bits(self, tmp_path: Path, values: Any, wrong: int) -> None:
        with pytest.raises(BadTargetError, match=f"holds the value {wrong}"):
            read_class_mask(save(tmp_path / "a.png", values, np.uint16), (1, 2), 3)

    def test_negative_value(self, tmp_path: Path) -> None:
        with pytest.raises(BadTargetError, match="holds the value -1"):
            read_class_mask(save(tmp_path / "a.tif", [[-1, 0]], np.int32), (1, 2), 3)

    def test_floats(self, tmp_path: Path) -> None:
        with pytest.raises(BadTargetError, match="holds floating-point numbers"):
            read_class_mask(save(tmp_path / "a.tif", [[0.5, 0]], np.float32), (1, 2), 3)

    def test_another_size(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", CLASSES_3)
        with pytest.raises(BadTargetError, match=r"is 3x2 pixels \(width x height\), its image is 7x5$"):
            read_class_mask(path, (5, 7), 3)
        with pytest.raises(BadTargetError, match="its image is 2x3; it is turned: the image's EXIF orientation counts"):
            read_class_mask(path, (3, 2), 3)

    def test_one_pixel(self, tmp_path: Path) -> None:
        assert read_class_mask(save(tmp_path / "a.png", [[1]]), (1, 1), 2).tolist() == [[1]]


class TestBinaryMask:
    @pytest.mark.parametrize("high", [1, 255])
    def test_both_conventions(self, tmp_path: Path, high: int) -> None:
        mask = read_binary_mask(save(tmp_path / "a.png", [[0, high, 0]]), (1, 3))
        assert (mask.dtype, mask.tolist()) == (np.uint8, [[0, 1, 0]])

    def test_one_bit(self, tmp_path: Path) -> None:
        assert read_binary_mask(save(tmp_path / "a.png", [[0, 1]], np.bool_), (1, 2)).tolist() == [[0, 1]]

    @pytest.mark.parametrize(("values", "expected"), [([[0, 0]], 0), ([[255, 255]], 1), ([[1, 1]], 1)])
    def test_one_value_throughout(self, tmp_path: Path, values: Any, expected: int) -> None:
        assert (read_binary_mask(save(tmp_path / "a.png", values), (1, 2)) == expected).all()

    @pytest.mark.parametrize("value", [2, 128, 254])
    def test_any_other_value_is_named(self, tmp_path: Path, value: int) -> None:
        with pytest.raises(BadTargetError, match=rf"a\.png: holds the value {value}; a mask of background and defect"):
            read_binary_mask(save(tmp_path / "a.png", [[0, value, 255]]), (1, 3))

    def test_mixed_conventions(self, tmp_path: Path) -> None:
        with pytest.raises(BadTargetError, match="holds both 1 and 255"):
            read_binary_mask(save(tmp_path / "a.png", [[0, 1, 255]]), (1, 3))


class TestDepth:
    def test_16_bit_with_scale_and_invalid(self, tmp_path: Path) -> None:
        raw = np.array([[0, 1000], [2500, 65535]], np.uint16)
        depth = DepthReader(scale=1 / 1000, invalid=0).read(save(tmp_path / "a.png", raw, np.uint16), (2, 2))
        assert depth.dtype == np.float32
        np.testing.assert_allclose(depth, [[np.nan, 1], [2.5, 65.535]], rtol=1e-6)

    def test_without_an_invalid_value_zero_is_a_height(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", [[0, 7]], np.uint16)
        assert DepthReader(allow_zero=True).read(path, (1, 2)).tolist() == [[0, 7]]

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint8, np.int64])
    def test_arrays(self, tmp_path: Path, dtype: Any) -> None:
        np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4]], dtype))
        assert DepthReader(scale=0.5).read(tmp_path / "a.npy", (2, 2)).tolist() == [[0.5, 1], [1.5, 2]]

    def test_float_tiff(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.tif", [[0.25, 3.5]], np.float32)
        assert DepthReader().read(path, (1, 2)).tolist() == [[0.25, 3.5]]

    def test_infinity_and_not_a_number_are_unknown(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([[np.nan, np.inf, -np.inf, -999.9, 2]], np.float32))
        depth = DepthReader(invalid=-999.9).read(tmp_path / "a.npy", (1, 5))
        assert np.isnan(depth).tolist() == [[True, True, True, True, False]]
        assert depth[0, 4] == 2

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
        ],
    )
    def test_out_of_range(self, tmp_path: Path, values: Any, options: Any, message: str) -> None:
        np.save(tmp_path / "a.npy", np.array(values, np.float64))
        with pytest.raises(BadTargetError, match=rf"a\.npy: .*{message}"):
            DepthReader(**options).read(tmp_path / "a.npy", (1, 2))

    @pytest.mark.parametrize(
        "values", [np.zeros((1, 2, 1)), np.zeros(2), np.array([["a", "b"]]), np.zeros((1, 2), bool)]
    )
    def test_other_arrays(self, tmp_path: Path, values: np.ndarray) -> None:
        np.save(tmp_path / "a.npy", values)
        with pytest.raises(BadTargetError, match=r"must be an array of numbers \[height, width\], found"):
            DepthReader().read(tmp_path / "a.npy", (1, 2))

    def test_pickles_in_arrays_are_refused(self, tmp_path: Path) -> None:
        np.save(tmp_path / "a.npy", np.array([[{}, {}]], object), allow_pickle=True)
        with pytest.raises(BadTargetError, match=r"a\.npy: cannot be read: .*allow_pickle"):
            DepthReader().read(tmp_path / "a.npy", (1, 2))

    def test_colours_and_palettes_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BadTargetError, match="is of the kind RGB"):
            DepthReader().read(save(tmp_path / "a.png", np.ones((2, 3, 3))), SIZE)
        with pytest.raises(BadTargetError, match="is of the kind P"):
            DepthReader().read(save_palette(tmp_path / "b.png", CLASSES_3), SIZE)

    def test_another_size(self, tmp_path: Path) -> None:
        with pytest.raises(BadTargetError, match=r"is 2x1 pixels \(width x height\), its image is 4x3"):
            DepthReader().read(save(tmp_path / "a.png", [[1, 2]], np.uint16), (3, 4))


class TestDamage:
    @pytest.mark.parametrize("name", ["a.png", "a.npy"])
    def test_missing(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(BadTargetError, match=rf"{name}: cannot be read: no such file"):
            DepthReader().read(tmp_path / name, (1, 1))

    def test_truncated_images(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 2, (64, 48))
        path = save(tmp_path / "a.png", noise)
        path.write_bytes(path.read_bytes()[:-60])
        with pytest.raises(BadTargetError, match=r"a\.png: cannot be read: .*truncated"):
            read_binary_mask(path, (64, 48))

    @pytest.mark.parametrize("kept", [0, 5, 200])
    def test_truncated_arrays(self, tmp_path: Path, kept: int) -> None:
        path = tmp_path / "a.npy"
        np.save(path, np.ones((16, 16)))
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(BadTargetError, match=r"a\.npy: cannot be read: "):
            DepthReader().read(path, (16, 16))

    def test_the_error_is_a_value_error_that_survives_pickling(self) -> None:
        error = pickle.loads(pickle.dumps(BadTargetError(Path("a.png"), "is bad")))
        assert isinstance(error, ValueError)
        assert (error.path, error.reason, str(error)) == ("a.png", "is bad", "a.png: is bad")


def test_masks_are_not_held_to_pillows_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.png", np.ones((100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_binary_mask(path, (100, 100)).all()
