"""The drawn set: labels, masks, boxes and heights agree with each other and with the seed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets import GroupedJSON
from dinov2.data.prepare.demo_parts import DEFECT_TYPES, draw_part, make_demo_parts

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "set"
    make_demo_parts(root, parts=30, photos=2, seed=1, image_size=64)
    return root


def test_parts_images_and_splits(root: Path) -> None:
    datasets = [GroupedJSON(root, split) for split in SPLITS]
    groups = [name for dataset in datasets for name in dataset.get_group_ids()]
    assert len(groups) == 60
    assert {groups.count(name) for name in groups} == {2}
    assert len(set(groups)) == sum(len(set(dataset.get_group_ids())) for dataset in datasets) == 30
    for dataset in datasets:
        assert set(dataset.get_targets().tolist()) == {0, 1}
        assert dataset.classes == ("good", "defective")
    assert sum(int(dataset.get_targets().sum()) for dataset in datasets) == 20


def test_masks_boxes_and_labels_agree(root: Path) -> None:
    kinds = set()
    for split in SPLITS:
        dataset = GroupedJSON(root, split)
        for index in range(len(dataset)):
            row = dataset.get_annotation(index)
            assert dataset.get_image(index).size == (64, 64)
            kinds.add(row["defect_type"])
            if not row["gt_label"]:
                found = (row["defect_type"], row["boxes"], row["box_labels"], "mask_path" in row)
                assert found == ("free", [], [], False)
                continue
            mask = np.asarray(Image.open(root / row["mask_path"]))
            assert set(np.unique(mask)) == {0, 255}
            covered = np.zeros_like(mask, dtype=bool)
            for x0, y0, x1, y1 in row["boxes"]:
                assert 0 <= x0 < x1 <= 64
                assert 0 <= y0 < y1 <= 64
                for edge in (mask[y0, x0:x1], mask[y1 - 1, x0:x1], mask[y0:y1, x0], mask[y0:y1, x1 - 1]):
                    assert edge.any()  # a tight box touches its defect on every side
                covered[y0:y1, x0:x1] = True
            assert not mask[~covered].any()
            assert {dataset.metainfo["box_classes"][label] for label in row["box_labels"]} == {row["defect_type"]}
            assert len(row["box_labels"]) == len(row["boxes"])
    assert kinds == {"free", *DEFECT_TYPES}


def test_heights_are_micrometres_in_16_bits(root: Path) -> None:
    """The table is at 0, holes at 200, the plate at 2,000 with a few micrometres of brush marks."""
    dataset = GroupedJSON(root, "train")
    index = dataset.get_targets().tolist().index(0)
    image = Image.open(root / dataset.get_annotation(index)["height_path"])
    heights = np.asarray(image)
    assert (image.mode, heights.shape, heights.dtype) == ("I;16", (64, 64), np.uint16)
    assert heights.min() == 0
    assert abs(np.median(heights) - 2000) < 10
    assert heights.max() < 2030
    assert (np.abs(heights.astype(int) - 200) <= 1).sum() > 20


def test_no_two_images_are_the_same(root: Path) -> None:
    """Light and position change from image to image."""
    contents = {path.read_bytes() for path in root.glob("t*/*/*.jpeg")}
    assert len(contents) == len(list(root.glob("t*/*/*.jpeg")))
    dataset = GroupedJSON(root, "train")
    assert dataset.get_group_ids()[0] == dataset.get_group_ids()[1]
    first, second = (np.asarray(dataset.get_image(index), dtype=int) for index in range(2))
    assert np.abs(first - second).mean() > 3


def test_same_arguments_draw_the_same_set(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_demo_parts(tmp_path / name, parts=6, photos=1, seed=seed, image_size=32)
    a, b, c = (
        {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.jpeg")}
        for name in "abc"
    )
    assert a == b
    assert set(a.values()).isdisjoint(c.values())


@pytest.mark.parametrize("kind", DEFECT_TYPES)
def test_a_defect_changes_the_surface_inside_its_mask_only(kind: str) -> None:
    def draw(defect: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        part = draw_part(96, defect, np.random.default_rng(0), np.random.default_rng(1))
        masks = np.any(part.defects, axis=0) if part.defects else np.zeros(part.height.shape, bool)
        return part.height, part.albedo, masks

    height, albedo, _ = draw("free")
    damaged_height, damaged_albedo, mask = draw(kind)
    changed = (damaged_height != height) | (damaged_albedo != albedo)
    assert mask.any()
    assert not changed[~mask].any()
    assert changed[mask].mean() > 0.9
    assert (damaged_height - height).min() < -10 if kind != "stain" else (damaged_height == height).all()


def test_bad_numbers(tmp_path: Path) -> None:
    for name, value, least in (("parts", 5, 6), ("photos", 0, 1), ("image_size", 16, 32)):
        with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {value}"):
            make_demo_parts(tmp_path / "set", **{name: value})
