"""ImageFolder: classes from folders, or none, and groups from folders."""

from pathlib import Path

import pytest
from PIL import Image

from dinov2.data.datasets import ImageFolder


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".png", ".JPG")):
            Image.new("RGB", (2, 2)).save(root / name)
        else:
            (root / name).touch()
    return root


def test_classes_are_folders(tmp_path: Path) -> None:
    fill(tmp_path, "cat/2.png", "cat/1.JPG", "dog/part7/1.png", "dog/part7/2.png", "dog/notes.txt", ".trash/3.png")
    dataset = ImageFolder(tmp_path)
    assert dataset.classes == ("cat", "dog")
    assert [str(dataset.get_image_path(i).relative_to(tmp_path)) for i in range(4)] == [
        "cat/1.JPG",
        "cat/2.png",
        "dog/part7/1.png",
        "dog/part7/2.png",
    ]
    assert dataset.get_targets().tolist() == [0, 0, 1, 1]
    assert dataset.get_group_ids() == ["cat/1.JPG", "cat/2.png", "dog/part7", "dog/part7"]
    assert dataset[3][1] == 1


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    fill(tmp_path, "1.png", "part/2.png", "part/3.png", "part/deep/4.png")
    dataset = ImageFolder(tmp_path)
    assert (dataset.classes, dataset.get_targets().tolist(), dataset.get_target(0)) == ((), [-1] * 4, None)
    assert dataset.get_group_ids() == ["1.png", "part", "part", "part/deep"]


def test_labels_can_be_asked_for_or_left_out(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.png", "b/2.png")
    assert ImageFolder(tmp_path, labels="none").get_group_ids() == ["a", "b"]
    assert ImageFolder(tmp_path, labels="none").get_targets().tolist() == [-1, -1]
    fill(tmp_path, "loose.png")
    with pytest.raises(ValueError, match=r"image 'loose\.png' lies in no class folder; move it, or use labels=none"):
        ImageFolder(tmp_path, labels="folders")
    with pytest.raises(ValueError, match="labels='folder' is unknown; allowed are auto, folders, none"):
        ImageFolder(tmp_path, labels="folder")


def test_classes_have_the_same_number_in_every_split(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png", "Val/c/1.png", "other/z/1.png")
    assert ImageFolder(tmp_path, "VAL").get_targets().tolist() == [2]
    assert ImageFolder(tmp_path, "val").classes == ImageFolder(tmp_path, "TRAIN").classes == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"no folder for split 'test' \(such as TRAIN, VAL, TEST\); it has Val, other"):
        ImageFolder(tmp_path, "test")


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.png", "val/a/1.png")
    with pytest.raises(ValueError, match=r"holds the splits train, val, not classes; add split="):
        ImageFolder(tmp_path)
    assert len(ImageFolder(tmp_path, labels="none")) == 2


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    elsewhere = fill(tmp_path / "elsewhere", "1.png")
    root = fill(tmp_path / "root", "a/1.png")
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "loop").symlink_to(root)
    assert ImageFolder(root).get_targets().tolist() == [0, 1]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no image"):
        ImageFolder(fill(tmp_path, "notes.txt"))
