"""Scores of a classification over images and over parts, with intervals from resampled parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2.eval.metrics.classification import (
    FALSE_ALARM_BUDGETS,
    Figure,
    FloatArray,
    IntArray,
    check_probabilities,
    classification_figures,
    confusion_matrix,
    within_top,
)

AGGREGATIONS = ("max", "mean", "topk_mean")


@dataclass(frozen=True)
class PartScores:
    """Class probabilities and label of every part.

    Attributes:
        group_ids: the parts, sorted by id.
        probabilities: ``[P, C]``, rows sum to 1 where those of the photos do.
        labels: ``[P]``.
        num_mixed: how many parts have photos of different labels.
    """

    group_ids: tuple[str, ...]
    probabilities: FloatArray
    labels: IntArray
    num_mixed: int


def score_parts(
    probabilities: FloatArray,
    labels: IntArray,
    group_ids: Sequence[str],
    *,
    aggregation: str = "max",
    top_k: int = 3,
) -> PartScores:
    """Joins the photos of each part.

    With two classes, class 1 is the positive one (a defect) and shows in one photo only as often as not: a part's
    label is positive when any photo's is, and its probabilities are the mean of those of its most positive photo, of
    its ``top_k`` most positive ones, or of all. With ``max``, a part is therefore predicted positive when any photo is.
    With any other number of classes a part has the mean probabilities of its photos, whatever ``aggregation`` says,
    and the label that most of its photos have (of equally frequent labels, the lowest).

    Args:
        probabilities: ``[N, C]`` of the photos, rows sum to 1.
        labels: ``[N]`` in ``[0, C)``.
        group_ids: the part of every photo.
        aggregation: ``max``, ``mean`` or ``topk_mean``.
        top_k: photos that count with ``topk_mean``; all of a part that has no more.

    Raises:
        ValueError: for another aggregation, or ``top_k`` below 1.
    """
    check_aggregation(aggregation, top_k)
    names, parts = number_parts(group_ids)
    num_classes = probabilities.shape[1]
    votes = np.bincount(parts * num_classes + labels, minlength=len(names) * num_classes).reshape(-1, num_classes)
    if num_classes == 2:
        most = {"max": 1, "mean": len(parts), "topk_mean": top_k}[aggregation]
        counted = _most_positive_photos(probabilities[:, 1], parts, most)
        part_labels = (votes[:, 1] > 0).astype(np.int64)
    else:
        counted = np.arange(len(parts))
        part_labels = votes.argmax(axis=1)
    return PartScores(
        group_ids=names,
        probabilities=_means(probabilities[counted], parts[counted]),
        labels=part_labels,
        num_mixed=int(((votes > 0).sum(axis=1) > 1).sum()),
    )


def number_parts(group_ids: Sequence[str]) -> tuple[tuple[str, ...], IntArray]:
    """The parts, sorted by id, and the number of the part ``[N]`` of every photo."""
    names = sorted(set(group_ids))
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(names), np.fromiter((numbers[name] for name in group_ids), dtype=np.int64, count=len(group_ids))


def check_aggregation(aggregation: str, top_k: int) -> None:
    """Raises ValueError for settings that `score_parts` does not know."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"part aggregation {aggregation!r} is not one of {', '.join(AGGREGATIONS)}")
    if top_k < 1:
        raise ValueError(f"top_k of the part aggregation must be at least 1, found {top_k}")


def _most_positive_photos(positive: FloatArray, parts: IntArray, most: int) -> IntArray:
    """Indices of at most so many photos of every part, those with the largest positive probability ``[N]``."""
    order = np.lexsort((positive, parts))
    last_of_part = np.cumsum(np.bincount(parts)) - 1
    from_the_top = last_of_part[parts[order]] - np.arange(len(order))
    return np.asarray(order[from_the_top < most], dtype=np.int64)


def _means(probabilities: FloatArray, parts: IntArray) -> FloatArray:
    """Mean row ``[P, C]`` of every part."""
    by_part = parts.argsort(kind="stable")
    counts = np.bincount(parts)
    first_of_part = np.cumsum(counts) - counts
    return np.asarray(np.add.reduceat(probabilities[by_part], first_of_part, axis=0) / counts[:, None])


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


INTERVAL = (2.5, 97.5)  # percentiles
MOST_CLASSES_OF_CONFUSION = 100  # a table of a thousand classes has a million entries


