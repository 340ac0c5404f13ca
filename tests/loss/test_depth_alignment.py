"""Alignment of relative depth against NumPy, and what it must not change."""

import numpy as np
import pytest
import torch
from loss_stand_ins import depth_maps

from dinov2.loss.depth_losses import align_depth, masked_l1_loss, masked_mse_loss


def test_least_squares_equals_numpy() -> None:
    predictions, targets = depth_maps(3, 7, 6)
    known = targets.isfinite()
    aligned, kept = align_depth(predictions, targets, known, "least_squares")
    for image in range(3):
        p, t = predictions[image][known[image]].numpy(), targets[image][known[image]].numpy()
        scale, shift = np.polyfit(p, t, 1)
        np.testing.assert_allclose(aligned[image][known[image]].numpy(), scale * p + shift, rtol=1e-9)
        np.testing.assert_array_equal(kept[image][known[image]].numpy(), t)
    assert not aligned[~known].any()
    assert not kept[~known].any()


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_median_equals_numpy(unknown: float) -> None:
    predictions, targets = depth_maps(3, 7, 5, unknown=unknown)
    known = targets.isfinite()
    for maps, aligned in zip((predictions, targets), align_depth(predictions, targets, known, "median"), strict=True):
        for image in range(3):
            values = maps[image][known[image]].numpy()
            offsets = values - np.sort(values)[(len(values) - 1) // 2]
            np.testing.assert_allclose(
                aligned[image][known[image]].numpy(), offsets / np.abs(offsets).mean(), rtol=1e-9
            )
        assert not aligned[~known].any()


@pytest.mark.parametrize("loss", [masked_mse_loss, masked_l1_loss])
@pytest.mark.parametrize("alignment", ["least_squares", "median"])
def test_aligned_losses_know_neither_scale_nor_shift(loss, alignment: str) -> None:
    predictions, targets = depth_maps(2, 8, 8)
    factors, shifts = torch.tensor([3.0, 0.2])[:, None, None], torch.tensor([-1.0, 40.0])[:, None, None]
    expected = loss(predictions, targets, alignment=alignment)
    torch.testing.assert_close(loss(factors * predictions + shifts, targets, alignment=alignment), expected)
    assert loss(factors * targets.nan_to_num(1.0) + shifts, targets, alignment=alignment).item() < 1e-12
    assert expected > 0.1


def test_only_least_squares_takes_near_for_far() -> None:
    _, targets = depth_maps(1, 8, 8)
    turned = -targets.nan_to_num(1.0)
    assert masked_l1_loss(turned, targets, alignment="least_squares").item() < 1e-12
    assert masked_l1_loss(turned, targets, alignment="median") > 1


@pytest.mark.parametrize("loss", [masked_mse_loss, masked_l1_loss])
@pytest.mark.parametrize("alignment", ["least_squares", "median"])
def test_gradients_are_those_of_finite_differences(loss, alignment: str) -> None:
    predictions, targets = depth_maps(2, 5, 5, seed=4)
    assert torch.autograd.gradcheck(lambda p: loss(p, targets, alignment=alignment), predictions.requires_grad_())


@pytest.mark.parametrize("loss", [masked_mse_loss, masked_l1_loss])
@pytest.mark.parametrize("alignment", ["least_squares", "median"])
def test_flat_predictions_and_unknown_images_have_finite_gradients(loss, alignment: str) -> None:
    _, targets = depth_maps(3, 4, 4)
    targets[1] = torch.nan
    targets[2] = 5.0
    predictions = torch.full((3, 4, 4), 2.0, dtype=torch.float64, requires_grad=True)
    value = loss(predictions, targets, alignment=alignment)
    value.backward()
    assert value.isfinite()
    assert predictions.grad is not None
    assert predictions.grad.isfinite().all()
    assert not predictions.grad[1].any()


def test_a_flat_prediction_becomes_the_mean_of_the_targets() -> None:
    _, targets = depth_maps(1, 4, 4)
    known = targets.isfinite()
    aligned, _ = align_depth(torch.full_like(targets, 3.0), targets, known, "least_squares")
    torch.testing.assert_close(aligned[known], targets[known].mean().expand(int(known.sum())))
