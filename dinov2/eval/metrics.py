"""Figures of a classification, from class probabilities and labels."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ClassificationMetrics:
    """Figures of one classification, each in [0, 1].

    Attributes:
        count: how many rows were scored.
        accuracy: share of rows whose most probable class is the label.
        balanced_accuracy: mean over the classes that occur in the labels of the share of their rows that are right.
        auroc: area under the ROC curve of class 1 against class 0; None unless there are two classes and both occur.
        top5: share of rows whose label is among the five most probable classes; None up to five classes.
    """

    count: int
    accuracy: float
    balanced_accuracy: float
    auroc: float | None = None
    top5: float | None = None


def classification_metrics(probabilities: FloatArray, labels: IntArray) -> ClassificationMetrics:
    """Scores class probabilities against labels. Of equally probable classes the lowest number counts.

    Args:
        probabilities: ``[N, C]``, finite; for the AUROC, rows must be comparable with each other.
        labels: ``[N]`` in ``[0, C)``.

    Raises:
        ValueError: when there are no rows, or for a label outside the classes.
    """
    num_rows, num_classes = probabilities.shape
    if num_rows == 0 or labels.shape != (num_rows,):
        raise ValueError(f"probabilities {probabilities.shape} and labels {labels.shape} must have the same N >= 1")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be in [0, {num_classes}), found {labels.min()} to {labels.max()}")
    correct = probabilities.argmax(axis=1) == labels
    both_occur = num_classes == 2 and 0 < labels.sum() < num_rows
    return ClassificationMetrics(
        count=num_rows,
        accuracy=float(correct.mean()),
        balanced_accuracy=_balanced(correct, labels),
        auroc=float(roc_auc_score(labels, probabilities[:, 1])) if both_occur else None,
        top5=float(_within_top(probabilities, labels, 5).mean()) if num_classes > 5 else None,
    )


def _balanced(correct: npt.NDArray[np.bool_], labels: IntArray) -> float:
    counts = np.bincount(labels)
    hits = np.bincount(labels, weights=correct)
    occurs = counts > 0
    return float((hits[occurs] / counts[occurs]).mean())


def _within_top(probabilities: FloatArray, labels: IntArray, top: int) -> npt.NDArray[np.bool_]:
    """Whether fewer than ``top`` classes come before the label; equals come in the order of their numbers."""
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)  # [N, 1]
    before = (probabilities > own) | ((probabilities == own) & (np.arange(probabilities.shape[1]) < labels[:, None]))
    return np.asarray(before.sum(axis=1) < top)
