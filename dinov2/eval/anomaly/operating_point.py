"""The good parts of a set, the threshold of an anomaly score from them alone, and the false-alarm rate it promises."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import floor
from typing import Any, Self

import numpy as np
from scipy.stats import beta, betabinom

from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.eval.metrics.classification import FloatArray
from dinov2.utils.seeds import derive_seed

INTERVAL = (0.025, 0.975)
MIN_CALIBRATION = 5  # parts, below which no threshold is set


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A threshold, and what it promises for good parts (or images) like those that it comes from.

    Attributes:
        threshold: what scores above it is anomalous.
        false_alarm_rate: share of good ones above it that is to be expected; with a margin, at most.
        low: lower end of the 95 % interval of that rate; 0 with a margin.
        high: upper end.
        num_good: how many good ones it comes from.
        rank: the threshold (without margin) is the score of so many from above.
        margin: by which share the threshold was raised.
    """

    threshold: float
    false_alarm_rate: float
    low: float
    high: float
    num_good: int
    rank: int
    margin: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The point that `as_dict` turned into ``values``."""
        return cls(**values)

    def predict(self, num_unseen: int) -> tuple[float, float]:
        """95 % interval of the share of false alarms among so many good ones that were not seen before."""
        counts = betabinom(num_unseen, self.rank, self.num_good - self.rank + 1).ppf(INTERVAL)
        return 0.0 if self.margin else float(counts[0] / num_unseen), float(counts[1] / num_unseen)


def threshold_from_good(scores: FloatArray, *, false_alarm_rate: float = 0.05, margin: float = 0.0) -> OperatingPoint:
    """Chooses the lowest score of good parts above which no more than the wanted share of good ones is expected.

    Of ``n`` scores the one of rank ``k`` from above is taken: of further parts from the same line a share above it is
    distributed as Beta(k, n - k + 1), whatever the scores are like, with the mean ``k / (n + 1)``. So few parts promise
    little: with 19, no rate below 5 % can be expected, and the interval says how uncertain it is.

    Args:
        scores: ``[n]`` of good parts that nothing else was learnt from.
        false_alarm_rate: wanted, in (0, 1); where ``n`` is too small for it, the highest score is taken.
        margin: raises the threshold by this share of it, at least 0.

    Raises:
        ValueError: there are no scores, some are not finite, or a rate or margin is out of range.
    """
    if len(scores) == 0 or not np.isfinite(scores).all():
        raise ValueError(f"a threshold needs finite scores of good parts, found {len(scores)}: {scores[:5]}")
    if not 0 < false_alarm_rate < 1 or not 0 <= margin < np.inf:
        raise ValueError(f"the rate must be in (0, 1) and the margin at least 0, found {false_alarm_rate} and {margin}")
    count = len(scores)
    rank = min(max(floor(false_alarm_rate * (count + 1) + 1e-9), 1), count)
    rates = beta(rank, count - rank + 1)
    low, high = (float(end) for end in rates.ppf(INTERVAL))
    return OperatingPoint(
        threshold=float(np.sort(scores)[count - rank]) * (1 + margin),
        false_alarm_rate=rank / (count + 1),
        low=0.0 if margin else low,
        high=high,
        num_good=count,
        rank=rank,
        margin=margin,
    )


@dataclass(frozen=True, kw_only=True)
class GoodParts:
    """Positions of the images of ``train`` that something is learnt from.

    Attributes:
        memory: fill the memory.
        calibration: set the thresholds.
        counts: how many images were taken and left out, and why.
    """

    memory: list[int]
    calibration: list[int]
    counts: Mapping[str, int]


def find_good_parts(dataset: ImageDataset, good_class: int, calibration_share: float, seed: int) -> GoodParts:
    """Divides the parts of a set that show no defect; the others are left out and counted.

    A set without a single label is taken to be good throughout. Parts of too small a share for a threshold all go into
    the memory.

    Raises:
        ValueError: no part is good.
    """
    labels, groups = dataset.get_targets(), np.array(dataset.get_group_ids())
    unlabelled = bool((labels == MISSING_TARGET).all())
    is_good = labels == (MISSING_TARGET if unlabelled else good_class)
    good = ~np.isin(groups, groups[~is_good])
    parts = np.unique(groups[good])
    if len(parts) == 0:
        raise ValueError(
            f"the training set has no good part: {int(is_good.sum())} of {len(labels)} images are of the good class "
            f"({good_class}), and every part has others as well"
        )
    generator = np.random.default_rng(derive_seed(seed, "good parts that set thresholds"))
    held_out = round(calibration_share * len(parts))
    held_out = held_out if held_out >= MIN_CALIBRATION else 0
    calibration = np.isin(groups, generator.permutation(parts)[:held_out])
    return GoodParts(
        memory=np.flatnonzero(good & ~calibration).tolist(),
        calibration=np.flatnonzero(calibration).tolist(),
        counts={
            "images_in_memory": int((good & ~calibration).sum()),
            "images_for_thresholds": int(calibration.sum()),
            "defective_images_left_out": int((~is_good & (labels != MISSING_TARGET)).sum()),
            "unlabelled_images_left_out": 0 if unlabelled else int((labels == MISSING_TARGET).sum()),
            "good_images_of_other_parts_left_out": int((is_good & ~good).sum()),
        },
    )
