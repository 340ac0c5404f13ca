import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from dinov2.eval.metrics import classification as scoring
from dinov2.eval.metrics.classification import (
    classification_metrics,
    confusion_matrix,
    draw_parts,
    interval,
    score_parts,
    score_predictions,
)


def random_parts(seed: int = 0, num_parts: int = 40) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Photos of parts of one to six photos, two classes."""
    generator = np.random.default_rng(seed)
    parts = np.repeat(np.arange(num_parts), generator.integers(1, 7, num_parts))
    labels = (generator.random(num_parts) < 0.4).astype(np.int64)[parts]
    positive = np.clip(generator.normal(0.35 + 0.3 * labels, 0.25), 0, 1).round(2)
    return np.stack([1 - positive, positive], axis=1), labels, [f"part {part}" for part in parts]


def test_figures_are_those_of_images_and_of_parts() -> None:
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
    scores = score_predictions(probabilities, labels, groups, num_resamples=200, seed=3)
    names = sorted(set(groups))
    rows_of_part = [[row for row, group in enumerate(groups) if group == name] for name in names]
    measured: dict[str, list[float]] = {"auroc": [], "average_precision": [], "balanced_accuracy": [], "part": []}
    for draw in draw_parts(len(names), 200, 3):
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


def test_photos_of_one_part_are_no_independent_samples() -> None:
    """Ten copies of every photo change no figure and no interval, as long as they are of the same part."""
    probabilities, labels, groups = random_parts()
    once = score_predictions(probabilities, labels, groups, num_resamples=100)
    copies = score_predictions(
        np.repeat(probabilities, 10, axis=0), np.repeat(labels, 10), list(np.repeat(groups, 10)), num_resamples=100
    )
    alone = score_predictions(
        np.repeat(probabilities, 10, axis=0),
        np.repeat(labels, 10),
        [str(row) for row in range(10 * len(labels))],
        num_resamples=100,
    )
    wide, same, narrow = (scores.image.metrics["auroc"] for scores in (once, copies, alone))
    assert (same.value, same.low, same.high) == pytest.approx((wide.value, wide.low, wide.high))
    assert narrow.high - narrow.low < 0.7 * (wide.high - wide.low)


def test_the_seed_decides_the_intervals() -> None:
    problem = random_parts()
    first, again, other = (score_predictions(*problem, num_resamples=50, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.image.metrics["auroc"].value == other.image.metrics["auroc"].value
    assert first.image.metrics["auroc"] != other.image.metrics["auroc"]


def test_resamples_without_a_figure_are_left_out() -> None:
    """A single defect is missing in a third of the resamples; where it is drawn, the AUROC is perfect."""
    positive = np.array([0.9, 0.1, 0.2, 0.3])
    probabilities, labels = np.stack([1 - positive, positive], axis=1), np.array([1, 0, 0, 0])
    figures = score_predictions(probabilities, labels, list("abcd"), num_resamples=300).part.metrics
    assert (figures["auroc"].low, figures["auroc"].high) == (1.0, 1.0)
    assert (figures["accuracy"].low, figures["accuracy"].high) == (1.0, 1.0)


def test_no_interval_without_resamples_and_for_a_single_part() -> None:
    probabilities, labels, groups = random_parts()
    for scores in (
        score_predictions(probabilities, labels, groups, num_resamples=0),
        score_predictions(probabilities, labels, ["one"] * len(labels)),
    ):
        for figure in (*scores.image.metrics.values(), *scores.part.metrics.values()):
            assert (figure.low, figure.high) == (None, None)


def test_interval_of_values_that_do_not_exist() -> None:
    assert interval(np.full(5, np.nan)) == (None, None)
    assert interval(np.array([np.nan, 2.0, 2.0])) == (2.0, 2.0)


def test_one_class_only() -> None:
    scores = score_predictions(np.array([[0.8, 0.2], [0.4, 0.6]]), np.zeros(2, dtype=np.int64), ["a", "b"])
    assert list(scores.image.metrics) == ["accuracy", "balanced_accuracy"]
    assert scores.image.metrics["accuracy"].value == 0.5
    assert (scores.image.metrics["accuracy"].low, scores.image.metrics["accuracy"].high) == (0.0, 1.0)


def test_the_confusion_of_very_many_classes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "MAX_CLASSES_OF_CONFUSION", 2)
    scores = score_predictions(np.eye(3), np.arange(3), list("abc"), num_resamples=0)
    assert scores.image.confusion == scores.part.confusion == ()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="num_resamples must be at least 0"):
        score_predictions(np.eye(2), np.arange(2), list("ab"), num_resamples=-1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        score_predictions(np.full((2, 2), np.nan), np.arange(2), list("ab"))
