"""Making up for classes that are rare in the training set: by weights in the loss, or by drawing them more often."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dinov2.data.samplers import EpochStream
from dinov2.utils.seeds import derive_seed

BALANCE_RULES = ("inverse", "sqrt_inverse", "effective")

_EFFECTIVE_BETA = 0.9999

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def class_weights(counts: Sequence[int] | IntArray, rule: str) -> FloatArray:
    """Weight of every class ``[C]``, so that the mean weight over all samples is 1.

    ``inverse`` is one over the count (all classes then weigh the same in total), ``sqrt_inverse`` one over its root,
    and ``effective`` one over the effective number of samples, (1 - b^n) / (1 - b) with b = 0.9999, which levels off
    for classes of more than about 10,000. A class without samples has weight 0.

    Args:
        counts: samples (images or pixels) of every class.
        rule: one of ``BALANCE_RULES``.

    Raises:
        ValueError: for an unknown rule, a negative count, or no samples at all.

    Reference: Cui et al., Class-Balanced Loss Based on Effective Number of Samples (2019), section 4.
    """
    numbers = np.asarray(counts, dtype=np.float64)
    if numbers.ndim != 1 or (numbers < 0).any() or numbers.sum() == 0:
        raise ValueError(f"counts must be one number per class, none negative and not all 0, got {counts}")
    present = np.maximum(numbers, 1)
    match rule:
        case "inverse":
            weights = 1 / present
        case "sqrt_inverse":
            weights = 1 / np.sqrt(present)
        case "effective":
            weights = (1 - _EFFECTIVE_BETA) / -np.expm1(present * np.log(_EFFECTIVE_BETA))
        case _:
            raise ValueError(f"unknown rule of class balance {rule!r}; allowed: {', '.join(BALANCE_RULES)}")
    weights = np.where(numbers > 0, weights, 0.0)
    balanced: FloatArray = weights * numbers.sum() / (weights @ numbers)
    return balanced


def sample_weights(labels: Sequence[Sequence[int]], rule: str = "inverse") -> FloatArray:
    """How often each sample should be drawn ``[N]``, relative to the others, so that rare classes come more often.

    With ``inverse`` and one class per sample, all classes are drawn equally often. A sample of several classes is drawn
    as often as its rarest one asks for; samples of no class count as a class of their own.

    Args:
        labels: classes of every sample, such as the labels of an image or the classes of its mask.
        rule: one of ``BALANCE_RULES``.

    Returns:
        Weights with mean 1.

    Raises:
        ValueError: for an unknown rule.

    Reference: on several classes, Gupta et al., LVIS (2019), section 5.1 (repeat factors).
    """
    none = 1 + max((label for entry in labels for label in entry), default=-1)
    filled = [sorted(set(entry)) or [none] for entry in labels]
    by_class = class_weights(np.bincount([label for entry in filled for label in entry]), rule)
    largest = np.array([by_class[entry].max() for entry in filled])
    scaled: FloatArray = largest / largest.mean()
    return scaled


@dataclass(kw_only=True, eq=False, repr=False)
class WeightedSampler(EpochStream):
    """A finite epoch of ``size`` indices over all processes, each drawn in proportion to its weight.

    Draws are spread as evenly as they can be: a sample whose share of an epoch is 2.3 comes two or three times, and 2.3
    times on average; independent draws would leave out a third of the samples whose share is 1. The order of an epoch
    depends on the seed and the epoch alone.

    Attributes:
        weights: ``[N]``, none negative, at least one above 0.

    Raises:
        ValueError: for bad weights, sizes or positions.
    """

    weights: npt.ArrayLike = field(kw_only=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weights = np.asarray(self.weights, dtype=np.float64)
        if not np.isfinite(self._weights).all() or (self._weights < 0).any() or not self._weights.any():
            raise ValueError("weights must be finite, none negative and not all 0")

    def order(self) -> IntArray:
        rng = np.random.default_rng(derive_seed(self.seed, "balance", self.epoch))
        # Systematic sampling: a comb of evenly spaced points over the weights, laid end to end in random order.
        shuffled = rng.permutation(len(self._weights))
        ends = np.cumsum(self._weights[shuffled])
        points = (np.arange(self.size) + rng.random()) * (ends[-1] / self.size)
        places = np.searchsorted(ends, points, side="right").clip(max=np.flatnonzero(self._weights[shuffled])[-1])
        drawn: IntArray = rng.permutation(shuffled[places])
        return drawn
