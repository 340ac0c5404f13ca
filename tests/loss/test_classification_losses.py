"""Losses of image classes against torch and loops, with labels that are missing."""

import math

import pytest
import torch
import torch.nn.functional as F

from dinov2.loss.classification_losses import ClassificationLoss, MultiLabelLoss


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_the_labelled_rows_is_that_of_torch(weights: list[float] | None, smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(9, 3, dtype=torch.float64), torch.tensor([0, 1, -1, 2, 2, -1, 0, 1, 0])
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    loss = ClassificationLoss(label_smoothing=smoothing, class_weights=weights)
    known = labels >= 0
    expected = F.cross_entropy(logits[known], labels[known], tensor, label_smoothing=smoothing)
    torch.testing.assert_close(loss(logits, labels), {"cross_entropy": expected})
    assert loss.state_dict() == {}


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 3.0]])
def test_multi_label_equals_a_loop_over_known_entries(weights: list[float] | None) -> None:
    torch.manual_seed(1)
    logits = torch.randn(5, 3, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 1], [-1, 0, 1], [-1, -1, -1], [1, 1, 0], [0, -1, 0]]).float()
    terms = []
    for row, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        for number, (value, target) in enumerate(zip(row, targets, strict=True)):
            if target >= 0:
                probability = 1 / (1 + math.exp(-value))
                weight = weights[number] if weights else 1.0
                terms.append(-weight * math.log(probability) if target else -math.log(1 - probability))
    value = MultiLabelLoss(positive_weights=weights)(logits, labels)["binary_cross_entropy"]
    assert value.item() == pytest.approx(sum(terms) / len(terms))
    torch.testing.assert_close(
        MultiLabelLoss(positive_weights=weights)(logits, labels.long())["binary_cross_entropy"], value
    )


@pytest.mark.parametrize(
    "loss", [ClassificationLoss(label_smoothing=0.1), ClassificationLoss(class_weights=[1.0, 2.0]), MultiLabelLoss()]
)
def test_without_a_label_the_loss_is_zero_and_part_of_the_graph(loss) -> None:
    logits = torch.full((3, 2), 1e30, requires_grad=True)
    labels = torch.full((3, 2) if isinstance(loss, MultiLabelLoss) else (3,), -1)
    (value,) = loss(logits, labels).values()
    value.backward()
    assert value.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 2))


@pytest.mark.parametrize(
    "loss", [ClassificationLoss(class_weights=[1.0, 2.0]), MultiLabelLoss(positive_weights=[1.0, 2.0])]
)
def test_half_precision_is_computed_in_float32(loss) -> None:
    logits = torch.randn(4, 2).bfloat16()
    labels = torch.tensor([0, 1, 1, -1])
    if isinstance(loss, MultiLabelLoss):
        labels = torch.stack([labels, labels], dim=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (value,) = loss(logits, labels).values()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, *loss(logits.float(), labels).values())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"found \[2, 3\] and \[2, 3\]"):
        ClassificationLoss()(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"found \[2, 3\] and \[2\]"):
        MultiLabelLoss()(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"class_weights has shape \[2\], but the model has 3 classes"):
        ClassificationLoss(class_weights=[1.0, 1.0])(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"positive_weights has shape \[2\], but the model has 3 classes"):
        MultiLabelLoss(positive_weights=[1.0, 1.0])(torch.zeros(2, 3), torch.zeros(2, 3))
    for smoothing in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 1\)"):
            ClassificationLoss(label_smoothing=smoothing)
    with pytest.raises(ValueError, match="class_weights must be 0 or above"):
        ClassificationLoss(class_weights=[math.inf, 1.0])
    with pytest.raises(ValueError, match="positive_weights must be 0 or above"):
        MultiLabelLoss(positive_weights=[-1.0])
    with pytest.raises(IndexError):
        ClassificationLoss()(torch.zeros(1, 3), torch.tensor([3]))
