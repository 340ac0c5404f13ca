"""Splitting rows evenly over processes, and putting them back in order."""

import torch
from torch import Tensor

from dinov2.distributed import all_gather_rows, get_rank, get_world_size

ROWS_PER_GATHER = 65_536


def share_of_this_process(num_rows: int) -> list[int]:
    """Positions of the rows that this process works on: one contiguous stretch, equally long on every process.

    Every process must run the model equally often, or the collectives of a sharded model never meet. Positions past the
    end therefore repeat the last row; `gather_shares` drops them. ``num_rows`` must be at least 1.
    """
    length = -(-num_rows // get_world_size())
    start = get_rank() * length
    return [min(position, num_rows - 1) for position in range(start, start + length)]


def gather_shares(rows: Tensor, num_rows: int, device: torch.device) -> Tensor:
    """Puts the shares of all processes back together.

    Args:
        rows: ``[length, ...]``, one row per position of `share_of_this_process`.
        num_rows: how many rows there are without the padding.
        device: of this process. Only CUDA matters: its backend (NCCL) sees no host memory, every other sees only that.

    Returns:
        All rows in order, ``[num_rows, ...]`` on the CPU, the same on every process.
    """
    world_size = get_world_size()
    if world_size == 1:
        return rows[:num_rows].cpu()
    device = device if device.type == "cuda" else torch.device("cpu")
    # In pieces, so that the device never holds the whole set.
    pieces = [
        all_gather_rows(piece.to(device)).cpu().reshape(world_size, *piece.shape)
        for piece in torch.split(rows, ROWS_PER_GATHER)
    ]
    return torch.cat(pieces, dim=1).flatten(0, 1)[:num_rows]
