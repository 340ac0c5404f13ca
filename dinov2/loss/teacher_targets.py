"""Targets from teacher scores (softmax with a lagged centre, or Sinkhorn-Knopp) and cross-entropy against them."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.distributed import all_reduce_max, all_reduce_sum


class LaggedCenter(nn.Module):
    """Centres and sharpens teacher outputs with an exponential moving average of their batch means.

    An update lies in the buffer ``next_center`` until the next call of ``softmax_center_teacher``, which moves it to
    ``center``; so the probabilities of a step use the centre known before that step. Both buffers are in the state
    dict, and a resumed run goes on exactly. A state dict that holds ``center`` alone (an upstream file) loads too, as
    a centre with nothing pending.

    The batch mean is the mean of all rows of all processes, also where their numbers differ (upstream averages the
    means of the processes). An update without a row anywhere changes nothing (upstream's centre becomes NaN).

    Args:
        center_shape: shape of the buffers; the last entry is the number of prototypes ``K``.
        student_temp: what student logits are divided by, above 0.
        center_momentum: share of the old centre that an update keeps, in [0, 1].

    Raises:
        ValueError: ``student_temp`` or ``center_momentum`` is out of range.

    Reference:
        Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", section 3.1, equation 4.
    """

    center: Tensor
    next_center: Tensor

    def __init__(self, center_shape: tuple[int, ...], *, student_temp: float, center_momentum: float) -> None:
        super().__init__()
        if not student_temp > 0:
            raise ValueError(f"student_temp must be above 0, found {student_temp}")
        if not 0 <= center_momentum <= 1:
            raise ValueError(f"center_momentum must lie in [0, 1], found {center_momentum}")
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(center_shape))
        self.register_buffer("next_center", torch.zeros(center_shape))
        self.register_load_state_dict_pre_hook(_take_center_for_missing_next_center)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """Makes the pending centre visible, then returns ``softmax((teacher_output - center) / teacher_temp)``.

        Args:
            teacher_output: ``[..., K]`` logits; half precision is computed in float32.
            teacher_temp: above 0.

        Returns:
            Probabilities ``[..., K]``, float32 or wider.
        """
        self.center.copy_(self.next_center)
        return F.softmax((teacher_output - self.center.flatten()) / teacher_temp, dim=-1)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Enters the mean row of all processes' ``teacher_output`` ``[..., K]`` into the centre of the next step.

        All processes must call it together; any of them may have no row.
        """
        rows = teacher_output.flatten(0, -2)  # [M, K]
        # Sum and count travel in one tensor: one collective, and no process has to wait for a number on the host.
        row_sum = rows.sum(dim=0, dtype=self.next_center.dtype)
        total = all_reduce_sum(torch.cat([row_sum, row_sum.new_full((1,), rows.shape[0])]))
        count = total[-1]
        mean = (total[:-1] / count).view_as(self.next_center)
        updated = self.next_center * self.center_momentum + mean * (1 - self.center_momentum)
        self.next_center.copy_(torch.where(count > 0, updated, self.next_center))


def _take_center_for_missing_next_center(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Mapping[str, Any] | bool | list[str]
) -> None:
    """Loading a file that knows no pending update: the centre stays what it is at the next step."""
    center = state_dict.get(f"{prefix}center")
    if center is not None and f"{prefix}next_center" not in state_dict:
        state_dict[f"{prefix}next_center"] = center.clone()  # with assign=True both would be one tensor


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, temperature: float, n_iterations: int = 3, num_rows: Tensor | None = None) -> Tensor:
    """Alternately normalises ``exp(scores / temperature)`` over samples and over prototypes.

    The scaling is kept as two vectors beside one matrix, so an iteration is two matrix-vector products. Before the
    exponential the maximum of every prototype over all processes is subtracted, then that of every sample. The first
    cancels in the first normalisation; the second is put back as the weight of the sample in that normalisation. Every
    row and every column of the matrix then holds a 1, so nothing overflows and no sum vanishes, however far apart the
    scores are.

    Args:
        scores: ``[M, K]``, this process's samples; ``M`` may differ between processes and may be 0.
        temperature: above 0.
        n_iterations: at least 1.
        num_rows: integer tensor with one element: only so many leading rows are samples, the rest is padding.
            ``None`` takes all rows. It may lie on any device; it is not read on the host.

    Returns:
        ``[M, K]`` float32; rows sum to 1, rows of padding are 0.

    Raises:
        ValueError: ``n_iterations`` or ``temperature`` is not positive.

    Reference:
        Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", section 3.1.
    """
    if n_iterations < 1:
        raise ValueError(f"n_iterations must be at least 1, found {n_iterations}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    # Autocast would run the matrix-vector products in half precision.
    with torch.autocast(scores.device.type, enabled=False):
        matrix, sample_scale = _stabilised_exponential(scores.float() / temperature, num_rows)
        for _ in range(n_iterations):
            prototype_scale = _reciprocal(all_reduce_sum(sample_scale @ matrix))  # [K]
            sample_scale = _reciprocal(matrix @ prototype_scale)  # [M]
        return matrix.mul_(prototype_scale).mul_(sample_scale[:, None])


def _stabilised_exponential(logits: Tensor, num_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Turns ``logits`` in place into exp(logits - prototype maxima - sample maxima); also gives exp(sample maxima)."""
    if num_rows is not None:
        rows = torch.arange(logits.shape[0], device=logits.device)
        padding = rows >= num_rows.to(logits.device, non_blocking=True)
        logits.masked_fill_(padding[:, None], -torch.inf)
    if logits.shape[0] > 0:
        prototype_max = logits.amax(dim=0)  # [K]
    else:
        prototype_max = logits.new_full(logits.shape[1:], -torch.inf)
    logits -= _zero_where_empty(all_reduce_max(prototype_max))
    sample_max = _zero_where_empty(logits.amax(dim=1))  # [M], 0 for the sample that leads any prototype
    logits -= sample_max[:, None]
    return logits.exp_(), sample_max.exp()


def _zero_where_empty(maxima: Tensor) -> Tensor:
    """Replaces the maximum of nothing, minus infinity, which must not meet another infinity in a difference."""
    return maxima.masked_fill(maxima == -torch.inf, 0.0)


def _reciprocal(sums: Tensor) -> Tensor:
    """``1 / sums``; finite for the sums of padding, which are 0."""
    return sums.clamp_min(torch.finfo(sums.dtype).tiny).reciprocal()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns half-precision tensors as float32, and others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def cross_entropy(student_logits: Tensor, teacher_probabilities: Tensor, student_temp: float) -> Tensor:
    """Cross-entropy of every row, in float32 or wider.

    Args:
        student_logits: ``[..., K]``, any floating dtype.
        teacher_probabilities: ``[..., K]``, same shape; rows need not sum to 1 (they may be sums of distributions).
        student_temp: what the logits are divided by.

    Returns:
        ``[...]``, one value per row.

    Raises:
        ValueError: the shapes differ.
    """
    if student_logits.shape != teacher_probabilities.shape:
        raise ValueError(
            f"student logits and teacher probabilities must have one shape, "
            f"found {tuple(student_logits.shape)} and {tuple(teacher_probabilities.shape)}"
        )
    log_probabilities = F.log_softmax(at_least_float32(student_logits) / student_temp, dim=-1)
    return -(teacher_probabilities * log_probabilities).sum(dim=-1)
