"""GroupedJSON: what it reads, and every kind of broken annotation file."""

import json
import logging
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import IGNORED, BadTargetError, DepthSource, GroupedJSON, MaskSource
from dinov2.data.datasets.annotation_file import scan_group_ids
from dinov2.data.loaders import make_dataset
from dinov2.data.prepare.demo_parts import make_demo_parts

METAINFO = {"classes": ["good", "bad"], "line": 7}


def row(path: str, group: Any = "g", label: Any = 0, **extra: Any) -> dict[str, Any]:
    return {"img_path": path, "gt_label": label, "group_id": group, **extra}


def write(root: Path, rows: Any, split: str = "train", metainfo: Any = METAINFO) -> Path:
    return write_text(root, json.dumps({"metainfo": metainfo, "data_list": rows}), split)


def write_text(root: Path, text: str | bytes, split: str = "train") -> Path:
    (root / "annotations").mkdir(exist_ok=True)
    path = root / "annotations" / f"{split}.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


class TestReading:
    def test_columns(self, tmp_path: Path) -> None:
        rows = [row("a/1.png", "p", 1), row("a/2.png", "q"), {"img_path": "ü 3.png", "group_id": "p"}]
        write(tmp_path, rows)
        dataset = GroupedJSON(tmp_path, "TRAIN")
        assert len(dataset) == 3
        assert dataset.classes == ("good", "bad")
        assert dataset.metainfo == METAINFO
        assert [dataset.get_image_path(i) for i in range(3)] == [tmp_path / r["img_path"] for r in rows]
        assert [dataset.get_target(i) for i in range(3)] == [1, 0, None]
        assert dataset.get_targets().tolist() == [1, 0, -1]
        assert dataset.get_targets().dtype == np.int64
        assert dataset.get_group_ids() == ["p", "q", "p"]
        for copy in (dataset, pickle.loads(pickle.dumps(dataset))):
            assert [copy.get_annotation(i) for i in range(3)] == rows
            assert copy.get_annotation(-1) == rows[2]
            with pytest.raises(IndexError, match="index 3 is out of range"):
                copy.get_image_path(3)
        (tmp_path / "a").mkdir()
        Image.new("L", (5, 4), 9).save(tmp_path / "a/1.png")
        image, target = dataset[0]
        assert (image.mode, image.size, target) == ("RGB", (5, 4), 1)

    def test_numbers_as_group_ids_are_names_and_labels_may_be_missing(self, tmp_path: Path) -> None:
        rows = [row("1.png", 17), row("2.png", "17", None), {"img_path": "3.png", "group_id": -1}]
        write(tmp_path, rows, metainfo={"classes": ["good"]})
        assert GroupedJSON(tmp_path, "train").get_group_ids() == ["17", "17", "-1"]
        write(tmp_path, rows[1:], metainfo={})
        dataset = GroupedJSON(tmp_path, "train")
        assert (dataset.classes, dataset.get_targets().tolist()) == ((), [-1, -1])

    def test_other_keys_are_kept_and_paths_inside_the_root_shortened(self, tmp_path: Path) -> None:
        names = ["./a//1.png", "a/b/../2.png", ".hidden/3..png", "a:b/4.png", "a\nb.png"]
        others: dict[str, Any] = {"boxes": [[1, 2, 3, 4.5]], "note": "ü\ud800", "none": None, "a": {"b": []}}
        write(tmp_path, [*(row(name) for name in names), row("6.png", **others)])
        dataset = GroupedJSON(tmp_path, "train")
        assert [dataset.get_annotation(i)["img_path"] for i in range(5)] == ["a/1.png", "a/2.png", *names[2:]]
        assert dataset.get_annotation(5) == row("6.png", **others)

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
    def test_other_encodings_of_unicode(self, tmp_path: Path, encoding: str) -> None:
        text = json.dumps({"metainfo": {}, "data_list": [{"img_path": "ü.png", "group_id": "ß"}]}, ensure_ascii=False)
        path = write_text(tmp_path, text.encode(encoding))
        assert GroupedJSON(tmp_path, "train").get_group_ids() == ["ß"]
        assert scan_group_ids(path) == {"ß"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                '{"metainfo": {},\n"data_list": [{"a": {}}],\n "data_list": [{"b": "}"}]}',
                r"train\.json, line 3: the key \"data_list\" is already in line 2 of the same object",
            ),
            (
                '{"metainfo": {}, "data_list": [{"note": "{\\"x\\": 1}", "x": [{"x": 1}]},\n {"gt_label": 0,\n'
                '"n": "gt_label", "gt_\\u006cabel" : 1}]}',
                r"line 3: the key \"gt_.u006cabel\" is already in line 2",
            ),
            ('{"metainfo": {"classes": ["a"], "classes": ["a"]}, "data_list": []}', r'line 1: the key "classes"'),
        ],
    )
    def test_a_key_that_is_given_twice_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        write_text(tmp_path, text)
        with pytest.raises(ValueError, match=message):
            GroupedJSON(tmp_path, "train")

    def test_magnetic_tile(self, magnetic_tile: Path) -> None:
        for split, images, parts in (("TRAIN", 812, 156), ("VAL", 258, 49), ("TEST", 274, 53)):
            dataset = GroupedJSON(magnetic_tile, split)
            assert (len(dataset), len(set(dataset.get_group_ids()))) == (images, parts)
            assert dataset.missing_files(sample=None) == []
            assert {"defect_type", "exposure"} <= dataset.get_annotation(0).keys()
            for index in range(0, images, 50):
                mask, image = dataset.get_mask(index), dataset.get_image(index)
                assert mask.shape == (image.height, image.width)
                assert mask.max() == dataset.get_target(index)


