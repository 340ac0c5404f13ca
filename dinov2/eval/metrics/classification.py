"""Metrics of a classification over images and over parts, with intervals from resampled parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, precision_recall_fscore_support, roc_auc_score, roc_curve
from sklearn.metrics import confusion_matrix as count_confusions

FloatArray = npt.NDArray[np.floating]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

FALSE_ALARM_BUDGETS = {"escape_rate_at_0.1": 0.001, "escape_rate_at_1": 0.01, "escape_rate_at_5": 0.05}
METRICS = (
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
CHOICE_METRICS = ("accuracy", "balanced_accuracy", "auroc", "average_precision")  # by which evaluators choose
RANKING_METRICS = ("auroc", "average_precision", *FALSE_ALARM_BUDGETS)  # of two classes that both occur
LEVELS = ("image", "part")
MIN_PARTS = 5  # that do not show the most frequent class; with fewer, no interval says much
AGGREGATIONS = ("max", "mean", "topk_mean")
MAX_DRAWS = 10_000_000  # of parts, where predictions are compared
INTERVAL = (2.5, 97.5)  # percentiles
MAX_CLASSES_OF_CONFUSION = 100  # a table of a thousand classes has a million entries
NUMBERS_AT_A_TIME = 1_000_000


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """A metric with its 95 % interval, ``low`` to ``high``; both are None where there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class LevelScores:
    """Metrics over images, or over parts.

    Attributes:
        count: how many images or parts were scored.
        metrics: by name, see `classification_metrics`; those that do not apply are absent.
        confusion: how many of each class (outer) were predicted to be of each class (inner); empty above 100 classes,
            and where nothing is classified.
    """

    count: int
    metrics: Mapping[str, MetricValue]
    confusion: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Metrics over images and over parts (all images of one group)."""

    image: LevelScores
    part: LevelScores


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """How predictions are scored; the settings of evaluators add their own.

    Attributes:
        part_aggregation: how a part joins its images, see `score_parts`.
        part_top_k: images that count with ``topk_mean``.
        num_resamples: resamples of parts behind the intervals; 0 gives none.
        seed: of the resamples.
    """

    part_aggregation: str = "max"
    part_top_k: int = 3
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_aggregation(self.part_aggregation, self.part_top_k)
        check_num_resamples(self.num_resamples)

    def score(
        self, probabilities: FloatArray, labels: IntArray, group_ids: Sequence[str], *, intervals: bool = True
    ) -> Scores:
        """`score_predictions` with these settings."""
        return score_predictions(
            probabilities,
            labels,
            group_ids,
            aggregation=self.part_aggregation,
            top_k=self.part_top_k,
            num_resamples=self.num_resamples if intervals else 0,
            seed=self.seed,
        )

    def resample(
        self, probabilities: FloatArray, labels: IntArray, group_ids: Sequence[str]
    ) -> "dict[str, ResampledLevel]":
        """`resample_levels` with these settings, of at most 10,000,000 draws: each costs as much as a score."""
        num_parts = len(set(group_ids))
        return resample_levels(
            probabilities,
            labels,
            group_ids,
            aggregation=self.part_aggregation,
            top_k=self.part_top_k,
            num_resamples=min(self.num_resamples, max(MAX_DRAWS // num_parts, 1)),
            seed=self.seed,
        )


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
    """Scores the images and the parts that they show.

    The images of a part resemble each other, so images are no independent samples but parts are: every resample draws
    whole parts with replacement, and the interval of a metric reaches from its 2.5th to its 97.5th percentile. The
    same seed draws the same resamples, whatever the probabilities. A resample in which a metric does not exist, such
    as an AUROC without a defect, is left out of that metric's interval.

    Args:
        probabilities: ``[N, C]``, rows sum to 1.
        labels: ``[N]`` in ``[0, C)``.
        group_ids: the part of every image.
        aggregation: how a part joins its images, see `score_parts`.
        top_k: images that count with ``topk_mean``.
        num_resamples: how many; 0 gives no intervals, and neither does a single part.
        seed: of the resamples.

    Raises:
        ValueError: for no rows, labels outside the classes, values that are not finite, or settings out of range.
    """
    levels = resample_levels(
        probabilities,
        labels,
        group_ids,
        aggregation=aggregation,
        top_k=top_k,
        num_resamples=num_resamples,
        seed=seed,
    )
    return Scores(**{name: level.scores() for name, level in levels.items()})


@dataclass(frozen=True, kw_only=True)
class ResampledLevel:
    """Scores of the images or the parts, and of resamples that are the same for all predictions of a set.

    Attributes:
        count: of images or parts.
        values: of the metrics, by name.
        resamples: values ``[R]`` of the same metrics, NaN where a resample has none; empty without resamples.
        confusion: see `LevelScores`.
    """

    count: int
    values: Mapping[str, float]
    resamples: Mapping[str, Float64Array]
    confusion: tuple[tuple[int, ...], ...]

    def scores(self) -> LevelScores:
        """The metrics with their intervals."""
        metrics = {name: _with_interval(value, self.resamples.get(name)) for name, value in self.values.items()}
        return LevelScores(count=self.count, metrics=metrics, confusion=self.confusion)

    def less(self, other: "ResampledLevel") -> dict[str, MetricValue]:
        """The metrics less those of another prediction of the same images, with intervals of the difference.

        They are narrower than those of its ends, because what is hard is hard for both.
        """
        return {
            name: _with_interval(
                value - other.values[name], self.resamples[name] - other.resamples[name] if self.resamples else None
            )
            for name, value in self.values.items()
        }


def _with_interval(value: float, resamples: Float64Array | None) -> MetricValue:
    low, high = (None, None) if resamples is None else interval(resamples)
    return MetricValue(value=value, low=low, high=high)


def resample_levels(
    probabilities: FloatArray,
    labels: IntArray,
    group_ids: Sequence[str],
    *,
    aggregation: str,
    top_k: int,
    num_resamples: int,
    seed: int,
) -> dict[str, ResampledLevel]:
    """What `score_predictions` scores, by level (``image``, ``part``), with the resamples themselves."""
    check_num_resamples(num_resamples)
    levels = levels_of(probabilities, labels, group_ids, aggregation=aggregation, top_k=top_k)
    return {
        name: ResampledLevel(
            count=len(level.labels),
            values=classification_metrics(level.probabilities, level.labels),
            resamples=level.resampled(num_resamples, seed),
            confusion=confusion_matrix(level.probabilities, level.labels)
            if level.probabilities.shape[1] <= MAX_CLASSES_OF_CONFUSION
            else (),
        )
        for name, level in levels.items()
    }


def choice_key(metrics: Mapping[str, float], metric: str) -> tuple[float, float]:
    """By what one of several classifiers is chosen, more being better: the metric, and what divides equal rankings.

    AUROC and average precision see only the order of scores, in which many classifiers are equal on few images; of
    these the balanced accuracy decides. Other metrics stand alone, as published.
    """
    return metrics[metric], metrics["balanced_accuracy"] if metric in RANKING_METRICS else 0.0


@dataclass(frozen=True)
class Level:
    """Rows ``[N, C]`` that are scored, their labels ``[N]``, and the part ``[N]`` with which a resample draws each."""

    probabilities: FloatArray
    labels: IntArray
    part_of_row: IntArray

    @property
    def num_parts(self) -> int:
        """How many parts there are."""
        return int(self.part_of_row.max()) + 1

    def resampled(self, num_resamples: int, seed: int) -> dict[str, Float64Array]:
        """`resampled_metrics`; empty for no resamples, or a single part."""
        draws = draw_parts(self.num_parts if self.num_parts > 1 else 0, num_resamples, seed)
        return resampled_metrics(self.probabilities, self.labels, draws, self.part_of_row)


def levels_of(
    probabilities: FloatArray, labels: IntArray, group_ids: Sequence[str], *, aggregation: str = "max", top_k: int = 3
) -> dict[str, Level]:
    """What is scored, by level (`LEVELS`): the images, and the parts; see `score_predictions`."""
    check_probabilities(probabilities, labels)
    parts = score_parts(probabilities, labels, group_ids, aggregation=aggregation, top_k=top_k)
    return {
        "image": Level(probabilities, labels, number_parts(group_ids)[1]),
        "part": Level(parts.probabilities, parts.labels, np.arange(len(parts.group_ids))),
    }


def deciding_metric(labels: IntArray, num_classes: int, otherwise: str = "balanced_accuracy") -> str:
    """The metric by which evaluators choose and compare unless they are told another.

    With two classes that both occur, the AUROC: what an inspection asks is that defects rank above the rest, and where
    they are rare, an accuracy is highest for calling everything good.

    Args:
        labels: ``[N]`` of the images that decide.
        num_classes: known to the classifier.
        otherwise: the metric for any other case.
    """
    return "auroc" if num_classes == 2 and len(np.unique(labels)) == 2 else otherwise


def classification_metrics(probabilities: FloatArray, labels: IntArray) -> dict[str, float]:
    """Metrics of class probabilities against labels.

    A row is predicted to be of its most probable class, of equally probable ones that of the lowest number. A metric
    that the rows cannot give is absent. `resampled_metrics` has the same metrics of many resamples at once.

    Args:
        probabilities: ``[N, C]``, finite; with two classes, class 1 is the positive one (a defect), and rows must be
            comparable with each other.
        labels: ``[N]`` in ``[0, C)``.

    Returns:
        Values in [0, 1], in the order of `METRICS`:
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
    metrics = {
        "accuracy": float((predictions == labels).mean()),
        "balanced_accuracy": float(recall[occurring].mean()),
    }
    counted = occurring if num_classes != 2 else occurring[occurring == 1]
    if len(counted):
        for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
            metrics[name] = float(values[counted].mean())
    if num_classes == 2 and len(occurring) == 2:
        scores = probabilities[:, 1]
        metrics["auroc"] = float(roc_auc_score(labels, scores))
        metrics["average_precision"] = float(average_precision_score(labels, scores))
        false_alarms, found, _ = roc_curve(labels, scores, drop_intermediate=False)  # shares of class 0, of class 1
        for name, budget in FALSE_ALARM_BUDGETS.items():
            metrics[name] = float(1 - found[false_alarms <= budget].max())
    if num_classes > 5:
        metrics["top5"] = float(within_top(probabilities, labels, 5).mean())
    return metrics


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


