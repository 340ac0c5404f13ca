import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, top_k_accuracy_score

from dinov2.eval.metrics import classification_metrics


def random_problem(num_rows: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_rows)
    scores = generator.random((num_rows, num_classes)) + 0.5 * np.eye(num_classes)[labels]
    return scores / scores.sum(axis=1, keepdims=True), labels


def slow_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The definition: how often a positive scores above a negative, ties counting half."""
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean(pairs))


def test_two_classes_agree_with_scikit_learn_and_the_definition() -> None:
    probabilities, labels = random_problem(80, 2)
    probabilities = probabilities.round(1)  # ties
    metrics = classification_metrics(probabilities, labels)
    predictions = probabilities.argmax(axis=1)
    assert metrics.count == 80
    assert metrics.accuracy == pytest.approx((predictions == labels).mean())
    assert metrics.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predictions))
    assert metrics.auroc == pytest.approx(roc_auc_score(labels, probabilities[:, 1]))
    assert metrics.auroc == pytest.approx(slow_auroc(probabilities[:, 1], labels))
    assert metrics.top5 is None


def test_many_classes_agree_with_scikit_learn() -> None:
    probabilities, labels = random_problem(200, 9)
    metrics = classification_metrics(probabilities, labels)
    assert metrics.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, probabilities.argmax(axis=1)))
    assert metrics.top5 == pytest.approx(top_k_accuracy_score(labels, probabilities, k=5))
    assert metrics.auroc is None


def test_top5_breaks_ties_by_class_number() -> None:
    probabilities = np.full((7, 7), 1 / 7)
    metrics = classification_metrics(probabilities, np.arange(7))
    assert metrics.top5 == pytest.approx(5 / 7)
    assert metrics.accuracy == pytest.approx(1 / 7)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 5])
def test_top5_is_absent_up_to_five_classes(num_classes: int) -> None:
    probabilities, labels = random_problem(20, num_classes)
    assert classification_metrics(probabilities, labels).top5 is None


@pytest.mark.parametrize("label", [0, 1])
def test_auroc_is_absent_when_one_class_only_occurs(label: int) -> None:
    probabilities, _ = random_problem(6, 2)
    metrics = classification_metrics(probabilities, np.full(6, label))
    assert metrics.auroc is None
    assert metrics.balanced_accuracy == metrics.accuracy


def test_class_absent_from_the_labels_does_not_count() -> None:
    probabilities = np.eye(3)[[0, 0, 2, 1]]
    metrics = classification_metrics(probabilities, np.array([0, 0, 0, 1]))
    assert math.isclose(metrics.balanced_accuracy, (2 / 3 + 1) / 2)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="same N >= 1"):
        classification_metrics(np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
    with pytest.raises(ValueError, match="same N >= 1"):
        classification_metrics(np.zeros((3, 2)), np.zeros(2, dtype=np.int64))
    for label in (-1, 2):
        with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
            classification_metrics(np.zeros((1, 2)), np.array([label]))
