"""Rankings against their slow definition; descriptions of images; whitening."""

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from eval_stand_ins import tiny_transformer
from sklearn.decomposition import PCA
from slow_retrieval import slowly
from torch import Tensor, nn

from dinov2.eval.retrieval.ranking import (
    IGNORED,
    RELEVANT,
    RETRIEVAL_FEATURES,
    WRONG,
    ModelWithScales,
    QueryMeasures,
    Whitening,
    describe_images,
    expected_values,
    fit_learned_whitening,
    fit_pca_whitening,
    fit_whitening,
    generalized_mean,
    measure_names,
    measure_retrieval,
    patch_size_of,
    round_to_patches,
)
from dinov2.models.vision_transformer import DinoVisionTransformer

KS = (1, 5, 10)
R, W, J = RELEVANT, WRONG, IGNORED


def assert_as_slow(found: QueryMeasures, similarities: npt.NDArray[np.float64], kinds: npt.NDArray[np.int8]) -> None:
    rows = [slowly(list(row), list(of), KS) for row, of in zip(similarities, kinds, strict=True)]
    expected = [np.array([row[place] for row in rows]) for place in range(5)]
    np.testing.assert_allclose(found.average_precision, expected[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.precision, expected[1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.recall, expected[2], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.first_hit, expected[3])
    np.testing.assert_array_equal(found.best_wrong, expected[4])


def lookup(kinds: npt.NDArray[np.int8]) -> Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int8]]:
    return lambda rows: kinds[rows]


def measure(similarities: npt.NDArray[np.float64], kinds: npt.NDArray[np.int8], **arguments: int) -> QueryMeasures:
    """Measures given similarities: the gallery are the unit vectors, so inner products are exact."""
    gallery = torch.eye(similarities.shape[1])
    return measure_retrieval(torch.from_numpy(similarities).float(), gallery, lookup(kinds), KS, **arguments)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("num_levels", [2, 5, 1000])
def test_random_rankings_with_ties_and_junk(seed: int, num_levels: int) -> None:
    generator = np.random.default_rng(seed)
    num_queries, num_gallery = 23, int(generator.integers(1, 60))
    similarities = generator.integers(-num_levels, num_levels, (num_queries, num_gallery)).astype(np.float64)
    shares = generator.dirichlet([1, 1, 1], num_queries)  # also queries with hardly anything relevant, or all of it
    kinds = np.stack([generator.choice([W, R, J], num_gallery, p=share) for share in shares]).astype(np.int8)
    kinds[0], kinds[1], kinds[2] = W, R, J
    entries = int(generator.integers(1, 5 * num_gallery))
    assert_as_slow(measure(similarities, kinds, entries_at_a_time=entries), similarities, kinds)


def test_zeros_of_both_signs_rank_in_the_order_of_the_gallery() -> None:
    assert measure(np.array([[-0.0, 0.0]]), np.array([[R, W]], dtype=np.int8)).first_hit.tolist() == [1]