# Parts


@dataclass(frozen=True)
class PartScores:
    """Class probabilities and label of every part.

    Attributes:
        group_ids: the parts, sorted by id.
        probabilities: ``[P, C]``, rows sum to 1 where those of the images do.
        labels: ``[P]``.
        num_mixed: how many parts have images of different labels.
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
    """Joins the images of each part.

    With two classes, class 1 is the positive one (a defect) and shows in one image only as often as not: a part's
    label is positive when any image's is, and its probabilities are the mean of those of its most positive image, of
    its ``top_k`` most positive ones, or of all. With ``max``, a part is therefore predicted positive when any image is.
    With any other number of classes a part has the mean probabilities of its images, whatever ``aggregation`` says,
    and the label that most of its images have (of equally frequent labels, the lowest).

    Args:
        probabilities: ``[N, C]`` of the images, rows sum to 1.
        labels: ``[N]`` in ``[0, C)``.
        group_ids: the part of every image.
        aggregation: ``max``, ``mean`` or ``topk_mean``.
        top_k: images that count with ``topk_mean``; all of a part that has no more.

    Raises:
        ValueError: for another aggregation, or ``top_k`` below 1.
    """
    check_aggregation(aggregation, top_k)
    names, parts = number_parts(group_ids)
    num_classes = probabilities.shape[1]
    votes = np.bincount(parts * num_classes + labels, minlength=len(names) * num_classes).reshape(-1, num_classes)
    order = np.argsort(parts, kind="stable")  # rows of a part lie together
    part_labels = votes.argmax(axis=1)
    if num_classes == 2:
        order = np.lexsort((probabilities[:, 1], parts))
        rank_from_top = (np.cumsum(np.bincount(parts)) - 1)[parts[order]] - np.arange(len(order))
        order = order[rank_from_top < {"max": 1, "mean": len(parts), "topk_mean": top_k}[aggregation]]
        part_labels = (votes[:, 1] > 0).astype(np.int64)
    counts = np.bincount(parts[order])
    sums = np.add.reduceat(probabilities[order], np.cumsum(counts) - counts, axis=0)
    return PartScores(
        group_ids=names,
        probabilities=np.asarray(sums / counts[:, None]),
        labels=part_labels,
        num_mixed=int(((votes > 0).sum(axis=1) > 1).sum()),
    )


def number_parts(group_ids: Sequence[str]) -> tuple[tuple[str, ...], IntArray]:
    """The parts, sorted by id, and the number of the part ``[N]`` of every image."""
    names = sorted(set(group_ids))
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(names), np.fromiter((numbers[name] for name in group_ids), dtype=np.int64, count=len(group_ids))


def check_aggregation(aggregation: str, top_k: int) -> None:
    """Raises ValueError for settings that `score_parts` does not know."""
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"part aggregation {aggregation!r} is not one of {', '.join(AGGREGATIONS)}")
    if top_k < 1:
        raise ValueError(f"top_k of the part aggregation must be at least 1, found {top_k}")


# Resamples


def too_few_parts(labels: IntArray) -> str:
    """Why no verdict can rest on resamples of parts with these labels ``[P]``; empty where one can."""
    few = len(labels) - int(np.bincount(labels).max(initial=0))
    return f"{few} beside the most frequent class" if few < MIN_PARTS else ""


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


def interval(values: Float64Array) -> tuple[float, float] | tuple[None, None]:
    """Ends of the 95 % interval of resampled values ``[R]``, of which NaN do not count; None where none is left."""
    existing = values[~np.isnan(values)]
    if len(existing) == 0:
        return None, None
    low, high = np.percentile(existing, INTERVAL)
    return float(low), float(high)


def resampled_metrics(
    probabilities: FloatArray, labels: IntArray, draws: IntArray, unit_of_row: IntArray
) -> dict[str, Float64Array]:
    """Metrics of `classification_metrics` for resamples of the rows.

    A resample is given by how often it draws each unit, and so all rows of the unit; rows are sorted once, no resample
    is ever built, and memory does not grow with their number. scikit-learn takes one resample at a time.

    Args:
        probabilities: ``[N, C]``.
        labels: ``[N]`` in ``[0, C)``.
        draws: ``[R, U]``, how often each of ``R`` resamples draws each unit; none may be empty.
        unit_of_row: ``[N]`` in ``[0, U)``.

    Returns:
        Per metric ``[R]``, NaN where the metric does not exist in a resample.
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
        metrics = _counted_metrics(predictions, labels, weights, num_classes)
        if thresholds is not None:
            metrics |= thresholds.metrics(weights)
        if top5 is not None:
            metrics["top5"] = weights @ top5 / weights.sum(axis=1)
        pieces.append(metrics)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in (pieces[0] if pieces else ())}


