"""How C is chosen."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    log_loss,
    roc_auc_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from dinov2.eval.log_regression.model import LogRegressionSettings, best_candidate, choose_c, hold_out_parts

CS = (1e-3, 1e-2, 0.1, 1.0)


VALUES = {
    "auroc": lambda truth, probabilities: roc_auc_score(truth, probabilities[:, 1]),
    "average_precision": lambda truth, probabilities: average_precision_score(truth, probabilities[:, 1]),
    "accuracy": lambda truth, probabilities: accuracy_score(truth, probabilities.argmax(axis=1)),
    "balanced_accuracy": lambda truth, probabilities: balanced_accuracy_score(truth, probabilities.argmax(axis=1)),
}


def grouped_rows(num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Photos of a part resemble each other more than those of its class."""
    generator = np.random.default_rng(seed)
    parts = np.arange(90) // 3
    labels = np.where(parts % 5 < 3, 0, 1 + parts % (num_classes - 1) if num_classes > 2 else 1)
    part_means = generator.normal(size=(30, 8))
    embeddings = part_means[parts] + 0.3 * generator.normal(size=(90, 8))
    embeddings[:, :num_classes] += 1.5 * np.eye(num_classes)[labels]
    return embeddings, labels, [str(part) for part in parts]


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("class_weighting", ["none", "balanced"])
@pytest.mark.parametrize("metric", ["log_loss", "auroc", "average_precision", "accuracy", "balanced_accuracy"])
def test_figures_of_candidates_equal_a_slow_definition(num_classes: int, class_weighting: str, metric: str) -> None:
    embeddings, labels, groups = grouped_rows(num_classes)
    settings = LogRegressionSettings(cs=CS, metric=metric, class_weighting=class_weighting, hold_out_repeats=3, seed=5)
    if num_classes > 2 and metric in ("auroc", "average_precision"):
        with pytest.raises(ValueError, match=f"{metric} exists for two classes; to choose C among 3, take log_loss"):
            choose_c(embeddings, labels, groups, ("a", "b", "c"), settings)
        return
    choice = choose_c(embeddings, labels, groups, ("a", "b", "c")[:num_classes], settings)
    weight = None if class_weighting == "none" else "balanced"
    for repeat, division in enumerate(hold_out_parts(labels, groups, fraction=0.2, repeats=3, seed=5)):
        truth = labels[division.held]
        weights = None if weight is None else 1 / np.bincount(truth)[truth]
        for number, c in enumerate(CS):
            plain = make_pipeline(
                Normalizer(), StandardScaler(), LogisticRegression(C=c, class_weight=weight, tol=1e-8, max_iter=1000)
            ).fit(embeddings[division.fit], labels[division.fit])
            probabilities = plain.predict_proba(embeddings[division.held])
            loss = log_loss(truth, probabilities, sample_weight=weights, labels=np.arange(num_classes))
            expected = -loss if metric == "log_loss" else VALUES[metric](truth, probabilities)
            assert choice.log_losses[repeat, number] == pytest.approx(loss, abs=4e-3)
            assert choice.values[repeat, number] == pytest.approx(expected, abs=4e-3)
    assert choice.c == CS[best_candidate(choice.values, choice.log_losses)]
    assert choice.converged.all()
    assert choice.metric == metric


def test_the_best_log_loss_wins_and_of_equal_ones_the_smallest_c() -> None:
    losses = np.array([[0.9, 0.4, 0.6, 0.4], [0.9, 0.6, 0.3, 0.6]])
    assert best_candidate(-losses, losses) == 2
    losses[:, 2] = 0.5
    assert best_candidate(-losses, losses) == 1
    assert best_candidate(np.zeros((3, 4)), np.ones((3, 4))) == 0


def test_candidates_within_one_standard_error_count_as_equal() -> None:
    best = np.array([0.9, 0.8, 1.0])
    # Deficits 0.1, 0, 0.05: mean 0.05, standard error 0.0289. Deficits 0.1, -0.1, 0.03: mean 0.01, error 0.0586.
    clearly, hardly = best - [0.1, 0.0, 0.05], best - [0.1, -0.1, 0.03]
    losses = np.tile([0.2, 0.3, 0.7], (3, 1))
    assert best_candidate(np.stack([clearly, hardly, best], axis=1), losses) == 1
    assert best_candidate(np.stack([hardly, clearly, best], axis=1), losses) == 0
    # One repeat has no error: only ties count.
    assert best_candidate(np.array([[0.9, 1.0, 1.0]]), np.array([[0.1, 0.3, 0.2]])) == 2


def test_perfect_ranking_does_not_end_in_probabilities_that_say_nothing() -> None:
    """With any C the classes are ranked without a mistake; the smallest would call every image good."""
    generator = np.random.default_rng(0)
    labels = np.array([0] * 40 + [1] * 10)
    embeddings = generator.normal(size=(50, 5)) * 0.1 + np.array([[1.0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0]])[labels]
    choice = choose_c(embeddings, labels, [str(row) for row in range(50)], ("a", "b"), LogRegressionSettings())
    assert choice.metric == "auroc"
    assert choice.values.min() == 1.0
    assert choice.c > 0.01


def test_features_that_say_nothing_end_in_a_strong_penalty() -> None:
    generator = np.random.default_rng(0)
    embeddings, labels = generator.normal(size=(90, 40)), np.arange(90) % 3
    choice = choose_c(embeddings, labels, [str(row) for row in range(90)], ("a", "b", "c"), LogRegressionSettings())
    assert choice.metric == "log_loss"
    assert choice.c < 0.01


def test_one_candidate_needs_no_choice() -> None:
    embeddings, labels, groups = grouped_rows(2)
    choice = choose_c(embeddings, labels, groups, ("a", "b"), LogRegressionSettings(cs=(7.0,)))
    assert (choice.c, choice.chosen_by, choice.values.size) == (7.0, "being the only one", 0)
    assert choice.as_dict() == {"metric": "auroc", "repeats": 0, "candidates": []}


def test_without_parts_to_hold_out_c_is_the_fallback() -> None:
    embeddings, labels, groups = grouped_rows(2)
    groups = ["one" if label else group for label, group in zip(labels, groups, strict=True)]
    choice = choose_c(embeddings, labels, groups, ("a", "b"), LogRegressionSettings(cs=CS, fallback_c=0.5))
    assert choice.c == 0.5
    assert choice.chosen_by == "falling back, as fewer than two classes have a part to hold out"


def test_plain_values_name_every_candidate() -> None:
    embeddings, labels, groups = grouped_rows(2)
    choice = choose_c(embeddings, labels, groups, ("a", "b"), LogRegressionSettings(cs=(0.01, 1e5), max_iter=3))
    described = choice.as_dict()
    assert [candidate["c"] for candidate in described["candidates"]] == [0.01, 1e5]
    assert described["candidates"][0]["auroc"] == pytest.approx(choice.values[:, 0].mean())
    assert described["candidates"][0]["log_loss"] == pytest.approx(choice.log_losses[:, 0].mean())
    assert described["candidates"][1]["not_converged"] == 5
