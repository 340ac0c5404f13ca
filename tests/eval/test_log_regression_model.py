"""The fit, its file, the choice of C and the parts that are held out for it."""

import re
import warnings
from pathlib import Path

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

from dinov2.eval.log_regression_model import (
    C_GRID,
    HoldOut,
    LogRegressionModel,
    LogRegressionSettings,
    best_candidate,
    choose_c,
    fit_path,
    hold_out_parts,
    load_log_regression,
)

NAMES = ("a", "b", "c", "d", "e")


def rows(num_rows: int, num_classes: int, seed: int = 0, width: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Overlapping clouds, one per class, of rows whose length says nothing; the first class is the largest."""
    generator = np.random.default_rng(seed)
    labels = np.minimum(generator.integers(0, num_classes + 2, num_rows), num_classes - 1)[::-1]
    labels = num_classes - 1 - labels
    centres = np.random.default_rng(99).normal(size=(num_classes, width))
    embeddings = (centres[labels] + generator.normal(size=(num_rows, width))) * generator.uniform(0.1, 9, (num_rows, 1))
    return embeddings.astype(np.float32), labels


def fit_one(embeddings: np.ndarray, labels: np.ndarray, num_classes: int, c: float, **settings) -> LogRegressionModel:
    model, converged = next(fit_path(embeddings, labels, NAMES[:num_classes], [c], LogRegressionSettings(**settings)))
    assert converged
    return model


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("class_weighting", ["none", "balanced"])
@pytest.mark.parametrize("c", [1e-6, 0.01, 1.0])
def test_equals_a_plain_pipeline(num_classes: int, class_weighting: str, c: float) -> None:
    embeddings, labels = rows(80, num_classes)
    others, _ = rows(30, num_classes, seed=1)
    weight = None if class_weighting == "none" else class_weighting
    plain = make_pipeline(Normalizer(), StandardScaler(), LogisticRegression(C=c, class_weight=weight, max_iter=1000))
    plain.fit(embeddings.astype(np.float64), labels)
    model = fit_one(embeddings, labels, num_classes, c, class_weighting=class_weighting)
    expected = plain.predict_proba(others.astype(np.float64))
    np.testing.assert_allclose(model.probabilities(others), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(model.log_probabilities(others), np.log(expected), rtol=0, atol=1e-10)
    np.testing.assert_allclose(model.probabilities(others * 64), expected, rtol=0, atol=1e-12)  # whatever their length


@pytest.mark.parametrize("train_dtype", ["float64", "float32"])
def test_a_path_gives_what_single_fits_give(train_dtype: str) -> None:
    embeddings, labels = rows(200, 3)
    settings = LogRegressionSettings(train_dtype=train_dtype)
    cs = C_GRID[:33]  # up to 100
    for c, (model, converged) in zip(cs, fit_path(embeddings, labels, NAMES[:3], cs, settings), strict=True):
        assert converged
        assert model.c == c
        alone = fit_one(embeddings, labels, 3, c)
        # Both stop within the solver's tolerance of the optimum.
        np.testing.assert_allclose(model.probabilities(embeddings), alone.probabilities(embeddings), atol=5e-3)


def test_a_fit_that_is_stopped_is_told_and_does_not_warn() -> None:
    embeddings, labels = rows(100, 2)
    fits = fit_path(embeddings, labels, NAMES[:2], [1e-6, 0.01], LogRegressionSettings(max_iter=9))
    assert [converged for _, converged in fits] == [False, True]


def test_other_warnings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = LogisticRegression.fit

    def warn_and_fit(self: LogisticRegression, *args: np.ndarray) -> LogisticRegression:
        warnings.warn("something else", UserWarning, stacklevel=1)
        return fit(self, *args)

    monkeypatch.setattr(LogisticRegression, "fit", warn_and_fit)
    embeddings, labels = rows(20, 2)
    with pytest.warns(UserWarning, match="something else"):
        fit_one(embeddings, labels, 2, 1.0)


@pytest.mark.parametrize("seen", [(0, 2), (1, 2, 4)])
def test_a_class_without_images_is_never_predicted(seen: tuple[int, ...]) -> None:
    embeddings, labels = rows(60, len(seen))
    model = fit_one(embeddings, np.array(seen)[labels], 5, 1.0)
    narrow = fit_one(embeddings, labels, len(seen), 1.0)
    probabilities = model.probabilities(embeddings)
    np.testing.assert_array_equal(probabilities[:, seen], narrow.probabilities(embeddings))
    assert np.delete(probabilities, seen, axis=1).sum() == 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_features_that_do_not_vary_are_too_wide_or_none() -> None:
    embeddings, labels = rows(40, 2)
    embeddings[:, 1] = 0
    embeddings[3] = 0  # a row without a direction
    model = fit_one(embeddings, labels, 2, 1.0)
    assert model.std[1] == 1
    assert np.isfinite(model.probabilities(embeddings)).all()
    with pytest.raises(ValueError, match=re.escape("the model takes features [N, 6], not [4, 7]")):
        model.probabilities(np.zeros((4, 7)))
    assert model.probabilities(np.zeros((0, 6))).shape == (0, 2)


def test_logarithms_do_not_saturate() -> None:
    weights, zeros = np.array([[0.0, 0.0], [1000.0, -1000.0]]), np.zeros(2)
    model = LogRegressionModel(weights=weights, bias=zeros, mean=zeros, std=np.ones(2), c=1.0, classes=NAMES[:2])
    logs = model.log_probabilities(np.array([[1.0, 0.0], [0.0, 1.0]]))
    np.testing.assert_array_equal(logs, [[-1000.0, 0.0], [0.0, -1000.0]])


@pytest.mark.parametrize("num_classes", [2, 3])
def test_saved_and_loaded_gives_the_same_bits(num_classes: int, tmp_path: Path) -> None:
    embeddings, labels = rows(50, num_classes)
    model = fit_one(embeddings, labels, 5, 0.3)
    model.save(tmp_path / "model.npz")
    loaded = load_log_regression(tmp_path / "model.npz")
    np.testing.assert_array_equal(loaded.probabilities(embeddings), model.probabilities(embeddings))
    assert (loaded.c, loaded.classes) == (0.3, NAMES)
    loaded.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "model.npz").read_bytes()


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_log_regression(tmp_path / "absent.npz")
    path = tmp_path / "model.npz"
    for content in (b"something else", b"", b"PK\x03\x04 and nothing more"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape("model.npz is not a fitted logistic regression")):
            load_log_regression(path)
    for arrays in ({"weights": np.zeros((2, 3))}, {"objects": np.array([{}, None], dtype=object)}):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match="is not a fitted logistic regression"):
            load_log_regression(path)
    model = fit_one(*rows(20, 2), 2, 1.0)
    for name, array in (("bias", np.zeros(3)), ("mean", np.zeros(())), ("classes", np.array("a")), ("c", np.ones(2))):
        fields = {field: getattr(model, field) for field in ("weights", "bias", "mean", "std", "c", "classes")}
        np.savez(path, **(fields | {name: array}))
        with pytest.raises(ValueError, match="is not a fitted logistic regression: arrays of shapes"):
            load_log_regression(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cs": ()}, "cs must be one or more finite numbers above 0"),
        ({"cs": (float("nan"),)}, "cs must be one or more finite numbers above 0"),
        ({"fallback_c": -1.0}, "fallback_c must be finite and above 0, found -1.0"),
        ({"hold_out_fraction": 1.5}, "hold_out_fraction must be between 0 and 1, found 1.5"),
        ({"hold_out_repeats": 0}, "hold_out_repeats must be at least 1, found 0"),
        ({"max_iter": 0}, "max_iter must be at least 1, found 0"),
        ({"num_resamples": -1}, "num_resamples must be at least 0, found -1"),
        ({"metric": "top5"}, "metric 'top5' is not one of '', 'log_loss', 'auroc'"),
        ({"class_weighting": "yes"}, "class_weighting 'yes' is not one of 'none', 'balanced'"),
        ({"train_dtype": "float16"}, "train_dtype 'float16' is not one of 'float64', 'float32'"),
        ({"n_tries": 0}, "n_tries must be at least 1"),
        ({"part_aggregation": "min"}, "part aggregation 'min'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LogRegressionSettings(**settings)


def test_the_published_grid() -> None:
    np.testing.assert_allclose(C_GRID, np.logspace(-6, 5, 45), rtol=1e-12)
    assert LogRegressionSettings(cs=(1.0, 0.1, 1.0)).cs == (0.1, 1.0)


CS = (1e-3, 1e-2, 0.1, 1.0)


VALUES = {
    "auroc": lambda truth, probabilities: roc_auc_score(truth, probabilities[:, 1]),
    "average_precision": lambda truth, probabilities: average_precision_score(truth, probabilities[:, 1]),
    "accuracy": lambda truth, probabilities: accuracy_score(truth, probabilities.argmax(axis=1)),
    "balanced_accuracy": lambda truth, probabilities: balanced_accuracy_score(truth, probabilities.argmax(axis=1)),
}


def grouped_rows(num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images of a part resemble each other more than those of its class."""
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
def test_metrics_of_candidates_equal_a_slow_definition(num_classes: int, class_weighting: str, metric: str) -> None:
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
    for number, candidate in enumerate(choice.as_dict()["candidates"]):
        assert candidate["c"] == CS[number]
        assert candidate[metric] == pytest.approx(choice.values[:, number].mean() * (-1 if metric == "log_loss" else 1))
        assert candidate["log_loss"] == pytest.approx(choice.log_losses[:, number].mean())
    assert choice.c == CS[best_candidate(choice.values, choice.log_losses)]
    assert choice.converged.all()
    assert choice.metric == metric


def test_the_best_log_loss_wins_and_of_equal_ones_the_smallest_c() -> None:
    losses = np.array([[0.9, 0.4, 0.6, 0.4], [0.9, 0.6, 0.3, 0.6]])
    assert best_candidate(-losses, losses) == 2
    losses[:, 2] = 0.5
    assert best_candidate(-losses, losses) == 1
    assert best_candidate(np.zeros((3, 4)), np.ones((3, 4))) == 0
    # Candidates within one standard error of the best count as equal.
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


def random_rows(seed: int, *, agree: bool) -> tuple[np.ndarray, list[str]]:
    """Images of parts of very different sizes; the labels of a part agree or do not."""
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


def test_a_part_with_one_defective_image_counts_as_defective() -> None:
    labels = np.array([0, 0, 1] * 6 + [0, 0, 0] * 12)
    groups = [f"part {row // 3:02}" for row in range(len(labels))]  # 6 defective parts, 12 good ones
    divisions = [one for seed in range(5) for one in hold_out_parts(labels, groups, fraction=0.5, seed=seed)]
    assert len(divisions) == 25
    for division in divisions:
        held = held_parts(division, groups)
        assert sum(part < "part 06" for part in held) == 3
        assert len(held) == 9


def test_with_more_classes_a_part_counts_as_what_most_of_its_images_are() -> None:
    labels = np.array([2, 1, 1] * 4 + [0] * 12 + [2] * 12)
    groups = [f"part {row // 3:02}" for row in range(len(labels))]
    divisions = hold_out_parts(labels, groups, fraction=0.25, repeats=4)
    assert len(divisions) == 4
    for division in divisions:
        assert sorted(int(part[-2:]) // 4 for part in held_parts(division, groups)) == [0, 1, 2]


def test_nothing_is_held_out_without_two_classes_to_spare() -> None:
    for labels, groups in (([0, 0, 1, 1], "abcc"), ([0, 1], "ab"), ([0, 0, 0], "abc"), ([0, 1], "aa")):
        assert hold_out_parts(np.array(labels), list(groups)) == ()


def test_parts_that_show_both_labels() -> None:
    # All parts are defective; the only good images are on two of them, and one must stay.
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
    for labels, groups in ([0, 1], ["a"]), ([], []):
        with pytest.raises(ValueError, match="parts must be equally many, and at least one"):
            hold_out_parts(np.array(labels, dtype=np.int64), groups)
