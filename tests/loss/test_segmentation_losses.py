"""Pixel losses against slow definitions, torch and torchvision, and masks in which nothing is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.loss.segmentation_losses import SegmentationLoss, focal_loss, pixel_cross_entropy, soft_dice_loss

LOSSES = [pixel_cross_entropy, soft_dice_loss, focal_loss]


def problem(
    num_classes: int = 4, seed: int = 0, ignored: float = 0.2, size: tuple[int, ...] = (3, 6, 7)
) -> tuple[Tensor, Tensor]:
    """Logits float64 and masks in which the last class does not occur and some pixels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((size[0], num_classes, *size[1:]), generator=generator, dtype=torch.float64)
    targets = torch.randint(0, max(num_classes - 1, 2), size, generator=generator)
    return logits, targets.where(torch.rand(size, generator=generator) >= ignored, 255)


def known_pixels(logits: Tensor, targets: Tensor) -> list[tuple[list[float], int]]:
    """Probabilities and class of every pixel that has one."""
    rows = logits.softmax(1).movedim(1, -1).reshape(-1, logits.shape[1]).tolist()
    return [(row, label) for row, label in zip(rows, targets.flatten().tolist(), strict=True) if label != 255]


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 3.0]])
def test_cross_entropy_equals_torch_and_a_loop(weights: list[float] | None) -> None:
    logits, targets = problem()
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    value = pixel_cross_entropy(logits, targets, tensor)
    torch.testing.assert_close(value, F.cross_entropy(logits, targets, tensor, ignore_index=255))
    pixels = known_pixels(logits, targets)
    weights = weights or [1.0] * 4
    total = sum(-weights[label] * math.log(row[label]) for row, label in pixels)
    assert value.item() == pytest.approx(total / sum(weights[label] for _, label in pixels))


def test_dice_equals_a_loop_over_classes_and_pixels() -> None:
    logits, targets = problem()
    pixels = known_pixels(logits, targets)
    losses = []
    for number in range(4):
        overlap = sum(row[number] for row, label in pixels if label == number)
        both = sum(row[number] for row, _ in pixels) + sum(label == number for _, label in pixels)
        if any(label == number for _, label in pixels):
            losses.append(1 - 2 * overlap / both)
    assert len(losses) == 3  # class 3 does not occur
    assert soft_dice_loss(logits, targets).item() == pytest.approx(sum(losses) / 3)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 3.0]])
def test_focal_equals_a_loop(gamma: float, weights: list[float] | None) -> None:
    logits, targets = problem()
    value = focal_loss(logits, targets, gamma, None if weights is None else torch.tensor(weights))
    pixels = known_pixels(logits, targets)
    weights = weights or [1.0] * 4
    if gamma == 0 and weights == [1.0] * 4:
        torch.testing.assert_close(value, pixel_cross_entropy(logits, targets))
    terms = [-weights[label] * (1 - row[label]) ** gamma * math.log(row[label]) for row, label in pixels]
    assert value.item() == pytest.approx(sum(terms) / len(terms))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradients_of_pixels_that_are_certain_are_finite(gamma: float) -> None:
    logits = torch.tensor([200.0, -200.0])[None, :, None, None].repeat(1, 1, 1, 2).requires_grad_()
    value = focal_loss(logits, torch.tensor([[[0, 1]]]), gamma)  # one right, one wrong
    value.backward()
    assert value.item() == pytest.approx(200)
    assert logits.grad.isfinite().all()
    assert logits.grad[0, :, 0, 0].abs().max() == 0
    torch.testing.assert_close(logits.grad[0, :, 0, 1], torch.tensor([0.5, -0.5]))


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_pixels_do_not_matter(loss) -> None:
    logits, targets = problem()
    changed = logits.where((targets != 255)[:, None], 50.0 * torch.randn_like(logits))
    torch.testing.assert_close(loss(changed, targets), loss(logits, targets))
    torch.testing.assert_close(loss(logits, targets.where(targets != 255, 3), ignore_index=3), loss(logits, targets))


@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_known_pixel_the_loss_is_zero_and_part_of_the_graph(loss) -> None:
    logits = problem()[0].requires_grad_()
    value = loss(logits, torch.full((3, 6, 7), 255))
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_only_classes_of_weight_zero_give_zero() -> None:
    logits, targets = problem(ignored=0.5)
    logits.requires_grad_()
    value = pixel_cross_entropy(logits, targets.where(targets == 255, 1), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    value.backward()
    assert value.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss) -> None:
    logits, targets = problem(size=(2, 3, 3))
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), logits.requires_grad_())


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_float32(loss) -> None:
    logits, targets = problem()
    logits = logits.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, targets.byte())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.float(), targets))


def test_the_sum_names_its_weighted_terms() -> None:
    logits, targets = problem()
    weights = [1.0, 2.0, 3.0, 4.0]
    loss = SegmentationLoss(2.0, dice=0.5, focal=3.0, class_weights=weights, focal_gamma=1.5)
    terms = loss(logits, targets)
    assert list(terms) == ["cross_entropy", "dice", "focal"]
    torch.testing.assert_close(terms["cross_entropy"], 2 * pixel_cross_entropy(logits, targets, torch.tensor(weights)))
    torch.testing.assert_close(terms["dice"], 0.5 * soft_dice_loss(logits, targets))
    torch.testing.assert_close(terms["focal"], 3 * focal_loss(logits, targets, 1.5, torch.tensor(weights)))
    assert loss.state_dict() == {}
    assert list(SegmentationLoss(0.0, dice=1.0)(logits, targets)) == ["dice"]
    ignored = SegmentationLoss(1.0, 1.0, 1.0, ignore_index=2)(logits, targets.where(targets != 255, 2))
    expected = SegmentationLoss(1.0, 1.0, 1.0)(logits, targets.where(targets != 2, 255))
    torch.testing.assert_close(ignored, expected)


def test_bad_input() -> None:
    logits, targets = problem()
    outside = targets.index_fill(2, torch.tensor([0]), 4)
    for loss in LOSSES:
        with pytest.raises((IndexError, RuntimeError)):
            loss(logits, outside)
        with pytest.raises(ValueError, match=r"found \[3, 4, 6, 7\] and \[3, 6, 6\]"):
            loss(logits, targets[:, :, :6])
    for loss in (pixel_cross_entropy, focal_loss):
        with pytest.raises(ValueError, match=r"class_weights has shape \[3\], but the model has 4 classes"):
            loss(logits, targets, class_weights=torch.ones(3))
    with pytest.raises(ValueError, match="gamma must be 0 or above, found -1"):
        focal_loss(logits, targets, -1.0)
    for options, message in (
        ({"cross_entropy": 0.0}, "one of the weights cross_entropy, dice, focal must be above 0"),
        ({"dice": -1.0}, "weight dice must be 0 or above"),
        ({"cross_entropy": math.nan}, "weight cross_entropy must be 0 or above"),
        ({"cross_entropy": 0.0, "dice": 1.0, "class_weights": [1.0, 1.0]}, "class_weights have no effect"),
        ({"class_weights": [1.0, -1.0]}, "class_weights must be 0 or above"),
        ({"class_weights": [0.0, 0.0]}, "one of them above 0"),
        ({"focal_gamma": -1.0}, "focal_gamma must be 0 or above"),
    ):
        with pytest.raises(ValueError, match=message):
            SegmentationLoss(**options)
