"""Sinkhorn-Knopp against its literal definition, its conservation laws, extreme scores and padding."""

import pytest
import torch
from torch import Tensor

from dinov2.loss.teacher_targets import sinkhorn_knopp


def literal_sinkhorn(scores: Tensor, temperature: float, n_iterations: int) -> Tensor:
    """Rows and columns normalised in turn, in float64, with logarithms so that nothing can overflow."""
    log_q = scores.double() / temperature  # [M, K]
    for _ in range(n_iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.exp()


@pytest.mark.parametrize("scale", [1.0, 4.0, 100.0, 10_000.0])
@pytest.mark.parametrize("n_iterations", [1, 3, 10])
def test_equals_the_definition_at_any_spread_of_scores(scale: float, n_iterations: int) -> None:
    scores = scale * torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    # Logits of large magnitude carry rounding of that magnitude.
    tolerance = 1e-6 * max(1.0, scale)
    expected = literal_sinkhorn(scores, 0.04, n_iterations).float()
    torch.testing.assert_close(sinkhorn_knopp(scores, 0.04, n_iterations), expected, rtol=0, atol=min(tolerance, 1e-2))


def test_samples_sum_to_one_and_prototypes_are_used_equally() -> None:
    scores = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    probabilities = sinkhorn_knopp(scores, 0.5, n_iterations=50)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(probabilities.sum(dim=0), torch.full((16,), 64 / 16))


def test_an_outlying_sample_and_an_outlying_prototype_stay_finite() -> None:
    scores = torch.zeros(4, 6)
    scores[1] = -1e6
    scores[:, 2] -= 1e6
    probabilities = sinkhorn_knopp(scores, 0.04)
    torch.testing.assert_close(probabilities, torch.full((4, 6), 1 / 6))  # constants per row and column cancel


def test_finite_where_upstream_overflows(reference) -> None:
    case = reference("loss_fixture_dino.pt")["sinkhorn_overflow"]
    assert case["out"].isnan().all()
    probabilities = sinkhorn_knopp(case["teacher"], case["teacher_temp"])
    torch.testing.assert_close(probabilities, literal_sinkhorn(case["teacher"], case["teacher_temp"], 3).float())


def test_scores_are_left_alone() -> None:
    scores = torch.randn(3, 5)
    before = scores.clone()
    sinkhorn_knopp(scores, 1.0, num_rows=torch.tensor([2]))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_runs_in_float32_also_under_autocast(dtype: torch.dtype) -> None:
    scores = torch.randn(6, 9, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probabilities = sinkhorn_knopp(scores, 0.1)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities, sinkhorn_knopp(scores.float(), 0.1), rtol=0, atol=0)


@pytest.mark.parametrize("fill", [0.0, 50.0, float("nan")])
def test_padding_has_no_influence(fill: float) -> None:
    scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    padded = torch.cat([scores, torch.full((3, 8), fill)])
    probabilities = sinkhorn_knopp(padded, 0.1, num_rows=torch.tensor([5]))
    torch.testing.assert_close(probabilities[:5], sinkhorn_knopp(scores, 0.1))
    assert torch.equal(probabilities[5:], torch.zeros(3, 8))


def test_no_sample_at_all() -> None:
    assert sinkhorn_knopp(torch.zeros(0, 4), 0.1).shape == (0, 4)
    assert torch.equal(sinkhorn_knopp(torch.ones(2, 4), 0.1, num_rows=torch.tensor(0)), torch.zeros(2, 4))


def test_a_nan_among_the_scores_is_not_hidden() -> None:
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan
    assert sinkhorn_knopp(scores, 0.1).isnan().any()


@pytest.mark.parametrize(
    ("temperature", "n_iterations", "message"), [(0.1, 0, "n_iterations"), (0.0, 3, "temperature")]
)
def test_rejects_bad_arguments(temperature: float, n_iterations: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} must be"):
        sinkhorn_knopp(torch.zeros(2, 2), temperature, n_iterations)
