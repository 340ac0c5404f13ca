"""From photos to parts: an inspector accepts or rejects a part, which several photos show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinov2.eval.metrics import FloatArray, IntArray

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
