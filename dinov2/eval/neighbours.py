"""Exact nearest neighbours by inner product, in bounded memory and in an order that does not depend on the machine."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2.eval.features import gather_shares, share_of_this_process

INDEX_BITS = 32
INDEX_MASK = (1 << INDEX_BITS) - 1
EMPTY = torch.iinfo(torch.int64).min  # below every key

# Of the search on the CPU. None of them changes the result.
TILE_ROWS = 2048  # bank rows compared at a time: the similarities of 512 queries (4 MiB) are read back from the cache
TILE_GROUP = 16  # similarities of a tile of which only the largest is looked at first
CANDIDATES = 512  # room per query for rows that may turn out to be neighbours


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
    similarities. A bank that lies on the device is not copied. Beside it, about
    ``query_chunk * (bank_chunk + num_neighbours) * 20`` bytes are needed there, however large the sets are; on the CPU,
    chunks are cut into tiles of at most `TILE_ROWS` rows and need less.

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
    search = _search_on_cpu if device.type == "cpu" else _search
    with torch.no_grad():
        keys = torch.cat(
            [search(chunk.to(device), bank, num_neighbours, bank_chunk) for chunk in own.split(query_chunk)]
        )
    return _decode(gather_shares(keys, len(queries), device))


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
    numbers = {part: number for number, part in enumerate({*bank_parts, *query_parts})}
    part_of_row = torch.tensor([numbers[part] for part in bank_parts])
    part_of_query = torch.tensor([numbers[part] for part in query_parts])
    own_rows = torch.bincount(part_of_row, minlength=len(numbers))[part_of_query]  # [M]
    similarities = torch.empty(len(queries), num_neighbours)
    rows = torch.empty(len(queries), num_neighbours, dtype=torch.int64)
    # Queries with about as many rows to drop go together, so that one large part does not make all searches long.
    sizes = (own_rows + 1).double().log2().ceil()
    for size in sizes.unique():
        members = (sizes == size).nonzero().flatten()
        count = num_neighbours + int(own_rows[members].max())
        found, places = nearest_neighbours(queries[members], bank, count, device=device, bank_on_cpu=bank_on_cpu)
        own = part_of_row[places] == part_of_query[members, None]
        kept = own.int().argsort(dim=1, stable=True)[:, :num_neighbours]  # other parts first, in their order
        similarities[members] = found.gather(1, kept)
        rows[members] = places.gather(1, kept)
    return similarities, rows


def num_rows_of_other_parts(query_parts: Sequence[str], bank_parts: Sequence[str]) -> int:
    """How many rows of the bank are left for the query that loses most of them."""
    counts = Counter(bank_parts)
    return len(bank_parts) - max((counts[part] for part in set(query_parts)), default=0)


def _search(queries: Tensor, bank: Tensor, num_neighbours: int, bank_chunk: int) -> Tensor:
    """The keys ``[q, k]`` of the nearest rows, from large to small, on the CPU; all are sorted, as suits a GPU."""
    best = torch.full((len(queries), num_neighbours), EMPTY, device=queries.device)
    for start in range(0, len(bank), bank_chunk):
        rows = bank[start : start + bank_chunk].to(queries.device)
        best = _merge(best, queries @ rows.T, start, num_neighbours)
    return best.cpu()


def _search_on_cpu(queries: Tensor, bank: Tensor, num_neighbours: int, bank_chunk: int) -> Tensor:
    """As `_search`, in little more time than the matrix product takes: nearly all similarities are read only once."""
    tile_rows = min(bank_chunk, TILE_ROWS)
    tile = torch.empty(len(queries), -(-tile_rows // TILE_GROUP) * TILE_GROUP)
    shortlist = _Shortlist(len(queries), num_neighbours)
    for start in range(0, len(bank), tile_rows):
        rows = bank[start : start + tile_rows]
        torch.mm(queries, rows.T, out=tile[:, : len(rows)])
        tile[:, len(rows) :] = -torch.inf
        shortlist.add(tile, start, len(rows))
    return shortlist.best()


class _Shortlist:
    """The best keys of each query among the bank rows shown so far; rows must be shown in their order.

    A row whose similarity does not exceed that of k earlier rows is no neighbour. Those that do are few (for rows in
    random order ``k / n`` of a tile after ``n`` rows) and wait unsorted beside the best k. Where a query has no room
    for those of a tile, all its similarities are merged instead, so no order of the rows needs more memory.
    """

    def __init__(self, num_queries: int, num_neighbours: int) -> None:
        self._num_neighbours = num_neighbours
        self._keys = torch.full((num_queries, num_neighbours + CANDIDATES), EMPTY)  # the best k first
        self._filled = torch.full((num_queries,), num_neighbours)
        self._threshold = torch.full((num_queries, 1), -torch.inf)  # the k-th best similarity at the last merge

    def add(self, tile: Tensor, start: int, num_rows: int) -> None:
        """Takes the similarities ``[q, width]`` with bank rows from ``start``; -inf from column ``num_rows`` on."""
        if start < self._num_neighbours:  # there is no k-th best yet
            self._merge(torch.arange(len(tile)), tile[:, :num_rows], start)
            return
        queries, columns = self._above_threshold(tile)
        counts = torch.bincount(queries, minlength=len(tile))
        crowded = self._filled + counts > self._keys.shape[1]
        if crowded.any():
            self._merge(crowded.nonzero()[:, 0], tile[crowded, :num_rows], start)
            fitting = ~crowded[queries]
            queries, columns = queries[fitting], columns[fitting]
            counts[crowded] = 0
        places = torch.arange(len(queries)) + (self._filled - counts.cumsum(0) + counts)[queries]
        self._keys[queries, places] = _encode(tile[queries, columns], columns + start)
        self._filled += counts

    def best(self) -> Tensor:
        """The keys ``[q, k]`` from large to small."""
        return self._keys.topk(self._num_neighbours, dim=1).values

    def _above_threshold(self, tile: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, in ascending order, and columns of the similarities that may belong to the best."""
        # A group's columns lie apart, so that maxima of neighbouring groups are taken by one vector instruction.
        groups = tile.view(len(tile), TILE_GROUP, -1)
        queries, group = (groups.amax(dim=1) > self._threshold).nonzero(as_tuple=True)
        entry, member = (groups[queries, :, group] > self._threshold[queries]).nonzero(as_tuple=True)
        return queries[entry], member * groups.shape[2] + group[entry]

    def _merge(self, queries: Tensor, similarities: Tensor, start: int) -> None:
        best = _merge(self._keys[queries], similarities, start, self._num_neighbours)
        self._keys[queries, : self._num_neighbours] = best
        self._keys[queries, self._num_neighbours :] = EMPTY
        self._filled[queries] = self._num_neighbours
        self._threshold[queries] = _decode(best[:, -1:])[0]


def _merge(keys: Tensor, similarities: Tensor, start: int, num_neighbours: int) -> Tensor:
    """The largest of the keys and of those of the similarities, whose bank rows begin at ``start``."""
    rows = torch.arange(start, start + similarities.shape[1], device=similarities.device)
    return torch.cat([keys, _encode(similarities, rows)], dim=1).topk(num_neighbours, dim=1).values


def _encode(similarities: Tensor, rows: Tensor) -> Tensor:
    """Packs similarity and bank row into one integer that sorts by similarity, then by early row.

    All keys of a query differ, which makes "the k largest" unique; `topk` on the similarities alone may return any of
    several equal ones.
    """
    bits = (similarities.float() + 0.0).view(torch.int32)  # adding zero turns -0 into +0, its equal
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats they were
    return (ascending.to(torch.int64) << INDEX_BITS) | (INDEX_MASK - rows)


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    ascending = (keys >> INDEX_BITS).to(torch.int32)
    bits = ascending ^ ((ascending >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32), INDEX_MASK - (keys & INDEX_MASK)
