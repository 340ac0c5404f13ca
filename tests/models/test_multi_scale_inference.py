"""Averaging over scales and mirror images, against a loop and the symmetries it must have."""

import pytest
import torch
import torch.nn.functional as F

from dinov2.models.heads.segmentation import BNHead
from dinov2.models.task_model import MultiScaleInference, TensorTaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer


@pytest.fixture
def model() -> TensorTaskModel:
    torch.manual_seed(0)
    backbone = DinoVisionTransformer(img_size=28, patch_size=7, embed_dim=16, depth=2, num_heads=2)
    head = BNHead(16, 3, num_blocks=2)
    torch.nn.init.normal_(head.conv_seg.weight)
    return TensorTaskModel(backbone, head, blocks=[0, 1]).eval()


def test_once_is_the_model_itself(model: TensorTaskModel) -> None:
    images = torch.randn(2, 3, 20, 30)
    result = MultiScaleInference(model, scales=[1.0], flip=False)(images)
    torch.testing.assert_close(result, model(images).log_softmax(1), atol=1e-5, rtol=0)


def test_probabilities_are_the_mean_over_all_copies(model: TensorTaskModel) -> None:
    images = torch.randn(1, 3, 20, 30)
    seen = []
    for size in ((20, 30), (26, 40), (40, 60)):  # 20 * 1.32 = 26.4, 30 * 1.32 = 39.6
        scaled = F.interpolate(images, size=size, mode="bilinear")
        for mirrored in (False, True):
            logits = model(scaled.flip(3) if mirrored else scaled)
            logits = logits.flip(3) if mirrored else logits
            seen.append(F.interpolate(logits, size=(20, 30), mode="bilinear").softmax(1))
    result = MultiScaleInference(model, scales=[1.0, 1.32, 2.0])(images)
    torch.testing.assert_close(result.exp(), sum(seen) / 6, atol=1e-5, rtol=0)
    torch.testing.assert_close(result.softmax(1), result.exp())


def test_a_mirrored_image_gets_the_mirrored_mask(model: TensorTaskModel) -> None:
    images = torch.randn(1, 3, 21, 28)
    both = MultiScaleInference(model, scales=[1.0, 0.5])
    torch.testing.assert_close(both(images.flip(3)), both(images).flip(3), atol=1e-5, rtol=0)
    one = MultiScaleInference(model, scales=[1.0, 0.5], flip=False)
    assert not torch.allclose(one(images.flip(3)), one(images).flip(3), atol=1e-3)


def test_a_pixel_is_scaled_too(model: TensorTaskModel) -> None:
    assert MultiScaleInference(model, scales=[0.1, 1.0])(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("scales", [[], [0.0], [1.0, -1.0]])
def test_scales_must_be_positive(model: TensorTaskModel, scales: list[float]) -> None:
    with pytest.raises(ValueError, match="scales must be one or more positive numbers"):
        MultiScaleInference(model, scales=scales)
