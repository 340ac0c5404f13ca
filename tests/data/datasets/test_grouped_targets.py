"""GroupedJSON for task heads: masks, height and depth maps, several labels at once."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import IGNORED, BadTargetError, DepthSource, GroupedJSON, MaskSource
from dinov2.data.prepare.demo_parts import make_demo_parts

CLASSES = ["good", "scratched", "dented"]


def row(number: int, **keys: Any) -> dict[str, Any]:
    return {"img_path": f"{number}.png", "group_id": "g", **keys}


def make_set(root: Path, rows: list[dict[str, Any]], size: tuple[int, int] = (4, 3), **metainfo: Any) -> GroupedJSON:
    """Writes a set of black photos of a size (width, height)."""
    (root / "annotations").mkdir(exist_ok=True)
    content = {"metainfo": {"classes": CLASSES, **metainfo}, "data_list": rows}
    (root / "annotations" / "train.json").write_text(json.dumps(content))
    for entry in rows:
        Image.new("RGB", size).save(root / entry["img_path"])
    return GroupedJSON(root, "TRAIN")


def save(path: Path, values: Any, dtype: Any = np.uint8) -> None:
    Image.fromarray(np.asarray(values, dtype)).save(path)


class TestMasks:
    def test_binary_masks_and_rows_without(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        mask = np.array([[0, 0, 255, 0], [0, 255, 255, 0], [0, 0, 0, 0]], np.uint8)
        save(tmp_path / "mask.png", mask)
        rows = [row(0, gt_label=1, mask_path="mask.png"), row(1, gt_label=0), row(2, gt_label=1), row(3)]
        dataset = make_set(tmp_path, rows)
        assert isinstance(dataset, MaskSource)
        assert not caplog.records  # a set may also be opened for something else
        assert dataset.get_mask(0).tolist() == (mask // 255).tolist()
        for index, value in ((1, 0), (2, IGNORED), (3, IGNORED)):
            found = dataset.get_mask(index)
            assert (found.dtype, found.shape, set(found.ravel().tolist())) == (np.uint8, (3, 4), {value})
        assert dataset.mask_classes == ("background", "defect")
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "3 of 4 rows have no mask_path; 1 of them have gt_label 0 (good)" in record.getMessage()
        assert "the other 2 are ignored" in record.getMessage()

    def test_a_copy_in_a_worker_does_not_warn_again(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        dataset = make_set(tmp_path, [row(0, gt_label=0), row(1)])
        assert dataset.mask_classes == ("background", "defect")
        caplog.clear()
        assert pickle.loads(pickle.dumps(dataset)).get_mask(1).tolist() == [[IGNORED] * 4] * 3
        assert not caplog.records

    def test_good_photos_without_masks_are_no_reason_to_warn(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        save(tmp_path / "mask.png", np.zeros((3, 4)))
        dataset = make_set(tmp_path, [row(0, gt_label=1, mask_path="mask.png"), row(1, gt_label=0)])
        with caplog.at_level(logging.INFO, logger="dinov2"):
            dataset.get_mask(0)
        assert [record.levelno for record in caplog.records] == [logging.INFO]

    def test_named_classes(self, tmp_path: Path) -> None:
        values = np.array([[0, 1, 2, 255], [0, 0, 0, 0], [1, 1, 1, 1]], np.uint8)
        save(tmp_path / "mask.png", values)
        names = ["background", "scratch", "dent"]
        dataset = make_set(tmp_path, [row(0, gt_label=0, mask_path="./mask.png")], mask_classes=names)
        assert dataset.mask_classes == tuple(names)
        assert dataset.get_mask(0).tolist() == values.tolist()
        assert dataset.get_annotation(0)["mask_path"] == "mask.png"
        fewer = make_set(tmp_path, [row(0, mask_path="mask.png")], mask_classes=names[:2])
        with pytest.raises(BadTargetError, match=r"mask\.png: holds the value 2; allowed are 0 to 1"):
            fewer.get_mask(0)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (np.full((3, 4), 37), "holds the value 37"),
            (np.zeros((3, 5)), "is 5x3 pixels .* its photo is 4x3"),
            (np.zeros((4, 3)), "is 3x4 pixels .* it is turned"),
            (None, "no such file"),
        ],
    )
    def test_bad_masks_are_named(self, tmp_path: Path, values: np.ndarray | None, message: str) -> None:
        if values is not None:
            save(tmp_path / "mask.png", values)
        with pytest.raises(BadTargetError, match=rf"{tmp_path}/mask\.png: .*{message}"):
            make_set(tmp_path, [row(0, mask_path="mask.png")]).get_mask(0)

    def test_masks_fit_the_upright_photo(self, tmp_path: Path) -> None:
        save(tmp_path / "mask.png", np.zeros((4, 3)))
        dataset = make_set(tmp_path, [row(0, mask_path="mask.png"), row(1, gt_label=0)])
        exif = Image.Exif()
        exif[0x0112] = 6
        for number in range(2):
            Image.new("RGB", (4, 3)).save(tmp_path / f"{number}.png", exif=exif)
        assert dataset.get_image(0).size == (3, 4)
        assert dataset.get_mask(0).shape == dataset.get_mask(1).shape == (4, 3)

    def test_nothing_known_about_any_pixel(self, tmp_path: Path) -> None:
        dataset = make_set(tmp_path, [row(0, gt_label=1), row(1)])
        for use in (lambda: dataset.get_mask(0), lambda: dataset.mask_classes):
            with pytest.raises(ValueError, match=r"train\.json: no row has 'mask_path' and none has gt_label 0"):
                use()

    def test_one_pixel(self, tmp_path: Path) -> None:
        save(tmp_path / "mask.png", [[255]])
        dataset = make_set(tmp_path, [row(0, mask_path="mask.png"), row(1, gt_label=0)], size=(1, 1))
        assert [dataset.get_mask(index).tolist() for index in range(2)] == [[[1]], [[0]]]

    @pytest.mark.slow
    def test_photos_of_20_000_pixels_a_side(self, tmp_path: Path) -> None:
        """Both decode, though Pillow's own limit is less than half of it."""
        dataset = make_set(tmp_path, [row(0, mask_path="mask.png")])
        Image.new("L", (20_000, 20_000), 1).save(tmp_path / "mask.png", compress_level=1)
        Image.new("L", (20_000, 20_000), 9).save(tmp_path / "0.png", compress_level=1)
        assert dataset.get_image_size(0) == (20_000, 20_000)
        mask = dataset.get_mask(0)
        assert (mask.shape, int(mask.min()), int(mask.max())) == ((20_000, 20_000), 1, 1)
        del mask
        image = dataset.get_image(0)
        assert (image.size, image.getpixel((19_999, 19_999))) == ((20_000, 20_000), (9, 9, 9))

    def test_magnetic_tile(self, magnetic_tile: Path) -> None:
        dataset = GroupedJSON(magnetic_tile, "VAL")
        for index in range(0, len(dataset), 10):
            mask, image = dataset.get_mask(index), dataset.get_image(index)
            assert mask.shape == (image.height, image.width)
            assert mask.max() == dataset.get_target(index)


