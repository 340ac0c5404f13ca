from itertools import pairwise

import numpy as np
import pytest

from dinov2.eval.metrics.classification import classification_metrics, confusion_matrix, score_parts


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
    figures = classification_metrics(parts.probabilities, parts.labels)
    assert figures["accuracy"] == pytest.approx(3 / 4)  # only d is wrong
    assert figures["balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert figures["precision"] == pytest.approx(1 / 2)
    assert figures["auroc"] == pytest.approx(2 / 3)  # a above b and c, below d
    assert figures["average_precision"] == pytest.approx(1 / 2)
    assert figures["escape_rate_at_5"] == 1.0  # finding a would ring for d, a third of the good parts
    assert confusion_matrix(parts.probabilities, parts.labels) == ((2, 1), (0, 1))


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


@pytest.mark.parametrize(
    ("aggregation", "top_k", "expected"),
    [
        ("max", 3, [0.9, 0.4, 0.6]),
        ("topk_mean", 1, [0.9, 0.4, 0.6]),
        ("topk_mean", 2, [0.8, 0.4, 0.35]),
        ("topk_mean", 3, [0.6, 0.4, 0.35]),
        ("mean", 3, [0.475, 0.4, 0.35]),
    ],
)
def test_aggregations_of_two_classes(aggregation: str, top_k: int, expected: list[float]) -> None:
    #  part            a    b    a    a    c    a    c
    rows = two_classes(0.1, 0.4, 0.9, 0.7, 0.6, 0.2, 0.1)
    labels = np.array([0, 0, 1, 0, 0, 0, 0])
    groups = ["a", "b", "a", "a", "c", "a", "c"]
    parts = score_parts(rows, labels, groups, aggregation=aggregation, top_k=top_k)
    np.testing.assert_allclose(parts.probabilities[:, 1], expected)
    np.testing.assert_allclose(parts.probabilities.sum(axis=1), 1)
    assert parts.labels.tolist() == [1, 0, 0]
    assert parts.probabilities.argmax(axis=1).tolist() == [int(value > 0.5) for value in expected]


def test_top_k_mean_lies_between_maximum_and_mean() -> None:
    generator = np.random.default_rng(0)
    rows, labels = generator.dirichlet(np.ones(2), 200), np.zeros(200, dtype=np.int64)
    groups = [str(group) for group in generator.integers(0, 30, 200)]
    scores = {
        (aggregation, top_k): score_parts(rows, labels, groups, aggregation=aggregation, top_k=top_k).probabilities[
            :, 1
        ]
        for aggregation, top_k in (("max", 1), ("topk_mean", 2), ("topk_mean", 4), ("topk_mean", 500), ("mean", 1))
    }
    falling = list(scores.values())
    assert all((high >= low - 1e-12).all() for high, low in pairwise(falling))
    np.testing.assert_allclose(scores["topk_mean", 500], scores["mean", 1])


def test_many_classes_take_means_whatever_is_asked() -> None:
    rows, groups = np.random.default_rng(0).dirichlet(np.ones(3), 12), ["a", "b", "c"] * 4
    labels = np.zeros(12, dtype=np.int64)
    expected = score_parts(rows, labels, groups, aggregation="mean").probabilities
    np.testing.assert_array_equal(score_parts(rows, labels, groups, aggregation="max").probabilities, expected)


def test_bad_settings() -> None:
    rows, labels = two_classes(0.5), np.array([0])
    with pytest.raises(ValueError, match="'median' is not one of max, mean, topk_mean"):
        score_parts(rows, labels, ["a"], aggregation="median")
    with pytest.raises(ValueError, match="must be at least 1, found 0"):
        score_parts(rows, labels, ["a"], aggregation="topk_mean", top_k=0)
