"""Writing grouped sets: all or nothing, never over anything else."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dinov2.data.datasets import GroupedJSON
from dinov2.data.datasets.base import Split
from dinov2.data.prepare.grouped_json_writer import GroupedItem, describe_grouped_set, is_prepared, write_grouped_set

METAINFO = {"classes": ["good", "bad"], "note": "ü"}
Items = list[tuple[Split, GroupedItem]]


def item(name: str, group: str = "g", label: int = 0) -> GroupedItem:
    return GroupedItem({"img_path": name, "gt_label": label, "group_id": group, "more": [1]}, {name: b"image"})


def some_items() -> Items:
    return [
        (Split.TRAIN, item("train/1.png", "a")),
        (Split.VAL, item("val/1.png", "b", 1)),
        (Split.TRAIN, item("train/2.png", "a", 1)),
    ]


def write(output: Path, items: Items | Iterator[tuple[Split, GroupedItem]], seed: int = 0) -> None:
    write_grouped_set(output, items, metainfo=METAINFO, tool="tool", settings={"seed": seed})


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "set"
    write(root, some_items())
    dataset = GroupedJSON(root, "train")
    rows = [items.row for split, items in some_items() if split is Split.TRAIN]
    assert [dataset.get_annotation(i) for i in range(2)] == rows
    assert dataset.metainfo == METAINFO
    assert dataset.get_image_bytes(0) == b"image"
    assert {path.name for path in root.iterdir()} == {"annotations", "prepared.json", "train", "val"}
    assert {path.name for path in (root / "annotations").iterdir()} == {"train.json", "val.json"}
    counts = ["split images groups good bad", "train 2 1 1 1", "val 1 1 0 1"]
    assert [" ".join(line.split()) for line in describe_grouped_set(root).splitlines()] == counts


def test_doing_it_again_changes_nothing(tmp_path: Path) -> None:
    def content() -> dict[Path, tuple[int, bool | bytes]]:
        return {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes()) for path in tmp_path.rglob("*")}

    write(tmp_path, some_items())
    before = content()
    write(tmp_path, some_items())
    assert content() == before


def test_other_settings_other_tools_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "set", some_items())
    with pytest.raises(ValueError, match=r"was made with \{'seed': 0\}, now asked for \{'seed': 1\}"):
        write(tmp_path / "set", some_items(), seed=1)
    with pytest.raises(ValueError, match="was not made by another"):
        is_prepared(tmp_path / "set", "another", {"seed": 0})
    with pytest.raises(ValueError, match=r"is not empty \(it holds set\) and was not made by tool"):
        write(tmp_path, some_items())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give a folder"):
        write(tmp_path / "file", some_items())


def test_a_set_that_lost_an_image_is_not_taken_for_whole(tmp_path: Path) -> None:
    write(tmp_path, some_items())
    (tmp_path / "train" / "2.png").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its images, such as .*train/2\.png; delete it and retry"):
        write(tmp_path, some_items())


def test_a_failure_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[Split, GroupedItem]]:
        yield from some_items()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write(tmp_path, failing())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".dinov2_partial" / "train").mkdir(parents=True)  # what a killed process leaves
    write(tmp_path, some_items())
    assert len(GroupedJSON(tmp_path, "train")) == 2


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "the set has no images"),
        ([(Split.VAL, item("1.png")), (Split.TEST, item("1.png"))], "two images of the set are written to 1.png"),
        ([(Split.VAL, item("1.png", label=2))], "'gt_label' 2 is outside the classes"),
        ([(Split.VAL, GroupedItem({"img_path": "1.png", "group_id": "g"}))], "name 1.png, which no item writes"),
    ],
)
def test_sets_that_could_not_be_read_are_not_written(tmp_path: Path, items: Items, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, items)
    assert list(tmp_path.iterdir()) == []
