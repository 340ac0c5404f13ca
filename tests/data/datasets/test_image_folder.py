"""Folders of images: classes from folders or none, groups from folders, and folders of masks beside them."""

import json
import logging
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import BadTargetError, ImageFolder, ImageMaskFolder, MaskSource


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".png", ".PNG", ".JPG", ".jfif", ".jpg")):
            Image.new("RGB", (2, 2)).save(root / name)
        else:
            (root / name).touch()
    return root


def test_classes_are_folders(tmp_path: Path) -> None:
    fill(tmp_path, "cat/2.png", "cat/1.JPG", "dog/part7/1.png", "dog/part7/2.png", "dog/notes.txt", ".trash/3.png")
    dataset = ImageFolder(tmp_path)
    assert dataset.classes == ("cat", "dog")
    names = [str(dataset.get_image_path(i).relative_to(tmp_path)) for i in range(4)]
    assert names == ["cat/1.JPG", "cat/2.png", "dog/part7/1.png", "dog/part7/2.png"]
    assert dataset.get_targets().tolist() == [0, 0, 1, 1]
    assert dataset.get_group_ids() == ["cat/1.JPG", "cat/2.png", "dog/part7", "dog/part7"]
    assert dataset[3][1] == 1


def test_loose_images_have_no_labels(tmp_path: Path) -> None:
    fill(tmp_path, "1.png", "part/2.png", "part/3.png", "part/deep/4.png")
    dataset = ImageFolder(tmp_path)
    assert (dataset.classes, dataset.get_targets().tolist(), dataset.get_target(0)) == ((), [-1] * 4, None)
    assert dataset.get_group_ids() == ["1.png", "part", "part", "part/deep"]


def test_a_stray_image_that_takes_all_labels_away_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, "overview.jpg", *(f"{name}/{number}.png" for name in ("good", "bad") for number in range(5)))
    assert ImageFolder(tmp_path).classes == ()
    assert "1 of 11 images lie beside the folders, such as overview.jpg, so no folder counts as a class" in caplog.text
    caplog.clear()
    ImageFolder(tmp_path, labels="none")
    assert not caplog.records


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
    with pytest.raises(FileNotFoundError, match=r"no folder for split 'test' \(such as TRAIN, VAL, TEST\); it has Val"):
        ImageFolder(tmp_path, "test")


def test_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    fill(tmp_path, "train/a/1.png", "val/a/1.png")
    with pytest.raises(ValueError, match=r"holds the splits train, val, not classes; add split="):
        ImageFolder(tmp_path)
    assert len(ImageFolder(tmp_path, labels="none")) == 2


def test_splits_beside_other_folders_and_in_capitals_are_not_taken_for_classes_either(tmp_path: Path) -> None:
    fill(tmp_path, "Train/a/1.png", "VAL/a/1.png", "extra/1.png")
    with pytest.raises(ValueError, match=r"holds the splits Train, VAL, not classes; .*labels=folders if these are"):
        ImageFolder(tmp_path)
    assert ImageFolder(tmp_path, labels="folders").classes == ("Train", "VAL", "extra")
    fill(tmp_path, "train/a/2.png")
    with pytest.raises(ValueError, match=r"has 2 folders for split 'train': Train, train; keep one"):
        ImageFolder(tmp_path, "train")


def test_system_folders_are_no_classes_and_what_is_left_out_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left_out = ("good/phone.HEIC", "good/b.heic", "bad/notes.txt", "bad/raw", "good/._1.png", "Thumbs.db")
    systems = ("@eaDir/1.jpg/THUMB.jpg", "$RECYCLE.BIN/9.png", "lost+found/2.png", "good/@eaDir/1.png")
    fill(tmp_path, "good/1.png", "bad/2.PNG", "bad/3.jfif", *left_out, *systems, ".ipynb_checkpoints/1.png")
    (tmp_path / "__MACOSX").mkdir()
    with caplog.at_level(logging.INFO):
        dataset = ImageFolder(tmp_path)
    assert dataset.classes == ("bad", "good")
    assert [dataset.get_image_path(index).name for index in range(len(dataset))] == ["2.PNG", "3.jfif", "1.png"]
    (record, _) = caplog.records
    assert record.levelno == logging.WARNING  # .heic are missed
    assert record.getMessage() == (
        f"{tmp_path}: left out, as no images that can be read: 2 .heic, 1 .txt, 1 without an ending, 5 folders of the "
        "system ($RECYCLE.BIN, @eaDir, __MACOSX, lost+found), 3 hidden files or folders; convert images among them, to "
        "PNG for example"
    )
    with pytest.raises(ValueError, match=r"holds no image \(it holds 1 \.heic\): nothing below it ends in .*\.jfif"):
        ImageFolder(fill(tmp_path / "phones", "a.heic"))