def test_memory_is_bounded_by_the_entries_at_a_time() -> None:
    asked: list[int] = []

    def relevance(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        asked.extend([len(rows)])
        return np.ones((len(rows), 50), dtype=np.int8)

    measure_retrieval(torch.randn(21, 4), torch.randn(50, 4), relevance, KS, entries_at_a_time=420)
    assert asked == [8, 8, 5]


@pytest.mark.parametrize(
    ("queries", "gallery", "ks", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(2, 3), (1,), r"queries \(0, 3\) and gallery \(2, 3\)"),
        (torch.zeros(2, 3), torch.zeros(0, 3), (1,), r"gallery \(0, 3\)"),
        (torch.zeros(2, 3), torch.zeros(2, 4), (1,), r"must be \[Q, D\] and \[N, D\]"),
        (torch.zeros(2, 3), torch.zeros(2, 3), (), "ks must be one or more different numbers from 1 up"),
        (torch.zeros(2, 3), torch.zeros(2, 3), (0, 1), "ks must be"),
        (torch.zeros(2, 3), torch.zeros(2, 3), (5, 5), "ks must be"),
    ],
)
def test_bad_input(queries: torch.Tensor, gallery: torch.Tensor, ks: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_retrieval(queries, gallery, lookup(np.zeros((2, 2), dtype=np.int8)), ks)


@pytest.fixture(scope="module")
def backbone() -> DinoVisionTransformer:
    return tiny_transformer()


def images(height: int = 28, width: int = 42) -> Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_the_generalised_mean_is_the_published_formula() -> None:
    tokens = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for power in (1.0, 1.0 + 1e-6):
        torch.testing.assert_close(generalized_mean(tokens, power), tokens.mean(dim=1).float(), atol=1e-4, rtol=1e-4)
    cubes = (tokens**3).mean(dim=1).float()
    torch.testing.assert_close(generalized_mean(tokens, 3.0) ** 3, cubes, rtol=1e-4, atol=1e-5)
    positive = tokens.abs()
    torch.testing.assert_close(generalized_mean(positive, 2.5), (positive**2.5).mean(dim=1).pow(1 / 2.5).float())
    few = torch.tensor([[[1.0, 2.0], [0.5, -8.0], [-0.2, 3.0]]])  # a large power: the value farthest from zero
    torch.testing.assert_close(generalized_mean(few, 400.0), torch.tensor([[1.0, -8.0]]), rtol=0.01, atol=0)


def test_generalized_mean_follows_scale_and_sign_and_never_overflows() -> None:
    tokens = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = generalized_mean(tokens, 3.0)
    torch.testing.assert_close(generalized_mean(tokens * 1e30, 3.0), expected * 1e30)
    torch.testing.assert_close(generalized_mean(-tokens, 3.0), -expected)
    assert generalized_mean(torch.zeros(1, 3, 2), 3.0).tolist() == [[0.0, 0.0]]
    assert generalized_mean(tokens.clamp(-1, 1).half() * 60_000, 3.0).isfinite().all()


@pytest.mark.parametrize("features", RETRIEVAL_FEATURES)
def test_descriptions_have_unit_length_and_come_from_the_named_tokens(
    backbone: DinoVisionTransformer, features: str
) -> None:
    found = describe_images(backbone, features, gem_power=2.0)(images())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    tokens = backbone(images(), is_training=True)
    patches = tokens["x_norm_patchtokens"]
    assert patches.shape[1] == 6
    expected = {
        "cls": tokens["x_norm_clstoken"],
        "patch_mean": patches.mean(dim=1),
        "gem": generalized_mean(patches, 2.0),
    }
    if features in expected:
        torch.testing.assert_close(found, nn.functional.normalize(expected[features], dim=1))


def test_scales_are_summed_and_normalised(backbone: DinoVisionTransformer) -> None:
    scales = (1.0, 0.5, 1.4142)
    found = describe_images(backbone, scales=scales)(images(56, 28))
    sizes = [(56, 28), (28, 14), (84, 42)]  # 79.2 x 39.6 comes to whole patches
    single = describe_images(backbone)
    parts = []
    for size in sizes:
        scaled = images(56, 28)
        if size != (56, 28):
            scaled = nn.functional.interpolate(scaled, size=size, mode="bilinear", antialias=True)
        parts.append(single(scaled))
    torch.testing.assert_close(found, nn.functional.normalize(torch.stack(parts).sum(dim=0), dim=1))
    assert (found - parts[0]).abs().max() > 1e-3
    assert round_to_patches((3, 40), (14, 16)) == (14, 32)  # 2.5 patches: to the even number


def test_a_plain_network_is_scaled_to_whole_pixels() -> None:
    seen = []

    class Network(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            seen.append(tuple(batch.shape[-2:]))
            return nn.functional.normalize(batch.mean(dim=(2, 3)), dim=1)

    ModelWithScales(Network(), (1.0, 0.7071, 0.01), patch_size_of(Network()))(images(30, 20))
    assert seen == [(30, 20), (21, 14), (1, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"features": "max"},
            "features 'max' is not one of cls, patch_mean, cls_patch_mean, cls_patch_statistics, gem",
        ),
        ({"features": "gem", "gem_power": 0.0}, "power of the generalised mean must be above 0"),
        ({"scales": ()}, "scales must be one or more different factors above 0"),
        ({"scales": (1.0, 0.0)}, "scales must be"),
        ({"scales": (1.0, 1.0)}, "scales must be"),
        ({"scales": (float("nan"),)}, "scales must be"),
    ],
)
def test_bad_settings(backbone: DinoVisionTransformer, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_images(backbone, **arguments)


def correlated(num_rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(num_rows, width, generator=generator) @ mixing + 3


def unnormalised(whitening: Whitening, features: torch.Tensor) -> torch.Tensor:
    return (features.double() - whitening.mean) @ whitening.projection


@pytest.mark.parametrize("dim", [3, 5])
def test_pca_whitening_is_that_of_scikit_learn(dim: int) -> None:
    features = correlated(80, 5)
    found = unnormalised(fit_pca_whitening(features, dim=dim), correlated(10, 5, seed=1)).numpy()
    expected = (
        PCA(dim, whiten=True).fit(features.double().numpy()).transform(correlated(10, 5, seed=1).double().numpy())
    )
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-8, atol=1e-10)  # signs are free


def test_fewer_images_than_width_give_one_direction_less_than_images() -> None:
    features = F.normalize(torch.randn(5, 300), dim=1)
    whitening = fit_pca_whitening(features)
    assert whitening.projection.shape == (300, 4)
    assert fit_pca_whitening(features.repeat(3, 1)).projection.shape == (300, 4)  # copies add nothing
    assert whitening(features).isfinite().all()
    assert whitening(features).dtype == torch.float32
    torch.testing.assert_close(whitening(features).norm(dim=1), torch.ones(5))


def parts_under_exposure(num_parts: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Four images of each part: parts differ a little in 6 directions, exposures of a part much in 2 of them."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(num_parts, 6, generator=generator).repeat_interleave(4, dim=0)
    exposure = torch.randn(4 * num_parts, 6, generator=generator) * torch.tensor([20.0, 20.0, 0.2, 0.2, 0.2, 0.2])
    return parts + exposure, [f"part {number // 4}" for number in range(4 * num_parts)]


def test_learned_whitening_gives_differences_within_parts_the_unit_covariance() -> None:
    features, groups = parts_under_exposure(2000)
    whitened = unnormalised(fit_learned_whitening(features, groups), features).reshape(2000, 4, 6)
    differences = (whitened - whitened.mean(dim=1, keepdim=True)).flatten(0, 1)
    covariance = differences.T @ differences / (3 * 2000)
    torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), atol=0.05, rtol=0)
    spread = whitened.flatten(0, 1).T.cov()
    torch.testing.assert_close(spread, spread.diagonal().diag(), atol=1e-6, rtol=0)  # turned to its components
    assert (spread.diagonal().diff() <= 1e-9).all()


