"""Descriptions of images for retrieval, their whitening, and how well each query ranks what belongs to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.eval.features import (
    FEATURES,
    ModelWithFeatures,
    ModelWithNormalize,
    check_has_patches,
    gather_shares,
    share_of_this_process,
)
from dinov2.eval.metrics.classification import Float64Array, IntArray

RETRIEVAL_FEATURES = (*FEATURES, "gem")
KINDS = ("pca", "learned")  # of whitening
WRONG, RELEVANT, IGNORED = 0, 1, 2
MIN_VARIANCE = 1e-10  # of the largest; directions below it vary by rounding
ENTRIES_AT_A_TIME = 4_000_000  # of the matrix queries x gallery; each takes about 30 bytes


@dataclass(frozen=True)
class QueryMeasures:
    """Measures of ``Q`` queries; a query to which nothing belongs has NaN.

    Ranks count from 1 over the gallery without what is ignored for the query.

    Attributes:
        average_precision: ``[Q]``.
        precision: ``[Q, K]`` at each k.
        recall: ``[Q, K]`` at each k.
        first_hit: ``[Q]`` rank of the first relevant image, 0 where there is none.
        best_wrong: ``[Q]`` gallery position of the wrong image with the best rank, -1 where none is wrong.
    """

    average_precision: Float64Array
    precision: Float64Array
    recall: Float64Array
    first_hit: IntArray
    best_wrong: IntArray

    def select(self, rows: IntArray) -> "QueryMeasures":
        """Those of some queries."""
        return QueryMeasures(*(getattr(self, field.name)[rows] for field in fields(self)))

    def values(self, ks: Sequence[int]) -> Float64Array:
        """One row per query, with the columns of `measure_names`."""
        hit = (self.first_hit[:, None] > 0) & (self.first_hit[:, None] <= np.asarray(ks))
        return np.column_stack([self.average_precision, self.precision, self.recall, hit])


def measure_names(ks: Sequence[int]) -> list[str]:
    """Names of what is measured of a ranking.

    ``map`` and ``recall@k`` are those of the revisited benchmarks, see `measure_ranking`: the area by trapezia and the
    share of the relevant images that is found. ``hit@k`` is what metric learning calls Recall@k: whether any of the k
    nearest is relevant.

    Reference: Jégou et al., "Product Quantization for Nearest Neighbor Search", section V; Oh Song et al., "Deep Metric
        Learning via Lifted Structured Feature Embedding", section 5.
    """
    return ["map", *(f"{name}@{k}" for name in ("mp", "recall", "hit") for k in ks)]


def expected_values(relevant: IntArray, candidates: IntArray, ks: Sequence[int]) -> Float64Array:
    """What a ranking in random order gives on average, exactly.

    Args:
        relevant: ``[Q]`` how many images are relevant to each query, at least one.
        candidates: ``[Q]`` how many are ranked.
        ks: see `measure_ranking`.

    Returns:
        One row per query, with the columns of `measure_names`.
    """
    pairs, inverse = np.unique(np.stack([relevant, candidates], axis=1), axis=0, return_inverse=True)
    return np.array([_expected(int(found), int(ranked), ks) for found, ranked in pairs])[inverse.reshape(-1)]


def _expected(relevant: int, candidates: int, ks: Sequence[int]) -> list[float]:
    """`expected_values` of one query."""
    rest = np.arange(2, candidates + 1)
    share = (relevant - 1) / max(candidates - 1, 1)  # of the others that are relevant, given one
    # Precision before a relevant image at rank r, and with it; at rank 1 both are 1.
    area = (1 + float(((share + ((rest - 1) * share + 1) / rest) / 2).sum())) / candidates
    precision, recall, hit = [], [], []
    for k in (min(k, candidates) for k in ks):
        last = np.arange(relevant, k + 1)  # ranks at which all may be found
        all_found = np.exp(_log_comb(last - 1, relevant - 1) - _log_comb(candidates, relevant))
        precision.append(relevant / candidates + float((all_found * (relevant / last - relevant / k)).sum()))
        recall.append(k / candidates)
        none = candidates >= relevant + k
        missed = np.exp(_log_comb(max(candidates - relevant, k), k) - _log_comb(candidates, k))
        hit.append(1 - none * float(missed))
    return [area, *precision, *recall, *hit]


def _log_comb(items: float | IntArray, chosen: float) -> Float64Array:
    """Logarithm of how many ways there are to choose so many of the items."""
    counts = np.asarray(items, dtype=np.float64)
    numbers = (counts + 1, np.full_like(counts, chosen + 1), counts - chosen + 1)
    whole, inside, outside = (torch.as_tensor(number).lgamma().numpy() for number in numbers)
    return np.asarray(whole - inside - outside)


def count_relevant(
    relevance: Callable[[IntArray], npt.NDArray[np.int8]], num_queries: int, num_gallery: int
) -> tuple[IntArray, IntArray]:
    """How many images are relevant to each query, and how many are ranked: ``[Q]`` each."""
    num_rows = max(1, ENTRIES_AT_A_TIME // num_gallery)
    relevant, candidates = np.zeros(num_queries, np.int64), np.zeros(num_queries, np.int64)
    for start in range(0, num_queries, num_rows):
        rows = np.arange(start, min(start + num_rows, num_queries))
        kinds = relevance(rows)
        relevant[rows], candidates[rows] = (kinds == RELEVANT).sum(axis=1), (kinds != IGNORED).sum(axis=1)
    return relevant, candidates


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
        relevant = ranked == RELEVANT
        chunk_rows = relevant.nonzero()[:, 0].cpu().numpy()
        hit_ranks = (ranked != IGNORED).cumsum(dim=1)[relevant].cpu().numpy()
        first_hit = np.zeros(len(order), dtype=np.int64)
        first_hit[chunk_rows[::-1]] = hit_ranks[::-1]
        wrong = (ranked == WRONG).to(torch.int8)
        place = wrong.argmax(dim=1, keepdim=True)  # the first of equal values
        best_wrong = torch.where(wrong.gather(1, place) == 1, order.gather(1, place), -1)[:, 0].cpu().numpy()
        measured = measure_ranking(chunk_rows, hit_ranks, len(order), ks)
        pieces.append(torch.from_numpy(np.column_stack([*measured, first_hit, best_wrong])))
    values = gather_shares(torch.cat(pieces), len(queries), device).numpy()
    return QueryMeasures(
        average_precision=values[:, 0],
        precision=values[:, 1 : 1 + len(ks)],
        recall=values[:, 1 + len(ks) : 1 + 2 * len(ks)],
        first_hit=values[:, -2].astype(np.int64),
        best_wrong=values[:, -1].astype(np.int64),
    )


def measure_ranking(
    rows: IntArray, ranks: IntArray, num_queries: int, ks: Sequence[int]
) -> tuple[Float64Array, Float64Array, Float64Array]:
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


def generalized_mean(tokens: Tensor, power: float) -> Tensor:
    """Generalised mean over tokens ``[B, N, D]``, from the mean (1) towards the value farthest from zero (large).

    Published for values that are not negative. Normed patch tokens have signs, so each value keeps its own when it is
    raised to the power, and the mean its own under the root; at an odd power that is the published formula.

    Args:
        tokens: ``[B, N, D]``.
        power: above 0.

    Returns:
        ``[B, D]`` float32.

    Reference: Radenović et al., "Fine-tuning CNN Image Retrieval with no Human Annotation", section 3.2.
    """
    tokens = tokens.float()
    if power == 1:
        return tokens.mean(dim=1)
    # In units of the largest value, whose power then cannot overflow.
    largest = tokens.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    shares = tokens / largest
    mean = (shares.sign() * shares.abs() ** power).mean(dim=1)
    return mean.sign() * mean.abs() ** (1 / power) * largest[:, 0]


class _ModelWithGeneralizedMean(nn.Module):
    """A vision transformer whose output is the `generalized_mean` of its normed patch tokens."""

    def __init__(self, model: nn.Module, power: float) -> None:
        super().__init__()
        if not power > 0:
            raise ValueError(f"the power of the generalised mean must be above 0, found {power}")
        check_has_patches(model, "gem")
        self.model = model
        self.power = power

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to ``[B, D]``."""
        return generalized_mean(self.model(images, is_training=True)["x_norm_patchtokens"], self.power)


