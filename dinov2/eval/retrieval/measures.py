"""How well each query ranks what belongs to it: average precision, precision and recall at k, with images ignored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2.eval.sharding import gather_shares, share_of_this_process

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

WRONG, RELEVANT, IGNORED = 0, 1, 2
ENTRIES_AT_A_TIME = 4_000_000  # of the matrix queries x gallery; each takes about 30 bytes


@dataclass(frozen=True)
class QueryMeasures:
    """What each of ``Q`` queries achieved; a query to which nothing belongs has NaN.

    Ranks count from 1 over the gallery without what is ignored for the query.

    Attributes:
        average_precision: ``[Q]``.
        precision: ``[Q, K]`` at each k.
        recall: ``[Q, K]`` at each k.
        first_hit: ``[Q]`` rank of the first relevant image, 0 where there is none.
        best_wrong: ``[Q]`` gallery position of the wrong image with the best rank, -1 where none is wrong.
    """

    average_precision: FloatArray
    precision: FloatArray
    recall: FloatArray
    first_hit: IntArray
    best_wrong: IntArray

    def select(self, rows: IntArray) -> "QueryMeasures":
        """Those of some queries."""
        return QueryMeasures(*(getattr(self, field.name)[rows] for field in fields(self)))


def measure_retrieval(
    queries: Tensor,
    gallery: Tensor,
    relevance: Callable[[IntArray], npt.NDArray[np.int8]],
    ks: Sequence[int],
    *,
    device: torch.device | str = "cpu",
    entries_at_a_time: int = ENTRIES_AT_A_TIME,
) -> QueryMeasures:
    """Ranks the gallery for every query by inner product and measures the rankings.

    Of equal similarities the image that comes first in the gallery ranks first. Several processes split the queries and
    all get the whole result. Memory is bounded: a few queries are compared with the gallery at a time.

    Args:
        queries: ``[Q, D]`` float32, finite.
        gallery: ``[N, D]`` float32, finite.
        relevance: gives, for positions of queries ``[q]``, `WRONG`, `RELEVANT` or `IGNORED` for each gallery image,
            ``[q, N]``.
        ks: numbers of first ranks at which precision and recall are measured.
        device: where similarities are computed and ranked.
        entries_at_a_time: size of the largest matrix of similarities (at least one row).

    Raises:
        ValueError: for empty sets, widths that differ, or a k below 1.
    """
    if len(queries) == 0 or len(gallery) == 0 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} and gallery {tuple(gallery.shape)} must be [Q, D] and [N, D]")
    check_ks(ks)
    device = torch.device(device)
    own = np.asarray(share_of_this_process(len(queries)), dtype=np.int64)
    bank = gallery.to(device)
    num_rows = max(1, entries_at_a_time // len(gallery))
    pieces = []
    for start in range(0, len(own), num_rows):
        rows = own[start : start + num_rows]
        similarities = queries[torch.from_numpy(rows)].to(device) @ bank.T
        order = similarities.sort(dim=1, descending=True, stable=True).indices
        ranked = torch.from_numpy(relevance(rows)).to(device).gather(1, order)
        pieces.append(_measure_chunk(order, ranked, ks))
    return _unpack(gather_shares(torch.cat(pieces), len(queries), device).numpy(), len(ks))


def measure_ranking(
    rows: IntArray, ranks: IntArray, num_queries: int, ks: Sequence[int]
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Measures queries from the ranks of what is relevant to them.

    Average precision is the area below the precision-recall curve by trapezia: each relevant image, the j-th at rank r,
    adds the mean of the precision before it, (j - 1) / (r - 1), which is 1 at rank 1, and with it, j / r. Precision
    at k looks no further than the last relevant image, so that few relevant images do not cap it below 1. Recall at k
    is the share of the relevant images that is among the first k, and is at most k / their number.

    Args:
        rows: ``[T]`` the query of each relevant image, ascending.
        ranks: ``[T]`` its rank from 1 without what is ignored, ascending for each query.
        num_queries: ``Q``.
        ks: at which precision and recall are measured.

    Returns:
        Average precision ``[Q]``, precision ``[Q, K]`` and recall ``[Q, K]``; NaN for queries without relevant images.

    Reference: Radenović et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking", section 3;
        Philbin et al., "Object retrieval with large vocabularies and fast spatial matching", section 4.
    """
    counts = np.bincount(rows, minlength=num_queries)
    first = np.cumsum(counts) - counts
    found = np.arange(len(rows)) - first[rows]  # relevant images before this one
    before = np.where(ranks == 1, 1.0, found / np.maximum(ranks - 1, 1))
    areas = np.bincount(rows, weights=(before + (found + 1) / ranks) / 2, minlength=num_queries)
    known = np.where(counts > 0, counts, np.nan)  # dividing by NaN marks queries that cannot be measured
    last = np.zeros(num_queries, dtype=np.int64)
    last[rows] = ranks  # of several values for one query the last one stays
    precision, recall = np.empty((num_queries, len(ks))), np.empty((num_queries, len(ks)))
    for column, k in enumerate(ks):
        hits = np.bincount(rows[ranks <= k], minlength=num_queries)
        precision[:, column] = hits / np.where(counts > 0, np.minimum(last, k), np.nan)
        recall[:, column] = hits / known
    return areas / known, precision, recall


def check_ks(ks: Sequence[int]) -> None:
    """Raises ValueError unless there are numbers, each at least 1 and none twice."""
    if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
        raise ValueError(f"ks must be one or more different numbers from 1 up, found {list(ks)}")


def _measure_chunk(order: Tensor, ranked: Tensor, ks: Sequence[int]) -> Tensor:
    """Measures rankings ``[q, N]`` and what they hold ``[q, N]``; one float64 row per query on the CPU."""
    ranks = (ranked != IGNORED).cumsum(dim=1)
    relevant = ranked == RELEVANT
    rows = relevant.nonzero()[:, 0].cpu().numpy()
    hit_ranks = ranks[relevant].cpu().numpy()
    measures = measure_ranking(rows, hit_ranks, len(order), ks)
    first_hit = np.zeros(len(order), dtype=np.int64)
    first_hit[rows[::-1]] = hit_ranks[::-1]
    wrong = (ranked == WRONG).to(torch.int8)
    place = wrong.argmax(dim=1, keepdim=True)  # the first of equal values
    best_wrong = torch.where(wrong.gather(1, place) == 1, order.gather(1, place), -1)[:, 0].cpu().numpy()
    return torch.from_numpy(np.column_stack([*measures, first_hit, best_wrong]))


def _unpack(values: FloatArray, num_ks: int) -> QueryMeasures:
    return QueryMeasures(
        average_precision=values[:, 0],
        precision=values[:, 1 : 1 + num_ks],
        recall=values[:, 1 + num_ks : 1 + 2 * num_ks],
        first_hit=values[:, -2].astype(np.int64),
        best_wrong=values[:, -1].astype(np.int64),
    )
