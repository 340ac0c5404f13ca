import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

from dinov2.eval.retrieval.ranking import Whitening, fit_learned_whitening, fit_pca_whitening, fit_whitening


def correlated(num_rows: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(num_rows, width, generator=generator) @ mixing + 3


def unnormalised(whitening: Whitening, features: torch.Tensor) -> torch.Tensor:
    return (features.double() - whitening.mean) @ whitening.projection


def test_pca_whitened_features_have_the_unit_covariance_and_mean_zero() -> None:
    features = correlated(200, 6)
    whitened = unnormalised(fit_pca_whitening(features), features)
    torch.testing.assert_close(whitened.T.cov(), torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(whitened.mean(dim=0), torch.zeros(6, dtype=torch.float64))


def test_pca_whitening_is_that_of_scikit_learn() -> None:
    features = correlated(80, 5)
    found = unnormalised(fit_pca_whitening(features, dim=3), correlated(10, 5, seed=1)).numpy()
    expected = PCA(3, whiten=True).fit(features.double().numpy()).transform(correlated(10, 5, seed=1).double().numpy())
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-8, atol=1e-10)  # signs are free


def test_result_has_unit_length_and_float32() -> None:
    features = correlated(50, 4)
    whitened = fit_pca_whitening(features)(features)
    assert whitened.dtype == torch.float32
    torch.testing.assert_close(whitened.norm(dim=1), torch.ones(50))


def test_fewer_images_than_width_give_one_direction_less_than_images() -> None:
    features = F.normalize(torch.randn(5, 300), dim=1)
    whitening = fit_pca_whitening(features)
    assert whitening.projection.shape == (300, 4)
    assert fit_pca_whitening(features.repeat(3, 1)).projection.shape == (300, 4)  # copies add nothing
    assert whitening(features).isfinite().all()


def test_similarities_do_not_depend_on_an_affine_map_of_the_features() -> None:
    features, queries = correlated(100, 5), correlated(7, 5, seed=1)
    mixing = torch.randn(5, 5, generator=torch.Generator().manual_seed(3)).double()
    plain = fit_pca_whitening(features.double())(queries.double())
    mapped = fit_pca_whitening(features.double() @ mixing - 4)(queries.double() @ mixing - 4)
    torch.testing.assert_close(plain @ plain.T, mapped @ mapped.T, atol=1e-5, rtol=1e-5)


def parts_under_exposure(num_parts: int, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Four photos of each part: parts differ a little in 6 directions, exposures of a part much in 2 of them."""
    generator = torch.Generator().manual_seed(seed)
    parts = torch.randn(num_parts, 6, generator=generator).repeat_interleave(4, dim=0)
    exposure = torch.randn(4 * num_parts, 6, generator=generator) * torch.tensor([20.0, 20.0, 0.2, 0.2, 0.2, 0.2])
    return parts + exposure, [f"part {number // 4}" for number in range(4 * num_parts)]


def share_of_right_neighbours(features: torch.Tensor, groups: list[str]) -> float:
    similarities = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
    nearest = similarities.fill_diagonal_(-2).argmax(dim=1)
    return float(np.mean([groups[other] == groups[row] for row, other in enumerate(nearest.tolist())]))


def test_learned_whitening_gives_differences_within_parts_the_unit_covariance() -> None:
    features, groups = parts_under_exposure(2000)
    whitened = unnormalised(fit_learned_whitening(features, groups), features).reshape(2000, 4, 6)
    differences = (whitened - whitened.mean(dim=1, keepdim=True)).flatten(0, 1)
    covariance = differences.T @ differences / (3 * 2000)
    torch.testing.assert_close(covariance, torch.eye(6, dtype=torch.float64), atol=0.05, rtol=0)
    spread = whitened.flatten(0, 1).T.cov()
    torch.testing.assert_close(spread, spread.diagonal().diag(), atol=1e-6, rtol=0)  # turned to its components
    assert (spread.diagonal().diff() <= 1e-9).all()


def test_learned_whitening_removes_what_differs_within_parts() -> None:
    fitted_on, groups = parts_under_exposure(100)
    judged, judged_groups = parts_under_exposure(30, seed=1)
    before = share_of_right_neighbours(judged, judged_groups)
    after = share_of_right_neighbours(fit_learned_whitening(fitted_on, groups, dim=4)(judged), judged_groups)
    assert before < 0.2
    assert after > 0.8


def test_learned_whitening_of_very_few_photos_stays_bounded() -> None:
    features = F.normalize(torch.randn(4, 50, generator=torch.Generator().manual_seed(0)), dim=1)
    whitening = fit_learned_whitening(features, ["a", "a", "b", "b"])
    assert whitening(features).isfinite().all()
    stretch = torch.linalg.svdvals(whitening.projection)
    assert stretch.max() / stretch.min() < 10


def test_learned_whitening_from_a_single_difference_is_finite() -> None:
    features = F.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    whitening = fit_learned_whitening(features, ["a", "a", "b", "c", "d"])
    stretch = torch.linalg.svdvals(whitening.projection)  # seen once, a direction is not trusted to be all there is
    assert stretch.max() / stretch.min() < 20


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
def test_bad_input(features: torch.Tensor, groups: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_whitening(features, list(groups), **arguments)
