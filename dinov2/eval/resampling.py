"""The figures of many resamples of the same rows at once."""

import numpy as np
import numpy.typing as npt

from dinov2.eval.metrics import FALSE_ALARM_BUDGETS, FloatArray, IntArray, check_probabilities, within_top

Array = npt.NDArray[np.float64]

NUMBERS_AT_A_TIME = 1_000_000


def resampled_figures(
    probabilities: FloatArray, labels: IntArray, draws: IntArray, unit_of_row: IntArray
) -> dict[str, Array]:
    """Figures of `classification_figures` for resamples of the rows.

    A resample is given by how often it draws each unit, and so all rows of the unit; rows are sorted once, no resample
    is ever built, and memory does not grow with their number.

    Args:
        probabilities: ``[N, C]``.
        labels: ``[N]`` in ``[0, C)``.
        draws: ``[R, U]``, how often each of ``R`` resamples draws each unit; none may be empty.
        unit_of_row: ``[N]`` in ``[0, U)``.

    Returns:
        Per figure ``[R]``, NaN where the figure does not exist in a resample.
    """
    check_probabilities(probabilities, labels)
    num_classes = probabilities.shape[1]
    predictions = probabilities.argmax(axis=1)
    top5 = within_top(probabilities, labels, 5) if num_classes > 5 else None
    thresholds = _Thresholds(probabilities[:, 1], labels) if num_classes == 2 else None
    pieces = []
    at_a_time = max(1, NUMBERS_AT_A_TIME // len(labels))
    for start in range(0, len(draws), at_a_time):
        weights = draws[start : start + at_a_time][:, unit_of_row].astype(np.float64)  # [r, N]
        figures = _counted_figures(predictions, labels, weights, num_classes)
        if thresholds is not None:
            figures |= thresholds.figures(weights)
        if top5 is not None:
            figures["top5"] = weights @ top5 / weights.sum(axis=1)
        pieces.append(figures)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in (pieces[0] if pieces else ())}


def _counted_figures(predictions: IntArray, labels: IntArray, weights: Array, num_classes: int) -> dict[str, Array]:
    """Figures of predictions ``[N]`` that count right and wrong ones."""
    truly = _sum_by(weights, labels, num_classes)  # [r, C]
    predicted = _sum_by(weights, predictions, num_classes)
    right = predictions == labels
    hits = _sum_by(weights[:, right], labels[right], num_classes)
    occurs = truly > 0
    recall = _share(hits, truly)
    counted = occurs.copy()
    if num_classes == 2:
        counted[:, 0] = False
    return {
        "accuracy": hits.sum(axis=1) / weights.sum(axis=1),
        "balanced_accuracy": _mean_where(recall, occurs),
        "precision": _mean_where(_share(hits, predicted), counted),
        "recall": _mean_where(recall, counted),
        "f1": _mean_where(_share(2 * hits, truly + predicted), counted),
    }


class _Thresholds:
    """All thresholds on the scores ``[N]`` of class 1, from the highest down; equal scores fall together."""

    def __init__(self, scores: FloatArray, labels: IntArray) -> None:
        self.order = np.argsort(-scores, kind="stable")
        descending = scores[self.order]
        self.starts = np.flatnonzero(np.concatenate([[True], descending[1:] != descending[:-1]]))
        self.positive = labels[self.order] == 1

    def figures(self, weights: Array) -> dict[str, Array]:
        """Figures of resamples that draw the rows so often, ``[r, N]``."""
        weights = weights[:, self.order]
        ones = np.add.reduceat(weights * self.positive, self.starts, axis=1)  # [r, thresholds]
        zeros = np.add.reduceat(weights * ~self.positive, self.starts, axis=1)
        found, alarms = ones.cumsum(axis=1), zeros.cumsum(axis=1)
        num_ones, num_zeros = found[:, -1:], alarms[:, -1:]
        exists = ((num_ones > 0) & (num_zeros > 0))[:, 0]
        num_ones, num_zeros = np.maximum(num_ones, 1), np.maximum(num_zeros, 1)
        beaten = (ones * (num_zeros - alarms + zeros / 2)).sum(axis=1)  # pairs in the right order, ties counting half
        precision = _share(found, found + alarms)
        figures = {
            "auroc": beaten / (num_ones * num_zeros)[:, 0],
            "average_precision": (ones * precision).sum(axis=1) / num_ones[:, 0],
        }
        for name, budget in FALSE_ALARM_BUDGETS.items():
            allowed = np.where(alarms / num_zeros <= budget, found, 0.0)
            figures[name] = 1 - allowed.max(axis=1) / num_ones[:, 0]
        return {name: np.where(exists, values, np.nan) for name, values in figures.items()}


def _sum_by(weights: Array, numbers: IntArray, count: int) -> Array:
    """Sums the columns ``[R, N]`` that have the same number: ``[R, count]``."""
    sums = np.zeros((len(weights), count))
    order = np.argsort(numbers, kind="stable")
    present, starts = np.unique(numbers[order], return_index=True)
    if len(present):
        sums[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
    return sums


def _share(part: Array, whole: Array) -> Array:
    """``part / whole``, 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _mean_where(values: Array, counted: npt.NDArray[np.bool_]) -> Array:
    """Mean of the counted values of each row; NaN where none is."""
    number = counted.sum(axis=1)
    mean = np.where(counted, values, 0.0).sum(axis=1) / np.maximum(number, 1)
    return np.where(number > 0, mean, np.nan)
