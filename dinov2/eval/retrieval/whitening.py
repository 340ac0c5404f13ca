"""Whitening of features, fitted on a set of its own: directions that vary everywhere say little about an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("pca", "learned")
LEAST_VARIANCE = 1e-10  # of the largest; directions below it vary by rounding


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
    mean, variances, directions = _components(features.double())
    dim = _check_dim(dim, len(variances), len(features))
    return Whitening(mean, directions[:, :dim] / variances[:dim].sqrt())


def fit_learned_whitening(features: Tensor, group_ids: Sequence[str], *, dim: int | None = None) -> Whitening:
    """Whitens the differences between photos of one part, and puts first the directions in which parts differ most.

    What varies between photos of one part, such as exposure, is thereby scaled down. The covariance of these
    differences is taken after whitening by principal components, and shrunk there towards a multiple of the unit: by
    the share that Ledoit and Wolf estimate, and at least by one in as many differences as there are. The fewer photos
    there are, the closer the result is to that of `fit_pca_whitening`.

    Args:
        features: ``[N, D]`` on the CPU, finite.
        group_ids: the part of every row; parts of one photo say nothing about differences within a part.
        dim: how many directions are kept.

    Raises:
        ValueError: when no part has two photos, the photos of each part are alike, or more directions are wanted than
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
    # Photos in general have variance 1 everywhere, so parts differ most where their own photos differ least: first.
    variances, directions = torch.linalg.eigh(torch.from_numpy(covariance))
    return Whitening(principal.mean, principal.projection @ (directions / variances.sqrt())[:, :dim])


def _differences_within_parts(features: Tensor, group_ids: Sequence[str]) -> tuple[Tensor, int]:
    """Rows of parts of several photos, less the mean of their part, and how many of these differences are free.

    Raises:
        ValueError: when there are none, or all are zero.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(group_ids))}
    parts = torch.tensor([numbers[name] for name in group_ids])
    counts = parts.bincount()
    several = counts > 1
    if not several.any():
        raise ValueError("learned whitening needs parts of several photos, and no part of its set has two")
    means = torch.zeros(len(counts), features.shape[1], dtype=features.dtype).index_add_(0, parts, features)
    differences = (features - (means / counts[:, None])[parts])[several[parts]]
    if not differences.square().sum() > LEAST_VARIANCE * features.square().sum():
        raise ValueError("learned whitening needs photos that differ, and those of each part of its set are alike")
    return differences, int((counts - 1).sum())


def _components(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[D]``, and the variances ``[R]`` (falling) and directions ``[D, R]`` in which the rows vary."""
    mean = features.mean(dim=0)
    centred = features - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / max(len(features) - 1, 1))  # rising
    variances, directions = variances.flip(0), directions.flip(1)
    rank = int((variances > LEAST_VARIANCE * features.square().sum(dim=1).mean()).sum())
    return mean, variances[:rank], directions[:, :rank]


def _check_dim(dim: int | None, largest: int, num_images: int) -> int:
    if largest < 1:
        raise ValueError(f"whitening needs images that differ, and the features of all {num_images} are equal")
    if dim is not None and not 1 <= dim <= largest:
        raise ValueError(f"whitening to {dim} directions is not possible: {num_images} images give 1 to {largest}")
    return largest if dim is None else dim