class ModelWithScales(nn.Module):
    """A model whose output is the sum of its features of several sizes of an image, again of unit length.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]`` of unit length.
        scales: factors of height and width.
        patch_size: height and width to whose nearest multiple a scaled image is brought (at least one).

    Raises:
        ValueError: for no scale, one that is not above 0, or the same one twice.
    """

    def __init__(self, model: nn.Module, scales: Sequence[float], patch_size: tuple[int, int]) -> None:
        super().__init__()
        if not scales or not min(scales) > 0 or len(set(scales)) != len(scales):
            raise ValueError(f"scales must be one or more different factors above 0, found {list(scales)}")
        self.model = model
        self.scales = tuple(scales)
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to ``[B, D]`` of unit length."""
        features: Tensor = sum(self.model(self._scaled(images, scale)) for scale in self.scales)
        return F.normalize(features, dim=1)

    def _scaled(self, images: Tensor, scale: float) -> Tensor:
        height, width = images.shape[-2:]
        size = round_to_patches((height * scale, width * scale), self.patch_size)
        if scale == 1 or size == (height, width):
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def round_to_patches(size: tuple[float, float], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Nearest height and width in whole patches, at least one each."""
    height, width = (max(round(side / patch), 1) * patch for side, patch in zip(size, patch_size, strict=True))
    return height, width


