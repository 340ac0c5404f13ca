"""Stochastic depth: leaving out a residual branch for some of the samples of a training batch.

Reference: Huang et al., Deep Networks with Stochastic Depth (2016); on subsets, Oquab et al., DINOv2 (2023), section 5.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dinov2.layers.token_groups import GroupShapes


def drop_path(residual: Tensor, rate: float) -> Tensor:
    """Zeroes each sample of ``[B, ...]`` with probability ``rate`` and scales the others by ``1 / (1 - rate)``."""
    keep = residual.new_empty((residual.shape[0],) + (1,) * (residual.ndim - 1)).bernoulli_(1 - rate)
    return residual * keep / (1 - rate)


def add_residual_of_subset(
    x: Tensor, shapes: GroupShapes, branch: Callable[[Tensor, GroupShapes], Tensor], rate: float
) -> Tensor:
    """Adds ``branch(x)`` to a random subset of samples; the branch is not computed for the others.

    Of every group exactly ``max(int(B * (1 - rate)), 1)`` samples are kept, and their residual is scaled by
    ``B / kept``. One permutation per group is drawn, in order, from the default generator of the device.

    Args:
        x: packed tokens ``[sum of B * N, D]``.
        shapes: ``(B, N)`` of every group.
        branch: maps packed tokens and their shapes to a residual of the same shape.
        rate: fraction of samples to leave out, in [0, 1).
    """
    rows: list[Tensor] = []
    kept_shapes: list[tuple[int, int]] = []
    scales: list[float] = []
    start = 0
    for batch, tokens in shapes:
        num_kept = max(int(batch * (1 - rate)), 1)
        kept = torch.randperm(batch, device=x.device)[:num_kept]
        within_image = torch.arange(start, start + tokens, device=x.device)
        rows.append((kept.unsqueeze(1) * tokens + within_image).flatten())
        kept_shapes.append((kept.shape[0], tokens))
        scales.append(batch / num_kept)
        start += batch * tokens

    index = torch.cat(rows)
    residual = branch(x.index_select(0, index), tuple(kept_shapes))
    # A Python number multiplies in float32 whatever the dtype; the `alpha` of `index_add` would be rounded to bfloat16.
    parts = torch.split(residual, [len(part) for part in rows])
    scaled = torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)])
    return x.index_add(0, index, scaled.to(x.dtype))