def test_folders_without_images_and_names_that_differ_in_capitals_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, "train/good/1.png", "train/bad/1.png", "train/notes/a.txt", "val/Good/1.png")
    assert ImageFolder(tmp_path, "train").classes == ("Good", "bad", "good", "notes")
    assert "1 folders hold no image and count as classes all the same: notes" in caplog.text
    assert "the classes Good and good differ in capitals only" in caplog.text


def test_a_class_has_one_name_in_both_forms_of_unicode(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "gr\u00f6\u00dfe") for form in ("NFC", "NFD"))
    fill(tmp_path, f"train/{composed}/1.png", "train/z/1.png", f"val/{decomposed}/1.png")
    assert ImageFolder(tmp_path, "val").classes == (composed, "z")
    assert ImageFolder(tmp_path, "val").get_targets().tolist() == [0]
    fill(tmp_path, f"{decomposed}/1.png")
    assert len(ImageFolder(tmp_path / composed, labels="none")) == 1


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


MASK = np.array([[0, 1, 2], [255, 0, 0]], np.uint8)


def add(root: Path, name: str, mask: np.ndarray | None = MASK, split: str = "train") -> None:
    """Writes an image of 3×2 pixels and its mask; the name is that of the image."""
    image_path = root / "images" / split / name
    mask_path = root / "masks" / split / Path(name).with_suffix(".png")
    for path in (image_path, mask_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2)).save(image_path)
    if mask is not None:
        Image.fromarray(mask).save(mask_path)


def test_named_classes(tmp_path: Path) -> None:
    add(tmp_path, "b.jpg")
    add(tmp_path, "a.tiff")
    add(tmp_path, "c.jpg", split="val")
    for name, text in (("json", json.dumps(["ground", "scratch", "dent"])), ("txt", "ground\nscratch \n\ndent\n")):
        path = tmp_path / f"classes.{name}"
        path.write_text(text)
        dataset = ImageMaskFolder(tmp_path, "TRAIN")
        path.unlink()
        assert dataset.mask_classes == ("ground", "scratch", "dent")
    assert isinstance(dataset, MaskSource)
    assert [dataset.get_image_path(index).name for index in range(len(dataset))] == ["a.tiff", "b.jpg"]
    assert [dataset.get_mask(index).tolist() for index in range(2)] == [MASK.tolist()] * 2
    assert dataset.get_targets().tolist() == [-1, -1]


def test_without_names_masks_are_binary_and_spare_ones_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(tmp_path, "a.png", np.array([[0, 255, 0], [0, 0, 255]], np.uint8))
    dataset = ImageMaskFolder(tmp_path, "train")
    assert dataset.mask_classes == ("background", "defect")
    assert dataset.get_mask(0).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert not caplog.records
    Image.fromarray(MASK).save(tmp_path / "masks" / "train" / "b.png")
    ImageMaskFolder(tmp_path, "train")
    (record,) = caplog.records
    assert "1 masks have no image, such as b.png" in record.getMessage()


@pytest.mark.parametrize("ending", [".PNG", ".bmp", ".tif", ".Tiff"])
def test_masks_are_found_by_name_with_every_ending(tmp_path: Path, ending: str) -> None:
    name = "gr\u00f6\u00dfe"
    add(tmp_path, f"part/{name}.jpg")
    mask = tmp_path / "masks" / "train" / "part" / f"{name}.png"
    stored = mask.with_name(unicodedata.normalize("NFD", name) + ending)  # as macOS names it
    Image.open(mask).save(stored)
    mask.unlink()
    (tmp_path / "classes.txt").write_text("ground\nscratch\ndent\n")
    dataset = ImageMaskFolder(tmp_path, "train")
    assert dataset.get_mask_path(0) == stored
    assert dataset.get_mask(0).tolist() == MASK.tolist()
    Image.open(stored).save(mask.with_suffix(".gif"))
    with pytest.raises(ValueError, match=r"has the masks .*; keep one"):
        ImageMaskFolder(tmp_path, "train")
    mask.with_suffix(".gif").unlink()
    stored.rename(stored.with_name("a_mask.png"))
    with pytest.raises(ValueError, match=r"nor one with another ending; .*masks/train has part/a_mask\.png"):
        ImageMaskFolder(tmp_path, "train")


