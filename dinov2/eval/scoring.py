"""Scores of a classification over images and over parts, with intervals from resampled parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dinov2.eval.metrics import Figure, FloatArray, IntArray, classification_figures, confusion_matrix
from dinov2.eval.part_scores import number_parts, score_parts
from dinov2.eval.resampling import resampled_figures

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
