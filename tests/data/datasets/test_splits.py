"""Splits by group: nothing is torn, shares are kept, and the order of rows does not matter."""

import numpy as np
import pytest

from dinov2.data.datasets.base import Split, check_fractions, split_groups


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
    """Ten parts of four photos, one of each defective: if they counted as good, all could fall into one split."""
    groups = np.repeat([f"bad{i}" for i in range(10)] + [f"good{i}" for i in range(90)], 4)
    strata = np.where(np.char.startswith(groups, "bad") & (np.arange(400) % 4 == 0), "bad", "good")
    splits = split_groups(groups, strata, (0.5, 0.5), seed=0)
    assert np.bincount(splits[strata == "bad"]).tolist() == [5, 5]


def test_small_and_empty() -> None:
    assert split_groups([], [], (0.6, 0.2, 0.2), 0).tolist() == []
    assert split_groups(["a"], ["x"], (0.6, 0.2, 0.2), 0).tolist() == [0]
    assert split_groups(["a", "b", "c"], ["x"] * 3, (0, 0, 1), 0).tolist() == [2] * 3


def test_bad_input() -> None:
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
