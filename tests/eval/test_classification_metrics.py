import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    precision_score,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from dinov2.eval.metrics.classification import FALSE_ALARM_BUDGETS, METRICS, classification_metrics, confusion_matrix


def random_problem(num_rows: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_rows)
    scores = generator.random((num_rows, num_classes)) + 0.5 * np.eye(num_classes)[labels]
    return scores / scores.sum(axis=1, keepdims=True), labels


def two_classes(positive: list[float]) -> np.ndarray:
    return np.array([[1 - p, p] for p in positive])


def slow_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The definition: how often a positive scores above a negative, ties counting half."""
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean(pairs))


def slow_escape_rate(scores: np.ndarray, labels: np.ndarray, budget: float) -> float:
    """The definition: over all thresholds "raise an alarm from this score on", and the one without alarms."""
    best = 1.0
    for threshold in [*scores, np.inf]:
        alarms = scores >= threshold
        if alarms[labels == 0].mean() <= budget:
            best = min(best, (~alarms)[labels == 1].mean())
    return float(best)


@pytest.mark.parametrize("seed", range(5))
def test_two_classes_agree_with_scikit_learn_and_the_definitions(seed: int) -> None:
    probabilities, labels = random_problem(80, 2, seed)
    probabilities = probabilities.round(1)  # ties
    figures = classification_metrics(probabilities, labels)
    predictions, scores = probabilities.argmax(axis=1), probabilities[:, 1]
    assert figures == pytest.approx(
        {
            "accuracy": (predictions == labels).mean(),
            "balanced_accuracy": balanced_accuracy_score(labels, predictions),
            "precision": precision_score(labels, predictions),
            "recall": recall_score(labels, predictions),
            "f1": f1_score(labels, predictions),
            "auroc": roc_auc_score(labels, scores),
            "average_precision": average_precision_score(labels, scores),
            **{name: slow_escape_rate(scores, labels, budget) for name, budget in FALSE_ALARM_BUDGETS.items()},
        },
        abs=1e-12,
    )
    assert figures["auroc"] == pytest.approx(slow_auroc(scores, labels))


def test_many_classes_agree_with_scikit_learn() -> None:
    probabilities, labels = random_problem(200, 9)
    predictions = probabilities.argmax(axis=1)
    assert classification_metrics(probabilities, labels) == pytest.approx(
        {
            "accuracy": (predictions == labels).mean(),
            "balanced_accuracy": balanced_accuracy_score(labels, predictions),
            "precision": precision_score(labels, predictions, average="macro"),
            "recall": recall_score(labels, predictions, average="macro"),
            "f1": f1_score(labels, predictions, average="macro"),
            "top5": top_k_accuracy_score(labels, probabilities, k=5),
        }
    )


@pytest.mark.parametrize("num_classes", [2, 9])
def test_figures_come_in_one_order(num_classes: int) -> None:
    names = list(classification_metrics(*random_problem(50, num_classes)))
    assert names == [name for name in METRICS if name in names]


def test_escape_rate_of_hand_made_scores() -> None:
    """Of 20 good rows one may ring at 5 %: alarms from 0.7 on ring for one and miss a defect of four."""
    good = [0.1] * 17 + [0.6, 0.6, 0.8]
    defects = [0.9, 0.8, 0.7, 0.6]
    probabilities, labels = two_classes(good + defects), np.array([0] * 20 + [1] * 4)
    figures = classification_metrics(probabilities, labels)
    assert figures["escape_rate_at_5"] == pytest.approx(1 / 4)  # from 0.7 on, with the good row at 0.8
    assert figures["escape_rate_at_1"] == figures["escape_rate_at_0.1"] == pytest.approx(3 / 4)  # only 0.9 is safe


def test_escape_rate_when_every_defect_looks_like_a_good_row() -> None:
    figures = classification_metrics(two_classes([0.5, 0.5, 0.5]), np.array([0, 1, 1]))
    assert figures["escape_rate_at_5"] == 1.0
    assert figures["auroc"] == 0.5
    assert figures["average_precision"] == pytest.approx(2 / 3)


def test_a_budget_is_met_exactly() -> None:
    """One false alarm in 20, 100 and 1000 good rows is just allowed at 5, 1 and 0.1 %."""
    for num_good, name in ((20, "escape_rate_at_5"), (100, "escape_rate_at_1"), (1000, "escape_rate_at_0.1")):
        for count, escaped in ((num_good, 0.0), (num_good - 1, 1.0)):
            probabilities = two_classes([0.7] + [0.0] * (count - 1) + [0.6])
            assert classification_metrics(probabilities, np.array([0] * count + [1]))[name] == escaped


def test_top5_breaks_ties_by_class_number() -> None:
    figures = classification_metrics(np.full((7, 7), 1 / 7), np.arange(7))
    assert figures["top5"] == pytest.approx(5 / 7)
    assert figures["accuracy"] == pytest.approx(1 / 7)


@pytest.mark.parametrize("num_classes", [1, 2, 3, 5])
def test_top5_is_absent_up_to_five_classes(num_classes: int) -> None:
    assert "top5" not in classification_metrics(*random_problem(20, num_classes))


def test_figures_that_need_both_classes_are_absent_with_one() -> None:
    probabilities = two_classes([0.2, 0.7, 0.6])
    good = classification_metrics(probabilities, np.zeros(3, dtype=np.int64))
    assert good == pytest.approx({"accuracy": 1 / 3, "balanced_accuracy": 1 / 3})
    defect = classification_metrics(probabilities, np.ones(3, dtype=np.int64))
    assert defect == pytest.approx(
        {"accuracy": 2 / 3, "balanced_accuracy": 2 / 3, "precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    )


def test_a_class_that_is_never_predicted_has_precision_zero() -> None:
    figures = classification_metrics(two_classes([0.1, 0.2]), np.array([0, 1]))
    assert (figures["precision"], figures["recall"], figures["f1"]) == (0.0, 0.0, 0.0)


def test_class_absent_from_the_labels_does_not_count() -> None:
    probabilities = np.eye(3)[[0, 0, 2, 1]]
    figures = classification_metrics(probabilities, np.array([0, 0, 0, 1]))
    assert figures["balanced_accuracy"] == figures["recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert figures["precision"] == 1.0
    assert figures["f1"] == pytest.approx((0.8 + 1) / 2)


def test_confusion_matrix_is_that_of_scikit_learn_with_absent_classes() -> None:
    probabilities, labels = random_problem(60, 4)
    labels[labels == 2] = 0
    expected = sklearn_confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(4))
    assert confusion_matrix(probabilities, labels) == tuple(map(tuple, expected.tolist()))
    assert confusion_matrix(two_classes([0.2, 0.9, 0.4]), np.array([0, 0, 1])) == ((1, 1), (1, 0))


def test_bad_input() -> None:
    for function in (classification_metrics, confusion_matrix):
        with pytest.raises(ValueError, match="same N >= 1"):
            function(np.zeros((0, 2)), np.zeros(0, dtype=np.int64))
        with pytest.raises(ValueError, match="same N >= 1"):
            function(np.zeros((3, 2)), np.zeros(2, dtype=np.int64))
        for label in (-1, 2):
            with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
                function(np.zeros((1, 2)), np.array([label]))
        with pytest.raises(ValueError, match="probabilities of 1 of 2 rows are NaN or infinite"):
            function(two_classes([0.5, float("nan")]), np.array([0, 1]))
