"""The good parts of a set, the threshold of an anomaly score, and the false-alarm rate that it promises."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil, floor
from typing import Any, Self

import numpy as np
from scipy.stats import beta, betabinom

from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.eval.metrics.classification import BoolArray, FloatArray
from dinov2.utils.seeds import derive_seed

INTERVAL = (0.025, 0.975)
MIN_CALIBRATION = 5  # parts, below which no threshold is set
TAILS = 10  # shares of the highest scores at which the dependence of a part's images is looked at
LARGEST_TAIL = 0.5


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A threshold, and what it promises for good parts (or images) like those that it comes from.

    Attributes:
        threshold: what scores above it is anomalous.
        false_alarm_rate: share of good ones above it that is to be expected; with a margin, at most.
        low: lower end of the 95 % interval of that rate; 0 with a margin.
        high: upper end.
        num_good: how many good ones it comes from.
        rank: how many of the independent good ones reach the threshold (without margin), itself counted.
        margin: by which share the threshold was raised.
        num_independent: so many independent ones say as much as the good ones, of which several may be of a part; 0
            where an earlier version took all for independent.
        num_anomalous: anomalous ones that chose the threshold; 0 where good ones did.
        escape_rate: share of anomalous ones that is expected below it; 0 where none chose it.
        escape_high: upper end of the 95 % interval of that share.
    """

    threshold: float
    false_alarm_rate: float
    low: float
    high: float
    num_good: int
    rank: int
    margin: float = 0.0
    num_independent: int = 0
    num_anomalous: int = 0
    escape_rate: float = 0.0
    escape_high: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The point that `as_dict` turned into ``values``."""
        return cls(**values)

    def as_thresholds(self, level: str) -> dict[str, float]:
        """Numbers by name, as a model's file keeps them: the threshold is called as the level, such as ``image``."""
        values = {f"{level}.{name}": float(value) for name, value in asdict(self).items()}
        return {level: values.pop(f"{level}.threshold"), **values}

    @classmethod
    def of_thresholds(cls, level: str, values: Mapping[str, float]) -> Self | None:
        """The point of a level from what `as_thresholds` gave; None where there is none, or nothing but a number."""
        kinds = {field.name: field.type for field in fields(cls) if field.name != "threshold"}
        if level not in values or any(f"{level}.{name}" not in values for name in kinds):
            return None
        known: dict[str, Any] = {
            name: int(values[f"{level}.{name}"]) if kind is int else values[f"{level}.{name}"]
            for name, kind in kinds.items()
        }
        return cls(threshold=values[level], **known)

    def promise(self) -> str:
        """What is to be expected, in a few words."""
        most = "at most " if self.margin else ""
        text = f"{most}{self.false_alarm_rate:.1%} false alarms [{self.low:.1%}, {self.high:.1%}]"
        if self.num_anomalous:
            text += f", {self.escape_rate:.1%} escapes [0, {self.escape_high:.1%}]"
        return text.replace("%", " %")

    def predict(self, num_unseen: int) -> tuple[float, float]:
        """95 % interval of the share of false alarms among so many good ones that were not seen before.

        Images are taken to come as many to a part as those that the threshold comes from.
        """
        independent = self.num_independent or self.num_good
        unseen = max(floor(num_unseen * independent / self.num_good), 1)
        if self.num_anomalous:  # not one of the good ones, but between two of them
            rates = self.rank + 0.5, independent - self.rank + 0.5
        else:
            rates = float(self.rank), float(independent - self.rank + 1)
        counts = betabinom(unseen, *rates).ppf(INTERVAL)
        return 0.0 if self.margin else float(counts[0] / unseen), float(counts[1] / unseen)


def threshold_from_good(
    scores: FloatArray,
    *,
    group_ids: Sequence[str] | None = None,
    false_alarm_rate: float = 0.05,
    margin: float = 0.0,
) -> OperatingPoint:
    """Chooses the lowest score of good parts above which no more than the wanted share of good ones is expected.

    Of ``n`` scores the one of rank ``k`` from above is taken: of further parts from the same line a share above it is
    distributed as Beta(k, n - k + 1), whatever the scores are like, with the mean ``k / (n + 1)``. So few parts promise
    little: with 19, no rate below 5 % can be expected, and the interval says how uncertain it is. Images of a part are
    not independent: ``n`` is then the number of independent ones that say as much, see `independent_scores`.

    Args:
        scores: ``[n]`` of good parts that nothing else was learnt from.
        group_ids: the part of each score; None where every one is of a part of its own.
        false_alarm_rate: wanted, in (0, 1); where ``n`` is too small for it, the highest score is taken.
        margin: raises the threshold by this share of it, at least 0.

    Raises:
        ValueError: there are no scores, some are not finite, or a rate or margin is out of range.
    """
    _check_scores(scores, "good parts")
    if not 0 < false_alarm_rate < 1 or not 0 <= margin < np.inf:
        raise ValueError(f"the rate must be in (0, 1) and the margin at least 0, found {false_alarm_rate} and {margin}")
    count = len(scores)
    independent = count if group_ids is None else independent_scores(scores, group_ids, false_alarm_rate)
    rank = min(max(floor(false_alarm_rate * (independent + 1) + 1e-9), 1), independent)
    # In the middle of the scores that stand for the independent one of this rank.
    place = min(max(floor((rank - 0.5) * count / independent + 0.5), 1), count)
    low, high = (float(end) for end in beta(rank, independent - rank + 1).ppf(INTERVAL))
    return OperatingPoint(
        threshold=float(np.sort(scores)[count - place]) * (1 + margin),
        false_alarm_rate=rank / (independent + 1),
        low=0.0 if margin else low,
        high=high,
        num_good=count,
        rank=rank,
        margin=margin,
        num_independent=independent,
    )