@pytest.mark.parametrize(("width", "groups", "limit"), [(50, "aabb", 10), (4, "aabcd", 20)])
def test_learned_whitening_of_very_few_images_stays_bounded(width: int, groups: str, limit: float) -> None:
    """Seen once, a direction is not trusted to be all there is."""
    features = F.normalize(torch.randn(len(groups), width, generator=torch.Generator().manual_seed(0)), dim=1)
    whitening = fit_learned_whitening(features, list(groups))
    assert whitening(features).isfinite().all()
    stretch = torch.linalg.svdvals(whitening.projection)
    assert stretch.max() / stretch.min() < limit


def test_learned_whitening_without_a_common_difference_is_that_of_principal_components() -> None:
    generator = torch.Generator().manual_seed(0)
    features = correlated(4000, 4)
    groups = [str(number) for number in torch.randint(0, 1500, (4000,), generator=generator).tolist()]
    learned, plain = fit_learned_whitening(features, groups)(features), fit_pca_whitening(features)(features)
    torch.testing.assert_close(learned[:50] @ learned.T, plain[:50] @ plain.T, atol=0.1, rtol=0)


def test_order_of_the_rows_does_not_matter() -> None:
    features, groups = parts_under_exposure(10)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    one = fit_learned_whitening(features, groups)(features)
    other = fit_learned_whitening(features[order], [groups[row] for row in order])(features)
    torch.testing.assert_close(one @ one.T, other @ other.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("features", "groups", "arguments", "message"),
    [
        (torch.randn(4, 3), "abcd", {"kind": "zca"}, "whitening kind 'zca' is not one of pca, learned"),
        (torch.randn(1, 3), "a", {}, "whitening needs images that differ, and the features of all 1 are equal"),
        (torch.ones(5, 3), "aabbc", {}, "needs images that differ"),
        (torch.randn(3, 9), "abc", {"dim": 3}, "whitening to 3 directions is not possible: 3 images give 1 to 2"),
        (torch.randn(3, 9), "abc", {"dim": 0}, "whitening to 0 directions"),
        (torch.randn(3, 9), "abc", {"kind": "learned"}, "no part of its set has two"),
        (torch.eye(3)[[0, 0, 1]], "aab", {"kind": "learned"}, "those of each part of its set are alike"),
    ],
)
def test_bad_input_of_whitening(
    features: torch.Tensor, groups: str, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_whitening(features, list(groups), **arguments)


@pytest.mark.parametrize(("relevant", "candidates"), [(1, 1), (1, 6), (3, 6), (5, 6), (2, 7), (4, 4)])
def test_expected_values_are_the_means_over_all_orders(relevant: int, candidates: int) -> None:
    ks = (1, 2, 5, 9)
    every = []
    for places in itertools.combinations(range(candidates), relevant):
        kinds = [RELEVANT if place in places else WRONG for place in range(candidates)]
        area, precision, recall, first, _ = slowly([float(-place) for place in range(candidates)], kinds, ks)
        every.append([area, *precision, *recall, *(first <= k for k in ks)])
    found = expected_values(np.array([relevant, relevant]), np.array([candidates, candidates]), ks)
    np.testing.assert_allclose(found, [np.mean(every, axis=0)] * 2)
    assert len(measure_names(ks)) == found.shape[1]