def test_folders_below_the_split_are_groups(tmp_path: Path) -> None:
    for name in ("part_1/a.jpg", "part_1/b.jpg", "part_2/a.jpg", "loose.v2.jpg"):
        add(tmp_path, name, np.zeros((2, 3), np.uint8))
    dataset = ImageMaskFolder(tmp_path, "train")
    assert dataset.get_group_ids() == ["loose.v2.jpg", "part_1", "part_1", "part_2"]
    assert dataset.get_mask_path(0) == tmp_path / "masks" / "train" / "loose.v2.png"
    assert dataset.get_mask(3).shape == (2, 3)


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_missing_folders(tmp_path: Path, folder: str) -> None:
    add(tmp_path, "a.jpg")
    with pytest.raises(FileNotFoundError, match=r"images has no folder for split 'test' .*; it has train"):
        ImageMaskFolder(tmp_path, "test")
    (tmp_path / folder).rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=f"{folder} is not a folder; the root must hold images/<split>/"):
        ImageMaskFolder(tmp_path, "train")


def test_images_and_masks_that_do_not_fit(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="images/train holds no image"):
        ImageMaskFolder(tmp_path, "train")
    for name, mask in (("a.jpg", MASK), ("b.jpg", None), ("c.jpg", None)):
        add(tmp_path, name, mask)
    with pytest.raises(ValueError, match=r"b\.jpg has no mask .*masks/train/b\.png \(2 of 3 images lack one\)"):
        ImageMaskFolder(tmp_path, "train")
    add(tmp_path, "a.bmp")
    with pytest.raises(ValueError, match=r"a\.bmp and a\.jpg share the mask a\.png"):
        ImageMaskFolder(tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes.txt", b"", r"classes\.txt lists nothing"),
        ("classes.txt", b"a", r"classes\.txt: the file must have 2 to 255 names, found 1"),
        ("classes.txt", b"a\na", r"classes\.txt: the file names 'a' twice"),
        ("classes.json", b"[", r"classes\.json, line 1, column 2: not valid JSON"),
        ("classes.json", b"{}", r"classes\.json: the file must be a list of names, found {}"),
        ("classes.json", b'["a", "\xff"]', r"classes\.json, line 1: byte 0xff .* is not UTF-8"),
    ],
)
def test_broken_names(tmp_path: Path, name: str, text: bytes, message: str) -> None:
    add(tmp_path, "a.jpg")
    (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        ImageMaskFolder(tmp_path, "train")
    other = "classes.txt" if name.endswith("json") else "classes.json"
    (tmp_path / other).write_text("")
    with pytest.raises(ValueError, match=r"classes\.txt: classes\.json lies beside it; keep one of them"):
        ImageMaskFolder(tmp_path, "train")


def test_wrong_values(tmp_path: Path) -> None:
    add(tmp_path, "a.jpg")
    with pytest.raises(
        BadTargetError, match=r"masks/train/a\.png: holds the values 0, 1, 2, 255; .* must name its classes"
    ):
        ImageMaskFolder(tmp_path, "train").get_mask(0)
    (tmp_path / "classes.txt").write_text("ground\nscratch\n")
    with pytest.raises(BadTargetError, match=r"a\.png: holds the values 0, 1, 2, 255; allowed are 0 to 1"):
        ImageMaskFolder(tmp_path, "train").get_mask(0)
    expected = [[0, 1, 1], [255, 0, 0]]
    assert ImageMaskFolder(tmp_path, "train", mask_values="0,1+2").get_mask(0).tolist() == expected


def test_defects_painted_in_255_beside_named_classes_are_not_ignored(tmp_path: Path) -> None:
    painted = np.array([[0, 255, 0], [0, 0, 255]], np.uint8)
    for name in ("a.jpg", "b.jpg"):
        add(tmp_path, name, painted)
    (tmp_path / "classes.txt").write_text("ground\nscratch\n")
    dataset = ImageMaskFolder(tmp_path, "train")
    with pytest.raises(
        BadTargetError, match=r"a\.png: holds only 0 and 255, and none of the 2 masks .*mask_values=0,255"
    ):
        dataset.get_mask(0)
    dataset = ImageMaskFolder(tmp_path, "train", mask_values="0,255")
    assert dataset.get_mask(1).tolist() == [[0, 1, 0], [0, 0, 1]]
    add(tmp_path, "c.jpg", painted // 255)  # one mask with a class tells that 255 is ignored
    assert ImageMaskFolder(tmp_path, "train").get_mask(0).max() == 255
