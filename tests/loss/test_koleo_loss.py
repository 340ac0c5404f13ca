"""KoLeo against a loop over rows, reference values, and batches in which somebody has no neighbour."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.loss.koleo_loss import KoLeoLoss


def literal_koleo(features: Tensor) -> Tensor:
    """Minus the mean logarithm of every row's distance to the nearest other row, on the sphere."""
    rows = F.normalize(features, dim=-1)
    nearest = [
        min((rows[i] - rows[j]).norm() for j in range(len(rows)) if j != i)  # the nearest by angle, too
        for i in range(len(rows))
    ]
    return -torch.stack(nearest).log().mean()


def test_equals_a_loop_over_rows() -> None:
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(KoLeoLoss()(features), literal_koleo(features), rtol=1e-6, atol=0)
    assert torch.equal(KoLeoLoss(all_ranks=True)(features), KoLeoLoss()(features)), "there is one process"


def test_all_cases_equal_the_reference(reference) -> None:
    for case in reference("loss_fixture_koleo.pt")["cases"]:
        features = case["x"].requires_grad_()
        loss = KoLeoLoss()(features)
        if case["kind"] == "duplicate":
            torch.testing.assert_close(loss, case["loss"], rtol=0, atol=1e-4)
            continue
        tolerance = 1e-5 if case["dtype"] == "float32" else 1e-10
        torch.testing.assert_close(loss, case["loss"], rtol=0, atol=tolerance)
        torch.testing.assert_close(torch.autograd.grad(loss, features)[0], case["grad"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("num_rows", [0, 1])
@pytest.mark.parametrize("half_precision", [False, True])
def test_without_a_neighbour_the_loss_is_zero_and_part_of_the_graph(num_rows: int, half_precision: bool) -> None:
    features = torch.full((num_rows, 8), 1e4, dtype=torch.float16, requires_grad=True)
    loss = KoLeoLoss(half_precision)(features)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(features.grad, torch.zeros(num_rows, 8, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_duplicates_are_finite_by_default_and_infinite_with_the_half_precision_option(dtype: torch.dtype) -> None:
    features = torch.ones(3, 16, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = KoLeoLoss()(features)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert features.grad.isfinite().all()
    if dtype == torch.float16:
        assert KoLeoLoss(half_precision=True)(features).isinf()


def test_half_precision_keeps_the_dtype() -> None:
    features = torch.randn(6, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    loss = KoLeoLoss(half_precision=True)(features)
    assert loss.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(KoLeoLoss()(features).item(), abs=0.05)