def _counted_metrics(
    predictions: IntArray, labels: IntArray, weights: Float64Array, num_classes: int
) -> dict[str, Float64Array]:
    """Metrics of predictions ``[N]`` that count right and wrong ones."""

    def sum_by(numbers: IntArray, weights: Float64Array) -> Float64Array:
        """Sums the columns ``[r, N]`` that have the same number: ``[r, C]``."""
        sums = np.zeros((len(weights), num_classes))
        order = np.argsort(numbers, kind="stable")
        present, starts = np.unique(numbers[order], return_index=True)
        if len(present):
            sums[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
        return sums

    def mean_where(values: Float64Array, counted: BoolArray) -> Float64Array:
        """Mean of the counted values of each row; NaN where none is."""
        number = counted.sum(axis=1)
        mean = np.where(counted, values, 0.0).sum(axis=1) / np.maximum(number, 1)
        return np.where(number > 0, mean, np.nan)

    actual, predicted = sum_by(labels, weights), sum_by(predictions, weights)
    right = predictions == labels
    hits = sum_by(labels[right], weights[:, right])
    occurs = actual > 0
    recall = share_of(hits, actual)
    counted = occurs.copy()
    if num_classes == 2:
        counted[:, 0] = False
    return {
        "accuracy": hits.sum(axis=1) / weights.sum(axis=1),
        "balanced_accuracy": mean_where(recall, occurs),
        "precision": mean_where(share_of(hits, predicted), counted),
        "recall": mean_where(recall, counted),
        "f1": mean_where(share_of(2 * hits, actual + predicted), counted),
    }


class _Thresholds:
    """All thresholds on the scores ``[N]`` of class 1, from the highest down; equal scores fall together."""

    def __init__(self, scores: FloatArray, labels: IntArray) -> None:
        self.order = np.argsort(-scores, kind="stable")
        descending = scores[self.order]
        self.starts = np.flatnonzero(np.concatenate([[True], descending[1:] != descending[:-1]]))
        self.positive = labels[self.order] == 1

    def metrics(self, weights: Float64Array) -> dict[str, Float64Array]:
        """Metrics of resamples that draw the rows so often, ``[r, N]``."""
        weights = weights[:, self.order]
        ones = np.add.reduceat(weights * self.positive, self.starts, axis=1)  # [r, thresholds]
        zeros = np.add.reduceat(weights * ~self.positive, self.starts, axis=1)
        found, alarms = ones.cumsum(axis=1), zeros.cumsum(axis=1)
        num_ones, num_zeros = found[:, -1:], alarms[:, -1:]
        exists = ((num_ones > 0) & (num_zeros > 0))[:, 0]
        num_ones, num_zeros = np.maximum(num_ones, 1), np.maximum(num_zeros, 1)
        beaten = (ones * (num_zeros - alarms + zeros / 2)).sum(axis=1)  # pairs in the right order, ties counting half
        metrics = {
            "auroc": beaten / (num_ones * num_zeros)[:, 0],
            "average_precision": (ones * share_of(found, found + alarms)).sum(axis=1) / num_ones[:, 0],
        }
        for name, budget in FALSE_ALARM_BUDGETS.items():
            allowed = np.where(alarms / num_zeros <= budget, found, 0.0)
            metrics[name] = 1 - allowed.max(axis=1) / num_ones[:, 0]
        return {name: np.where(exists, values, np.nan) for name, values in metrics.items()}


def share_of(part: Float64Array, whole: Float64Array) -> Float64Array:
    """``part / whole``, 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