@dataclass(frozen=True, kw_only=True)
class LevelScores:
    """Figures over images, or over parts.

    Attributes:
        count: how many images or parts were scored.
        figures: by name, see `classification_figures`; those that do not apply are absent.
        confusion: how many of each class (outer) were predicted to be of each class (inner); empty above 100 classes,
            and where nothing is classified.
    """

    count: int
    figures: Mapping[str, Figure]
    confusion: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Figures over images and over parts (all photos of one group)."""

    image: LevelScores
    part: LevelScores


def score_predictions(
    probabilities: FloatArray,
    labels: IntArray,
    group_ids: Sequence[str],
    *,
    aggregation: str = "max",
    top_k: int = 3,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Scores:
    """Scores the photos and the parts that they show.

    The photos of a part resemble each other, so photos are no independent samples but parts are: every resample draws
    whole parts with replacement, and the interval of a figure reaches from its 2.5th to its 97.5th percentile. The
    same seed draws the same resamples, whatever the probabilities. A resample in which a figure does not exist, such
    as an AUROC without a defect, is left out of that figure's interval.

    Args:
        probabilities: ``[N, C]``, rows sum to 1.
        labels: ``[N]`` in ``[0, C)``.
        group_ids: the part of every photo.
        aggregation: how a part joins its photos, see `score_parts`.
        top_k: photos that count with ``topk_mean``.
        num_resamples: how many; 0 gives no intervals, and neither does a single part.
        seed: of the resamples.

    Raises:
        ValueError: for no rows, labels outside the classes, values that are not finite, or settings out of range.
    """
    check_num_resamples(num_resamples)
    images = classification_figures(probabilities, labels)
    parts = score_parts(probabilities, labels, group_ids, aggregation=aggregation, top_k=top_k)
    num_parts = len(parts.group_ids)
    draws = draw_parts(num_parts if num_parts > 1 else 0, num_resamples, seed)
    part_of_image = number_parts(group_ids)[1]
    return Scores(
        image=_level(probabilities, labels, images, draws, part_of_image),
        part=_level(
            parts.probabilities,
            parts.labels,
            classification_figures(parts.probabilities, parts.labels),
            draws,
            np.arange(num_parts),
        ),
    )


def check_num_resamples(num_resamples: int) -> None:
    """Raises ValueError for a negative number."""
    if num_resamples < 0:
        raise ValueError(f"num_resamples must be at least 0, found {num_resamples}")


def draw_parts(num_parts: int, num_resamples: int, seed: int) -> IntArray:
    """How often each resample draws each part, ``[R, P]``; every row sums to ``P``. Without parts, no resamples."""
    if num_parts == 0:
        return np.zeros((0, 0), dtype=np.int64)
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_parts, np.full(num_parts, 1 / num_parts), size=num_resamples)


def interval(values: npt.NDArray[np.float64]) -> tuple[float, float] | tuple[None, None]:
    """Ends of the 95 % interval of resampled values ``[R]``, of which NaN do not count; None where none is left."""
    existing = values[~np.isnan(values)]
    if len(existing) == 0:
        return None, None
    low, high = np.percentile(existing, INTERVAL)
    return float(low), float(high)


def _level(
    probabilities: FloatArray,
    labels: IntArray,
    values: Mapping[str, float],
    draws: IntArray,
    part_of_row: IntArray,
) -> LevelScores:
    """Joins the figures with their intervals; ``part_of_row`` ``[N]`` says with which part a row is drawn."""
    resampled = resampled_figures(probabilities, labels, draws, part_of_row)
    joined = {}
    for name, value in values.items():
        low, high = interval(resampled[name]) if resampled else (None, None)
        joined[name] = Figure(value=value, low=low, high=high)
    small = probabilities.shape[1] <= MOST_CLASSES_OF_CONFUSION
    return LevelScores(
        count=len(labels), figures=joined, confusion=confusion_matrix(probabilities, labels) if small else ()
    )


def few_shot_subset(labels: Tensor, n_per_class: int, seed: int) -> Tensor:
    """Draws the same number of images of every class that occurs; the draws are those of upstream.

    Args:
        labels: ``[N]`` int64.
        n_per_class: images per class; all of a class that has no more.
        seed: of the draw.

    Returns:
        Indices of the drawn images, class after class, int64.

    Raises:
        ValueError: for fewer than one image per class.
    """
    if n_per_class < 1:
        raise ValueError(f"the number of images per class must be at least 1, found {n_per_class}")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        drawn.append(members[torch.randperm(len(members), generator=generator)[:n_per_class]])
    return torch.cat(drawn)


def check_few_shot(n_per_class_list: Sequence[int], n_tries: int) -> None:
    """Raises ValueError unless every number of images per class is -1 (all) or from 1 up, and there is a try."""
    wrong = [number for number in n_per_class_list if number != -1 and number < 1]
    if wrong or not n_per_class_list:
        raise ValueError(f"n_per_class_list takes numbers from 1 up, or -1 for all images, found {n_per_class_list}")
    if n_tries < 1:
        raise ValueError(f"n_tries must be at least 1, found {n_tries}")


def mean_scores(tries: Sequence[Scores]) -> Scores:
    """The mean figures of several tries, each over the tries that have it; without intervals and confusion."""
    return Scores(
        image=_mean_level([scores.image for scores in tries]), part=_mean_level([scores.part for scores in tries])
    )


def summarise_tries(tries: Sequence[Scores]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and spread of the figures of several tries.

    Returns:
        Per level (``image``, ``part``) and figure: ``mean``, ``std`` (of a sample; 0 for one try) and the ``values``
        of the tries that have it.
    """
    levels = {"image": [scores.image for scores in tries], "part": [scores.part for scores in tries]}
    return {
        level: {
            name: {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "values": values}
            for name, values in _values(scored).items()
        }
        for level, scored in levels.items()
    }


def _mean_level(tries: Sequence[LevelScores]) -> LevelScores:
    figures = {name: Figure(value=fmean(values)) for name, values in _values(tries).items()}
    return LevelScores(count=tries[0].count, figures=figures)


def _values(tries: Sequence[LevelScores]) -> dict[str, list[float]]:
    """By figure, the values of the tries that have it."""
    names = dict.fromkeys(name for scores in tries for name in scores.figures)
    return {name: [scores.figures[name].value for scores in tries if name in scores.figures] for name in names}