def patch_size_of(model: nn.Module) -> tuple[int, int]:
    """Height and width of the patches of a vision transformer; 1 and 1 for another network, which takes any size."""
    height, width = getattr(model, "patch_size", (1, 1))
    return height, width


def describe_images(
    model: nn.Module,
    features: str = "cls",
    *,
    gem_power: float = 3.0,
    scales: Sequence[float] = (1.0,),
) -> nn.Module:
    """Wraps a backbone so that it maps images ``[B, 3, H, W]`` to descriptions ``[B, D]`` of unit length.

    Args:
        model: a vision transformer; only ``cls`` works with any network that maps images to ``[B, D]``.
        features: those of `ModelWithFeatures`, or ``gem`` (see `generalized_mean`).
        gem_power: of ``gem``.
        scales: see `ModelWithScales`.

    Raises:
        ValueError: for unknown features, or settings out of range.
    """
    if features not in RETRIEVAL_FEATURES:
        raise ValueError(f"features {features!r} is not one of {', '.join(RETRIEVAL_FEATURES)}")
    pooled = _ModelWithGeneralizedMean(model, gem_power) if features == "gem" else ModelWithFeatures(model, features)
    return ModelWithScales(ModelWithNormalize(pooled), scales, patch_size_of(model))


@dataclass(frozen=True)
class Whitening:
    """An affine map of features.

    Attributes:
        mean: ``[D]`` float64.
        projection: ``[D, E]`` float64, columns by falling importance.
    """

    mean: Tensor
    projection: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Maps ``[N, D]`` to ``[N, E]`` float32 of unit length."""
        return F.normalize((features.double() - self.mean) @ self.projection, dim=1).float()


def fit_whitening(
    features: Tensor, group_ids: Sequence[str], *, kind: str = "pca", dim: int | None = None
) -> Whitening:
    """Fits one of the two kinds of whitening.

    Args:
        features: ``[N, D]`` on the CPU, finite.
        group_ids: the part of every row; only ``learned`` looks at it.
        kind: ``pca`` or ``learned``.
        dim: width of the result; None for all that the features allow.

    Raises:
        ValueError: for an unknown kind, too few images or parts, or a width that the features do not allow.
    """
    if kind not in KINDS:
        raise ValueError(f"whitening kind {kind!r} is not one of {', '.join(KINDS)}")
    return (
        fit_pca_whitening(features, dim=dim) if kind == "pca" else fit_learned_whitening(features, group_ids, dim=dim)
    )


def fit_pca_whitening(features: Tensor, *, dim: int | None = None) -> Whitening:
    """Principal components, each divided by its standard deviation: the fitted features get the unit covariance.

    Directions in which the features do not vary are left out; N images span at most N - 1.

    Args:
        features: ``[N, D]`` on the CPU, finite.
        dim: how many components are kept, those of the largest variance.

    Raises:
        ValueError: for fewer than two different images, or more components than there are.

    Reference: Jégou and Chum, "Negative evidences and co-occurences in image retrieval: the benefit of PCA and
        whitening", section 3.
    """
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / max(len(features) - 1, 1))  # rising
    rank = int((variances > MIN_VARIANCE * features.square().sum(dim=1).mean()).sum())
    variances, directions = variances.flip(0)[:rank], directions.flip(1)[:, :rank]
    dim = _check_dim(dim, len(variances), len(features))
    return Whitening(mean, directions[:, :dim] / variances[:dim].sqrt())


def fit_learned_whitening(features: Tensor, group_ids: Sequence[str], *, dim: int | None = None) -> Whitening:
    """Whitens the differences between images of one part, and puts first the directions in which parts differ most.

    What varies between images of one part, such as exposure, is thereby scaled down. The covariance of these
    differences is taken after whitening by principal components, and shrunk there towards a multiple of the unit: by
    the share that Ledoit and Wolf estimate, and at least by one in as many differences as there are. The fewer images
    there are, the closer the result is to that of `fit_pca_whitening`.

    Args:
        features: ``[N, D]`` on the CPU, finite.
        group_ids: the part of every row; parts of one image say nothing about differences within a part.
        dim: how many directions are kept.

    Raises:
        ValueError: when no part has two images, the images of each part are alike, or more directions are wanted than
            there are.

    Reference: Mikolajczyk and Matas, "Improving descriptors for fast tree matching by optimal linear projection";
        Radenović et al., "Fine-tuning CNN Image Retrieval with no Human Annotation", section 3.4.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage, shrunk_covariance  # takes a second to import

    principal = fit_pca_whitening(features)
    dim = _check_dim(dim, principal.projection.shape[1], len(features))
    whitened = (features.double() - principal.mean) @ principal.projection
    differences, num_free = _differences_within_parts(whitened, group_ids)
    shrinkage = max(float(ledoit_wolf_shrinkage(differences.numpy(), assume_centered=True)), 1 / (1 + num_free))
    covariance = shrunk_covariance((differences.T @ differences / num_free).numpy(), shrinkage)
    # Images in general have variance 1 everywhere, so parts differ most where their own images differ least: first.
    variances, directions = torch.linalg.eigh(torch.from_numpy(covariance))
    return Whitening(principal.mean, principal.projection @ (directions / variances.sqrt())[:, :dim])


def _differences_within_parts(features: Tensor, group_ids: Sequence[str]) -> tuple[Tensor, int]:
    """Rows less the mean of their part, where it has several, and how many of these are free."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(group_ids))}
    parts = torch.tensor([numbers[name] for name in group_ids])
    counts = parts.bincount()
    several = counts > 1
    if not several.any():
        raise ValueError("learned whitening needs parts of several images, and no part of its set has two")
    means = torch.zeros(len(counts), features.shape[1], dtype=features.dtype).index_add_(0, parts, features)
    differences = (features - (means / counts[:, None])[parts])[several[parts]]
    if not differences.square().sum() > MIN_VARIANCE * features.square().sum():
        raise ValueError("learned whitening needs images that differ, and those of each part of its set are alike")
    return differences, int((counts - 1).sum())


def _check_dim(dim: int | None, largest: int, num_images: int) -> int:
    if largest < 1:
        raise ValueError(f"whitening needs images that differ, and the features of all {num_images} are equal")
    if dim is not None and not 1 <= dim <= largest:
        raise ValueError(f"whitening to {dim} directions is not possible: {num_images} images give 1 to {largest}")
    return largest if dim is None else dim
