"""Holding out whole parts of a labelled set, to choose a setting without looking at the validation set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinov2.eval.metrics import BoolArray, IntArray
from dinov2.eval.part_scores import number_parts
from dinov2.utils.seeds import derive_seed


@dataclass(frozen=True)
class HoldOut:
    """One division of a set: row numbers to fit on and row numbers held out, each from small to large."""

    fit: IntArray
    held: IntArray


@dataclass(frozen=True)
class _Parts:
    """The parts of a set, sorted by id.

    Attributes:
        of_row: ``[N]`` number of each row's part.
        labels: ``[P]``, as `score_parts` has them: positive if any photo is, or the most frequent of more classes.
        pairs: ``[Q, 2]`` every part with every label that one of its photos has.
    """

    of_row: IntArray
    labels: IntArray
    pairs: IntArray


def hold_out_parts(
    labels: IntArray, group_ids: Sequence[str], *, fraction: float = 0.2, repeats: int = 5, seed: int = 0
) -> tuple[HoldOut, ...]:
    """Divides a labelled set several times, never dividing a part, and with every class left to fit on.

    Of the parts of each class about ``fraction`` are held out: at least one where there are two, never the last.
    Successive repeats hold out successive stretches of a shuffled order, which is shuffled anew when it is used up:
    five repeats of a fifth are a five-fold cross-validation. The result depends on the parts, their labels and the
    seed, not on the order of the rows.

    Args:
        labels: ``[N]``, from 0 up.
        group_ids: the part of every row.
        fraction: in (0, 1), of the parts of a class.
        repeats: divisions to try, at least 1.
        seed: of the shuffled orders.

    Returns:
        The divisions whose held-out rows show at least two classes; another could not tell a good setting from one that
        always answers the same. Empty when fewer than two classes have a part to spare.

    Raises:
        ValueError: for settings out of range, or rows that differ in number.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction to hold out must be between 0 and 1, found {fraction}")
    if repeats < 1:
        raise ValueError(f"hold-out repeats must be at least 1, found {repeats}")
    if len(labels) != len(group_ids) or len(labels) == 0:
        raise ValueError(f"{len(labels)} labels and {len(group_ids)} parts must be equally many, and at least one")
    parts = _describe(np.asarray(labels, dtype=np.int64), group_ids)
    divisions = []
    for repeat in range(repeats):
        held_parts = _keep_every_class(_draw(parts.labels, fraction, repeat, seed), parts.pairs)
        held = held_parts[parts.of_row]
        if len(np.unique(labels[held])) >= 2:
            divisions.append(HoldOut(fit=np.flatnonzero(~held), held=np.flatnonzero(held)))
    return tuple(divisions)


def _describe(labels: IntArray, group_ids: Sequence[str]) -> _Parts:
    _, of_row = number_parts(group_ids)
    pairs, counts = np.unique(np.stack([of_row, labels], axis=1), axis=0, return_counts=True)
    # Sorted so that the label of a part comes first among its own.
    precedence = -pairs[:, 1] if labels.max() < 2 else -counts
    ordered = pairs[np.lexsort((pairs[:, 1], precedence, pairs[:, 0]))]
    _, first = np.unique(ordered[:, 0], return_index=True)
    return _Parts(of_row=of_row, labels=ordered[first, 1], pairs=pairs)


def _draw(part_labels: IntArray, fraction: float, repeat: int, seed: int) -> BoolArray:
    """Which parts ``[P]`` this repeat holds out."""
    held = np.zeros(len(part_labels), dtype=np.bool_)
    for label in np.unique(part_labels):
        members = np.flatnonzero(part_labels == label)
        if len(members) == 1:
            continue
        size = min(max(round(fraction * len(members)), 1), len(members) - 1)
        round_number, stretch = divmod(repeat, len(members) // size)
        generator = np.random.default_rng(derive_seed(seed, "hold-out", int(label), round_number))
        held[generator.permutation(members)[stretch * size : (stretch + 1) * size]] = True
    return held


def _keep_every_class(held: BoolArray, pairs: IntArray) -> BoolArray:
    """Takes parts ``[P]`` back until every class has one to fit on: photos of a part need not agree."""
    for label in np.unique(pairs[:, 1]):
        having = pairs[pairs[:, 1] == label, 0]
        if held[having].all():
            held[having[0]] = False
    return held
