"""Losses of a dense detector: slow definitions, torchvision, and images without, with many and with odd objects."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou

from dinov2.loss.dense_detection_loss import (
    DenseDetectionLoss,
    assign_positions,
    distribution_focal_loss,
    varifocal_loss,
)

BINS = 8


def grid(size: int = 64, strides: tuple[int, ...] = (8, 16)) -> tuple[Tensor, Tensor]:
    """Points and strides of a square image."""
    rows = [
        (x * stride + stride / 2, y * stride + stride / 2, stride)
        for stride in strides
        for y in range(size // stride)
        for x in range(size // stride)
    ]
    table = torch.tensor(rows)
    return table[:, :2], table[:, 2]


def random_boxes(number: int, seed: int, size: int = 64, smallest: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(number, 2, generator=generator) * (size - 20)
    return torch.cat([corners, corners + smallest + torch.rand(number, 2, generator=generator) * 20], dim=1)


def random_outputs(batch: int, num_classes: int, seed: int = 0) -> dict[str, Tensor]:
    """As a head gives them: boxes around the points, and the distances that they are made of."""
    generator = torch.Generator().manual_seed(seed)
    points, strides = grid()
    distances = torch.randn(batch, len(points), 4 * BINS, generator=generator).requires_grad_()
    sides = (distances.unflatten(2, (4, BINS)).softmax(3) * torch.arange(BINS)).sum(3) * strides[:, None]
    boxes = torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=2)
    scores = torch.randn(batch, len(points), num_classes, generator=generator).requires_grad_()
    return {"boxes": boxes, "scores": scores, "distances": distances, "points": points, "strides": strides}


def iou(first: list[float], second: list[float]) -> float:
    width, height = (min(first[2 + axis], second[2 + axis]) - max(first[axis], second[axis]) for axis in (0, 1))
    common = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return common / (sum(areas) - common)


def slow_assignment(
    probabilities: Tensor, predicted: Tensor, points: Tensor, boxes: Tensor, labels: Tensor, min_side: float, most: int
) -> list[tuple[int, float]]:
    """Object (-1: none) and quality of every position, by the words of the docstring."""
    wanted: dict[int, list[tuple[int, float, float]]] = {}  # by object: position, alignment, overlap
    for number, (box, label) in enumerate(zip(boxes.tolist(), labels.tolist(), strict=True)):
        candidates = []
        for place, point in enumerate(points.tolist()):
            inside = box[0] < box[2] and box[1] < box[3]
            for axis in (0, 1):
                reach = max(box[2 + axis] - box[axis], min_side) / 2
                inside = inside and abs(point[axis] - (box[axis] + box[2 + axis]) / 2) <= reach
            if inside:
                overlap = iou(box, predicted[place].tolist())
                candidates.append((place, probabilities[place, label].item() ** 0.5 * overlap**6, overlap))
        wanted[number] = sorted(candidates, key=lambda entry: -entry[1])[:most]
    owners: dict[int, int] = {}
    for number, entries in wanted.items():
        for place, _, overlap in entries:
            if overlap == max(row[2] for rows in wanted.values() for row in rows if row[0] == place):
                owners.setdefault(place, number)
    found = [(-1, 0.0)] * len(points)
    for number, entries in wanted.items():
        own = [entry for entry in entries if owners[entry[0]] == number]
        for place, alignment, _ in own:
            best = max(0.1, *(entry[2] for entry in own))
            found[place] = (number, alignment / max(entry[1] for entry in own) * best)
    return found


@pytest.mark.parametrize(("num_objects", "most"), [(1, 10), (6, 3), (40, 10)])
def test_assignment_equals_its_slow_definition(num_objects: int, most: int) -> None:
    outputs = random_outputs(1, 3)
    probabilities, predicted, points = outputs["scores"][0].sigmoid(), outputs["boxes"][0], outputs["points"]
    boxes = random_boxes(num_objects, seed=num_objects)
    labels = torch.arange(num_objects) % 3
    boxes[-1] = boxes[0]  # the same place twice: the first object has it
    owner, quality = assign_positions(probabilities, predicted, points, boxes, labels, min_side=8, max_positions=most)
    expected = slow_assignment(probabilities, predicted, points, boxes, labels, 8, most)
    assert torch.where(quality > 0, owner, -1).tolist() == [number for number, _ in expected]
    torch.testing.assert_close(quality, torch.tensor([share for _, share in expected]), rtol=1e-4, atol=1e-9)
    assert not quality.requires_grad
    assert 0.1 <= quality.max() <= 1


@pytest.mark.parametrize("corner", [(0.2, 0.3), (19.0, 30.5), (31.5, 31.5), (60.0, 62.0)])
def test_the_smallest_object_has_a_position_and_one_without_area_none(corner: tuple[float, float]) -> None:
    points, _ = grid()
    far = torch.cat([points, points + 1], dim=1) + 100  # overlaps nothing
    box = torch.tensor([[*corner, corner[0] + 0.5, corner[1] + 1.0], [*corner, corner[0], corner[1] + 9]])
    owner, quality = assign_positions(
        torch.full((len(points), 1), 0.5), far, points, box, torch.tensor([0, 0]), min_side=8
    )
    assert quality.max() == pytest.approx(0.1)
    assert (owner[quality > 0] == 0).all()
    nearest = (points[quality > 0] - box[0, :2]).abs().amax(dim=1).min()
    assert nearest <= 5


def test_distribution_focal_loss_equals_its_slow_definition() -> None:
    logits = torch.randn(7, BINS, dtype=torch.float64, requires_grad=True)
    distances = torch.tensor([-1.0, 0.0, 0.3, 2.0, 5.75, 7.0, 9.0], dtype=torch.float64)
    expected = []
    for row, distance in zip(logits.softmax(dim=1).tolist(), distances.tolist(), strict=True):
        distance = min(max(distance, 0), BINS - 1)
        below = min(int(distance), BINS - 2)
        weight = distance - below
        expected.append(-(1 - weight) * math.log(row[below]) - weight * math.log(row[below + 1]))
    losses = distribution_focal_loss(logits, distances)
    assert losses.tolist() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda entry: distribution_focal_loss(entry, distances), logits)


def test_varifocal_loss_equals_its_slow_definition() -> None:
    logits, qualities = torch.tensor([-2.0, 0.5, 3.0, -1.0]), torch.tensor([0.0, 0.0, 0.8, 0.3])
    expected = []
    for probability, quality in zip(logits.sigmoid().tolist(), qualities.tolist(), strict=True):
        entropy = -quality * math.log(probability) - (1 - quality) * math.log(1 - probability)
        expected.append(entropy * (quality or 0.75 * probability**2))
    assert varifocal_loss(logits, qualities).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["bce", "varifocal"])
def test_terms_equal_sums_over_assigned_positions(kind: str) -> None:
    outputs = random_outputs(3, 2)
    boxes = [random_boxes(4, seed=1, smallest=20), torch.zeros(0, 4), random_boxes(2, seed=2, smallest=20)]
    labels = [torch.tensor([0, 1, 1, 0]), torch.zeros(0, dtype=torch.int64), torch.tensor([1, 0])]
    terms = DenseDetectionLoss(2.0, 3.0, 0.5, kind=kind)(outputs, boxes, labels)
    targets, overlaps, distances, total = torch.zeros_like(outputs["scores"]), 0.0, 0.0, 0.0
    for image in (0, 2):
        owner, quality = assign_positions(
            outputs["scores"][image].sigmoid(), outputs["boxes"][image], outputs["points"], boxes[image], labels[image],
            min_side=8,
        )  # fmt: skip
        for place in quality.nonzero().flatten().tolist():
            weight, box = quality[place].item(), boxes[image][owner[place]]
            targets[image, place, labels[image][owner[place]]] = weight
            total += weight
            overlaps += weight * (1 - complete_box_iou(outputs["boxes"][image, place][None], box[None]).item())
            point, stride = outputs["points"][place], outputs["strides"][place]
            sides = torch.cat([point - box[:2], box[2:] - point]) / stride
            rows = outputs["distances"][image, place].unflatten(0, (4, BINS))
            distances += weight * distribution_focal_loss(rows, sides).mean().item()
    assert total > 1
    classes = {"bce": F.binary_cross_entropy_with_logits, "varifocal": varifocal_loss}[kind]
    entropy = classes(outputs["scores"], targets, **({"reduction": "none"} if kind == "bce" else {})).sum().item()
    expected = {"classification": 2 * entropy, "ciou": 3 * overlaps, "distribution": 0.5 * distances}
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value / total, rel=1e-4), name


@pytest.mark.parametrize("kind", ["bce", "varifocal"])
@pytest.mark.parametrize("num_objects", [0, 1, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_objects_gives_finite_gradients(kind: str, num_objects: int, dtype: torch.dtype) -> None:
    outputs = random_outputs(2, 3)
    leaves = (outputs["scores"], outputs["distances"])
    outputs |= {name: outputs[name].to(dtype) for name in ("scores", "distances")}
    boxes = [random_boxes(num_objects, seed=3, smallest=0.0), torch.zeros(0, 4)]
    boxes[0][::7, 2] = boxes[0][::7, 0]  # without area
    labels = [torch.arange(num_objects) % 3, torch.zeros(0, dtype=torch.int64)]
    terms = DenseDetectionLoss(kind=kind)(outputs, boxes, labels)
    assert all(term.dtype == torch.float32 and term.isfinite() and term >= 0 for term in terms.values())
    sum(terms.values()).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert leaves[0].grad.any()
    assert leaves[1].grad.any() == (num_objects == 500)
    assert (terms["ciou"] > 0) == (num_objects == 500)  # a single object has no area


def test_wrong_settings_and_targets_are_named() -> None:
    with pytest.raises(ValueError, match="must be 0 or above, found -1"):
        DenseDetectionLoss(ciou=-1)
    with pytest.raises(ValueError, match="one of bce, varifocal, found 'focal'"):
        DenseDetectionLoss(kind="focal")
    outputs, boxes, labels = random_outputs(1, 2), [torch.zeros(2, 4)], [torch.zeros(2, dtype=torch.int64)]
    assert DenseDetectionLoss(1, 0, 0)(outputs, boxes, labels).keys() == {"classification"}
    for wrong_boxes, wrong_labels in ((boxes * 2, labels * 2), (boxes, [labels[0][:1]]), ([boxes[0][:, :3]], labels)):
        with pytest.raises(ValueError, match=r"each of the 1 images needs boxes \[n, 4\] and labels \[n\], found"):
            DenseDetectionLoss()(outputs, wrong_boxes, wrong_labels)
