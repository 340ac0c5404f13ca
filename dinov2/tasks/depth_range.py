"""Whether the depths of a set lie where the head can say them: a wrong unit would train nothing, in silence."""

import logging

import numpy as np

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import DepthSource
from dinov2.distributed import is_main_process

logger = logging.getLogger("dinov2")

_MAPS = 4  # tell the share of depths in range
_MOST_MAPS = 200  # that are looked through for a single one
_SUSPICIOUS = 0.05  # share


def check_depths_in_range(dataset: ImageDataset, path: str, *, min_depth: float, max_depth: float) -> None:
    """Looks at a few maps, spread over the set, and at more of them as long as no depth is in range.

    Warns where few depths are.

    Args:
        dataset: a `DepthSource`.
        path: what the options call it.
        min_depth: least depth that counts, in the set's unit.
        max_depth: greatest depth that counts.

    Raises:
        ValueError: none is; the first photo and what was found are named.
        BadTargetError: a map cannot be used.
    """
    assert isinstance(dataset, DepthSource)
    span = f"head.min_depth={min_depth:g} and head.max_depth={max_depth:g} ({dataset.depth_unit})"
    least, greatest = np.inf, -np.inf
    num_known = num_inside = 0
    order = np.random.default_rng(0).permutation(len(dataset))[:_MOST_MAPS].tolist()
    for number, index in enumerate(order):
        if number >= _MAPS and num_inside:
            break
        depth = dataset.get_depth(index)
        known = depth[np.isfinite(depth)]
        num_known += known.size
        num_inside += int(((known > min_depth) & (known < max_depth)).sum())
        least, greatest = float(known.min(initial=least)), float(known.max(initial=greatest))
    if not num_inside:
        found = f"depths of {least:g} to {greatest:g}" if num_known else "not a single known depth"
        raise ValueError(
            f"{path}: no depth lies between {span}; {len(order)} maps, such as that of "
            f"{dataset.get_image_path(order[0])}, hold {found}"
        )
    if num_inside < _SUSPICIOUS * num_known and is_main_process():
        share = f"{num_inside / num_known:.2%}"
        logger.warning("%s: only %s of the depths (%g to %g) lie between %s", path, share, least, greatest, span)
