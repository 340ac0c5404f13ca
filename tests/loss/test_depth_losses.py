"""Depth losses and their weighted sum against reference values, NumPy, loops over pixels, and maps that know little."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.loss.depth_losses import (
    DepthLoss,
    GradientLoss,
    SigLoss,
    align_depth,
    masked_l1_loss,
    masked_mse_loss,
)

ALIGNED = [
    functools.partial(loss, alignment=alignment)
    for loss in (masked_mse_loss, masked_l1_loss)
    for alignment in ("least_squares", "median")
]
LOSSES = [SigLoss(), GradientLoss(), GradientLoss(upstream_slicing=True), masked_mse_loss, masked_l1_loss, *ALIGNED]


def depth_maps(*shape: int, seed: int = 0, unknown: float = 0.3) -> tuple[Tensor, Tensor]:
    """Predictions and targets above 0, float64, some targets NaN."""
    generator = torch.Generator().manual_seed(seed)
    predictions = 0.2 + 9 * torch.rand(shape, generator=generator, dtype=torch.float64)
    targets = 0.2 + 9 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return predictions, targets.where(torch.rand(shape, generator=generator) >= unknown, torch.nan)


def literal_gradient_loss(predictions: Tensor, targets: Tensor, max_depth: float = math.inf) -> float:
    """Image by image and pixel by pixel."""
    total = 0.0
    for step in (1, 2, 4, 6):
        p, t = predictions[:, ::step, ::step], targets[:, ::step, ::step]
        known = {
            (image, y, x): math.log(p[image, y, x] + 1e-3) - math.log(t[image, y, x] + 1e-3)
            for image, y, x in ((t > 0) & (t <= max_depth)).nonzero().tolist()
        }
        changes = [
            abs(value - known[there])
            for (image, y, x), value in known.items()
            for there in ((image, y + 2, x), (image, y, x + 2))
            if there in known
        ]
        total += sum(changes) / len(known)
    return total


def test_reference_values_and_gradients(reference) -> None:
    single_maps = 0
    for case in reference("eval_fixture.pt")["depth"]["losses"]:
        is_gradient = case["loss"] == "GradientLoss"
        loss = GradientLoss(**case["args"], upstream_slicing=True) if is_gradient else SigLoss(**case["args"])
        predictions = case["pred"].requires_grad_()
        values = [loss(predictions, case["gt"]) for _ in case["values"]]  # a warm-up may change them
        torch.testing.assert_close(torch.autograd.grad(values[0], predictions)[0], case["grad"], rtol=1e-5, atol=1e-6)
        assert [value.item() for value in values] == pytest.approx(case["values"], rel=1e-5, abs=1e-6)
        # Called with one map at a time, upstream's loss slices height and width, as ours does always.
        for number, expected in enumerate(case.get("values_per_2d_map", [])):
            single = GradientLoss(**case["args"])(case["pred"][number], case["gt"][number])
            assert single.item() == pytest.approx(expected, rel=1e-5)
            single_maps += 1
    assert single_maps == 10


def test_sig_loss_equals_its_formula() -> None:
    predictions, targets = depth_maps(3, 1, 9, 7)
    known = (targets <= 6) & (targets > 0)
    logs = [math.log(p + 1e-3) - math.log(t + 1e-3) for p, t in zip(predictions[known], targets[known], strict=True)]
    mean = sum(logs) / len(logs)
    variance = sum((g - mean) ** 2 for g in logs) / (len(logs) - 1)
    loss = SigLoss(loss_weight=3.0, max_depth=6.0)(predictions, targets)
    assert loss.item() == pytest.approx(3 * math.sqrt(variance + 0.15 * mean**2), rel=1e-12)


@pytest.mark.parametrize("max_depth", [None, 5.0])
def test_gradient_loss_equals_a_loop_over_pixels(max_depth: float | None) -> None:
    predictions, targets = depth_maps(2, 1, 13, 16)
    expected = literal_gradient_loss(predictions[:, 0], targets[:, 0], max_depth or math.inf)
    loss = GradientLoss(loss_weight=0.5, max_depth=max_depth)(predictions, targets)
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-12)


@pytest.mark.parametrize(("loss", "power"), [(masked_mse_loss, 2), (masked_l1_loss, 1)])
def test_mean_differences_over_known_pixels(loss, power: int) -> None:
    predictions, targets = depth_maps(2, 1, 6, 5)
    targets[0, 0, 0, :3] = torch.tensor([0.0, -2.0, 8.5])
    known = targets.isfinite()
    expected = (predictions - targets)[known].abs().pow(power).mean()
    torch.testing.assert_close(loss(predictions, targets), expected)
    known &= targets <= 8
    expected = (predictions - targets)[known].abs().pow(power).mean()
    torch.testing.assert_close(loss(predictions, targets, max_depth=8.0), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_with_and_without_a_channel_are_the_same(loss) -> None:
    predictions, targets = depth_maps(4, 8, 9)
    expected = loss(predictions, targets)
    for p, t in (
        (predictions[:, None], targets),
        (predictions, targets[:, None]),
        (predictions[:, None], targets[:, None]),
    ):
        assert torch.equal(loss(p, t), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("other", [77.0, 0.0, -1e-3, -5.0, math.nan])
def test_what_is_predicted_at_unknown_pixels_does_not_matter(loss, other: float) -> None:
    predictions, targets = depth_maps(4, 8, 9)
    known = targets.isfinite()
    changed = predictions.where(known, other).requires_grad_()
    value = loss(changed, targets)
    value.backward()
    assert torch.equal(value, loss(predictions, targets))
    assert changed.grad.isfinite().all()
    assert not changed.grad[~known].any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_known", [0, 1])
def test_next_to_nothing_known_gives_finite_gradients(loss, num_known: int) -> None:
    predictions = torch.full((2, 1, 5, 6), 2.0, requires_grad=True)
    targets = torch.full((2, 1, 5, 6), torch.nan)
    targets.view(-1)[:num_known] = 3.0
    value = loss(predictions, targets)
    value.backward()
    assert predictions.grad.isfinite().all()
    one_counts = num_known == 1 and not isinstance(loss, GradientLoss | functools.partial)
    assert (value.item() > 0) == one_counts
    assert predictions.grad.count_nonzero() == one_counts


@pytest.mark.parametrize("loss", [SigLoss(), GradientLoss()])
def test_zero_depth_is_unknown_to_logarithms(loss) -> None:
    predictions, targets = depth_maps(1, 8, 8)
    assert torch.equal(loss(predictions, targets.nan_to_num(0.0)), loss(predictions, targets))
    assert not torch.equal(
        type(loss)(valid_mask=False)(predictions, targets.nan_to_num(0.0)), loss(predictions, targets)
    )


@pytest.mark.parametrize("loss", [SigLoss(), GradientLoss(), masked_mse_loss, masked_l1_loss])
def test_a_perfect_prediction_costs_nothing(loss) -> None:
    _, targets = depth_maps(2, 1, 8, 8)
    predictions = targets.nan_to_num(4.0).requires_grad_()
    value = loss(predictions, targets)
    value.backward()
    assert value.item() == 0
    assert not predictions.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss) -> None:
    predictions, targets = depth_maps(3, 1, 5, 6, seed=3)
    assert torch.autograd.gradcheck(lambda p: loss(p, targets), predictions.requires_grad_())


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_float32(loss) -> None:
    predictions, targets = (maps.bfloat16() for maps in depth_maps(3, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(predictions, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(predictions.float(), targets.float()))


def test_warm_up_counts_training_calls_and_resumes() -> None:
    predictions, targets = depth_maps(1, 6, 6)
    loss, whole = SigLoss(warm_up=True, warm_iter=3), SigLoss()(predictions, targets)
    assert torch.equal(loss.eval()(predictions, targets), whole)  # neither counted nor cut short
    first = loss.train()(predictions, targets)
    assert first < whole
    resumed = SigLoss(warm_up=True, warm_iter=3)
    resumed.load_state_dict(loss.state_dict())
    values = [resumed(predictions, targets) for _ in range(3)]
    assert [bool(value == first) for value in values] == [True, True, False]
    assert torch.equal(values[2], whole)


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
    flat, _ = align_depth(torch.full_like(targets, 3.0), targets, known, "least_squares")
    torch.testing.assert_close(flat[0][known[0]], targets[0][known[0]].mean().expand(int(known[0].sum())))


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


@pytest.mark.parametrize("loss", ALIGNED)
def test_aligned_losses_know_neither_scale_nor_shift(loss) -> None:
    predictions, targets = depth_maps(2, 8, 8)
    factors, shifts = torch.tensor([3.0, 0.2])[:, None, None], torch.tensor([-1.0, 40.0])[:, None, None]
    expected = loss(predictions, targets)
    torch.testing.assert_close(loss(factors * predictions + shifts, targets), expected)
    assert loss(factors * targets.nan_to_num(1.0) + shifts, targets).item() < 1e-12
    assert expected > 0.1


@pytest.mark.parametrize("loss", ALIGNED)
def test_flat_predictions_and_unknown_images_have_finite_gradients(loss) -> None:
    _, targets = depth_maps(3, 4, 4)
    targets[1] = torch.nan
    targets[2] = 5.0
    predictions = torch.full((3, 4, 4), 2.0, dtype=torch.float64, requires_grad=True)
    value = loss(predictions, targets)
    value.backward()
    assert value.isfinite()
    assert predictions.grad.isfinite().all()
    assert not predictions.grad[1].any()


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


def test_only_what_has_a_weight_is_computed_and_warm_up_is_counted() -> None:
    predictions, targets = depth_maps(2, 1, 8, 8)
    assert list(DepthLoss(scale_invariant_log=0, l1=1)(predictions, targets)) == ["l1"]
    loss = DepthLoss(warm_up_iterations=2)
    assert list(loss(predictions, targets)) == ["scale_invariant_log"]
    assert loss.state_dict()["scale_invariant_log.warm_up_counter"] == 1
    values = [loss(predictions, targets)["scale_invariant_log"] for _ in range(2)]
    assert values[0] < values[1]


def test_bad_input() -> None:
    maps = torch.ones(2, 4, 4)
    for loss in LOSSES:
        with pytest.raises(ValueError, match=r"one size, found \[2, 4, 4\] and \[2, 4, 5\]"):
            loss(maps, torch.ones(2, 4, 5))
        with pytest.raises(ValueError, match="one size"):
            loss(maps[0], maps[0])
    for kind in (SigLoss, GradientLoss):
        with pytest.raises(ValueError, match="no effect without valid_mask"):
            kind(valid_mask=False, max_depth=3.0)
        with pytest.raises(ValueError, match="max_depth must be above 0, found 0"):
            kind(max_depth=0)
    with pytest.raises(ValueError, match="warm_iter must be at least 0"):
        SigLoss(warm_iter=-1)
    with pytest.raises(ValueError, match="max_depth must be above 0"):
        masked_mse_loss(maps, maps, max_depth=-1)
    with pytest.raises(ValueError, match="alignment 'mean' is not one of none, least_squares, median"):
        masked_l1_loss(maps, maps, alignment="mean")
    for options, message in (
        ({"scale_invariant_log": 0.0}, "one of the weights scale_invariant_log, gradient, mse, l1 must be above 0"),
        ({"mse": -1.0}, "weight mse must be 0 or above, found -1"),
        ({"alignment": "median"}, "alignment 'median' has no effect"),
        ({"alignment": "mean", "l1": 1.0}, "is not one of none, least_squares, median"),
        ({"scale_invariant_log": 0.0, "l1": 1.0, "warm_up_iterations": 5}, "warm_up_iterations=5 has no effect"),
        ({"upstream_slicing": True}, "upstream_slicing has no effect"),
        ({"max_depth": -1.0}, "max_depth must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DepthLoss(**options)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("number", [number for number in range(len(LOSSES)) if number != 2])
def test_predictions_that_are_nan_or_infinite_are_no_perfect_ones(number: int, everywhere: bool, bad: float) -> None:
    predictions, targets = depth_maps(2, 8, 8, unknown=0)
    predictions[:, 3, 4] = bad
    predictions = torch.full_like(predictions, bad) if everywhere else predictions
    assert not LOSSES[number](predictions, targets).isfinite()
