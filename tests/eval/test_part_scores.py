import numpy as np
import pytest

from dinov2.eval.metrics import classification_metrics
from dinov2.eval.part_scores import score_parts


def two_classes(*positive: float) -> np.ndarray:
    return np.array([[1 - p, p] for p in positive])


def test_two_classes_take_the_most_positive_photo() -> None:
    #  part            a    b    a    c    b    d
    rows = two_classes(0.1, 0.4, 0.7, 0.2, 0.3, 0.9)
    labels = np.array([0, 0, 1, 0, 0, 0])
    parts = score_parts(rows, labels, ["a", "b", "a", "c", "b", "d"])
    assert parts.group_ids == ("a", "b", "c", "d")
    np.testing.assert_allclose(parts.probabilities[:, 1], [0.7, 0.4, 0.2, 0.9])
    assert parts.labels.tolist() == [1, 0, 0, 0]
    assert parts.num_mixed == 1
    metrics = classification_metrics(parts.probabilities, parts.labels)
    assert metrics.count == 4
    assert metrics.accuracy == pytest.approx(3 / 4)  # only d is wrong
    assert metrics.balanced_accuracy == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.auroc == pytest.approx(2 / 3)  # a above b and c, below d


def test_a_part_is_predicted_positive_exactly_when_a_photo_is() -> None:
    generator = np.random.default_rng(0)
    rows = two_classes(*generator.integers(0, 11, 400) / 10)  # one half, which is negative, occurs
    groups = [str(group) for group in generator.integers(0, 120, 400)]
    parts = score_parts(rows, np.zeros(400, dtype=np.int64), groups)
    for name, row in zip(parts.group_ids, parts.probabilities, strict=True):
        photos = rows[[group == name for group in groups]]
        assert (row.argmax() == 1) == bool((photos.argmax(axis=1) == 1).any())
        assert row[1] == photos[:, 1].max()


def test_many_classes_take_means_and_the_majority() -> None:
    rows = np.array([[0.6, 0.3, 0.1], [0.0, 0.5, 0.5], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    labels = np.array([0, 1, 2, 1, 2])
    parts = score_parts(rows, labels, ["x", "y", "z", "y", "x"])
    np.testing.assert_allclose(parts.probabilities, [[0.45, 0.3, 0.25], [0.05, 0.65, 0.3], [0.2, 0.2, 0.6]])
    assert parts.labels.tolist() == [0, 1, 2]  # x has labels 0 and 2, equally often
    assert parts.num_mixed == 1


def test_photos_in_groups_of_their_own_are_parts() -> None:
    for num_classes in (1, 2, 4):
        generator = np.random.default_rng(num_classes)
        rows = generator.dirichlet(np.ones(num_classes), 30)
        labels = generator.integers(0, num_classes, 30)
        names = [f"{index:02d}" for index in range(30)]
        parts = score_parts(rows, labels, names)
        np.testing.assert_array_equal(parts.probabilities, rows)
        np.testing.assert_array_equal(parts.labels, labels)
        assert parts.num_mixed == 0


def test_order_of_photos_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    rows, labels = generator.dirichlet(np.ones(4), 60), generator.integers(0, 4, 60)
    groups = np.array([f"part {group}" for group in generator.integers(0, 15, 60)])
    order = generator.permutation(60)
    first, second = score_parts(rows, labels, groups), score_parts(rows[order], labels[order], groups[order])
    assert first.group_ids == second.group_ids
    np.testing.assert_allclose(first.probabilities, second.probabilities)
    np.testing.assert_array_equal(first.labels, second.labels)
