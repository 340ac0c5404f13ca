"""What every dataset inherits."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinov2.data.datasets.base import ImageDataset, Split, check_fractions, split_groups
from dinov2.data.reading import ByteCache, UnreadableImageError


class Two(ImageDataset):
    """An image of class 1 and one without a label."""

    def __init__(self, root: Path, **transforms: object) -> None:
        super().__init__(**transforms)
        self.root = root

    def __len__(self) -> int:
        return 2

    def get_image_path(self, index: int) -> Path:
        return self.root / f"{index}.png"

    def get_target(self, index: int) -> int | None:
        return (1, None)[index]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index in range(2):
        Image.new("L", (3, 2), 10 * index).save(tmp_path / f"{index}.png")
    return tmp_path


def test_items_are_rgb_images_and_targets_transformed(root: Path) -> None:
    dataset = Two(root)
    image, target = dataset[1]
    assert (image.mode, image.size, image.getpixel((0, 0)), target) == ("RGB", (3, 2), (10, 10, 10), -1)
    assert dataset[0][1] == 1
    dataset = Two(root, transform=lambda image: image.size, target_transform=lambda target: target * 10)
    assert [dataset[index] for index in range(2)] == [((3, 2), 10), ((3, 2), -10)]


def test_targets_and_groups_of_all_images(root: Path) -> None:
    targets = Two(root).get_targets()
    assert (targets.tolist(), targets.dtype) == ([1, -1], np.int64)
    assert Two(root).get_group_ids() == [str(root / "0.png"), str(root / "1.png")]
    assert Two(root).classes == ()


def test_cache_keeps_encoded_files_and_unreadable_ones_are_named(root: Path) -> None:
    dataset = Two(root)
    dataset.cache = ByteCache(10_000)
    before = dataset.get_image(1).tobytes()
    (root / "1.png").unlink()
    assert dataset.get_image(1).tobytes() == before
    with pytest.raises(UnreadableImageError, match=r"1\.png: no such file"):
        Two(root).get_image(1)
    (root / "0.png").write_bytes(b"nonsense")
    with pytest.raises(UnreadableImageError, match=r"0\.png: not an image"):
        Two(root)[0]


def example(seed: int = 0, images: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    """Groups of one to six images; every fifth group is bad."""
    groups = np.repeat(np.arange(images), np.random.default_rng(seed).integers(1, 7, images))[:images]
    return groups.astype(str), np.where(groups % 5 == 0, "bad", "good")


def test_groups_stay_whole_and_shares_are_kept() -> None:
    groups, strata = example()
    splits = split_groups(groups, strata, (0.6, 0.3, 0.1), seed=0)
    for group in np.unique(groups):
        assert len(set(splits[groups == group])) == 1
    for stratum in ("good", "bad"):
        shares = np.bincount(splits[strata == stratum], minlength=3) / (strata == stratum).sum()
        assert np.abs(shares - (0.6, 0.3, 0.1)).max() < 0.01


def test_seed_decides_and_order_does_not() -> None:
    groups, strata = example()
    splits = split_groups(groups, strata, (0.5, 0.25, 0.25), seed=3)
    order = np.random.default_rng(1).permutation(len(groups))
    assert (split_groups(groups[order], strata[order], (0.5, 0.25, 0.25), seed=3) == splits[order]).all()
    assert (split_groups(groups, strata, (0.5, 0.25, 0.25), seed=4) != splits).any()


def test_a_group_with_one_rare_image_counts_as_rare() -> None:
    """Ten parts of four images, one of each defective: if they counted as good, all could fall into one split."""
    groups = np.repeat([f"bad{i}" for i in range(10)] + [f"good{i}" for i in range(90)], 4)
    strata = np.where(np.char.startswith(groups, "bad") & (np.arange(400) % 4 == 0), "bad", "good")
    splits = split_groups(groups, strata, (0.5, 0.5), seed=0)
    assert np.bincount(splits[strata == "bad"]).tolist() == [5, 5]


def test_small_empty_and_bad_input() -> None:
    assert split_groups([], [], (0.6, 0.2, 0.2), 0).tolist() == []
    assert split_groups(["a"], ["x"], (0.6, 0.2, 0.2), 0).tolist() == [0]
    assert split_groups(["a", "b", "c"], ["x"] * 3, (0, 0, 1), 0).tolist() == [2] * 3
    with pytest.raises(ValueError, match="got 1 group ids and 2 strata"):
        split_groups(["a"], ["x", "y"], (1,), 0)
    with pytest.raises(ValueError, match=r"sum to 1, got \(0.5, 0.6\)"):
        split_groups(["a"], ["x"], (0.5, 0.6), 0)
    for fractions in ((0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.4, 0.2)):
        with pytest.raises(ValueError, match="must be three shares that sum to 1"):
            check_fractions(fractions)


def test_split_names() -> None:
    assert Split.parse(" Val ") is Split.VAL
    assert Split.parse(Split.TEST) is Split.TEST
    with pytest.raises(ValueError, match="unknown split 'dev'; allowed are TRAIN, VAL, TEST"):
        Split.parse("dev")
