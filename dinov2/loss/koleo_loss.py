"""The KoLeo regulariser, which spreads the features of a batch evenly over the sphere."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.distributed import all_gather_rows, all_reduce_sum, get_rank, get_world_size
from dinov2.loss.teacher_targets import at_least_float32


class KoLeoLoss(nn.Module):
    """Minus the mean logarithm of every feature's distance to its nearest neighbour, on the unit sphere.

    Args:
        half_precision: compute in the dtype of the features, as upstream does. In float16 the small constant vanishes
            and two equal images make the loss infinite, so the default computes in float32 or wider.
        all_ranks: look for neighbours among the features of all processes, which must hold equally many. The gradient
            is that of one process with the whole batch, once gradients are averaged over the processes.

    Reference:
        Sablayrolles et al., "Spreading vectors for similarity search", section 3.
    """

    def __init__(self, half_precision: bool = False, all_ranks: bool = False) -> None:
        super().__init__()
        self.half_precision = half_precision
        self.all_ranks = all_ranks

    def forward(self, student_output: Tensor, eps: float = 1e-8) -> Tensor:
        """Loss of the features ``[B, D]``; 0 where there is no second feature to compare with.

        Args:
            student_output: any floating dtype; normalised here.
            eps: keeps norms, distances and logarithms away from 0.

        Returns:
            Scalar, float32 or wider (with ``half_precision``, the dtype of the features).
        """
        with torch.autocast(student_output.device.type, enabled=False):
            if not self.half_precision:
                student_output = at_least_float32(student_output)
            features = F.normalize(student_output, p=2.0, dim=-1, eps=eps)
            gather = self.all_ranks and get_world_size() > 1
            candidates = _GatherRows.apply(features) if gather else features  # [B or processes · B, D]
            if candidates.shape[0] < 2:
                return features[:0].sum()
            own_offset = get_rank() * features.shape[0] if gather else 0
            neighbours = _nearest_neighbours(features, candidates, own_offset)
            distances = F.pairwise_distance(features, candidates[neighbours], p=2.0, eps=eps)  # [B]
            return -torch.log(distances + eps).mean()


@torch.no_grad()
def _nearest_neighbours(features: Tensor, candidates: Tensor, own_offset: int) -> Tensor:
    """Index of the candidate nearest by angle, ``[B]``; row ``i`` is candidate ``own_offset + i``, left out."""
    dots = features @ candidates.T  # [B, candidates]
    dots.diagonal(own_offset).fill_(-torch.inf)
    return dots.argmax(dim=1)


class _GatherRows(torch.autograd.Function):
    """Rows of all processes; its gradient adds up what every process derives for the rows of this one."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = rows.shape[0]
        return all_gather_rows(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        start = get_rank() * ctx.num_rows
        return all_reduce_sum(gradients[0].contiguous())[start : start + ctx.num_rows]