def threshold_from_labelled(
    scores: FloatArray, anomalous: BoolArray, *, group_ids: Sequence[str] | None = None, recall: float = 1.0
) -> OperatingPoint:
    """Chooses the highest threshold that finds the wanted share of anomalous parts (or images).

    With all of them found, ``n`` anomalous ones promise no escapes but only few: of further ones ``1 / (n + 1)`` are to
    be expected below.

    Args:
        scores: ``[n]`` of parts that nothing else was learnt from.
        anomalous: ``[n]``, which are.
        group_ids: the part of each score; None where every one is of a part of its own.
        recall: wanted, in (0, 1]; 1 for no escapes.

    Raises:
        ValueError: good or anomalous ones are missing, scores are not finite, or the recall is out of range.
    """
    _check_scores(scores, "labelled parts")
    if not 0 < recall <= 1:
        raise ValueError(f"the recall must be in (0, 1], found {recall}")
    if anomalous.all() or not anomalous.any():
        raise ValueError(f"a threshold from labels needs good and anomalous parts, found {int(anomalous.sum())} "
                         f"anomalous ones of {len(anomalous)}")  # fmt: skip
    parts = np.arange(len(scores)).astype(str) if group_ids is None else np.asarray(group_ids)
    found, good = np.sort(scores[anomalous])[::-1], scores[~anomalous]
    lowest = float(found[ceil(recall * len(found) - 1e-9) - 1])
    threshold = float(np.nextafter(lowest, -np.inf))  # what scores as high is found
    share = float((good > threshold).mean())
    independent = independent_scores(good, parts[~anomalous].tolist(), share)
    rank = round(share * independent)
    bad = independent_scores(-found, parts[anomalous][np.argsort(-scores[anomalous], kind="stable")].tolist(), 0.5)
    missed = round((found < lowest).mean() * bad)
    return OperatingPoint(
        threshold=threshold,
        false_alarm_rate=share,
        low=float(beta(rank, independent - rank + 1).ppf(INTERVAL[0])) if rank else 0.0,
        high=float(beta(rank + 1, independent - rank).ppf(INTERVAL[1])) if rank < independent else 1.0,
        num_good=len(good),
        rank=rank,
        num_independent=independent,
        num_anomalous=len(found),
        escape_rate=(missed + 1) / (bad + 1),
        escape_high=float(beta(missed + 1, bad - missed).ppf(0.95)) if missed < bad else 1.0,
    )


def independent_scores(scores: FloatArray, group_ids: Sequence[str], share: float) -> int:
    """How many independent scores would say as much about the highest ones as scores of parts with several images do.

    Shares of scores above a threshold vary more between samples of parts than between samples of as many independent
    images, by a factor (the design effect) that is estimated from the parts themselves: at thresholds from the wanted
    share to a half, and the largest one counts, since few images lie above a single threshold. There are at least as
    many as parts of the same size would be, and at most as many as images.

    Args:
        scores: ``[n]``.
        group_ids: the part of each.
        share: of the scores above the threshold that is wanted.

    Reference:
        Kish, "Survey Sampling", 1965, section 5.4.
    """
    _, part, sizes = np.unique(np.asarray(group_ids), return_inverse=True, return_counts=True)
    part, count, num_parts = part.reshape(-1), len(scores), len(sizes)
    fewest = count**2 / float(np.square(sizes, dtype=np.float64).sum())
    if num_parts in (1, count):
        return num_parts
    ordered, effect = np.sort(scores)[::-1], 1.0
    for tail in np.linspace(min(max(share, 1 / count), LARGEST_TAIL), LARGEST_TAIL, TAILS):
        above = scores >= ordered[min(max(round(tail * count), 1), count - 1) - 1]
        rate = float(above.mean())
        if num_parts > 1 and rate < 1:
            spread = np.square(np.bincount(part, weights=above) - sizes * rate).sum() * num_parts / (num_parts - 1)
            effect = max(effect, float(spread) / (count * rate * (1 - rate)))
    return max(floor(min(max(count / effect, fewest), count)), 1)


def _check_scores(scores: FloatArray, source: str) -> None:
    if len(scores) == 0 or not np.isfinite(scores).all():
        raise ValueError(f"a threshold needs finite scores of {source}, found {len(scores)}: {scores[:5]}")


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


def check_good_class(good_class: int, train: ImageDataset, other: ImageDataset) -> None:
    """Checks that the label of good images means the same class in another set as in the training set.

    Raises:
        ValueError: both sets name their classes, and it is another one.
    """
    here, there = train.classes, other.classes
    if here and there and here[good_class : good_class + 1] != there[good_class : good_class + 1]:
        raise ValueError(
            f"the good class is label {good_class}, which is another class there than in the training set: there are "
            f"{list(there)}, in training {list(here)}; number them alike, as the splits below one root are"
        )


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
        shown = f"{good_class} of {list(dataset.classes)}" if dataset.classes else good_class
        raise ValueError(
            f"there is no good part: {int(is_good.sum())} of {len(labels)} images are of the good class ({shown}), and "
            "every part has others as well"
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
