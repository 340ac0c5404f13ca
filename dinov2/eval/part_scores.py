"""From photos to parts: an inspector accepts or rejects a part, which several photos show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinov2.eval.metrics import FloatArray, IntArray


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


def score_parts(probabilities: FloatArray, labels: IntArray, group_ids: Sequence[str]) -> PartScores:
    """Joins the photos of each part.

    With two classes, class 1 is the positive one (a defect) and shows in one photo only as often as not: a part's score
    is the largest positive probability among its photos, it is predicted positive when any photo is, and its label is
    positive when any photo's is. With any other number of classes a part has the mean probabilities of its photos and
    the label that most of its photos have (of equally frequent labels, the lowest).

    Args:
        probabilities: ``[N, C]`` of the photos, rows sum to 1.
        labels: ``[N]`` in ``[0, C)``.
        group_ids: the part of every photo.
    """
    names = sorted(set(group_ids))
    numbers = {name: number for number, name in enumerate(names)}
    parts = np.fromiter((numbers[name] for name in group_ids), dtype=np.int64, count=len(group_ids))
    num_classes = probabilities.shape[1]
    votes = np.bincount(parts * num_classes + labels, minlength=len(names) * num_classes).reshape(-1, num_classes)
    if num_classes == 2:
        part_probabilities = probabilities[_most_positive_photos(probabilities[:, 1], parts)]
        part_labels = (votes[:, 1] > 0).astype(np.int64)
    else:
        part_probabilities = _means(probabilities, parts)
        part_labels = votes.argmax(axis=1)
    return PartScores(
        group_ids=tuple(names),
        probabilities=part_probabilities,
        labels=part_labels,
        num_mixed=int(((votes > 0).sum(axis=1) > 1).sum()),
    )


def _most_positive_photos(positive: FloatArray, parts: IntArray) -> IntArray:
    """Index ``[P]`` of the photo with the largest positive probability ``[N]`` of every part."""
    by_part_then_score = np.lexsort((positive, parts))
    last_of_part = np.cumsum(np.bincount(parts)) - 1
    return np.asarray(by_part_then_score[last_of_part], dtype=np.int64)


def _means(probabilities: FloatArray, parts: IntArray) -> FloatArray:
    """Mean row ``[P, C]`` of every part."""
    by_part = parts.argsort(kind="stable")
    counts = np.bincount(parts)
    first_of_part = np.cumsum(counts) - counts
    return np.asarray(np.add.reduceat(probabilities[by_part], first_of_part, axis=0) / counts[:, None])
