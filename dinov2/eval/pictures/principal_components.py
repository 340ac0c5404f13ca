"""Principal components whose signs do not depend on the machine."""

import torch
from torch import Tensor


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Projects rows on their first principal components.

    A component points where its largest loading is positive, so that the same rows always give the same values.

    Args:
        rows: ``[N, D]``, finite.
        count: how many components, at most D.

    Returns:
        The projections ``[N, count]``, and the variances along all components ``[D]`` from large to small, up to a
        common factor; both float64 on the CPU.
    """
    rows = rows.detach().cpu().double()
    rows = rows - rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(rows.T @ rows)  # ascending
    variances, directions = variances.clamp_min(0).flip(0), directions.flip(1)[:, :count]  # [D], [D, count]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))  # [1, count]
    return rows @ (directions * largest.sign()), variances
