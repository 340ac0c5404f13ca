"""Which score is high enough: thresholds that reach a wanted recall, rate of false alarms, or the best F1."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

GOALS = ("f1", "recall", "false_alarms")
LEVELS = ("object", "image", "part")


@dataclass(frozen=True)
class ThresholdRule:
    """By what a threshold is chosen.

    Attributes:
        goal: one of `GOALS`, see `choose_threshold`.
        target: the share that is wanted, or allowed.
        level: what has scores and is to be found, one of `LEVELS`.
    """

    goal: str
    target: float
    level: str

    def choose(self, scores: npt.NDArray[np.floating], positive: npt.NDArray[np.bool_], **counts: int) -> float | None:
        """`choose_threshold` by this rule."""
        return choose_threshold(scores, positive, goal=self.goal, target=self.target, **counts)


def choose_threshold(
    scores: npt.NDArray[np.floating],
    positive: npt.NDArray[np.bool_],
    *,
    goal: str,
    target: float = 0.0,
    num_positive: int | None = None,
    num_negative: int | None = None,
) -> float | None:
    """A threshold for scores; what reaches it counts as found.

    It lies halfway between two scores, so that no rounding decides. Equal scores fall together.

    Args:
        scores: ``[N]`` in [0, 1], of images, of parts, or of single finds.
        positive: ``[N]``, which of them are right to be found.
        goal: ``recall``: the highest threshold that finds at least ``target`` of the positive ones, or all that have a
            score; ``false_alarms``: the lowest one by which at most ``target`` of the negative ones are found; ``f1``:
            the one of the highest F1, of equal ones the highest.
        target: share that is wanted.
        num_positive: how many there are; more than ``positive`` has where some have no score.
        num_negative: what the share of false alarms is of, such as images.

    Returns:
        None where no scores are given, or nothing is positive (with ``false_alarms``: negative).

    Raises:
        ValueError: for another goal.
    """
    if goal not in GOALS:
        raise ValueError(f"a threshold is chosen for {', '.join(GOALS)}, found {goal!r}")
    num_positive = int(positive.sum()) if num_positive is None else num_positive
    num_negative = int((~positive).sum()) if num_negative is None else num_negative
    if len(scores) == 0 or (num_negative if goal == "false_alarms" else num_positive) == 0:
        return None
    order = np.argsort(-scores, kind="stable")
    descending = scores[order].astype(np.float64)
    ends = np.flatnonzero(np.concatenate([descending[1:] != descending[:-1], [True]]))  # of equal scores
    # Cuts from "nothing is found" down to "all is found".
    hits = np.concatenate([[0], np.cumsum(positive[order])[ends]])
    alarms = np.concatenate([[0], np.cumsum(~positive[order])[ends]])
    levels = np.concatenate([[1.0], descending[ends], [0.0]])
    if goal == "recall":
        enough = np.flatnonzero(hits >= min(target * num_positive, hits[-1]) - 1e-9)
        cut = int(enough[0])
    elif goal == "false_alarms":
        cut = int(np.flatnonzero(alarms <= target * num_negative + 1e-9)[-1])
    else:
        cut = int(np.argmax(2 * hits / (hits + alarms + num_positive)))
    return float((levels[cut] + levels[cut + 1]) / 2)
