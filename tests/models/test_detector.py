"""The detector that is built by name."""

import pytest
import torch

from dinov2.loss.set_detection_loss import SetDetectionLoss
from dinov2.models.detector import DINOv2ObjectDetector
from dinov2.models.vision_transformer import DinoVisionTransformer


def test_it_is_vit_small_with_a_hundred_queries() -> None:
    detector = DINOv2ObjectDetector(num_classes=80).eval()
    assert (detector.backbone.embed_dim, detector.backbone.n_blocks, detector.patch_size) == (384, 12, (14, 14))
    with torch.no_grad():
        outputs = detector(torch.randn(2, 3, 224, 224))
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "pred_logits": (2, 100, 80),
        "pred_boxes": (2, 100, 4),
    }
    assert ((outputs["pred_boxes"] >= 0) & (outputs["pred_boxes"] <= 1)).all()


def test_it_takes_a_backbone_and_trains() -> None:
    backbone = DinoVisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=12, num_heads=2)
    detector = DINOv2ObjectDetector(3, num_queries=5, backbone=backbone, channels=16, num_layers=1)
    targets = {"boxes": [torch.tensor([[3.0, 4, 20, 30]])], "box_labels": [torch.tensor([2])]}
    outputs = detector(torch.randn(1, 3, 32, 48), targets)
    assert outputs["pred_logits"].shape == (1, 5, 3)
    terms = SetDetectionLoss()(outputs, targets["boxes"], targets["box_labels"])
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in detector.head.parameters())
    with pytest.raises(ValueError, match=r"multiples of the patch \(16, 16\), got \[1, 3, 32, 40\]"):
        detector(torch.randn(1, 3, 32, 40))
