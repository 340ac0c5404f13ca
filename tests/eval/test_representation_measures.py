"""Label-free measures against known spectra, slow definitions, and what must not change them."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.eval.representation_measures import (
    effective_rank,
    match_rate,
    mean_cosine_similarity,
    patch_similarities,
    similarity_drift,
)


def slow_rank(features: Tensor) -> float:
    """RankMe as published, in numpy, without its constant against 0."""
    values = np.linalg.svd(features.numpy().astype(np.float64), compute_uv=False)
    shares = values / np.abs(values).sum()
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (1, 5), (5, 1)])
def test_rank_is_that_of_the_definition_and_of_the_directions_alone(shape: tuple[int, int]) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert effective_rank(features) == pytest.approx(slow_rank(features), rel=1e-9)
    rotation = torch.linalg.qr(torch.randn(shape[1], shape[1], dtype=torch.float64)).Q
    assert effective_rank(-0.1 * features.flip(0) @ rotation) == pytest.approx(effective_rank(features), rel=1e-9)
    assert effective_rank(features.half()) == pytest.approx(effective_rank(features), rel=1e-2)
    assert 1 <= effective_rank(features) <= min(shape)


def test_rank_of_what_is_not_finite_or_no_matrix() -> None:
    assert effective_rank(torch.zeros(3, 2)) == 0
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.nan]])))
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.inf]])))
    for shape in ((0, 3), (3, 0), (3,), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"matrix \[N, D\] that is not empty, found"):
            effective_rank(torch.zeros(shape))


def test_mean_cosine_is_the_mean_over_all_pairs() -> None:
    rows = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(2))
    for batch, found in zip(rows, mean_cosine_similarity(rows), strict=True):
        cosines = [torch.cosine_similarity(batch[i], batch[j], dim=0) for i in range(6) for j in range(6) if i != j]
        torch.testing.assert_close(found, torch.stack(cosines).mean())
    assert mean_cosine_similarity(torch.eye(5)).item() == pytest.approx(0)
    assert mean_cosine_similarity(torch.arange(1.0, 9)[:, None] * torch.ones(3)).item() == pytest.approx(1)
    assert mean_cosine_similarity(torch.tensor([[1.0, 0], [-2.0, 0]])).item() == pytest.approx(-1)
    assert mean_cosine_similarity(torch.tensor([[1.0, 0], [0.0, 0]])).item() == 0
    with pytest.raises(ValueError, match="needs two of them, found 1"):
        mean_cosine_similarity(torch.ones(1, 3))
    rows = torch.ones(4096, 64).bfloat16()  # many nearly equal rows keep their digits in half precision
    assert mean_cosine_similarity(rows).item() == pytest.approx(1, abs=1e-4)


def test_patch_similarities_are_cosines_and_ignore_axes_and_lengths() -> None:
    patches = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
    found = patch_similarities(patches)
    for image in range(2):
        for i in range(5):
            expected = torch.cosine_similarity(patches[image, i], patches[image], dim=-1)
            torch.testing.assert_close(found[image, i], expected)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    lengths = torch.rand(2, 5, 1) + 0.5
    torch.testing.assert_close(patch_similarities(lengths * patches @ rotation), found)


def test_drift_is_zero_for_the_same_and_two_for_the_opposite() -> None:
    equal = torch.ones(3, 2, 2)
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).expand(3, 2, 2)
    assert similarity_drift(equal, equal) == 0
    assert similarity_drift(opposite, equal) == 2
    mixed = equal.clone()
    mixed[0] = opposite[0]
    assert similarity_drift(mixed, equal) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="must have one shape"):
        similarity_drift(equal, torch.ones(3, 4, 4))
    for shape in ((0, 4, 4), (2, 1, 1)):
        with pytest.raises(ValueError, match="an image with two patches"):
            similarity_drift(torch.ones(shape), torch.ones(shape))


def test_views_that_are_each_others_nearest_match_whatever_all_images_share() -> None:
    generator = torch.Generator().manual_seed(0)
    images, shared = torch.randn(8, 16, generator=generator), 100 * torch.randn(16, generator=generator)
    views = [images + 0.1 * torch.randn(8, 16, generator=generator) + shared for _ in range(2)]
    assert match_rate(*views) == 1
    assert match_rate(views[0], views[1].roll(1, dims=0)) == 0
    half = torch.cat([views[1][:4], views[1][4:].roll(1, dims=0)])
    assert match_rate(views[0].bfloat16(), half.bfloat16()) == 0.5
    with pytest.raises(ValueError, match=r"at least two images are compared, found \[1, 16\] and \[1, 16\]"):
        match_rate(views[0][:1], views[1][:1])
