import re

import numpy as np
import pytest

from dinov2.eval.log_regression.model import HoldOut, hold_out_parts


def random_rows(seed: int, *, agree: bool) -> tuple[np.ndarray, list[str]]:
    """Photos of parts of very different sizes; the labels of a part agree or do not."""
    generator = np.random.default_rng(seed)
    num_parts, num_classes = int(generator.integers(2, 30)), int(generator.integers(2, 5))
    parts = generator.integers(0, num_parts, int(generator.integers(num_parts, 120)))
    labels = generator.integers(0, num_classes, num_parts)[parts] if agree else generator.integers(0, 3, len(parts))
    return labels.astype(np.int64), [f"part {part}" for part in parts]


def held_parts(division: HoldOut, groups: list[str]) -> set[str]:
    return {groups[row] for row in division.held}


@pytest.mark.parametrize("seed", range(40))
def test_parts_stay_whole_and_every_class_can_be_fitted(seed: int) -> None:
    labels, groups = random_rows(seed, agree=seed % 2 == 0)
    for division in hold_out_parts(labels, groups, fraction=0.1 + 0.2 * (seed % 5), repeats=6, seed=seed):
        assert sorted([*division.fit, *division.held]) == list(range(len(labels)))
        assert not held_parts(division, groups) & {groups[row] for row in division.fit}
        assert set(labels[division.fit]) == set(labels)
        assert len(set(labels[division.held])) >= 2


def test_the_seed_alone_decides() -> None:
    labels, groups = random_rows(4, agree=True)
    expected = [held_parts(division, groups) for division in hold_out_parts(labels, groups, seed=3)]
    assert len(expected) == 5
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = [groups[row] for row in order]
    found = [held_parts(division, shuffled) for division in hold_out_parts(labels[order], shuffled, seed=3)]
    assert found == expected
    assert [held_parts(division, groups) for division in hold_out_parts(labels, groups, seed=4)] != expected


def test_five_repeats_of_a_fifth_hold_out_every_part_once() -> None:
    labels = np.array([0] * 40 + [1] * 20)
    groups = [f"p{row // 2}" for row in range(60)]  # 20 parts of class 0, 10 of class 1
    divisions = hold_out_parts(labels, groups, fraction=0.2, repeats=5)
    assert sorted(row for division in divisions for row in division.held) == list(range(60))
    for division in divisions:
        assert np.bincount(labels[division.held]).tolist() == [8, 4]
    sixth = hold_out_parts(labels, groups, fraction=0.2, repeats=10)[5:]
    assert sorted(row for division in sixth for row in division.held) == list(range(60))
    assert [held_parts(division, groups) for division in sixth] != [held_parts(one, groups) for one in divisions]


def test_one_part_of_a_class_stays_and_it_is_not_always_the_same() -> None:
    labels, groups = np.array([0, 0, 0, 1, 1]), list("abcde")
    divisions = hold_out_parts(labels, groups, fraction=0.9, repeats=12)
    assert all(np.bincount(labels[division.fit]).tolist() == [1, 1] for division in divisions)
    assert {row for division in divisions for row in division.held} == set(range(5))


def test_a_part_with_one_defective_photo_counts_as_defective() -> None:
    labels = np.array([0, 0, 1] * 6 + [0, 0, 0] * 12)
    groups = [f"part {row // 3:02}" for row in range(len(labels))]  # 6 defective parts, 12 good ones
    divisions = [one for seed in range(5) for one in hold_out_parts(labels, groups, fraction=0.5, seed=seed)]
    assert len(divisions) == 25
    for division in divisions:
        held = held_parts(division, groups)
        assert sum(part < "part 06" for part in held) == 3
        assert len(held) == 9


def test_with_more_classes_a_part_counts_as_what_most_of_its_photos_are() -> None:
    labels = np.array([2, 1, 1] * 4 + [0] * 12 + [2] * 12)
    groups = [f"part {row // 3:02}" for row in range(len(labels))]
    divisions = hold_out_parts(labels, groups, fraction=0.25, repeats=4)
    assert len(divisions) == 4
    for division in divisions:
        assert sorted(int(part[-2:]) // 4 for part in held_parts(division, groups)) == [0, 1, 2]


def test_a_class_of_one_part_is_never_held_out() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    groups = ["a", "b", "c", "d", "e", "lonely", "lonely"]
    divisions = hold_out_parts(labels, groups, fraction=0.5, repeats=8)
    assert len(divisions) == 8
    assert all(2 not in labels[division.held] for division in divisions)


@pytest.mark.parametrize(
    ("labels", "groups"),
    [([0, 0, 1, 1], ["a", "b", "c", "c"]), ([0, 1], ["a", "b"]), ([0, 0, 0], ["a", "b", "c"]), ([0, 1], ["a", "a"])],
)
def test_nothing_is_held_out_without_two_classes_to_spare(labels: list[int], groups: list[str]) -> None:
    assert hold_out_parts(np.array(labels), groups) == ()


def test_parts_that_show_both_labels() -> None:
    # All parts are defective; the only good photos are on two of them, and one must stay.
    labels = np.array([1, 0, 1, 0, 1, 1, 1, 1])
    groups = ["a", "a", "b", "b", "c", "d", "e", "f"]
    divisions = hold_out_parts(labels, groups, fraction=0.8, repeats=20)
    assert divisions
    assert all(0 in labels[division.fit] for division in divisions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 1.0}, "fraction to hold out must be between 0 and 1, found 1.0"),
        ({"fraction": 0.0}, "between 0 and 1"),
        ({"repeats": 0}, "repeats must be at least 1, found 0"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        hold_out_parts(np.array([0, 1]), ["a", "b"], **settings)


def test_rows_must_match() -> None:
    with pytest.raises(ValueError, match="2 labels and 1 parts must be equally many"):
        hold_out_parts(np.array([0, 1]), ["a"])
    with pytest.raises(ValueError, match="at least one"):
        hold_out_parts(np.array([], dtype=np.int64), [])
