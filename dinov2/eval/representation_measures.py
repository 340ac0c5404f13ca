"""Measures of features that need no labels: how many directions they use, and how alike images and patches are."""

import torch
import torch.nn.functional as F
from torch import Tensor


def effective_rank(features: Tensor) -> float:
    """How many directions a set of features uses: exp of the entropy of its normalised singular values (RankMe).

    Args:
        features: ``[N, D]``, any floating dtype; neither centred nor normalised here.

    Returns:
        From 1, where all rows are multiples of one, to ``min(N, D)``, where all directions weigh the same; 0 where all
        features are 0, NaN where one is not finite.

    Raises:
        ValueError: the features are no matrix, or hold no row or column.

    Reference:
        Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by
        Their Rank" (2023), equation 1.
    """
    if features.ndim != 2 or features.numel() == 0:
        raise ValueError(f"features must be a matrix [N, D] that is not empty, found {list(features.shape)}")
    if not features.isfinite().all():
        return float("nan")
    values = torch.linalg.svdvals(features.double().cpu())
    total = values.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(values / total).sum().exp())


def mean_cosine_similarity(features: Tensor) -> Tensor:
    """Mean cosine between different rows of ``[..., N, D]``: 1 where all point one way, about 0 where they spread.

    Computed from the sum of the unit rows, without a matrix of pairs; a row of zeros has cosine 0 to all others.

    Returns:
        ``[...]`` float32 or wider.

    Raises:
        ValueError: there are fewer than two rows.
    """
    num_rows = features.shape[-2]
    if num_rows < 2:
        raise ValueError(f"similarity between rows needs two of them, found {num_rows}")
    unit = _unit_rows(features)
    pairs = unit.sum(dim=-2).square().sum(dim=-1) - unit.square().sum(dim=(-2, -1))
    return pairs / (num_rows * (num_rows - 1))


def match_rate(first: Tensor, second: Tensor) -> Tensor:
    """Share of the images whose first view is most like their own second view, among all second views.

    By cosine, after the mean of both views is taken away: what all images share tells none of them apart.

    Args:
        first: one view of every image, ``[N, D]``.
        second: another view of the same images, in the same order.

    Returns:
        A float32 scalar; ``1 / N`` is chance, 1 tells every image.

    Raises:
        ValueError: the shapes differ, or there are fewer than two images.
    """
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(
            f"two views of at least two images are compared, found {list(first.shape)} and {list(second.shape)}"
        )
    mean = (first.float().mean(dim=0) + second.float().mean(dim=0)) / 2
    similarities = _unit_rows(first - mean) @ _unit_rows(second - mean).T
    return (similarities.argmax(dim=1) == torch.arange(len(first), device=first.device)).float().mean()


def patch_similarities(patches: Tensor) -> Tensor:
    """Cosine between all pairs of an image's patches: ``[B, N, D]`` -> ``[B, N, N]``, float32 or wider.

    It tells which places of an image look alike to the model, in a form that does not depend on the axes of the
    feature space, so that two models, or two moments of training, can be compared.
    """
    unit = _unit_rows(patches)
    return unit @ unit.transpose(-2, -1)


def similarity_drift(similarities: Tensor, reference: Tensor) -> float:
    """Mean absolute difference between two sets of patch similarities ``[B, N, N]``, over different patches: 0 to 2.

    Raises:
        ValueError: the shapes differ, or there are no two patches to compare.
    """
    if similarities.shape != reference.shape:
        raise ValueError(
            f"similarities and reference must have one shape, found {list(similarities.shape)} "
            f"and {list(reference.shape)}"
        )
    batch, num_patches, _ = similarities.shape
    if batch == 0 or num_patches < 2:
        raise ValueError(f"drift needs an image with two patches, found shape {list(similarities.shape)}")
    different = (similarities.double() - reference.double()).abs()
    # The diagonal, every patch with itself, is 1 in both.
    return float(different.sum() / (batch * num_patches * (num_patches - 1)))


def _unit_rows(rows: Tensor) -> Tensor:
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
