"""Magnetic tiles as a grouped set, from a made-up checkout."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import GroupedJSON
from dinov2.data.prepare.magnetic_tile import DEFECT_TYPES, prepare_magnetic_tile

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five tiles of each kind at three exposures; the first two of each defect also have defect-free images."""
    source = tmp_path_factory.mktemp("tiles") / "checkout"
    for kind, name in enumerate(DEFECT_TYPES):
        folder = source / f"MT_{name.capitalize()}" / "Imgs"
        folder.mkdir(parents=True)
        for tile in range(kind * 100, kind * 100 + 5):
            for exposure in (1, 2, 6):
                add_image(folder, tile, exposure)
            if kind and tile % 100 < 2:
                add_image(source / "MT_Free" / "Imgs", tile, 3)
    return source


@pytest.fixture
def checkout(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return shutil.copytree(whole, tmp_path / "checkout")


def add_image(folder: Path, tile: int, exposure: int) -> None:
    pixels = np.random.default_rng((tile, exposure)).integers(0, 256, (6, 5), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"exp{exposure}_num_{tile}.jpg")
    Image.fromarray(np.array([[0, 255, 250, 10, 0]] * 6, np.uint8)).save(folder / f"exp{exposure}_num_{tile}.png")


def test_rows_files_masks_and_splits(whole: Path, tmp_path: Path) -> None:
    prepare_magnetic_tile(whole, tmp_path / "set")
    tiles, images = [], 0
    for split in SPLITS:
        dataset = GroupedJSON(tmp_path / "set", split)
        tiles.append(set(dataset.get_group_ids()))
        images += len(dataset)
        assert dataset.metainfo == {"classes": ["negative", "positive"], "defect_types": list(DEFECT_TYPES)}
        assert {dataset.get_annotation(i)["defect_type"] for i in range(len(dataset))} == set(DEFECT_TYPES)
        for index in range(len(dataset)):
            row, path = dataset.get_annotation(index), dataset.get_image_path(index)
            tile, number = path.stem.split("-")
            assert row["img_path"] == f"{split}/{tile}/{tile}-{number}.jpeg"
            assert row["group_id"] == tile
            assert row["gt_label"] == int(row["defect_type"] != "free")
            folder = whole / f"MT_{row['defect_type'].capitalize()}" / "Imgs"
            assert path.read_bytes() == (folder / f"exp{row['exposure']}_num_{tile}.jpg").read_bytes()
            assert ("mask_path" in row) is bool(row["gt_label"])
            if row["gt_label"]:
                mask = Image.open(tmp_path / "set" / row["mask_path"])
                assert (mask.mode, np.asarray(mask)[0].tolist()) == ("L", [0, 255, 255, 0, 0])
    assert images == 6 * 5 * 3 + 5 * 2
    assert [len(group) for group in tiles] == [18, 6, 6]
    assert len(set.union(*tiles)) == 30, "no tile lies in two splits"


def test_images_of_a_tile_are_numbered_by_exposure(whole: Path, tmp_path: Path) -> None:
    prepare_magnetic_tile(whole, tmp_path / "set", fractions=(1, 0, 0))
    dataset = GroupedJSON(tmp_path / "set", "train")
    rows = [dataset.get_annotation(i) for i in range(len(dataset))]
    found = [(row["img_path"], row["exposure"], row["defect_type"]) for row in rows if row["group_id"] == "100"]
    expected = [(1, "blowhole"), (2, "blowhole"), (3, "free"), (6, "blowhole")]
    assert found == [(f"train/100/100-{number}.jpeg", *values) for number, values in enumerate(expected)]


def test_seed_decides(whole: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_magnetic_tile(whole, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "annotations" / "train.json").read_bytes() for name in "abc")
    assert a == b != c


DAMAGED = "MT_Fray/Imgs/exp1_num_400"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda root: (root / "MT_Fray").rename(root / "elsewhere"),
            "is missing; .* must be a checkout",
        ),
        (lambda root: (root / f"{DAMAGED}.png").unlink(), r"exp1_num_400\.jpg has no mask exp1_num_400\.png"),
        (
            lambda root: Image.new("L", (3, 3)).save(root / f"{DAMAGED}.png"),
            r"png has \(3, 3\) pixels, its image has",
        ),
        (lambda root: os.truncate(root / f"{DAMAGED}.jpg", 100), r"cannot read image .*exp1_num_400\.jpg"),
    ],
)
def test_broken_checkouts(checkout: Path, tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(checkout)
    with pytest.raises((OSError, ValueError), match=message):
        prepare_magnetic_tile(checkout, tmp_path / "set")
    assert list((tmp_path / "set").glob("*")) == []


def test_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        prepare_magnetic_tile(tmp_path / "absent", tmp_path / "set")
    for name in DEFECT_TYPES:
        (tmp_path / f"MT_{name.capitalize()}" / "Imgs").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no images"):
        prepare_magnetic_tile(tmp_path, tmp_path / "set")


def test_other_names_are_left_out_aloud(checkout: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("L", (5, 6)).save(checkout / "MT_Free/Imgs/overview.jpg")
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        prepare_magnetic_tile(checkout, tmp_path / "set")
    assert "overview.jpg is left out" in caplog.text
