"""Metrics of images and of parts against scikit-learn and slow definitions; intervals against a slow bootstrap."""

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

from dinov2.eval.metrics import classification
from dinov2.eval.metrics.classification import (
    FALSE_ALARM_BUDGETS,
    METRICS,
    classification_metrics,
    confusion_matrix,
    draw_parts,
    interval,
    resampled_metrics,
    score_parts,
    score_predictions,
)


def random_problem(num_rows: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_rows)
    scores = generator.random((num_rows, num_classes)) + 0.5 * np.eye(num_classes)[labels]
    return scores / scores.sum(axis=1, keepdims=True), labels


def two_classes(*positive: float) -> np.ndarray:
    return np.array([[1 - p, p] for p in positive])


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
    assert list(figures) == [name for name in METRICS if name in figures]


def test_many_classes_agree_with_scikit_learn() -> None:
    probabilities, labels = random_problem(200, 9)
    predictions = probabilities.argmax(axis=1)
    figures = classification_metrics(probabilities, labels)
    assert list(figures) == [name for name in METRICS if name in figures]
    assert figures == pytest.approx(
        {
            "accuracy": (predictions == labels).mean(),
            "balanced_accuracy": balanced_accuracy_score(labels, predictions),
            "precision": precision_score(labels, predictions, average="macro"),
            "recall": recall_score(labels, predictions, average="macro"),
            "f1": f1_score(labels, predictions, average="macro"),
            "top5": top_k_accuracy_score(labels, probabilities, k=5),
        }
    )


def test_a_budget_is_met_exactly() -> None:
    """One false alarm in 20, 100 and 1000 good rows is just allowed at 5, 1 and 0.1 %."""
    for num_good, name in ((20, "escape_rate_at_5"), (100, "escape_rate_at_1"), (1000, "escape_rate_at_0.1")):
        for count, escaped in ((num_good, 0.0), (num_good - 1, 1.0)):
            probabilities = two_classes(0.7, *[0.0] * (count - 1), 0.6)
            assert classification_metrics(probabilities, np.array([0] * count + [1]))[name] == escaped


def test_top5_breaks_ties_by_class_number() -> None:
    figures = classification_metrics(np.full((7, 7), 1 / 7), np.arange(7))
    assert figures["top5"] == pytest.approx(5 / 7)
    assert figures["accuracy"] == pytest.approx(1 / 7)


def test_metrics_that_need_both_classes_are_absent_with_one() -> None:
    probabilities = two_classes(0.2, 0.7, 0.6)
    good = classification_metrics(probabilities, np.zeros(3, dtype=np.int64))
    assert good == pytest.approx({"accuracy": 1 / 3, "balanced_accuracy": 1 / 3})
    defect = classification_metrics(probabilities, np.ones(3, dtype=np.int64))
    assert defect == pytest.approx(
        {"accuracy": 2 / 3, "balanced_accuracy": 2 / 3, "precision": 1.0, "recall": 2 / 3, "f1": 0.8}
    )


def test_classes_that_are_never_predicted_or_absent_from_the_labels() -> None:
    figures = classification_metrics(two_classes(0.1, 0.2), np.array([0, 1]))
    assert (figures["precision"], figures["recall"], figures["f1"]) == (0.0, 0.0, 0.0)
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
    assert confusion_matrix(two_classes(0.2, 0.9, 0.4), np.array([0, 0, 1])) == ((1, 1), (1, 0))


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
            function(two_classes(0.5, float("nan")), np.array([0, 1]))


