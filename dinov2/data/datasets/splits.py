"""Splits: their names, and dividing images into them without tearing a group apart."""

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from dinov2.utils.seeds import derive_seed


class Split(StrEnum):
    """The three splits; the value is the folder's and the annotation file's name."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @classmethod
    def parse(cls, name: str, *, found: str = "") -> "Split":
        """Finds a split by name, in any case.

        Args:
            name: ``TRAIN``, ``VAL`` or ``TEST``.
            found: what exists on disk, added to the error.

        Raises:
            ValueError: for another name.
        """
        try:
            return cls(name.strip().lower())
        except ValueError:
            allowed = ", ".join(split.name for split in cls)
            raise ValueError(f"unknown split {name!r}; allowed are {allowed}{found and f' ({found})'}") from None


DEFAULT_FRACTIONS = (0.6, 0.2, 0.2)


def check_fractions(fractions: Sequence[float]) -> list[float]:
    """Returns the shares of train, val and test as a list.

    Raises:
        ValueError: when they are not three non-negative numbers that sum to 1.
    """
    shares = [float(fraction) for fraction in fractions]
    if len(shares) != len(Split) or min(shares) < 0 or not np.isclose(sum(shares), 1):
        raise ValueError(f"fractions of train, val and test must be three shares that sum to 1, got {shares}")
    return shares


def split_groups(
    group_ids: Sequence[str], strata: Sequence[str], fractions: Sequence[float], seed: int
) -> npt.NDArray[np.int64]:
    """Divides images at random so that a group stays whole and every split gets its share of each stratum.

    The result depends on the sets of groups, not on the order of images. A group that holds several strata counts for
    the one that is rarest among all images, so that a part with one defective photo counts as defective.

    Args:
        group_ids: group of each image, length N.
        strata: kind of each image, length N.
        fractions: share of images for each split; positive, sum 1.
        seed: draws the order of groups.

    Returns:
        Split index of each image ``[N]``.

    Raises:
        ValueError: when lengths differ, or the fractions are not positive shares of one whole.
    """
    if len(group_ids) != len(strata):
        raise ValueError(f"got {len(group_ids)} group ids and {len(strata)} strata")
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.size == 0 or (shares < 0).any() or not np.isclose(shares.sum(), 1):
        raise ValueError(f"fractions must be non-negative and sum to 1, got {tuple(fractions)}")
    if not len(group_ids):
        return np.zeros(0, dtype=np.int64)
    _, groups = np.unique(np.asarray(group_ids), return_inverse=True)
    _, kinds, counts = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    sizes = np.bincount(groups)
    rarity = np.argsort(np.argsort(counts, kind="stable"), kind="stable")  # 0 is the rarest stratum
    group_kinds = np.full(len(sizes), len(counts))
    np.minimum.at(group_kinds, groups, rarity[kinds])

    bounds = shares.cumsum()[:-1]
    rng = np.random.default_rng(derive_seed(seed, "split groups"))
    result = np.zeros(len(sizes), dtype=np.int64)
    for kind in range(len(counts)):
        members = rng.permutation(np.flatnonzero(group_kinds == kind))
        if len(members):
            middle = sizes[members].cumsum() - sizes[members] / 2
            result[members] = np.searchsorted(bounds, middle / sizes[members].sum(), side="right")
    return result[groups]
