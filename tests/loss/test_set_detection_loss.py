"""Matching against brute force, and the loss of a set of boxes against its definition in loops."""

import itertools
import logging
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.loss.set_detection_loss import SetDetectionLoss, match

SIZE = torch.tensor([80.0, 40.0, 80.0, 40.0])


def random_boxes(*shape: int) -> Tensor:
    """(cx, cy, w, h) in shares, within the image."""
    corners = torch.rand(*shape, 2, 2).sort(dim=-2).values
    return torch.cat([corners.mean(dim=-2), (corners[..., 1, :] - corners[..., 0, :]).clamp(min=0.01)], dim=-1)


def in_pixels(boxes: Tensor) -> Tensor:
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1) * SIZE


def slow_giou(a: list[float], b: list[float]) -> float:
    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1, 0) * max(y2 - y1, 0)

    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    shared = area(max(ax1, bx1), max(ay1, by1), min(ax2, bx2), min(ay2, by2))
    union = area(*a) + area(*b) - shared
    hull = area(min(ax1, bx1), min(ay1, by1), max(ax2, bx2), max(ay2, by2))
    return shared / union - (hull - union) / hull


def slow_focal(logit: float, positive: bool) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if positive else -0.75 * p**2 * math.log(1 - p)


@pytest.mark.parametrize(("queries", "objects", "repeats"), [(5, 3, 1), (3, 4, 1), (5, 2, 2), (3, 2, 3), (2, 0, 4)])
def test_matches_are_the_cheapest(queries: int, objects: int, repeats: int) -> None:
    costs = np.random.default_rng(queries).normal(size=(queries, objects))
    found, places = match(costs, repeats)
    count = min(queries, objects * repeats)
    assert len(set(found.tolist())) == len(found) == count
    assert np.bincount(places, minlength=1).max() <= repeats

    def every_choice() -> Iterator[float]:
        copies = [place for place in range(objects) for _ in range(repeats)]
        for chosen in itertools.permutations(range(queries), count):
            for order in itertools.combinations(copies, count):
                yield sum(costs[query, place] for query, place in zip(chosen, order, strict=True))

    assert costs[found, places].sum() == pytest.approx(min(every_choice()))


def random_outputs(num_objects: tuple[int, ...] = (2, 0, 3)) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
    """Two layers, five queries, two classes; the third image has as many noised objects as places."""
    batch, most = len(num_objects), max(1, *num_objects)
    outputs = {"image_size": SIZE}
    for name, layers, queries in (("layer", 2, 5), ("many", 2, 6), ("proposal", 1, 12), ("denoising", 2, 2 * most)):
        outputs[f"{name}_scores"] = torch.randn(layers, batch, queries, 2, requires_grad=True)
        outputs[f"{name}_boxes"] = random_boxes(layers, batch, queries).requires_grad_()
    known = [[*range(count), *[-2] * (most - count), *[-1] * count, *[-2] * (most - count)] for count in num_objects]
    outputs["denoising_targets"] = torch.tensor(known)
    boxes = [in_pixels(random_boxes(count)) for count in num_objects]
    return outputs, boxes, [torch.randint(2, (count,)) for count in num_objects]