class TestDepth:
    def test_heights_of_the_demo_parts(self, tmp_path: Path) -> None:
        make_demo_parts(tmp_path / "parts", parts=6, photos=1, image_size=32)
        dataset = GroupedJSON(tmp_path / "parts", "TRAIN")
        assert isinstance(dataset, DepthSource)
        assert dataset.depth_unit == "um"
        for index in range(len(dataset)):
            stored = np.asarray(Image.open(dataset.root / dataset.get_annotation(index)["height_path"]))
            height = dataset.get_depth(index)
            assert height.dtype == np.float32
            assert height.tolist() == stored.tolist()
            assert dataset.get_mask(index).max() == dataset.get_target(index)

    def test_depths_with_scale_and_unknown_pixels(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        save(tmp_path / "depth.png", [[0, 1000, 2000, 3000]], np.uint16)
        np.save(tmp_path / "depth.npy", np.array([[0, 4, 8, np.nan]], np.float32))
        rows = [row(0, depth_path="depth.png"), row(1, depth_path="depth.npy"), row(2)]
        dataset = make_set(tmp_path, rows, size=(4, 1), depth_unit="m", depth_scale=0.001)
        np.testing.assert_allclose(dataset.get_depth(0), [[np.nan, 1, 2, 3]], rtol=1e-6)
        np.testing.assert_allclose(dataset.get_depth(1), [[np.nan, 0.004, 0.008, np.nan]], rtol=1e-6)
        assert np.isnan(dataset.get_depth(2)).all()
        assert dataset.get_depth(2).shape == (1, 4)
        assert dataset.depth_unit == "m"
        (record,) = caplog.records
        assert "1 of 3 rows have no depth_path" in record.getMessage()

    def test_invalid_values_can_be_chosen(self, tmp_path: Path) -> None:
        save(tmp_path / "depth.png", [[0, 65535]], np.uint16)
        height = make_set(
            tmp_path, [row(0, height_path="depth.png")], size=(2, 1), depth_invalid=65535, depth_unit="nm"
        )
        np.testing.assert_equal(height.get_depth(0), [[0, np.nan]])
        assert height.depth_unit == "nm"
        depth = make_set(tmp_path, [row(0, depth_path="depth.png")], size=(2, 1), depth_invalid=None, depth_unit="mm")
        with pytest.raises(BadTargetError, match=r"depth\.png: holds the depth 0 .*must be above 0"):
            depth.get_depth(0)

    def test_no_depth(self, tmp_path: Path) -> None:
        dataset = make_set(tmp_path, [row(0)])
        for use in (lambda: dataset.get_depth(0), lambda: dataset.depth_unit):
            with pytest.raises(ValueError, match=r"train\.json: no row has 'depth_path' or 'height_path'"):
                use()


class TestSeveralLabels:
    def test_labels(self, tmp_path: Path) -> None:
        rows = [
            row(0, gt_labels=[2, 1]),
            row(1, gt_labels=[]),
            row(2, gt_label=2),
            row(3, gt_label=0, gt_labels=[1]),
            row(4),
        ]
        dataset = make_set(tmp_path, rows)
        assert dataset.multi_label
        assert [dataset.get_labels(index) for index in range(4)] == [(2, 1), (), (2,), (1,)]
        assert dataset.get_targets().tolist() == [-1, -1, 2, 0, -1]
        assert [dataset.get_annotation(index) for index in range(5)] == rows
        assert dataset.get_labels(-2) == (1,)
        with pytest.raises(ValueError, match=r"train\.json: data_list\[4\]: neither 'gt_labels' nor 'gt_label'"):
            dataset.get_labels(4)

    def test_sets_of_one_label(self, tmp_path: Path) -> None:
        dataset = make_set(tmp_path, [row(0, gt_label=1), row(1, gt_label=0)])
        assert not dataset.multi_label
        assert [dataset.get_labels(index) for index in range(2)] == [(1,), (0,)]


class TestChecks:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"mask_path": 3}, "'mask_path' must be text, found a number 3"),
            ({"mask_path": ["a.png"]}, "'mask_path' must be text, found a list"),
            ({"mask_path": ""}, "'mask_path' '' is empty"),
            ({"mask_path": "/a.png"}, "'mask_path' '/a.png' is absolute"),
            ({"mask_path": "a/../../b.png"}, "'mask_path' 'a/../../b.png' leaves the set's root"),
            ({"height_path": "../b.png"}, "'height_path' '../b.png' leaves the set's root"),
            ({"depth_path": True}, "'depth_path' must be text, found true or false"),
            ({"gt_labels": 1}, "'gt_labels' must be a list of whole numbers, found a number"),
            (
                {"gt_labels": [0, 3]},
                r"'gt_labels' has 3, outside the classes; allowed are 0 to 2",
            ),
            ({"gt_labels": [-1]}, "'gt_labels' has -1, outside the classes"),
            ({"gt_labels": [1.0]}, "'gt_labels' must hold whole numbers, found a number 1.0"),
            ({"gt_labels": [True]}, "'gt_labels' must hold whole numbers, found true or false"),
            ({"gt_labels": [[1]]}, "'gt_labels' must hold whole numbers, found a list"),
            ({"gt_labels": ["1"]}, "'gt_labels' must hold whole numbers, found text '1'"),
            ({"gt_labels": [1, 2, 1]}, r"'gt_labels' \[1, 2, 1\] names a class twice"),
        ],
    )
    def test_rows(self, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
        rows = [row(0), row(1, mask_path="m.png", gt_labels=[1]), row(2, **keys)]
        with pytest.raises(ValueError, match=rf"train\.json: data_list\[2\]: {message}"):
            make_set(tmp_path, rows, depth_unit="m")

    def test_labels_without_classes(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"'gt_labels' has 0, outside the classes; allowed are none"):
            make_set(tmp_path, [row(0, gt_labels=[0])], classes=None)

    def test_heights_and_depths_in_one_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"train\.json: data_list has both 'height_path' and 'depth_path'"):
            make_set(tmp_path, [row(0, height_path="a.png"), row(1, depth_path="b.png")], depth_unit="m")

    @pytest.mark.parametrize(
        ("metainfo", "message"),
        [
            ({"mask_classes": "scratch"}, "metainfo.mask_classes must be a list of names, found 'scratch'"),
            ({"mask_classes": ["a", "a"]}, "metainfo.mask_classes names 'a' twice"),
            ({"mask_classes": ["a"]}, "metainfo.mask_classes must have 2 to 255 names, found 1"),
            ({"mask_classes": [str(i) for i in range(256)]}, "metainfo.mask_classes must have 2 to 255 names"),
            ({"depth_unit": None}, "metainfo.depth_unit must name the unit of the depth maps, .* found None"),
            ({"depth_unit": 3}, "metainfo.depth_unit must name the unit"),
            ({"depth_scale": 0}, "metainfo.depth_scale must be a number above 0"),
            ({"depth_scale": float("nan")}, "metainfo.depth_scale must be a number above 0"),
            ({"depth_scale": True}, "metainfo.depth_scale must be a number above 0"),
            ({"depth_invalid": "none"}, "metainfo.depth_invalid must be a number, or null"),
        ],
    )
    def test_metainfo(self, tmp_path: Path, metainfo: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=rf"train\.json: {message}"):
            make_set(tmp_path, [row(0, depth_path="a.png")], **{"depth_unit": "m", **metainfo})

    def test_null_is_missing(self, tmp_path: Path) -> None:
        empty = {"mask_path": None, "height_path": None, "depth_path": None, "gt_labels": None}
        dataset = make_set(tmp_path, [row(0, gt_label=0, **empty)])
        assert dataset.get_annotation(0) == row(0, gt_label=0)
        assert not dataset.multi_label
        assert (dataset.get_mask(0) == 0).all()
