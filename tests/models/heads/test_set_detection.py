"""The set head: sizes, who sees whom, gradients, export, and learning a few boxes by heart."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from random_features import random_features
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from dinov2.loss.set_detection_loss import SetDetectionLoss
from dinov2.models.heads.set_detection import NO_QUERY, NOT_AN_OBJECT, SetDetectionHead, noise_objects

PLAIN: Mapping[str, Any] = {"two_stage": False, "num_denoising": 0, "one_to_many": False}
KINDS = [
    {},
    {"cross_attention": "standard"},
    {"two_stage": False, "detail": False},
    {"cross_attention": "standard", **PLAIN},
]


def make_head(**options: Any) -> SetDetectionHead:
    torch.manual_seed(0)
    return SetDetectionHead(
        16, 3, **{"num_blocks": 2, "channels": 16, "num_queries": 6, "num_layers": 2, "num_denoising": 8, **options}
    )


def make_targets(*counts: int) -> dict[str, list[Tensor]]:
    corners = [torch.rand(count, 2, 2).sort(dim=1).values * torch.tensor([70, 42]) for count in counts]
    boxes = [entry.flatten(1) + torch.tensor([0, 0, 1, 1]) for entry in corners]
    return {"boxes": boxes, "box_labels": [torch.randint(3, (count,)) for count in counts]}


@pytest.mark.parametrize("options", KINDS)
def test_predictions_are_boxes_in_the_image_and_gradients_reach_every_parameter(options: Mapping[str, Any]) -> None:
    head, features, images = make_head(**options), random_features(2), torch.randn(2, 3, 42, 70)
    for name, parameter in head.named_parameters():
        if name.startswith("refine"):
            torch.nn.init.normal_(parameter, std=0.1)  # at first zero, and so are gradients before it
    for counts in ((3, 1), (0, 0), (500, 0)):
        targets = make_targets(*counts)
        head.zero_grad()
        outputs = head(features, images, targets)
        loss = SetDetectionLoss()(outputs, targets["boxes"], targets["box_labels"])
        torch.stack(list(loss.values())).sum().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient: processes would wait for it"
            if counts == (3, 1):
                assert parameter.grad.any(), name
            assert parameter.grad.isfinite().all()
    head.eval()
    outputs = head(features, images)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "scores": (2, 6, 3),
        "boxes": (2, 6, 4),
        "normalized_boxes": (2, 6, 4),
    }
    assert ((outputs["normalized_boxes"] >= 0) & (outputs["normalized_boxes"] <= 1)).all()
    pixels = box_convert(outputs["normalized_boxes"] * torch.tensor([70, 42, 70, 42]), "cxcywh", "xyxy")
    torch.testing.assert_close(outputs["boxes"], pixels)


def test_untrained_two_stages_begin_at_cells_and_give_what_small_maps_have() -> None:
    head = make_head(num_queries=91, output_stride=16).eval()
    outputs = head(random_features(2), torch.randn(2, 3, 112, 160))
    # 7 x 10 cells of 16 pixels and 4 x 5 of 32 make 90 positions, and the smaller have the smaller boxes.
    assert outputs["scores"].shape == (2, 90, 3)
    order = outputs["normalized_boxes"][0, :, 2].argsort()
    centres = outputs["normalized_boxes"][0, order[:70], :2] * torch.tensor([10, 7]) - 0.5
    torch.testing.assert_close(centres, centres.round(), atol=1e-4, rtol=0)
    assert len(centres.round().unique(dim=0)) == 70
    assert outputs["scores"].sigmoid().mean() < 0.05


def test_no_group_sees_another() -> None:
    """Ground truth must not leak into what is predicted without it, nor from one noised copy to the next."""
    head, features, images = make_head(), random_features(2), torch.randn(2, 3, 42, 70)
    targets = make_targets(2, 1)
    with torch.no_grad():
        without = head(features, images)
        with_targets = head(features, images, targets)
        assert set(with_targets) - set(without) == {f"denoising_{what}" for what in ("scores", "boxes", "targets")}
        for name, value in without.items():
            torch.testing.assert_close(value, with_targets[name])
        torch.manual_seed(1)
        before = head(features, images, targets)
        head.several_may_match.add_(1)
        torch.manual_seed(1)
        after = head(features, images, targets)
        for name, value in before.items():
            assert torch.allclose(value, after[name]) == (name != "many_scores"), name

        # One noised copy of four is told other classes: only its own 4 queries (2 near, 2 far) may change.
        def tell_another(module: torch.nn.Module, given: Any, embedded: Tensor) -> Tensor:
            return torch.cat([embedded[:, :4] + 1, embedded[:, 4:]], dim=1)

        head.noised_classes.register_forward_hook(tell_another)
        torch.manual_seed(1)
        changed = head(features, images, targets)["denoising_scores"] - after["denoising_scores"]
        assert changed.shape[2] == 16
        assert changed[:, :, :4].any(dim=-1).all()
        torch.testing.assert_close(changed[:, :, 4:], torch.zeros_like(changed[:, :, 4:]))


@pytest.mark.parametrize("counts", [(3, 1, 0), (0, 0), (500, 2), (100,)])
def test_noised_objects_are_near_or_far_and_known(counts: Sequence[int]) -> None:
    torch.manual_seed(0)
    boxes = [torch.rand(count, 2).repeat(1, 2) * 0.5 + torch.tensor([0.1, 0.2, 0.3, 0.3]) for count in counts]
    labels = [torch.randint(1000, (count,)) for count in counts]
    said, noised, objects = noise_objects(boxes, labels, 1000, 100)
    most = min(max(1, *counts, 1), 100)
    assert said.shape == objects.shape == (len(counts), 100 // most, 2 * most)
    assert ((noised >= 0) & (noised <= 1)).all()
    for image, count in enumerate(counts):
        for part, told, places in zip(objects[image], said[image], noised[image], strict=True):
            near, far = part.split(most)
            assert (far == torch.where(near == NO_QUERY, NO_QUERY, NOT_AN_OBJECT)).all()
            real = near[near >= 0]
            assert len(real.unique()) == len(real) == min(count, most)
            assert set(near.tolist()) <= {NO_QUERY, *range(count)}
            truth = boxes[image][real]
            half = (truth[:, 2:] - truth[:, :2]).repeat(1, 2) / 2
            moved = [
                (box_convert(side[near >= 0], "cxcywh", "xyxy") - truth).abs() / half for side in places.split(most)
            ]
            assert (moved[0] <= 1 + 1e-4).all()
            assert (moved[1] <= 2 + 1e-4).all()
            if len(real) > 50:
                assert moved[1].mean() > moved[0].mean() + 0.4  # not 1: what swaps or leaves the image comes back
                assert 0.6 < (told.split(most)[0][near >= 0] == labels[image][real]).float().mean() < 0.9


@pytest.mark.parametrize("options", KINDS[::3])
def test_evaluation_exports_without_grid_sample(options: Mapping[str, Any]) -> None:
    head, features, images = make_head(**options).eval(), random_features(2, batch=1), torch.randn(1, 3, 42, 70)
    features = [(maps.detach(), cls.detach()) for maps, cls in features]
    expected = head(features, images)
    exported = torch.export.export(head, (features, images))
    found = exported.module()(features, images)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert "grid_sampl" not in exported.graph_module.code
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        return
    program = torch.onnx.export(head, (features, images), dynamo=True, verbose=False)
    assert program is not None
    assert "GridSample" not in {node.op_type for node in program.model.graph}


@pytest.mark.parametrize("options", [{}, {"cross_attention": "standard"}])
def test_a_few_boxes_are_learnt_by_heart(options: Mapping[str, Any]) -> None:
    torch.manual_seed(0)
    head = SetDetectionHead(3, 2, num_blocks=1, channels=32, num_queries=12, num_layers=2, num_denoising=8, **options)
    boxes = [torch.tensor([[8.0, 10, 20, 18], [40, 30, 50, 52]]), torch.tensor([[30.0, 6, 44, 20]])]
    labels = [torch.tensor([0, 1]), torch.tensor([1])]
    images = 0.1 * torch.randn(2, 3, 64, 64)
    for image, places, classes in zip(images, boxes, labels, strict=True):
        for (x1, y1, x2, y2), label in zip(places.int().tolist(), classes.tolist(), strict=True):
            image[label, y1:y2, x1:x2] += 2
    patches, loss = torch.nn.functional.avg_pool2d(images, 8), SetDetectionLoss()
    features = [(patches, patches.mean(dim=(2, 3)))]
    optimizer = torch.optim.AdamW(head.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=110, pct_start=0.1)
    for _ in range(110):
        terms = loss(head(features, images, {"boxes": boxes, "box_labels": labels}), boxes, labels)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    outputs = head.eval()(features, images)
    for image, (places, classes) in enumerate(zip(boxes, labels, strict=True)):
        scores, found = outputs["scores"][image].sigmoid().max(dim=1)
        best = scores.argsort(descending=True)
        chosen = best[: len(places)]
        assert scores[best[len(places)]] < 0.5 * scores[chosen].min()  # nothing to suppress
        overlaps = box_iou(outputs["boxes"][image, chosen], places)
        assert (overlaps.amax(dim=0) > 0.8).all()
        assert (found[chosen][overlaps.argmax(dim=0)] == classes).all()


def test_wrong_settings_are_named() -> None:
    for options, message in (
        ({"cross_attention": "other"}, "one of deformable, standard, got 'other'"),
        ({"channels": 12}, "channels=12 must be a multiple of the 8 attention heads"),
        ({"num_queries": 0}, "num_queries=0"),
        ({"num_denoising": -1}, "num_denoising=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_head(**options)