def test_every_term_is_what_loops_add_up() -> None:
    torch.manual_seed(0)
    outputs, boxes, labels = random_outputs()
    loss = SetDetectionLoss(2.0, 5.0, 3.0, matches_per_object=2)
    found = loss(outputs, boxes, labels)

    def slow(name: str, repeats: int) -> np.ndarray:
        """Terms ``[L, 3]``."""
        terms, count = np.zeros((len(outputs[f"{name}_scores"]), 3)), 0
        for layer, image in np.ndindex(*outputs[f"{name}_scores"].shape[:2]):
            scores, shares = (outputs[f"{name}_{what}"][layer, image].tolist() for what in ("scores", "boxes"))
            targets = [[value / side for value, side in zip(box, SIZE, strict=True)] for box in boxes[image].tolist()]
            costs = np.zeros((len(scores), len(targets)))
            parts = np.zeros((len(scores), len(targets), 2))
            for query, place in np.ndindex(*costs.shape):
                x1, y1, x2, y2 = targets[place]
                distance = np.abs(np.subtract(shares[query], [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])).sum()
                corners = (in_pixels(torch.tensor(shares[query], dtype=torch.float64)) / SIZE).tolist()
                parts[query, place] = distance, 1 - slow_giou(corners, targets[place])
                logit = scores[query][labels[image][place]]
                focal = slow_focal(logit, True) - slow_focal(logit, False)
                costs[query, place] = 2 * focal + 5 * distance + 3 * (parts[query, place, 1] - 1)
            if name == "denoising":
                known = outputs["denoising_targets"][image].tolist()
                matches = [(query, number) for query, number in enumerate(known) if number >= 0]
            else:
                known = [-1] * len(scores)
                matches = list(zip(*match(costs, repeats), strict=True))
                asked = loss.costs(
                    outputs[f"{name}_scores"][layer, image],
                    outputs[f"{name}_boxes"][layer, image],
                    torch.tensor(targets).view(-1, 4)
                    @ torch.tensor([[0.5, 0, -1, 0], [0, 0.5, 0, -1], [0.5, 0, 1, 0], [0, 0.5, 0, 1]]),
                    labels[image],
                )
                np.testing.assert_allclose(asked.detach().numpy(), costs, rtol=1e-4, atol=1e-4)
            count += len(matches)
            seen = {query: labels[image][place] for query, place in matches}
            for query, row in enumerate(scores):
                if known[query] != -2:
                    terms[layer, 0] += 2 * sum(slow_focal(x, seen.get(query) == c) for c, x in enumerate(row))
            for query, place in matches:
                terms[layer, 1:] += [5, 3] * parts[query, place]
        return terms / (count / len(terms))

    layers = slow("layer", 1)
    expected = dict(zip(("classification", "l1", "giou"), layers[1], strict=True)) | {
        "auxiliary": layers[0].sum(),
        "proposals": slow("proposal", 1).sum(),
        "one_to_many": slow("many", 2).sum(),
        "denoising": slow("denoising", 0).sum(),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-4)


def test_what_the_head_does_not_have_is_left_out() -> None:
    outputs, boxes, labels = random_outputs()
    one_layer = {
        name: value[:1] if name.startswith("layer") else value
        for name, value in outputs.items()
        if name.startswith(("layer", "image"))
    }
    assert list(SetDetectionLoss()(one_layer, boxes, labels)) == ["classification", "l1", "giou"]


@pytest.mark.parametrize("num_objects", [(0, 0), (500, 1)])
def test_no_and_many_objects(num_objects: tuple[int, int], caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    outputs, boxes, labels = random_outputs(num_objects)
    loss = SetDetectionLoss()
    with caplog.at_level(logging.WARNING, logger="dinov2"):
        for _ in range(2):
            terms = loss(outputs, boxes, labels)
    torch.stack(list(terms.values())).sum().backward()
    for name, value in outputs.items():
        if value.requires_grad:
            assert value.grad is not None, name
            assert value.grad.isfinite().all()
            assert value.grad.any() == (bool(sum(num_objects)) or (name.endswith("scores") and "noising" not in name))
    messages = [record.message for record in caplog.records]
    if num_objects[0]:
        (message,) = messages
        assert "500 objects, and the head 5 queries" in message
        assert "raise num_queries" in message
    else:
        assert not messages
        assert not sum(terms[name].item() for name in ("l1", "giou", "denoising"))


def test_a_perfect_set_costs_next_to_nothing_and_a_diverged_one_is_not_a_number() -> None:
    torch.manual_seed(0)
    boxes, labels = random_boxes(1, 4), torch.tensor([0, 1, 1, 0])
    boxes[..., 2:] /= 10  # small defects
    logits = torch.full((1, 1, 4, 2), -20.0)
    logits[0, 0, range(4), labels] = 20.0
    shuffled = torch.tensor([2, 0, 3, 1])
    outputs = {"layer_scores": logits[:, :, shuffled], "layer_boxes": boxes[None, :, shuffled], "image_size": SIZE}
    loss = SetDetectionLoss()
    terms = loss(outputs, list(in_pixels(boxes)), [labels])
    assert sum(term.item() for term in terms.values()) < 0.01
    outputs["layer_boxes"] = torch.full_like(outputs["layer_boxes"], torch.nan)
    assert loss(outputs, list(in_pixels(boxes)), [labels])["l1"].isnan()


def test_wrong_input_is_named() -> None:
    outputs, boxes, labels = random_outputs()
    with pytest.raises(ValueError, match="outputs of a head in training, got scores"):
        SetDetectionLoss()({"scores": outputs["layer_scores"]}, boxes, labels)
    with pytest.raises(ValueError, match="3 images came with 2 entries of boxes, 3 of labels"):
        SetDetectionLoss()(outputs, boxes[:2], labels)
    with pytest.raises(ValueError, match="focal_alpha=2"):
        SetDetectionLoss(focal_alpha=2)
    with pytest.raises(ValueError, match="weights classification, l1, giou must be above 0"):
        SetDetectionLoss(0, 0, 0)
