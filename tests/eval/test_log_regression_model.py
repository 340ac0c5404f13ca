import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler

from dinov2.eval.log_regression.model import (
    C_GRID,
    LogRegressionModel,
    LogRegressionSettings,
    fit_path,
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


def test_formula_and_length_of_rows() -> None:
    embeddings, labels = rows(60, 3)
    model = fit_one(embeddings, labels, 3, 0.1)
    unit = embeddings / np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(model.mean, unit.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(model.std, unit.std(axis=0), atol=1e-7)
    logits = (unit - model.mean) / model.std @ model.weights.T + model.bias
    exponentials = np.exp(logits)
    probabilities = model.probabilities(embeddings)
    np.testing.assert_allclose(probabilities, exponentials / exponentials.sum(axis=1, keepdims=True), atol=1e-7)
    np.testing.assert_allclose(model.probabilities(embeddings * 64), probabilities, rtol=0, atol=1e-12)


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


def test_features_that_do_not_vary() -> None:
    embeddings, labels = rows(40, 2)
    embeddings[:, 1] = 0
    embeddings[3] = 0  # a row without a direction
    model = fit_one(embeddings, labels, 2, 1.0)
    assert model.std[1] == 1
    assert np.isfinite(model.probabilities(embeddings)).all()


def test_logarithms_do_not_saturate() -> None:
    model = LogRegressionModel(
        weights=np.array([[0.0, 0.0], [1000.0, -1000.0]]),
        bias=np.zeros(2),
        mean=np.zeros(2),
        std=np.ones(2),
        c=1.0,
        classes=("good", "defect"),
    )
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
    contents = {
        "text": b"something else",
        "empty": b"",
        "broken archive": b"PK\x03\x04 and nothing more",
    }
    for content in contents.values():
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


def test_features_of_another_width() -> None:
    model = fit_one(*rows(20, 2), 2, 1.0)
    with pytest.raises(ValueError, match=re.escape("the model takes features [N, 6], not [4, 7]")):
        model.probabilities(np.zeros((4, 7)))
    assert model.probabilities(np.zeros((0, 6))).shape == (0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cs": ()}, "cs must be one or more finite numbers above 0"),
        ({"cs": (1.0, 0.0)}, "cs must be one or more finite numbers above 0"),
        ({"cs": (float("nan"),)}, "cs must be one or more finite numbers above 0"),
        ({"fallback_c": -1.0}, "fallback_c must be finite and above 0, found -1.0"),
        ({"hold_out_fraction": 1.5}, "hold_out_fraction must be between 0 and 1, found 1.5"),
        ({"hold_out_repeats": 0}, "hold_out_repeats must be at least 1, found 0"),
        ({"max_iter": 0}, "max_iter must be at least 1, found 0"),
        ({"num_resamples": -1}, "num_resamples must be at least 0, found -1"),
        ({"metric": "top5"}, "metric 'top5' is not one of '', 'log_loss', 'auroc'"),
        ({"class_weighting": "yes"}, "class_weighting 'yes' is not one of 'none', 'balanced'"),
        ({"train_dtype": "float16"}, "train_dtype 'float16' is not one of 'float64', 'float32'"),
        ({"n_per_class_list": (0,)}, "n_per_class_list"),
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
