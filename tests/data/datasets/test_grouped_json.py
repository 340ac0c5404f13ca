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

from dinov2.data.datasets import GroupedJSON
from dinov2.data.datasets.annotation_file import scan_group_ids

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
        assert [dataset.get_annotation(i) for i in range(3)] == rows

    def test_item(self, tmp_path: Path) -> None:
        write(tmp_path, [row("1.png", label=1)])
        Image.new("L", (5, 4), 9).save(tmp_path / "1.png")
        image, target = GroupedJSON(tmp_path, "train")[0]
        assert (image.mode, image.size, target) == ("RGB", (5, 4), 1)

    def test_other_keys_are_kept(self, tmp_path: Path) -> None:
        rows = [
            row("1.png", boxes=[[1, 2, 3, 4.5]], note="ü\ud800", none=None),
            row("2.png"),
            row("3.png", deep={"a": []}),
        ]
        write(tmp_path, rows)
        dataset = GroupedJSON(tmp_path, "train")
        assert [dataset.get_annotation(i) for i in range(3)] == rows

    def test_numbers_as_group_ids_are_names_too(self, tmp_path: Path) -> None:
        write(tmp_path, [row("1.png", 17), row("2.png", "17"), row("3.png", -1)])
        assert GroupedJSON(tmp_path, "train").get_group_ids() == ["17", "17", "-1"]

    def test_labels_and_classes_may_be_missing_for_pretraining(self, tmp_path: Path) -> None:
        write(tmp_path, [{"img_path": "1.png", "group_id": "g"}, row("2.png", label=None)], metainfo={})
        dataset = GroupedJSON(tmp_path, "train")
        assert (dataset.classes, dataset.get_targets().tolist()) == ((), [-1, -1])

    def test_paths_inside_the_root_are_shortened(self, tmp_path: Path) -> None:
        write(
            tmp_path, [row("./a//1.png"), row("a/b/../2.png"), row(".hidden/3..png"), row("a:b/4.png"), row("a\nb.png")]
        )
        dataset = GroupedJSON(tmp_path, "train")
        found = [dataset.get_annotation(i)["img_path"] for i in range(5)]
        assert found == ["a/1.png", "a/2.png", ".hidden/3..png", "a:b/4.png", "a\nb.png"]

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
    def test_other_encodings_of_unicode(self, tmp_path: Path, encoding: str) -> None:
        text = json.dumps({"metainfo": {}, "data_list": [{"img_path": "ü.png", "group_id": "ß"}]}, ensure_ascii=False)
        path = write_text(tmp_path, text.encode(encoding))
        assert GroupedJSON(tmp_path, "train").get_group_ids() == ["ß"]
        assert scan_group_ids(path) == {"ß"}

    def test_survives_pickling_and_negative_indices(self, tmp_path: Path) -> None:
        write(tmp_path, [row("1.png"), row("2.png", "h", 1)])
        dataset = pickle.loads(pickle.dumps(GroupedJSON(tmp_path, "train")))
        assert dataset.get_annotation(-1) == row("2.png", "h", 1)
        with pytest.raises(IndexError, match="index 2 is out of range"):
            dataset.get_image_path(2)

    def test_magnetic_tile(self, magnetic_tile: Path) -> None:
        for split, images, parts in (("TRAIN", 812, 156), ("VAL", 258, 49), ("TEST", 274, 53)):
            dataset = GroupedJSON(magnetic_tile, split)
            assert (len(dataset), len(set(dataset.get_group_ids()))) == (images, parts)
            assert dataset.missing_files(sample=None) == []
            assert {"defect_type", "exposure"} <= dataset.get_annotation(0).keys()


class TestSplits:
    def test_in_any_case(self, tmp_path: Path) -> None:
        write(tmp_path, [row("1.png")], "val")
        assert len({GroupedJSON(tmp_path, split).annotation_path for split in ("VAL", "val", "Val")}) == 1

    def test_unknown(self, tmp_path: Path) -> None:
        write(tmp_path, [row("1.png")], "val")
        with pytest.raises(
            ValueError, match=r"unknown split 'valid'; allowed are TRAIN, VAL, TEST \(.*has val\.json\)"
        ):
            GroupedJSON(tmp_path, "valid")

    def test_absent(self, tmp_path: Path) -> None:
        write(tmp_path, [row("1.png")], "val")
        with pytest.raises(FileNotFoundError, match=r"train\.json does not exist; .*annotations has val\.json"):
            GroupedJSON(tmp_path, "TRAIN")

    def test_no_root(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"is not a folder; give the folder that holds annotations/"):
            GroupedJSON(tmp_path / "absent", "TRAIN")

    def test_no_annotations(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"has no folder annotations/ with train\.json"):
            GroupedJSON(tmp_path, "TRAIN")

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
        ("classes", "message"),
        [
            ("good", "metainfo.classes must be a list of names, found 'good'"),
            (["good", 1], "must be a list of names"),
            (["good", ""], "must be a list of names"),
            (["good", "good"], "metainfo.classes names 'good' twice"),
        ],
    )
    def test_classes(self, tmp_path: Path, classes: Any, message: str) -> None:
        write(tmp_path, [row("1.png")], metainfo={"classes": classes})
        with pytest.raises(ValueError, match=message):
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
            ({"img_path": ".."}, "leaves the set's root"),
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

    def test_labels_without_classes(self, tmp_path: Path) -> None:
        write(tmp_path, [row("1.png")], metainfo={})
        with pytest.raises(ValueError, match=r"allowed are none: metainfo\.classes is missing or empty"):
            GroupedJSON(tmp_path, "train")


class TestMissingFiles:
    def test_finds_what_does_not_exist(self, tmp_path: Path) -> None:
        write(tmp_path, [row(f"{i}.png") for i in range(20)])
        for i in range(0, 20, 2):
            (tmp_path / f"{i}.png").touch()
        dataset = GroupedJSON(tmp_path, "train")
        assert dataset.missing_files(sample=None) == [tmp_path / f"{i}.png" for i in range(1, 20, 2)]
        some = dataset.missing_files(sample=10)
        assert 0 < len(some) < 10
        assert some == dataset.missing_files(sample=10)


class TestMillionRows:
    @pytest.mark.slow
    def test_opens_and_stays_small(self, tmp_path: Path) -> None:
        """What is kept, and travels to workers, is less than the annotation file itself."""
        rows = [row(f"train/{i // 4:07d}/{i // 4:07d}-{i % 4}.jpeg", f"{i // 4:07d}", i % 2) for i in range(1_000_000)]
        write(tmp_path, rows)
        del rows
        dataset = GroupedJSON(tmp_path, "train")
        assert len(dataset) == 1_000_000
        assert dataset.get_annotation(999_999) == row("train/0249999/0249999-3.jpeg", "0249999", 1)
        assert len(pickle.dumps(dataset)) < dataset.annotation_path.stat().st_size

    def test_memory_per_row(self, tmp_path: Path) -> None:
        write(tmp_path, [row(f"train/{i // 4:07d}/{i // 4:07d}-{i % 4}.jpeg", f"{i // 4:07d}") for i in range(20_000)])
        GroupedJSON(tmp_path, "train")  # what is allocated once
        tracemalloc.start()
        dataset = GroupedJSON(tmp_path, "train")
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert kept / len(dataset) < 120  # bytes; a dict of the row alone takes 184
