"""Figures of a classification, from class probabilities and labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)
from sklearn.metrics import confusion_matrix as count_confusions

from dinov2.eval.metrics.streaming import Pixels, StreamedMetric, as_array, check_same_size

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

FALSE_ALARM_BUDGETS = {"escape_rate_at_0.1": 0.001, "escape_rate_at_1": 0.01, "escape_rate_at_5": 0.05}
FIGURES = (
    "accuracy",
    "balanced_accuracy",
    "precision",
    "recall",
    "f1",
    "auroc",
    "average_precision",
    *FALSE_ALARM_BUDGETS,
    "top5",
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure and where it may lie.

    Attributes:
        value: as measured.
        low: lower end of the 95 % interval; None where there is none.
        high: its upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


def classification_figures(probabilities: FloatArray, labels: IntArray) -> dict[str, float]:
    """Scores class probabilities against labels.

    A row is predicted to be of its most probable class, of equally probable ones that of the lowest number. A figure
    that the rows cannot give is absent.

    Args:
        probabilities: ``[N, C]``, finite; with two classes, class 1 is the positive one (a defect), and rows must be
            comparable with each other.
        labels: ``[N]`` in ``[0, C)``.

    Returns:
        Figures in [0, 1], in the order of `FIGURES`:
        ``accuracy``, and ``balanced_accuracy``, the mean recall of the classes that occur in the labels;
        ``precision``, ``recall``, ``f1``: with two classes those of class 1, absent where no label is 1, else means
        over the classes that occur (a precision of no predictions is 0);
        ``auroc``, ``average_precision`` and ``escape_rate_at_0.1``, ``_1`` and ``_5``, with two classes that both
        occur: the escape rate is the smallest share of class 1 that a threshold misses which raises false alarms on at
        most 0.1, 1 or 5 % of class 0;
        ``top5``, with more than five classes: share of rows whose label is among the five most probable classes.

    Raises:
        ValueError: when there are no rows, for a label outside the classes, or for probabilities that are not finite.
    """
    check_probabilities(probabilities, labels)
    num_classes = probabilities.shape[1]
    predictions = probabilities.argmax(axis=1)
    occurring = np.unique(labels)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=np.arange(num_classes), zero_division=0.0
    )
    figures = {
        "accuracy": float((predictions == labels).mean()),
        "balanced_accuracy": float(recall[occurring].mean()),
    }
    counted = occurring if num_classes != 2 else occurring[occurring == 1]
    if len(counted):
        figures |= {
            name: float(values[counted].mean())
            for name, values in (("precision", precision), ("recall", recall), ("f1", f1))
        }
    if num_classes == 2 and len(occurring) == 2:
        figures |= _threshold_figures(probabilities[:, 1], labels)
    if num_classes > 5:
        figures["top5"] = float(within_top(probabilities, labels, 5).mean())
    return figures


def confusion_matrix(probabilities: FloatArray, labels: IntArray) -> tuple[tuple[int, ...], ...]:
    """How many rows of each class (outer) are predicted to be of each class (inner), ``C`` by ``C``."""
    check_probabilities(probabilities, labels)
    counts = count_confusions(labels, probabilities.argmax(axis=1), labels=np.arange(probabilities.shape[1]))
    return tuple(tuple(int(count) for count in row) for row in counts)


def within_top(probabilities: FloatArray, labels: IntArray, top: int) -> BoolArray:
    """Whether fewer than ``top`` classes come before the label; equals come in the order of their numbers."""
    own = np.take_along_axis(probabilities, labels[:, None], axis=1)  # [N, 1]
    before = (probabilities > own) | ((probabilities == own) & (np.arange(probabilities.shape[1]) < labels[:, None]))
    return np.asarray(before.sum(axis=1) < top)


def check_probabilities(probabilities: FloatArray, labels: IntArray) -> None:
    """Raises ValueError for shapes that do not fit, no rows, labels outside the classes, or values not finite."""
    if probabilities.ndim != 2 or len(probabilities) == 0 or labels.shape != (len(probabilities),):
        raise ValueError(f"probabilities {probabilities.shape} and labels {labels.shape} must have the same N >= 1")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"labels must be in [0, {probabilities.shape[1]}), found {labels.min()} to {labels.max()}")
    num_bad = int((~np.isfinite(probabilities).all(axis=1)).sum())
    if num_bad:
        raise ValueError(f"the probabilities of {num_bad} of {len(probabilities)} rows are NaN or infinite")


def _threshold_figures(scores: FloatArray, labels: IntArray) -> dict[str, float]:
    """Figures over all thresholds on the scores ``[N]`` of class 1; both classes occur."""
    false_alarms, found, _ = roc_curve(labels, scores, drop_intermediate=False)  # shares of class 0 and of class 1
    figures = {
        "auroc": float(roc_auc_score(labels, scores)),
        "average_precision": float(average_precision_score(labels, scores)),
    }
    for name, budget in FALSE_ALARM_BUDGETS.items():
        figures[name] = float(1 - found[false_alarms <= budget].max())
    return figures


MISSING = -1
THRESHOLD = 0.5


class MultiLabelMetrics(StreamedMetric):
    """Average precision and F1 of every class, judged by itself.

    An image counts for a class only where it is known whether it shows it.

    Args:
        classes: names of the classes.
        threshold: probability from which on a class is predicted.

    Raises:
        ValueError: there are no classes or two of one name, or the threshold is not in [0, 1].
    """

    def __init__(self, classes: Sequence[str], *, threshold: float = THRESHOLD) -> None:
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(f"there must be different classes, found {list(classes)}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], found {threshold}")
        self.classes = tuple(classes)
        self.threshold = threshold
        empty = np.zeros((0, len(classes)))
        super().__init__(sums={}, rows={"probabilities": empty, "labels": empty.astype(np.int64)})

    def update(self, probabilities: Pixels, labels: Pixels) -> None:
        """Adds images.

        Args:
            probabilities: ``[B, C]`` in [0, 1].
            labels: ``[B, C]`` of any dtype: 1 where the image shows the class, 0 where not, -1 where unknown.

        Raises:
            ValueError: the shapes differ or do not fit the classes, or a value is not allowed.
        """
        predicted, truth = as_array(probabilities), as_array(labels)
        check_same_size(predicted, truth, "probabilities", "labels")
        if predicted.ndim != 2 or predicted.shape[1] != len(self.classes):
            raise ValueError(f"probabilities must be [B, {len(self.classes)}], found shape {list(predicted.shape)}")
        if not ((predicted >= 0) & (predicted <= 1)).all():  # also for NaN
            raise ValueError("probabilities must lie in [0, 1]")
        wrong = truth[~np.isin(truth, (0, 1, MISSING))]
        if wrong.size:
            raise ValueError(f"labels must be 0, 1 or {MISSING}, found {wrong[:5].tolist()}")
        self.append("probabilities", predicted.astype(np.float64))
        self.append("labels", truth.astype(np.int64))

    def compute(self) -> dict[str, float]:
        """Figures in [0, 1].

        Returns:
            ``mean_average_precision`` and ``macro_f1``: means over the classes that an image is known to show;
            ``micro_f1``, over all known pairs of image and class, where any is positive in truth or prediction;
            ``average_precision/NAME`` and ``f1/NAME`` of the classes that the means run over.
        """
        probabilities, labels = self.rows("probabilities"), self.rows("labels")
        predicted = (probabilities >= self.threshold).astype(np.int64)
        known = labels != MISSING
        precisions, f1 = {}, {}
        for number in np.flatnonzero((labels == 1).any(axis=0)):
            rows = known[:, number]
            name = self.classes[number]
            precisions[name] = float(average_precision_score(labels[rows, number], probabilities[rows, number]))
            f1[name] = _f1(labels[rows, number], predicted[rows, number])
        figures = {}
        if precisions:
            figures["mean_average_precision"] = float(np.mean(list(precisions.values())))
            figures["macro_f1"] = float(np.mean(list(f1.values())))
        if (labels[known] + predicted[known]).any():
            figures["micro_f1"] = _f1(labels[known], predicted[known])
        figures |= {f"average_precision/{name}": value for name, value in precisions.items()}
        return figures | {f"f1/{name}": value for name, value in f1.items()}


def _f1(labels: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64]) -> float:
    return float(f1_score(labels, predicted, zero_division=0.0))
