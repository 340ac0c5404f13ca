"""DAGM 2007, MURA and series in the layout of GDXray, in folders as they are unpacked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import DAGM2007, MURA, GDXray
from dinov2.data.loaders import make_dataset

RNG = np.random.default_rng(0)


def write(path: Path, bits: int = 8, size: tuple[int, int] = (12, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), RNG.integers(0, 2**bits, size).astype(np.uint8 if bits == 8 else np.uint16))


@pytest.fixture
def dagm(tmp_path: Path) -> Path:
    root = tmp_path / "DAGM2007"
    for category in (1, 10, 2):
        for split, first in (("Train", 576), ("Test", 1)):
            for number in range(first, first + 3):
                write(root / f"Class{category}" / split / f"{number:04d}.PNG")
            label = np.zeros((12, 16), np.uint8)
            cv2.ellipse(label, (8, 6), (4, 2), 30, 0, 360, 255, -1)
            path = root / f"Class{category}" / split / "Label" / f"{first:04d}_label.PNG"
            path.parent.mkdir()
            Image.fromarray(label).save(path)
            (path.parent / "Labels.txt").write_text("1\n")
    return root


def test_dagm(dagm: Path) -> None:
    train: Any = make_dataset(dataset_str=f"DAGM2007:root={dagm}:split=train")
    assert train.get_targets().tolist() == [1, 0, 0] * 3
    assert [path.split("/")[-3] for path in train.get_image_paths()[::3]] == ["Class1", "Class2", "Class10"]
    assert 0 < train.get_mask(0).sum() < 12 * 16 / 2
    assert set(np.unique(train.get_mask(0))) == {0, 1}
    assert not train.get_mask(1).any()
    test = DAGM2007(dagm, "TEST", category=2)
    assert [Path(path).name for path in test.get_image_paths()] == ["0001.PNG", "0002.PNG", "0003.PNG"]


def test_the_older_layout_of_dagm(tmp_path: Path) -> None:
    for number in range(1, 5):
        for folder in ("Class2", "Class2_def"):
            write(tmp_path / folder / f"{number}.png", size=(40, 60))
    lines = [f"{number}\t 12\t 4.0\t {number * np.pi / 4:.6f}\t 3.0e+01\t 20" for number in range(1, 5)]
    (tmp_path / "Class2_def" / "labels.txt").write_text("\n".join(lines) + "\n")
    train = DAGM2007(tmp_path, "TRAIN")
    names = ["Class2/1.png", "Class2/3.png", "Class2_def/1.png", "Class2_def/3.png"]
    assert [path.relative_to(tmp_path).as_posix() for path in map(train.get_image_path, range(4))] == names
    assert train.get_targets().tolist() == [0, 0, 1, 1]
    assert not train.get_mask(0).any()
    rows, columns = np.mgrid[:40, :60]
    for index, angle in ((2, np.pi / 4), (3, 3 * np.pi / 4)):
        right, down = columns - 30, rows - 20
        along, across = right * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - right * np.sin(angle)
        expected = (along / 12) ** 2 + (across / 4) ** 2 <= 1
        ellipse = np.zeros((40, 60), np.uint8)
        cv2.ellipse(ellipse, (30, 20), (12, 4), np.degrees(angle), 0, 360, 1, -1)
        assert (train.get_mask(index) != expected).sum() <= 4, "angles have six digits there"
        assert (ellipse != expected).mean() < 0.02, "but for pixels at the edge"
    assert len(DAGM2007(tmp_path, "TEST", category=2)) == 4
    (tmp_path / "Class2_def" / "labels.txt").write_text("1 2 3\n")
    with pytest.raises(ValueError, match="line 1: expected an image's number and five"):
        DAGM2007(tmp_path, "TRAIN")


def test_mura_has_a_study_as_part(tmp_path: Path) -> None:
    root = tmp_path / "MURA-v1.1"
    for path in (
        "train/XR_ELBOW/patient00011/study1_negative/image1.png",
        "train/XR_ELBOW/patient00011/study1_negative/image2.png",
        "train/XR_ELBOW/patient00011/study2_positive/image1.png",
        "train/XR_WRIST/patient00012/study1_positive/image1.png",
        "valid/XR_WRIST/patient11185/study1_negative/image1.png",
    ):
        write(root / path)
    (root / "train_image_paths.csv").write_text("")
    train = make_dataset(dataset_str=f"MURA:root={root}:split=TRAIN")
    elbow = "XR_ELBOW/patient00011/study1_negative"
    assert train.get_targets().tolist() == [0, 0, 1, 1]
    assert train.get_group_ids() == [elbow, elbow, *train.get_group_ids()[2:]]
    assert len(set(train.get_group_ids())) == 3
    assert MURA(root, "val").get_targets().tolist() == [0]
    assert MURA(root, "TRAIN", body_part="Wrist").get_targets().tolist() == [1]
    assert train.get_image(0).size == (16, 12)


@pytest.fixture
def castings(tmp_path: Path) -> Path:
    root = tmp_path / "GDXray" / "Castings"
    for series, count in (("C0001", 3), ("C0002", 2), ("C0003", 2)):
        for number in range(1, count + 1):
            write(root / series / f"{series}_{number:04d}.png", bits=16)
    rows = "  1.0000000e+00   3.0000000e+00   6.0000000e+00   2.0000000e+00   4.0000000e+00\n 3 1 16 1 12\n 3 2 3 2 3\n"
    (root / "C0001" / "ground_truth.txt").write_text(rows)
    (root / "C0002" / "ground_truth.txt").write_text("")
    return root


def test_gdxray_series_have_boxes_and_16_bits(castings: Path) -> None:
    steps: Any = make_dataset(dataset_str=f"GDXray:root={castings}")
    assert steps.get_group_ids() == ["C0001"] * 3 + ["C0002"] * 2
    assert steps.get_boxes(0)[0].tolist() == [[2, 1, 6, 4]]
    assert steps.get_boxes(1)[0].shape == (0, 4)
    assert steps.get_boxes(2)[0].tolist() == [[0, 0, 16, 12], [1, 1, 3, 3]]
    assert steps.get_image(0).mode == "RGB"
    assert [steps.knows_boxes(index) for index in (1, 4)] == [True, True]
    whole = GDXray(castings, series="C0001,C0003", unlabelled=True)
    assert len(whole) == 5
    assert not whole.knows_boxes(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: DAGM2007(root, "VAL"), "unknown split 'VAL'; DAGM2007 has TRAIN and TEST"),
        (lambda root: DAGM2007(root, "TRAIN", category=3), "Class3/Train is no folder with images, such as"),
        (lambda root: MURA(root, "TEST"), "unknown split 'TEST'; MURA has TRAIN and VAL"),
        (lambda root: GDXray(root / "none"), "no folder of a series, such as C0001"),
    ],
)
def test_what_is_not_there(dagm: Path, make: Callable[[Path], Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(dagm)


def test_broken_files_are_named(dagm: Path, castings: Path, tmp_path: Path) -> None:
    (castings / "C0002" / "ground_truth.txt").write_text("1 2 3 4\n")
    with pytest.raises(ValueError, match=r"C0002/ground_truth\.txt, line 1: must be the number of an image"):
        GDXray(castings)
    (castings / "C0002" / "ground_truth.txt").write_text("\n9 2 3 4 5\n")
    with pytest.raises(FileNotFoundError, match=r"ground_truth\.txt, line 2: there is no image 9 in C0002"):
        GDXray(castings)
    (dagm / "Class1" / "Train" / "Label" / "0999_label.PNG").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0999_label\.PNG is a mask of no image"):
        DAGM2007(dagm, "TRAIN")
    (dagm / "Class1_def").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no .*Class1_def/labels\.txt"):
        DAGM2007(dagm, "TRAIN")
    write(tmp_path / "m" / "train" / "XR_HAND" / "image1.png")
    with pytest.raises(ValueError, match=r"image1\.png lies in no study"):
        MURA(tmp_path / "m", "TRAIN")
