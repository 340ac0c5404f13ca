"""Exact nearest neighbours by inner product, in bounded memory and in an order that does not depend on the machine."""

import torch
from torch import Tensor

from dinov2.eval.sharding import gather_shares, share_of_this_process

INDEX_BITS = 32
INDEX_MASK = (1 << INDEX_BITS) - 1


def nearest_neighbours(
    queries: Tensor,
    bank: Tensor,
    num_neighbours: int,
    *,
    device: torch.device | str = "cpu",
    query_chunk: int = 512,
    bank_chunk: int = 32_768,
    bank_on_cpu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Finds the rows of ``bank`` with the largest inner product with each query.

    Several processes split the queries and all get the whole result. Equal similarities are ordered by the row's place
    in the bank, so the result is the same for every chunk size, number of processes and device that computes the same
    similarities. About ``query_chunk * bank_chunk * 20`` bytes are needed on the device, however large the sets are.

    Args:
        queries: ``[M, D]`` float32, finite.
        bank: ``[N, D]`` float32, finite.
        num_neighbours: in ``[1, N]``.
        device: where similarities are computed.
        query_chunk: queries compared at a time.
        bank_chunk: bank rows compared at a time.
        bank_on_cpu: leaves the bank where it is and copies each chunk to the device, once per chunk of queries; needed
            only where the bank does not fit into the device's memory.

    Returns:
        Similarities ``[M, k]`` float32 from large to small, and the rows' places in the bank ``[M, k]`` int64; both on
        the CPU.

    Raises:
        ValueError: for empty sets, widths that differ, or a number of neighbours that the bank does not have.
    """
    if len(queries) == 0 or len(bank) == 0 or queries.shape[1] != bank.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and bank {tuple(bank.shape)} must be [M, D] and [N, D]")
    if not 1 <= num_neighbours <= len(bank):
        raise ValueError(f"cannot find {num_neighbours} neighbours in a bank of {len(bank)} rows")
    device = torch.device(device)
    if not bank_on_cpu:
        bank = bank.to(device)
    own = queries[share_of_this_process(len(queries))]
    chunks = torch.split(own, query_chunk)
    keys = torch.cat([_search(chunk.to(device), bank, num_neighbours, bank_chunk) for chunk in chunks])
    return _decode(gather_shares(keys, len(queries), device))


def _search(queries: Tensor, bank: Tensor, num_neighbours: int, bank_chunk: int) -> Tensor:
    """Returns the keys ``[q, k]`` of the nearest rows, from large to small, on the CPU."""
    best = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), bank_chunk):
        rows = bank[start : start + bank_chunk].to(queries.device)
        keys = torch.cat([best, _encode(queries @ rows.T, start)], dim=1)
        best = keys.topk(min(num_neighbours, keys.shape[1]), dim=1).values
    return best.cpu()


def _encode(similarities: Tensor, start: int) -> Tensor:
    """Packs similarity and bank row into one integer that sorts by similarity, then by early row.

    All keys of a query differ, which makes "the k largest" unique; `topk` on the similarities alone may return any of
    several equal ones.
    """
    bits = (similarities.float() + 0.0).view(torch.int32)  # adding zero turns -0 into +0, its equal
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats they were
    rows = torch.arange(start, start + similarities.shape[1], device=similarities.device)
    return (ascending.to(torch.int64) << INDEX_BITS) | (INDEX_MASK - rows)


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    ascending = (keys >> INDEX_BITS).to(torch.int32)
    bits = ascending ^ ((ascending >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), INDEX_MASK - (keys & INDEX_MASK)
