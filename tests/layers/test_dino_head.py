"""The projection head against reference values and torch's own weight normalisation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov2.layers.dino_head import DINOHead, WeightNormLinear

CASES = range(5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", CASES)
def test_reference_values(number: int, dtype: str, reference: Callable[[str], Any]) -> None:
    case = reference("loss_fixture_head.pt")["cases"][number]
    expected = case["out"][dtype]
    head = DINOHead(**case["kwargs"])
    head.load_state_dict(case["state_dict"])
    head = head.to(getattr(torch, dtype))
    tolerance = {"atol": 1e-5 if dtype == "float32" else 1e-10, "rtol": 0.0}

    x = expected["x"].clone().requires_grad_()
    y = head.train()(x)
    torch.testing.assert_close(y, expected["y_train"], **tolerance)
    (y * expected["w"]).sum().backward()
    torch.testing.assert_close(x.grad, expected["grad_x"], **tolerance)
    for name, parameter in head.named_parameters():
        torch.testing.assert_close(parameter.grad, expected["grad_params"][name], **tolerance)
    for name, value in (expected["state_after_train_forward"] or {}).items():
        torch.testing.assert_close(head.state_dict()[name], value, **tolerance, check_dtype=False)
    head.eval()
    torch.testing.assert_close(head(expected["x"]), expected["y_eval"], **tolerance)
    zero_row = head(torch.zeros(1, case["kwargs"]["in_dim"], dtype=x.dtype))
    torch.testing.assert_close(zero_row.reshape(-1), expected["y_zero_row"].reshape(-1), **tolerance)


def test_initial_statistics(reference: Callable[[str], Any]) -> None:
    statistics = reference("schedule_fixture.json")["init_statistics_head"]
    head = DINOHead(**statistics["model"])
    parameters = dict(head.named_parameters())
    assert set(parameters) == set(statistics["params"])
    for name, expected in statistics["params"].items():
        assert list(parameters[name].shape) == expected["shape"]
        std = parameters[name].std().item()
        assert std == pytest.approx(expected["std"], rel=0.1)
        assert parameters[name].mean().item() == pytest.approx(
            expected["mean"], abs=5 * std / parameters[name].numel() ** 0.5
        )
    assert head.last_layer.weight_g.requires_grad


def test_weight_norm_equals_torch() -> None:
    ours = WeightNormLinear(6, 9)
    with torch.no_grad():
        ours.weight_g.uniform_(0.5, 2)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(6, 9, bias=False))
    theirs.parametrizations.weight.original0.data = ours.weight_g.data.clone()
    theirs.parametrizations.weight.original1.data = ours.weight_v.data.clone()
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)


def test_scores_are_cosines_at_the_start() -> None:
    head = DINOHead(8, 20, hidden_dim=16, bottleneck_dim=5)
    x = torch.randn(3, 8)
    prototypes = F.normalize(head.last_layer.weight_v, dim=1)
    torch.testing.assert_close(head(x), F.normalize(head.mlp(x), dim=1) @ prototypes.T)
    assert head(x[:0]).shape == (0, 20)
    with pytest.raises(ValueError, match="at least 1 layer, got nlayers=0"):
        DINOHead(8, 20, nlayers=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_padding_stay_finite_in_half_precision(dtype: torch.dtype) -> None:
    # Of so small a head, one in thirty gives the first row a norm whose gradient float16 cannot hold.
    torch.manual_seed(0)
    head = DINOHead(8, 20, hidden_dim=16, bottleneck_dim=5).to(dtype)
    x = torch.randn(3, 8).to(dtype)
    x[1] = 0
    x[2] = 1e-7
    y = head(x)
    y[:1].float().sum().backward()
    assert y.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_head_materialises_from_the_meta_device() -> None:
    with torch.device("meta"):
        head = DINOHead(8, 20, hidden_dim=16, use_bn=True)
    head = head.to_empty(device="cpu")
    head.init_weights()
    assert head(torch.randn(4, 8)).isfinite().all()
    assert torch.equal(head.last_layer.weight_g, torch.ones(20, 1))
