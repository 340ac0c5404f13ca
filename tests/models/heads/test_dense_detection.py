"""The dense detection head: positions, boxes, first probabilities, gradients, export, and two squares by heart."""

from pathlib import Path

import pytest
import torch
from random_features import random_features
from torch import nn

from dinov2.loss.dense_detection_loss import DenseDetectionLoss
from dinov2.models.heads.dense_detection import DenseDetectionHead
from dinov2.models.task_model import TaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer


@pytest.mark.parametrize("detail", [True, False])
@pytest.mark.parametrize("finest", [4, 8, 32])
@pytest.mark.parametrize("patch_size", [14, 16])
def test_every_position_has_its_point_and_the_box_of_its_distances(patch_size: int, finest: int, detail: bool) -> None:
    head = DenseDetectionHead(16, 3, num_blocks=2, channels=16, output_stride=finest, detail=detail, distance_bins=5)
    height, width = 3 * patch_size, 5 * patch_size  # 42 x 70 or 48 x 80: not all strides divide them
    outputs = head(random_features(2), torch.randn(2, 3, height, width))
    places = []
    for stride in (stride for stride in (4, 8, 16, 32) if stride >= finest):
        rows, columns = -(-height // stride), -(-width // stride)
        for row in range(rows):
            for column in range(columns):
                places.append(((column + 0.5) * width / columns, (row + 0.5) * height / rows, stride))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "boxes": (2, len(places), 4),
        "scores": (2, len(places), 3),
        "distances": (2, len(places), 20),
        "points": (len(places), 2),
        "strides": (len(places),),
    }
    positions = torch.cat([outputs["points"], outputs["strides"][:, None]], dim=1)
    torch.testing.assert_close(positions, torch.tensor(places))
    for place in (0, len(places) // 2, -1):
        x, y, stride = places[place]
        rows = outputs["distances"][1, place].unflatten(0, (4, 5)).softmax(dim=1).tolist()
        left, top, right, bottom = (stride * sum(bin * share for bin, share in enumerate(row)) for row in rows)
        expected = [x - left, y - top, x + right, y + bottom]
        assert outputs["boxes"][1, place].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_maps_and_positions_are_in_the_same_order() -> None:
    """A class that is the brightness of the maps' values is where the bright corner of the image is."""
    head = DenseDetectionHead(16, 1, num_blocks=1, channels=16, output_stride=8)
    head.pyramid.forward = lambda features, images: [
        nn.functional.avg_pool2d(images[:, :1], stride).expand(-1, 16, -1, -1) for stride in (8, 16, 32)
    ]
    head.classes = nn.Conv2d(16, 1, 1)
    nn.init.ones_(head.classes.weight)
    images = torch.zeros(1, 3, 64, 96)
    images[:, :, 40:, :20] = 1
    outputs = head(random_features(1), images)
    for stride in (8, 16):
        own = outputs["strides"] == stride
        x, y = outputs["points"][own][outputs["scores"][0, own, 0] > 10].T
        assert x.max() < 20
        assert y.min() > 40 - stride


def test_boxes_are_exact_where_the_network_is_rounded() -> None:
    head = DenseDetectionHead(16, 1, num_blocks=1, channels=16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(random_features(1), torch.randn(2, 3, 48, 80))
    assert outputs["scores"].dtype == torch.bfloat16
    sides = (outputs["distances"].float().unflatten(2, (4, 16)).softmax(dim=3) * torch.arange(16)).sum(dim=3)
    sides = sides * outputs["strides"][:, None]
    expected = torch.cat([outputs["points"] - sides[..., :2], outputs["points"] + sides[..., 2:]], dim=2)
    torch.testing.assert_close(outputs["boxes"], expected)


def test_classes_begin_rare_and_boxes_small() -> None:
    torch.manual_seed(0)
    head = DenseDetectionHead(16, 4, num_blocks=1)
    outputs = head(random_features(1, grid=(6, 8)), torch.randn(2, 3, 96, 128))
    assert outputs["scores"].sigmoid().mean().item() == pytest.approx(0.01, rel=0.5)
    sides = (outputs["boxes"][..., 2:] - outputs["boxes"][..., :2]) / outputs["strides"][:, None]
    assert sides.mean().item() == pytest.approx(5, rel=0.2)


def test_certain_distances_of_zero_still_make_a_box() -> None:
    head = DenseDetectionHead(16, 1, num_blocks=1, channels=16)
    with torch.no_grad():
        head.distances[-1].bias.copy_(torch.eye(16)[0].repeat(4) * 1e4)
    outputs = head(random_features(1), torch.randn(2, 3, 48, 80))
    assert (outputs["boxes"][..., 2:] > outputs["boxes"][..., :2]).all()
    boxes = [torch.tensor([[10.0, 10.0, 30.0, 30.0]])] * 2
    sum(DenseDetectionLoss()(outputs, boxes, [torch.tensor([0])] * 2).values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("detail", [True, False])
def test_gradients_reach_every_parameter_and_the_features(detail: bool) -> None:
    torch.manual_seed(0)
    head = DenseDetectionHead(16, 2, num_blocks=2, channels=16, detail=detail, distance_bins=4)
    features = random_features(2)
    outputs = head(features, torch.randn(2, 3, 48, 80))
    boxes = [torch.tensor([[10.0, 10.0, 30.0, 20.0], [0.0, 0.0, 80.0, 48.0]]), torch.zeros(0, 4)]
    labels = [torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64)]
    sum(DenseDetectionLoss()(outputs, boxes, labels).values()).backward()
    silent = [name for name, value in head.named_parameters() if value.grad is None or not value.grad.any()]
    assert not silent
    assert all(patches.grad.any() for patches, _ in features)
    assert bool(list(head.pyramid.branch.parameters())) == detail


def test_export_gives_the_same(tmp_path: Path) -> None:
    head = DenseDetectionHead(16, 3, num_blocks=1, channels=16).eval()
    features, images = [tuple(entry.detach() for entry in random_features(1)[0])], torch.randn(2, 3, 42, 70)
    expected = head(features, images)
    found = torch.export.export(head, (features, images)).module()(features, images)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path / "head.onnx"
    torch.onnx.export(head, (features, images), path, dynamo=True)
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = dict(zip((entry.name for entry in session.get_inputs()), (*features[0], images), strict=True))
    values = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    for value, reference in zip(values, expected.values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(value), reference, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["bce", "varifocal"])
def test_two_squares_are_learnt_by_heart(kind: str) -> None:
    torch.manual_seed(0)
    backbone = DinoVisionTransformer(img_size=64, patch_size=16, embed_dim=16, depth=1, num_heads=2)
    model = TaskModel(backbone, DenseDetectionHead(16, 2, num_blocks=1, channels=16), blocks=[0])
    images = torch.zeros(1, 3, 64, 64)
    boxes, labels = torch.tensor([[6.0, 9.0, 20.0, 23.0], [30.0, 28.0, 58.0, 56.0]]), torch.tensor([0, 1])
    for (x1, y1, x2, y2), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
        images[0, label, y1:y2, x1:x2] = 2
    criterion, optimizer = DenseDetectionLoss(kind=kind), torch.optim.Adam(model.head.parameters(), lr=0.01)
    for _ in range(100):
        outputs = model(images)
        loss = sum(criterion(outputs, [boxes], [labels]).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = outputs["scores"][0].sigmoid().max(dim=0)  # of each class
    assert best.values.min() > 0.7
    assert (outputs["boxes"][0, best.indices] - boxes).abs().max() < 2


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="distance_bins must be 2 or more, got 1"):
        DenseDetectionHead(16, 2, distance_bins=1)
    with pytest.raises(ValueError, match="finest stride of a pyramid must be one of"):
        DenseDetectionHead(16, 2, output_stride=14)
