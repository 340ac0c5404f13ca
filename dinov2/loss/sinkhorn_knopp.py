"""Sinkhorn-Knopp normalisation of teacher scores: every prototype is used equally over the batch of all processes."""

import torch
from torch import Tensor

from dinov2.distributed import all_reduce_max, all_reduce_sum


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