class TestSplits:
    def test_names_and_folders(self, tmp_path: Path) -> None:
        def refuse(kind: type[Exception], message: str, root: Path = tmp_path, split: str = "TRAIN") -> None:
            with pytest.raises(kind, match=message):
                GroupedJSON(root, split)

        refuse(FileNotFoundError, "is not a folder; give the folder that holds annotations/", tmp_path / "absent")
        refuse(FileNotFoundError, r"has no folder annotations/ with train\.json.*; from a table .* prepare_csv")
        write(tmp_path, [row("1.png")], "val")
        assert len({GroupedJSON(tmp_path, split).annotation_path for split in ("VAL", "val", "Val")}) == 1
        refuse(FileNotFoundError, r"train\.json does not exist; .*annotations has val\.json")
        refuse(ValueError, r"split 'valid'; allowed are TRAIN, VAL, TEST \(.*has val\.json\)", split="valid")

    def test_shared_groups_are_warned_about(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path, [row("1.png", "a"), row("2.png", 'b"\\ü'), row("3.png", 3)])
        write(tmp_path, [row("4.png", 'b"\\ü'), row("5.png", "3"), row("6.png", "d")], "val")
        write(tmp_path, [row("7.png", "e")], "test")
        with caplog.at_level(logging.WARNING, logger="dinov2"):
            GroupedJSON(tmp_path, "train")
        (record,) = caplog.records
        assert "train.json and val.json share 2 of 3 groups" in record.getMessage()
        caplog.clear()
        GroupedJSON(tmp_path, "test")
        assert not caplog.records

    def test_a_broken_sibling_does_not_matter(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write(tmp_path, [row("1.png", "a")])
        write_text(tmp_path, b"\xff\xfe\xff", "val")
        write_text(tmp_path, "{", "test")
        GroupedJSON(tmp_path, "train")
        assert not caplog.records


def rows_with(index: int, **changes: Any) -> list[dict[str, Any]]:
    """Four good rows, one of them changed; a value of `...` removes the key."""
    rows = [row(f"{i}.png") for i in range(4)]
    rows[index] = {key: value for key, value in (rows[index] | changes).items() if value is not ...}
    return rows


class TestBrokenFiles:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "the file is empty"),
            (" \n", "the file is empty"),
            ('{"metainfo": {},\n "data_list": [}', r"line 2, column 16: not valid JSON"),
            ('{"metainfo": {}, "data_list": [', "line 1, column 32: not valid JSON"),
            (
                b'{"metainfo": {},\n"x": "\xe4"}',
                r"line 2: byte 0xe4 at position 23 is not UTF-8; save the file as UTF-8",
            ),
            ("[" * 100_000, "not valid JSON"),
            ("[]", "the top level must be an object with metainfo and data_list, found a list"),
            ("3", "the top level must be an object with metainfo and data_list, found a number"),
            ('{"data_list": []}', "key 'metainfo' is missing; found 'data_list'"),
            ('{"metainfo": {}, "data": []}', "key 'data_list' is missing; found 'metainfo', 'data'"),
            ('{"metainfo": [], "data_list": []}', "'metainfo' must be an object, found a list"),
            ('{"metainfo": {}, "data_list": {}}', "'data_list' must be a list, found an object"),
            ('{"metainfo": {}, "data_list": []}', "'data_list' has no rows"),
            ('{"metainfo": {}, "data_list": [{}, "x"]}', r"data_list\[1\]: a row must be an object, found text"),
        ],
    )
    def test_content(self, tmp_path: Path, text: str | bytes, message: str) -> None:
        write_text(tmp_path, text)
        with pytest.raises(ValueError, match=rf"train\.json(:|,) .*{message}|train\.json, {message}"):
            GroupedJSON(tmp_path, "train")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"img_path": ...}, "key 'img_path' is missing; the row has 'gt_label', 'group_id'"),
            ({"img_path": None}, "'img_path' must be text, found null None"),
            ({"img_path": 3}, "'img_path' must be text, found a number 3"),
            ({"img_path": ""}, "'img_path' '' is empty"),
            ({"img_path": "/a.png"}, "'img_path' '/a.png' is absolute"),
            ({"img_path": "C:/a.png"}, "is absolute"),
            ({"img_path": "s3://bucket/a.png"}, "is absolute"),
            ({"img_path": "../a.png"}, "'img_path' '../a.png' leaves the set's root"),
            ({"img_path": "a/../../b.png"}, "leaves the set's root"),
            ({"img_path": "."}, "names a folder"),
            ({"img_path": "a/"}, "names a folder"),
            ({"img_path": "a\\b.png"}, "has a backslash; write / between folders"),
            ({"img_path": "a\0.png"}, "has a null character"),
            ({"img_path": "0.png"}, r"'img_path' '0.png' is already in data_list\[0\]"),
            ({"img_path": "x/../0.png"}, r"'img_path' '0.png' is already in data_list\[0\]"),
            ({"group_id": ...}, "key 'group_id' is missing"),
            ({"group_id": None}, "'group_id' must be text or a whole number, found null"),
            ({"group_id": 1.5}, "'group_id' must be text or a whole number, found a number 1.5"),
            ({"group_id": ""}, "'group_id' is empty"),
            ({"gt_label": 2}, r"'gt_label' 2 is outside the classes; allowed are 0 to 1 \(metainfo.classes has 2\)"),
            ({"gt_label": -1}, "'gt_label' -1 is outside the classes"),
            ({"gt_label": 10**30}, "is outside the classes"),
            ({"gt_label": "1"}, "'gt_label' must be a whole number, found text '1'"),
            ({"gt_label": 1.0}, "'gt_label' must be a whole number, found a number 1.0"),
            ({"gt_label": True}, "'gt_label' must be a whole number, found true or false True"),
            ({"gt_label": [1]}, r"'gt_label' must be a whole number, found a list \[1\]"),
            ({"mask_path": 3}, "'mask_path' must be text, found a number 3"),
            ({"mask_path": ["a.png"]}, "'mask_path' must be text, found a list"),
            ({"mask_path": ""}, "'mask_path' '' is empty"),
            ({"mask_path": "/a.png"}, "'mask_path' '/a.png' is absolute"),
            ({"mask_path": "a/../../b.png"}, "'mask_path' 'a/../../b.png' leaves the set's root"),
            ({"height_path": "../b.png"}, "'height_path' '../b.png' leaves the set's root"),
            ({"depth_path": True}, "'depth_path' must be text, found true or false"),
            ({"gt_labels": 1}, "'gt_labels' must be a list of whole numbers, found a number"),
            ({"gt_labels": [0, 3]}, "'gt_labels' has 3, outside the classes; allowed are 0 to 1"),
            ({"gt_labels": [-1]}, "'gt_labels' has -1, outside the classes"),
            ({"gt_labels": [1.0]}, "'gt_labels' must hold whole numbers, found a number 1.0"),
            ({"gt_labels": [True]}, "'gt_labels' must hold whole numbers, found true or false"),
            ({"gt_labels": [[1]]}, "'gt_labels' must hold whole numbers, found a list"),
            ({"gt_labels": ["1"]}, "'gt_labels' must hold whole numbers, found text '1'"),
            ({"gt_labels": [1, 0, 1]}, r"'gt_labels' \[1, 0, 1\] names a class twice"),
        ],
    )
    def test_row(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        write(tmp_path, rows_with(2, **changes))
        with pytest.raises(ValueError, match=rf"train\.json: data_list\[2\]: .*{message}"):
            GroupedJSON(tmp_path, "train")

    def test_number_of_such_rows_is_told(self, tmp_path: Path) -> None:
        write(tmp_path, [row(f"{i}.png", label=i) for i in range(10)])
        with pytest.raises(ValueError, match=r"data_list\[2\]: 'gt_label' 2 .*\(8 such rows in all\)"):
            GroupedJSON(tmp_path, "train")

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"label": 0}, "'gt_label' 0 is .*; allowed are none: metainfo\\.classes is missing or empty"),
            ({"label": None, "gt_labels": [0]}, "'gt_labels' has 0, outside the classes; allowed are none"),
        ],
    )
    def test_labels_without_classes(self, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
        write(tmp_path, [row("1.png", **keys)], metainfo={})
        with pytest.raises(ValueError, match=message):
            GroupedJSON(tmp_path, "train")


def test_missing_files_are_found(tmp_path: Path) -> None:
    write(tmp_path, [row(f"{i}.png") for i in range(20)])
    for i in range(0, 20, 2):
        (tmp_path / f"{i}.png").touch()
    dataset = GroupedJSON(tmp_path, "train")
    assert dataset.missing_files(sample=None) == [tmp_path / f"{i}.png" for i in range(1, 20, 2)]
    some = dataset.missing_files(sample=10)
    assert 0 < len(some) < 10
    assert some == dataset.missing_files(sample=10)


def test_memory_per_row(tmp_path: Path) -> None:
    """What is kept, and travels to workers, is less than the annotation file itself; it grows with the rows only."""
    write(tmp_path, [row(f"train/{i // 4:07d}/{i // 4:07d}-{i % 4}.jpeg", f"{i // 4:07d}") for i in range(20_000)])
    GroupedJSON(tmp_path, "train")  # what is allocated once
    tracemalloc.start()
    dataset = GroupedJSON(tmp_path, "train")
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / len(dataset) < 120  # bytes; a dict of the row alone takes 184
    assert dataset.get_annotation(19_999) == row("train/0004999/0004999-3.jpeg", "0004999")
    assert len(pickle.dumps(dataset)) < dataset.annotation_path.stat().st_size


CLASSES = ["good", "scratched", "dented"]


def bare(number: int, **keys: Any) -> dict[str, Any]:
    return {"img_path": f"{number}.png", "group_id": "g", **keys}


def make_set(root: Path, rows: list[dict[str, Any]], size: tuple[int, int] = (4, 3), **metainfo: Any) -> GroupedJSON:
    """Writes a set of black images of a size (width, height)."""
    write(root, rows, metainfo={"classes": CLASSES, **metainfo})
    for entry in rows:
        Image.new("RGB", size).save(root / entry["img_path"])
    return GroupedJSON(root, "TRAIN")


def save(path: Path, values: Any, dtype: Any = np.uint8) -> None:
    Image.fromarray(np.asarray(values, dtype)).save(path)


class TestMasks:
    def test_binary_masks_and_rows_without(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        mask = np.array([[0, 0, 255, 0], [0, 255, 255, 0], [0, 0, 0, 0]], np.uint8)
        save(tmp_path / "mask.png", mask)
        rows = [bare(0, gt_label=1, mask_path="mask.png"), bare(1, gt_label=0), bare(2, gt_label=1), bare(3)]
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
        caplog.clear()
        assert pickle.loads(pickle.dumps(dataset)).get_mask(3).tolist() == [[IGNORED] * 4] * 3
        assert not caplog.records, "a copy in a worker does not warn again"

    def test_good_images_without_masks_are_no_reason_to_warn(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        save(tmp_path / "mask.png", np.zeros((3, 4)))
        dataset = make_set(tmp_path, [bare(0, gt_label=1, mask_path="mask.png"), bare(1, gt_label=0)])
        with caplog.at_level(logging.INFO, logger="dinov2"):
            dataset.get_mask(0)
        assert [record.levelno for record in caplog.records] == [logging.INFO]

    def test_named_classes(self, tmp_path: Path) -> None:
        values = np.array([[0, 1, 2, 255], [0, 0, 0, 0], [1, 1, 1, 1]], np.uint8)
        save(tmp_path / "mask.png", values)
        names = ["background", "scratch", "dent"]
        dataset = make_set(tmp_path, [bare(0, gt_label=0, mask_path="./mask.png")], mask_classes=names)
        assert dataset.mask_classes == tuple(names)
        assert dataset.get_mask(0).tolist() == values.tolist()
        assert dataset.get_annotation(0)["mask_path"] == "mask.png"
        fewer = make_set(tmp_path, [bare(0, mask_path="mask.png")], mask_classes=names[:2])
        with pytest.raises(BadTargetError, match=r"mask\.png: holds the values 0, 1, 2, 255; allowed are 0 to 1"):
            fewer.get_mask(0)

    def test_the_file_or_the_dataset_string_says_what_values_mean(self, tmp_path: Path) -> None:
        save(tmp_path / "mask.png", np.array([[0, 9, 255, 0]] * 3, np.uint8))
        rows, names = [bare(0, mask_path="mask.png")], ["background", "scratch"]
        dataset = make_set(tmp_path, rows, mask_classes=names, mask_values=[0, [9, 255]])
        assert dataset.get_mask(0).tolist() == [[0, 1, 1, 0]] * 3
        assert pickle.loads(pickle.dumps(dataset)).get_mask(0).tolist() == [[0, 1, 1, 0]] * 3
        opened = make_dataset(dataset_str=f"GroupedJSON:split=TRAIN:root={tmp_path}:mask_values=9,0")
        assert isinstance(opened, MaskSource)
        assert opened.get_mask(0).tolist() == [[1, 0, IGNORED, 1]] * 3
        with pytest.raises(ValueError, match=r"train\.json: metainfo\.mask_values: must list the value of each class"):
            make_set(tmp_path, rows, mask_classes=names, mask_values="0,9")
        with pytest.raises(ValueError, match=r"train\.json: mask_values=0,9,7 has values for 3 classes, the set has 2"):
            make_set(tmp_path, rows, mask_classes=names, mask_values=[0, 9, 7])

    def test_defects_painted_in_255_beside_named_classes_are_not_ignored(self, tmp_path: Path) -> None:
        save(tmp_path / "mask.png", np.array([[0, 255, 255, 0]] * 3, np.uint8))
        rows = [bare(0, mask_path="mask.png"), bare(1, gt_label=0)]
        dataset = make_set(tmp_path, rows, mask_classes=["background", "scratch"])
        with pytest.raises(
            BadTargetError, match=r"mask\.png: holds only 0 and 255, .*mask_values=0,255 where they are"
        ):
            dataset.get_mask(0)

    def test_masks_fit_the_upright_image(self, tmp_path: Path) -> None:
        save(tmp_path / "mask.png", np.zeros((4, 3)))
        dataset = make_set(tmp_path, [bare(0, mask_path="mask.png"), bare(1, gt_label=0)])
        exif = Image.Exif()
        exif[0x0112] = 6
        for number in range(2):
            Image.new("RGB", (4, 3)).save(tmp_path / f"{number}.png", exif=exif)
        assert dataset.get_image(0).size == (3, 4)
        assert dataset.get_mask(0).shape == dataset.get_mask(1).shape == (4, 3)


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
        rows = [bare(0, depth_path="depth.png"), bare(1, depth_path="depth.npy"), bare(2)]
        dataset = make_set(tmp_path, rows, size=(4, 1), depth_unit="m", depth_scale=0.001)
        np.testing.assert_allclose(dataset.get_depth(0), [[np.nan, 1, 2, 3]], rtol=1e-6)
        np.testing.assert_allclose(dataset.get_depth(1), [[np.nan, 0.004, 0.008, np.nan]], rtol=1e-6)
        assert np.isnan(dataset.get_depth(2)).all()
        assert dataset.get_depth(2).shape == (1, 4)
        assert dataset.depth_unit == "m"
        (record,) = caplog.records
        assert "1 of 3 rows have no depth_path" in record.getMessage()

    def test_metres_without_a_scale_are_told(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for metainfo, told in (({}, 1), ({"depth_scale": 1}, 0)):
            caplog.clear()
            dataset = make_set(tmp_path, [bare(0, depth_path="d.png")], depth_unit="m", **metainfo)
            assert [dataset.depth_unit, dataset.depth_unit] == ["m", "m"]
            assert [record.getMessage().count("mostly millimetres") for record in caplog.records] == [1] * told

    def test_invalid_values_can_be_chosen(self, tmp_path: Path) -> None:
        save(tmp_path / "depth.png", [[0, 65535]], np.uint16)
        rows = [bare(0, height_path="depth.png")]
        height = make_set(tmp_path, rows, size=(2, 1), depth_invalid=65535, depth_unit="nm")
        np.testing.assert_equal(height.get_depth(0), [[0, np.nan]])
        assert height.depth_unit == "nm"
        depth = make_set(tmp_path, [bare(0, depth_path="depth.png")], size=(2, 1), depth_invalid=None, depth_unit="mm")
        with pytest.raises(BadTargetError, match=r"depth\.png: holds the depth 0 .*must be above 0"):
            depth.get_depth(0)


class TestSeveralLabels:
    def test_labels(self, tmp_path: Path) -> None:
        rows = [bare(0, gt_labels=[2, 1]), bare(1, gt_labels=[]), bare(2, gt_label=2), bare(4)]
        rows.insert(3, bare(3, gt_label=0, gt_labels=[1]))
        dataset = make_set(tmp_path, rows)
        assert dataset.multi_label
        assert [dataset.get_labels(index) for index in range(4)] == [(2, 1), (), (2,), (1,)]
        assert dataset.get_targets().tolist() == [-1, -1, 2, 0, -1]
        assert [dataset.get_annotation(index) for index in range(5)] == rows
        assert dataset.get_labels(-2) == (1,)
        with pytest.raises(ValueError, match=r"train\.json: data_list\[4\]: neither 'gt_labels' nor 'gt_label'"):
            dataset.get_labels(4)


class TestTargetsOfAllRows:
    def test_heights_and_depths_in_one_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"train\.json: data_list has both 'height_path' and 'depth_path'"):
            make_set(tmp_path, [bare(0, height_path="a.png"), bare(1, depth_path="b.png")], depth_unit="m")

    def test_targets_that_no_row_has(self, tmp_path: Path) -> None:
        dataset = make_set(tmp_path, [bare(0, gt_label=1), bare(1)])
        for use in (lambda: dataset.get_mask(0), lambda: dataset.mask_classes):
            with pytest.raises(ValueError, match=r"train\.json: no row has 'mask_path' and none has gt_label 0"):
                use()
        for use in (lambda: dataset.get_depth(0), lambda: dataset.depth_unit):
            with pytest.raises(ValueError, match=r"train\.json: no row has 'depth_path' or 'height_path'"):
                use()

    @pytest.mark.parametrize(
        ("metainfo", "message"),
        [
            ({"classes": "good"}, "metainfo.classes must be a list of names, found 'good'"),
            ({"classes": ["good", 1]}, "must be a list of names"),
            ({"classes": ["good", ""]}, "must be a list of names"),
            ({"classes": ["good", "good"]}, "metainfo.classes names 'good' twice"),
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
        with pytest.raises(ValueError, match=rf"train\.json: .*{message}"):
            make_set(tmp_path, [bare(0, depth_path="a.png")], **{"depth_unit": "m", **metainfo})

    def test_null_is_missing(self, tmp_path: Path) -> None:
        empty = {"mask_path": None, "height_path": None, "depth_path": None, "gt_labels": None}
        dataset = make_set(tmp_path, [bare(0, gt_label=0, **empty)])
        assert dataset.get_annotation(0) == bare(0, gt_label=0)
        assert not dataset.multi_label
        assert dataset.get_labels(0) == (0,)
        assert (dataset.get_mask(0) == 0).all()
