"""The weighted sum of depth losses."""

import pytest
import torch
from loss_stand_ins import depth_maps

from dinov2.loss.depth_losses import DepthLoss, GradientLoss, SigLoss, masked_l1_loss, masked_mse_loss


def test_terms_are_the_weighted_losses() -> None:
    predictions, targets = depth_maps(4, 1, 8, 8)
    loss = DepthLoss(
        scale_invariant_log=10.0,
        gradient=0.5,
        mse=2.0,
        l1=3.0,
        alignment="median",
        max_depth=7.0,
        upstream_slicing=True,
    )
    expected = {
        "scale_invariant_log": SigLoss(loss_weight=10.0, max_depth=7.0)(predictions, targets),
        "gradient": GradientLoss(loss_weight=0.5, max_depth=7.0, upstream_slicing=True)(predictions, targets),
        "mse": 2 * masked_mse_loss(predictions, targets, alignment="median", max_depth=7.0),
        "l1": 3 * masked_l1_loss(predictions, targets, alignment="median", max_depth=7.0),
    }
    terms = loss(predictions, targets)
    assert list(terms) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_only_what_has_a_weight_is_computed() -> None:
    predictions, targets = depth_maps(2, 1, 8, 8)
    assert list(DepthLoss()(predictions, targets)) == ["scale_invariant_log"]
    assert list(DepthLoss(scale_invariant_log=0, l1=1)(predictions, targets)) == ["l1"]


def test_warm_up_is_part_of_the_state() -> None:
    predictions, targets = depth_maps(2, 1, 8, 8)
    loss = DepthLoss(warm_up_iterations=2)
    values = [loss(predictions, targets)["scale_invariant_log"] for _ in range(3)]
    assert values[0] == values[1] < values[2]
    resumed = DepthLoss(warm_up_iterations=2)
    resumed.load_state_dict(loss.state_dict())
    assert resumed(predictions, targets)["scale_invariant_log"] == values[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_invariant_log": 0.0}, "one of the weights scale_invariant_log, gradient, mse, l1 must be above 0"),
        ({"mse": -1.0}, "weight mse must be 0 or above, found -1"),
        ({"alignment": "median"}, "alignment 'median' has no effect"),
        ({"alignment": "mean", "l1": 1.0}, "is not one of none, least_squares, median"),
        ({"scale_invariant_log": 0.0, "l1": 1.0, "warm_up_iterations": 5}, "warm_up_iterations=5 has no effect"),
        ({"upstream_slicing": True}, "upstream_slicing has no effect"),
        ({"max_depth": -1.0}, "max_depth must be above 0"),
    ],
)
def test_bad_settings(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthLoss(**options)
