"""Few rows that lie near all rows: the greedy k-centre coreset."""

import torch
from torch import Tensor

BLOCK_ROWS = 4096  # the largest block in which centres are chosen
REFRESHED_ROWS = 1024  # rows whose bounds are brought up to date together; they should be equally old
REFRESHED_CENTRES = 256  # with which they are compared together
SAME = 1e-6  # squared distances below this share of the largest squared length are rounding


def greedy_coreset(
    features: Tensor,
    num_centres: int,
    *,
    known: Tensor | None = None,
    radius: float = 0.0,
    projection: int | None = None,
    seed: int = 0,
    block_rows: int = BLOCK_ROWS,
) -> tuple[Tensor, float]:
    """Chooses rows one by one, each the one that lies farthest from all chosen so far.

    The choice is that of the plain greedy algorithm (but for rounding, and for the order of rows that lie equally far),
    which would read all rows once for every centre. Distances to the nearest centre only fall, so a distance that is
    out of date is an upper bound: centres are chosen inside a block of the rows with the largest bounds for as long as
    the farthest of them lies farther than any bound outside. Then bounds of the next block are brought up to date, by
    products of matrices. Beside the features, 16 bytes per row are needed, and the block.

    Args:
        features: ``[N, D]`` float32, on the device that shall compute.
        num_centres: how many at most; fewer where all rows lie within ``radius`` of those.
        known: ``[K, D]``, centres that there are already. Without, the row farthest from the mean is the first.
        radius: distance within which a row needs no centre of its own.
        projection: compares random projections to so many dimensions, which is faster and nearly the same; None
            compares the rows themselves.
        seed: of the projection.
        block_rows: rows of the largest block; changes nothing but speed.

    Returns:
        Positions of the centres ``[k]`` int64 on the CPU in the order of their choice, and the largest distance of a
        row to its nearest centre (as it was compared).

    Raises:
        ValueError: for features of another shape, no rows, or numbers below 1.

    Reference:
        Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, section 3.2.
    """
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features must be [N, D] with at least one row, found {list(features.shape)}")
    if min(num_centres, block_rows) < 1 or (projection is not None and projection < 1):
        raise ValueError(
            f"centres, block rows and dimensions must be at least 1, found {num_centres}, {block_rows}, {projection}"
        )
    with torch.no_grad():
        if projection is not None and projection < features.shape[1]:
            generator = torch.Generator().manual_seed(seed)
            directions = torch.randn(features.shape[1], projection, generator=generator) / projection**0.5
            directions = directions.to(features.device)
            features = torch.cat([rows @ directions for rows in features.split(BLOCK_ROWS)])
            known = None if known is None else known.to(directions) @ directions
        return _Greedy(features, known).choose(num_centres, radius, block_rows)


class _Greedy:
    """Rows, centres, and an upper bound of every row's distance to its nearest centre."""

    def __init__(self, features: Tensor, known: Tensor | None) -> None:
        self.features = features
        self.lengths = torch.cat([rows.square().sum(dim=1) for rows in features.split(BLOCK_ROWS)])  # squared
        self.same = SAME * float(self.lengths.max())
        self.bounds = torch.full_like(self.lengths, torch.inf)  # squared
        self.centres = torch.empty(0, features.shape[1], device=features.device)
        self.half_lengths = torch.empty(0, device=features.device)  # squared, of the centres
        self.num_centres = 0
        self.age = torch.zeros(len(features), dtype=torch.int64)  # centres that a bound knows
        self.chosen: list[int] = []
        if known is not None and len(known):
            self._append(known.to(features))
        else:
            mean = features.mean(dim=0, keepdim=True)
            far = torch.cat([(rows - mean).square().sum(dim=1) for rows in features.split(BLOCK_ROWS)])
            self._add(int(far.argmax()))
        self._refresh(torch.arange(len(features), device=features.device))

    def choose(self, num_centres: int, radius: float, block_rows: int) -> tuple[Tensor, float]:
        """Chooses until there are so many, or all rows lie within the radius; see `greedy_coreset`."""
        enough = radius**2 + self.same
        size = block_rows
        while True:
            rows, bounds, outside = self._farthest(size, block_rows)
            if not len(rows):  # bounds have fallen below those outside
                size *= 2
                continue
            size = block_rows
            block, lengths = self.features[rows], self.lengths[rows]
            while True:
                farthest = float(bounds.max())
                if farthest < outside:
                    break
                if len(self.chosen) >= num_centres or farthest <= enough:
                    return torch.tensor(self.chosen, dtype=torch.int64), max(farthest, 0.0) ** 0.5
                place = int(bounds.argmax())
                self._add(int(rows[place]))
                distances = torch.addmv(lengths + lengths[place], block, block[place], alpha=-2).clamp_(min=0)
                torch.minimum(bounds, distances, out=bounds)
                bounds[place] = 0.0
            self.bounds[rows] = bounds
            self.age[rows.cpu()] = self.num_centres

    def _farthest(self, size: int, most: int) -> tuple[Tensor, Tensor, float]:
        """The farthest rows, of ``size`` with the largest bounds brought up to date.

        Returns:
            Up to ``most`` rows, their distances, and a bound of all other rows, none of which lies farther than these.
        """
        size = min(size, len(self.bounds))
        largest, rows = self.bounds.topk(min(size + 1, len(self.bounds)))  # one more: the largest bound outside
        outside = float(largest[size]) if len(largest) > size else -torch.inf
        rows = rows[:size]
        self._refresh(rows)
        distances, order = self.bounds[rows].sort(descending=True, stable=True)
        if len(distances) > most:
            outside = max(outside, float(distances[most]))
        rows = rows[order[:most][distances[:most] >= outside]].sort().values
        return rows, self.bounds[rows], outside

    def _add(self, row: int) -> None:
        """Makes a row a centre; bounds know of it only after `_refresh`."""
        self._append(self.features[row : row + 1])
        self.chosen.append(row)

    def _append(self, centres: Tensor) -> None:
        end = self.num_centres + len(centres)
        if end > len(self.centres):
            more = max(1024, self.num_centres, len(centres))
            self.centres = torch.cat([self.centres, centres.new_empty(more, centres.shape[1])])
            self.half_lengths = torch.cat([self.half_lengths, centres.new_empty(more)])
        self.centres[self.num_centres : end] = centres
        self.half_lengths[self.num_centres : end] = centres.square().sum(dim=1) / 2
        self.num_centres = end

    def _refresh(self, rows: Tensor) -> None:
        """Compares rows ``[n]`` with the centres that their bounds do not know."""
        ages = self.age[rows.cpu()]
        order = ages.argsort(stable=True)
        for some in order.split(REFRESHED_ROWS):
            oldest = int(ages[some[0]])
            if oldest == self.num_centres:
                break
            own = rows[some.to(rows.device)]
            features, lengths, bounds = self.features[own], self.lengths[own], self.bounds[own]
            for start in range(oldest, self.num_centres, REFRESHED_CENTRES):  # similarities that stay in the cache
                known = slice(start, min(start + REFRESHED_CENTRES, self.num_centres))
                nearest = torch.addmm(self.half_lengths[known], features, self.centres[known].T, beta=-1).amax(dim=1)
                torch.minimum(bounds, (lengths - 2 * nearest).clamp_(min=0), out=bounds)
            self.bounds[own] = bounds
        self.age[rows.cpu()] = self.num_centres
