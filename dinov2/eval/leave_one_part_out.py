"""Nearest neighbours among other parts: photos of one part are almost copies, and would answer for each other."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dinov2.eval.neighbours import nearest_neighbours


def nearest_of_other_parts(
    queries: Tensor,
    query_parts: Sequence[str],
    bank: Tensor,
    bank_parts: Sequence[str],
    num_neighbours: int,
    *,
    device: torch.device | str = "cpu",
    bank_on_cpu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Finds the rows of ``bank`` with the largest inner product with each query, without rows of the query's own part.

    Args:
        queries: ``[M, D]`` float32, finite.
        query_parts: the part of every query.
        bank: ``[N, D]`` float32, finite.
        bank_parts: the part of every row of the bank.
        num_neighbours: from 1 to `num_rows_of_other_parts`.
        device: where similarities are computed.
        bank_on_cpu: leaves the bank where it is, see `nearest_neighbours`.

    Returns:
        Similarities ``[M, k]`` float32 from large to small, and places in the bank ``[M, k]`` int64; both on the CPU.

    Raises:
        ValueError: when some query has fewer rows of other parts.
    """
    available = num_rows_of_other_parts(query_parts, bank_parts)
    if not 1 <= num_neighbours <= available:
        raise ValueError(f"cannot find {num_neighbours} neighbours of other parts; some query has only {available}")
    numbers = {part: number for number, part in enumerate(dict.fromkeys((*bank_parts, *query_parts)))}
    part_of_row = torch.tensor([numbers[part] for part in bank_parts])
    part_of_query = torch.tensor([numbers[part] for part in query_parts])
    own_rows = torch.bincount(part_of_row, minlength=len(numbers))[part_of_query].numpy()  # [M]
    similarities = torch.empty(len(queries), num_neighbours)
    rows = torch.empty(len(queries), num_neighbours, dtype=torch.int64)
    # Queries with about as many rows to drop go together, so that one large part does not make all searches long.
    sizes = np.ceil(np.log2(own_rows + 1)).astype(int)
    for size in np.unique(sizes):
        members = torch.from_numpy(np.flatnonzero(sizes == size))
        most = num_neighbours + int(own_rows[members].max())
        found, places = nearest_neighbours(queries[members], bank, most, device=device, bank_on_cpu=bank_on_cpu)
        own = part_of_row[places] == part_of_query[members, None]
        kept = own.int().argsort(dim=1, stable=True)[:, :num_neighbours]  # other parts first, in their order
        similarities[members] = found.gather(1, kept)
        rows[members] = places.gather(1, kept)
    return similarities, rows


def num_rows_of_other_parts(query_parts: Sequence[str], bank_parts: Sequence[str]) -> int:
    """How many rows of the bank are left for the query that loses most of them."""
    asked = set(query_parts)
    counts: dict[str, int] = {}
    for part in bank_parts:
        if part in asked:
            counts[part] = counts.get(part, 0) + 1
    return len(bank_parts) - max(counts.values(), default=0)
