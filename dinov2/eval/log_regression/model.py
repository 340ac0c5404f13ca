"""Logistic regression on the features of a frozen backbone: fitted by scikit-learn, kept as plain arrays."""

import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize

from dinov2.eval.log_regression.settings import LogRegressionSettings
from dinov2.eval.metrics import FloatArray, IntArray
from dinov2.utils.files import write_atomically

Array = npt.NDArray[np.float64]

ROWS_AT_A_TIME = 65_536
ARRAYS = ("weights", "bias", "mean", "std", "c", "classes")  # of a file


@dataclass(frozen=True, kw_only=True, eq=False)
class LogRegressionModel:
    """A fitted logistic regression; a row ``x`` of features has the logits ``weights @ (x / |x| - mean) / std + bias``.

    Attributes:
        weights: ``[C, D]``; with two classes, all zero for the first.
        bias: ``[C]``; minus infinity for a class without a training image, whose probability is then 0.
        mean: ``[D]`` of the training features of unit length.
        std: ``[D]`` of the same, 1 where they do not vary.
        c: inverse strength of the L2 penalty.
        classes: names.
    """

    weights: Array
    bias: Array
    mean: Array
    std: Array
    c: float
    classes: tuple[str, ...]

    def probabilities(self, embeddings: FloatArray) -> Array:
        """Class probabilities ``[N, C]`` of features ``[N, D]`` of any length, as the backbone gives them."""
        return np.exp(self.log_probabilities(embeddings))

    def log_probabilities(self, embeddings: FloatArray) -> Array:
        """Logarithms of `probabilities`, exact also where those round to 0 or 1."""
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.mean):
            raise ValueError(f"the model takes features [N, {len(self.mean)}], not {list(embeddings.shape)}")
        pieces = [np.empty((0, len(self.classes)))]
        for start in range(0, len(embeddings), ROWS_AT_A_TIME):
            rows = normalize(embeddings[start : start + ROWS_AT_A_TIME].astype(np.float64))
            logits = (rows - self.mean) / self.std @ self.weights.T + self.bias
            logits -= logits.max(axis=1, keepdims=True)
            pieces.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        return np.concatenate(pieces)

    def save(self, path: str | Path) -> None:
        """Writes an ``.npz`` file of plain arrays, atomically; `load_log_regression` reads it."""
        arrays: Any = {name: np.asarray(getattr(self, name)) for name in ARRAYS}
        write_atomically(path, lambda file: np.savez(file, **arrays))


def load_log_regression(path: str | Path) -> LogRegressionModel:
    """Reads what `LogRegressionModel.save` wrote; nothing in the file can run code.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is not such a file.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ARRAYS}
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:  # TypeError: a single array
        raise ValueError(f"{path} is not a fitted logistic regression: {error}") from error
    shapes = {name: array.shape for name, array in arrays.items()}
    num_classes, num_features = len(np.atleast_1d(arrays["classes"])), np.atleast_1d(arrays["mean"]).size
    expected = {
        "weights": (num_classes, num_features),
        "bias": (num_classes,),
        "mean": (num_features,),
        "std": (num_features,),
        "c": (),
        "classes": (num_classes,),
    }
    if shapes != expected:
        raise ValueError(f"{path} is not a fitted logistic regression: arrays of shapes {shapes}")
    return LogRegressionModel(
        **{name: arrays[name] for name in ("weights", "bias", "mean", "std")},
        c=float(arrays["c"]),
        classes=tuple(str(name) for name in arrays["classes"]),
    )


def fit_path(
    embeddings: FloatArray,
    labels: IntArray,
    classes: Sequence[str],
    cs: Iterable[float],
    settings: LogRegressionSettings,
) -> Iterator[tuple[LogRegressionModel, bool]]:
    """Fits one model per C, each starting where the one before ended: from small to large C, neighbours are near.

    Features are brought to unit length, then each is standardised by mean and deviation of these rows alone.

    Args:
        embeddings: ``[N, D]``, finite.
        labels: ``[N]`` in ``[0, len(classes))``, at least two different ones.
        classes: names.
        cs: inverse strengths of the L2 penalty.
        settings: of the fit; its own ``cs`` do not count here.

    Yields:
        The model, and whether the fit converged within ``max_iter``.
    """
    rows = normalize(embeddings.astype(settings.train_dtype))
    scaler = StandardScaler().fit(rows)
    rows = scaler.transform(rows)
    estimator = LogisticRegression(
        max_iter=settings.max_iter,
        class_weight=None if settings.class_weighting == "none" else settings.class_weighting,
        warm_start=True,
    )
    for c in cs:
        estimator.C = c
        converged = _fit_quietly(estimator, rows, labels)
        yield _as_model(estimator, scaler, c, tuple(classes)), converged


def _fit_quietly(estimator: LogisticRegression, rows: FloatArray, labels: IntArray) -> bool:
    """Fits, and returns whether that converged instead of warning; other warnings stay warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        estimator.fit(rows, labels)
    others = [warning for warning in caught if not issubclass(warning.category, ConvergenceWarning)]
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return len(others) == len(caught)


def _as_model(
    estimator: LogisticRegression, scaler: StandardScaler, c: float, classes: tuple[str, ...]
) -> LogRegressionModel:
    seen: Any = estimator.classes_
    weights = np.zeros((len(classes), len(scaler.mean_)))
    bias = np.full(len(classes), -np.inf)
    if len(seen) == 2:  # scikit-learn has one row of weights then, the logit of the second class against the first
        weights[seen[1]], bias[seen[0]], bias[seen[1]] = estimator.coef_[0], 0.0, estimator.intercept_[0]
    else:
        weights[seen], bias[seen] = estimator.coef_, estimator.intercept_
    return LogRegressionModel(
        weights=weights,
        bias=bias,
        mean=np.array(scaler.mean_, dtype=np.float64),
        std=np.array(scaler.scale_, dtype=np.float64),
        c=float(c),
        classes=classes,
    )
