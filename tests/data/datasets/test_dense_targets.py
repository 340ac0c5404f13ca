"""Masks and depth maps: every format gives the values that were written, and every wrong file is named."""

import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets.dense_targets import (
    IGNORED,
    BadTargetError,
    DepthReader,
    MaskReader,
    MaskValues,
    read_binary_mask,
    read_class_mask,
)

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
            *(("a.png", np.tile(np.eye(3)[c], (2, 3, 1)), np.uint8, "is a colour image with .* #0") for c in range(3)),
            ("a.png", np.zeros((2, 3, 4)), np.uint8, "is transparent in places"),
            ("a.png", CLASSES_3 + (CLASSES_3 == 2), np.uint8, r"holds the values 0, 1, 3, 255; allowed are 0 to 2"),
            ("a.png", [[0, 7, 9]], np.uint8, "holds the values 0, 7, 9; .*in order .* such as mask_values=0,7,9"),
            ("a.png", [[0, 3, 7, 9, 255]], np.uint8, r".* such as mask_values=0,3,7\+9$"),
            ("a.png", [[9, 9]], np.uint8, r"holds the value 9; .* such as mask_values=9,\.\.\.$"),
            ("a.png", [range(99)], np.uint8, "holds .*, 6, 7 and 91 more; .*come of saving as JPEG or of resizing"),
            ("a.png", [[0, 256]], np.uint16, "holds the values 0, 256"),
            ("a.png", [[0, 65535]], np.uint16, "holds the values 0, 65535"),
            ("a.tif", [[-1, 0]], np.int32, "holds the values -1, 0"),
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
            ([0, 2, 255], r"holds the values 0, 2, 255; a mask of background and defect .* such as mask_values=0,2 \("),
            ([0, 254, 255], "holds the values 0, 254, 255"),
            ([0, 128, 128], ".* such as mask_values=0,128"),
            ([0, 1, 255], r"holds both 1 and 255; .*; mask_values=0,1\+255 takes both for defects"),
        ):
            with pytest.raises(BadTargetError, match=rf"a\.png: {message}"):
                read_binary_mask(save(tmp_path / "a.png", [values]), (1, 3))

    def test_masks_are_not_held_to_pillows_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = save(tmp_path / "a.png", np.ones((100, 100)))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert read_binary_mask(path, (100, 100)).all()


class TestMaskValues:
    """One painted square in every kind of file, and what its value means."""

    @pytest.mark.parametrize(
        ("values", "dtype", "text", "expected"),
        [
            ([[0, 255, 0]], np.uint8, "0,255", [[0, 1, 0]]),
            ([[0, 255, 0]], np.uint8, "255,0", [[1, 0, 1]]),
            ([[0, 255, 1]], np.uint8, "0,1", [[0, IGNORED, 1]]),  # 255 is ignored unless it is named
            ([[0, 255, 1]], np.uint8, "0,1+255", [[0, 1, 1]]),
            ([[0, 9, 128]], np.uint8, "0, 128, ignore=9", [[0, IGNORED, 1]]),
            ([[0, 255, 0]], "P", "0,255", [[0, 1, 0]]),
            ([[0, 1, 0]], np.bool_, "0,1", [[0, 1, 0]]),
            ([[0, 65535, 300]], np.uint16, "0,65535+300", [[0, 1, 1]]),
            (np.full((1, 3, 4), 255), np.uint8, "0,255", [[1, 1, 1]]),  # RGBA, nothing is transparent
            ([[[0, 0, 0], [255, 0, 0], [0, 0, 9]]], np.uint8, "#000000+#000009,#FF0000", [[0, 1, 0]]),
            ([[[9, 9, 9, 0], [255, 0, 0, 255], [0, 0, 0, 0]]], np.uint8, "#000000,#ff0000", [[0, 1, 0]]),
        ],
    )
    def test_values_mean_what_is_said(
        self, tmp_path: Path, values: Any, dtype: Any, text: str, expected: list[list[int]]
    ) -> None:
        values = np.array(values, np.uint8) if dtype == "P" else values
        path = save(tmp_path / "a.png", values, dtype)
        mask = MaskReader(2, named=True, values=MaskValues(text)).read(path, (1, 3), ())
        assert (mask.dtype, mask.tolist()) == (np.uint8, expected)

    def test_values_that_are_not_named_are_an_error(self, tmp_path: Path) -> None:
        for values, text, found in (([[7, 0, 3]], "0,255", "3, 7"), ([[[0, 0, 9]]], "#000000,#ff0000", "#000009")):
            path = save(tmp_path / "a.png", values)
            reader = MaskReader(2, named=True, values=MaskValues(text))
            with pytest.raises(
                BadTargetError, match=rf"a\.png: holds the values? {found}, which mask_values={text} does"
            ):
                reader.read(path, np.shape(values)[:2], ())

    @pytest.mark.parametrize(
        "text", ["", "0,", "0,x", "0,-1", "0,65536", "#ff", "0,#ff0000", "0,255,0", "0,1+1", "²,1"]
    )
    def test_wrong_texts_are_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"is no value; write the value of each class|names a value twice"):
            MaskValues(text)

    def test_every_class_needs_a_value(self) -> None:
        with pytest.raises(ValueError, match="mask_values=0,255 has values for 2 classes, the set has 3"):
            MaskReader(3, named=True, values=MaskValues("0,255"))
        assert MaskValues.from_json([0, [1, 2]]).classes == [[0], [1, 2]]
        for wrong in ({}, [], "0,255", [[]], [0.5, 1], [True, 1]):
            with pytest.raises(ValueError, match=r"must list the value of each class|is no value"):
                MaskValues.from_json(wrong)


class TestMeaningOf255:
    def test_is_an_error_where_no_mask_of_the_set_has_a_class(self, tmp_path: Path) -> None:
        paths = [save(tmp_path / f"{number}.png", [[0, 255]]) for number in range(3)]
        message = (
            r"0\.png: holds only 0 and 255, and none of the 3 masks looked at holds one of the classes 1 to 1: .* "
            "mask_values=0,255 where they are class 1, mask_values=0,1 where they are ignored"
        )
        with pytest.raises(BadTargetError, match=message):
            MaskReader(2, named=True).read(paths[0], (1, 2), paths)
        with pytest.raises(
            BadTargetError, match=r"holds only 255, and none of the 1 masks .*: mask_values=0,1,2 where they"
        ):
            MaskReader(3, named=True).read(save(tmp_path / "0.png", [[255, 255]]), (1, 2), paths[:1])

    def test_is_ignored_and_told_once_where_another_mask_has_a_class(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        paths = [save(tmp_path / f"{number}.png", [[0, value]]) for number, value in enumerate((255, 0, 255, 1))]
        reader = MaskReader(2, named=True)
        for path in paths[::2]:
            assert reader.read(path, (1, 2), [tmp_path / "missing.png", *paths]).tolist() == [[0, IGNORED]]
        (record,) = caplog.records
        assert "0.png holds only 0 and 255: its pixels of 255 are ignored, as other masks" in record.getMessage()

    def test_is_ignored_beside_a_class_in_the_same_mask(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        paths = [save(tmp_path / "0.png", [[1, 255]]), save(tmp_path / "1.png", [[0, 255]])]
        reader = MaskReader(2, named=True)
        assert [reader.read(path, (1, 2), ()).tolist() for path in paths] == [[[1, IGNORED]], [[0, IGNORED]]]
        assert not caplog.records


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