def random_parts(seed: int = 0, num_parts: int = 40) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images of parts of one to six images, two classes."""
    generator = np.random.default_rng(seed)
    parts = np.repeat(np.arange(num_parts), generator.integers(1, 7, num_parts))
    labels = (generator.random(num_parts) < 0.4).astype(np.int64)[parts]
    positive = np.clip(generator.normal(0.35 + 0.3 * labels, 0.25), 0, 1).round(2)
    return np.stack([1 - positive, positive], axis=1), labels, [f"part {part}" for part in parts]


def test_metrics_are_those_of_images_and_of_parts() -> None:
    probabilities, labels, groups = random_parts()
    scores = score_predictions(probabilities, labels, groups, aggregation="topk_mean", top_k=2, num_resamples=10)
    parts = score_parts(probabilities, labels, groups, aggregation="topk_mean", top_k=2)
    for level, rows, truth in (
        (scores.image, probabilities, labels),
        (scores.part, parts.probabilities, parts.labels),
    ):
        assert level.count == len(truth)
        assert {name: figure.value for name, figure in level.metrics.items()} == classification_metrics(rows, truth)
        assert level.confusion == confusion_matrix(rows, truth)
        assert sum(map(sum, level.confusion)) == level.count


def test_intervals_are_those_of_a_slow_bootstrap_with_scikit_learn() -> None:
    probabilities, labels, groups = random_parts()
    scores = score_predictions(probabilities, labels, groups, num_resamples=60, seed=3)
    names = sorted(set(groups))
    rows_of_part = [[row for row, group in enumerate(groups) if group == name] for name in names]
    measured: dict[str, list[float]] = {"auroc": [], "average_precision": [], "balanced_accuracy": [], "part": []}
    for draw in draw_parts(len(names), 60, 3):
        drawn = [number for number, count in enumerate(draw) for _ in range(count)]
        rows = np.array([row for number in drawn for row in rows_of_part[number]])
        truth, scored = labels[rows], probabilities[rows, 1]
        measured["auroc"].append(roc_auc_score(truth, scored))
        measured["average_precision"].append(average_precision_score(truth, scored))
        measured["balanced_accuracy"].append(balanced_accuracy_score(truth, scored > 0.5))
        measured["part"].append(
            roc_auc_score(
                [labels[rows_of_part[number]].max() for number in drawn],
                [probabilities[rows_of_part[number], 1].max() for number in drawn],
            )
        )
    for name, values in measured.items():
        figure = scores.part.metrics["auroc"] if name == "part" else scores.image.metrics[name]
        assert (figure.low, figure.high) == pytest.approx(tuple(np.percentile(values, [2.5, 97.5])))


def test_every_resample_draws_as_many_parts_as_there_are() -> None:
    draws = draw_parts(12, 500, seed=1)
    assert draws.shape == (500, 12)
    assert (draws.sum(axis=1) == 12).all()
    assert np.abs(draws.mean(axis=0) - 1).max() < 0.2  # every part equally often
    assert draws.std() == pytest.approx(np.sqrt(1 - 1 / 12), rel=0.05)


def test_the_seed_decides_the_intervals() -> None:
    problem = random_parts()
    first, again, other = (score_predictions(*problem, num_resamples=50, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.image.metrics["auroc"].value == other.image.metrics["auroc"].value
    assert first.image.metrics["auroc"] != other.image.metrics["auroc"]


def test_resamples_without_a_metric_are_left_out() -> None:
    """A single defect is missing in a third of the resamples; where it is drawn, the AUROC is perfect."""
    positive = np.array([0.9, 0.1, 0.2, 0.3])
    probabilities, labels = np.stack([1 - positive, positive], axis=1), np.array([1, 0, 0, 0])
    figures = score_predictions(probabilities, labels, list("abcd"), num_resamples=300).part.metrics
    assert (figures["auroc"].low, figures["auroc"].high) == (1.0, 1.0)
    assert (figures["accuracy"].low, figures["accuracy"].high) == (1.0, 1.0)
    assert interval(np.full(5, np.nan)) == (None, None)
    assert interval(np.array([np.nan, 2.0, 2.0])) == (2.0, 2.0)


def test_no_interval_without_resamples_and_for_a_single_part() -> None:
    probabilities, labels, groups = random_parts()
    for scores in (
        score_predictions(probabilities, labels, groups, num_resamples=0),
        score_predictions(probabilities, labels, ["one"] * len(labels)),
    ):
        for figure in (*scores.image.metrics.values(), *scores.part.metrics.values()):
            assert (figure.low, figure.high) == (None, None)


def test_the_confusion_of_very_many_classes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "MAX_CLASSES_OF_CONFUSION", 2)
    scores = score_predictions(np.eye(3), np.arange(3), list("abc"), num_resamples=0)
    assert scores.image.confusion == scores.part.confusion == ()


def test_bad_input_of_scores_and_parts() -> None:
    with pytest.raises(ValueError, match="num_resamples must be at least 0"):
        score_predictions(np.eye(2), np.arange(2), list("ab"), num_resamples=-1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        score_predictions(np.full((2, 2), np.nan), np.arange(2), list("ab"))
    with pytest.raises(ValueError, match="'median' is not one of max, mean, topk_mean"):
        score_parts(np.eye(1), np.array([0]), ["a"], aggregation="median")
    with pytest.raises(ValueError, match="must be at least 1, found 0"):
        score_parts(np.eye(1), np.array([0]), ["a"], aggregation="topk_mean", top_k=0)


def test_many_classes_take_means_and_the_majority() -> None:
    rows = np.array([[0.6, 0.3, 0.1], [0.0, 0.5, 0.5], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    labels = np.array([0, 1, 2, 1, 2])
    parts = score_parts(rows, labels, ["x", "y", "z", "y", "x"])
    np.testing.assert_allclose(parts.probabilities, [[0.45, 0.3, 0.25], [0.05, 0.65, 0.3], [0.2, 0.2, 0.6]])
    assert parts.labels.tolist() == [0, 1, 2]  # x has labels 0 and 2, equally often
    largest = score_parts(rows, labels, ["x", "y", "z", "y", "x"], aggregation="max")
    np.testing.assert_array_equal(largest.probabilities, parts.probabilities)  # whatever is asked for
    assert parts.num_mixed == 1


def test_order_of_images_does_not_matter() -> None:
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
    assert (parts.group_ids, parts.num_mixed) == (("a", "b", "c"), 1)
    assert parts.probabilities.argmax(axis=1).tolist() == [int(value > 0.5) for value in expected]


@pytest.mark.parametrize("num_classes", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(8))
def test_every_resample_is_scored_like_its_rows(num_classes: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "NUMBERS_AT_A_TIME", 70)  # several pieces
    generator = np.random.default_rng(seed)
    num_rows = int(generator.integers(1, 30))
    labels = generator.integers(0, num_classes, num_rows)
    probabilities = generator.integers(1, 6, (num_rows, num_classes)).astype(float)  # ties
    units = generator.integers(0, 5, num_rows)
    draws = generator.integers(0, 3, (15, 5))
    draws = draws[draws[:, units].sum(axis=1) > 0]
    resampled = resampled_metrics(probabilities, labels, draws, units)
    for index, draw in enumerate(draws):
        rows = np.repeat(np.arange(num_rows), draw[units])
        expected = classification_metrics(probabilities[rows], labels[rows])
        found = {name: values[index] for name, values in resampled.items() if not np.isnan(values[index])}
        assert found == pytest.approx(expected, abs=1e-12)
