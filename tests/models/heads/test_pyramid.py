"""The pyramid of patch tokens and pixels: sizes, what each map sees, defects smaller than a patch."""

import pytest
import torch
import torch.nn.functional as F
from random_features import random_features

from dinov2.models.heads.pyramid import FeaturePyramid, PyramidHead, pyramid_strides
from dinov2.models.task_model import TaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer


@pytest.mark.parametrize("patch_size", [8, 14, 32])
@pytest.mark.parametrize(("strides", "class_token"), [((8, 16, 32), False), ((2, 4, 8, 16, 32), True), ((32,), False)])
def test_every_map_has_the_grid_of_its_stride(patch_size: int, strides: tuple[int, ...], class_token: bool) -> None:
    pyramid = FeaturePyramid(16, num_blocks=2, channels=24, output_stride=strides[0], class_token=class_token)
    assert pyramid.strides == strides
    images = torch.randn(2, 3, 3 * patch_size, 5 * patch_size)
    sizes = [(24, -(-images.shape[-2] // stride), -(-images.shape[-1] // stride)) for stride in strides]
    assert [tuple(entry.shape[1:]) for entry in pyramid(random_features(2), images)] == sizes


def test_every_map_sees_its_pixels_the_tokens_and_the_coarser_map() -> None:
    torch.manual_seed(0)
    pyramid = FeaturePyramid(16, num_blocks=1, channels=16, output_stride=16, image_channels=6).eval()
    features, images = random_features(1), torch.randn(2, 6, 48, 80)
    detail = [images]
    for step in pyramid.branch:
        detail.append(step(detail[-1]))
    assert len(detail) == 6
    tokens = pyramid.mix_blocks(features[0][0])  # stride 16: the grid of the patches
    smaller = F.interpolate(tokens, (2, 3), mode="bilinear")
    coarse = pyramid.join[1](torch.cat([detail[5], smaller], dim=1))
    larger = F.interpolate(coarse, (3, 5), mode="bilinear")
    fine = pyramid.join[0](torch.cat([detail[4], tokens, larger], dim=1))
    for found, expected in zip(pyramid(features, images), (fine, coarse), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_is_smaller_than_a_patch_is_learnt_on_a_frozen_backbone_of_any_size() -> None:
    torch.manual_seed(0)
    backbone = DinoVisionTransformer(img_size=32, patch_size=16, embed_dim=16, depth=2, num_heads=2)
    model = TaskModel(backbone, PyramidHead(16, 2, num_blocks=2, channels=16, output_stride=2), blocks=[0, 1])
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.01)
    images = torch.randn(4, 3, 30, 41) * 0.1  # padded to 32 x 48
    mask = torch.zeros(4, 30, 41, dtype=torch.long)
    for number, (row, column) in enumerate([(2, 3), (10, 30), (20, 20), (24, 36)]):
        mask[number, row : row + 4, column : column + 4] = 1
    images += 2 * mask[:, None]
    for _ in range(60):
        logits = model(images)["logits"]
        loss = F.cross_entropy(logits, mask, weight=torch.tensor([1.0, 20.0]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.shape == (4, 2, 30, 41)
    found = logits.argmax(dim=1) == 1
    assert (found & (mask == 1)).sum() / (found | (mask == 1)).sum() > 0.4


def test_wrong_settings_are_named() -> None:
    assert pyramid_strides(4) == (4, 8, 16, 32)
    for stride in (1, 6, 64):
        with pytest.raises(ValueError, match=rf"one of \[2, 4, 8, 16, 32\] pixels, got {stride}"):
            PyramidHead(16, 2, output_stride=stride)
    with pytest.raises(ValueError, match="2 blocks, got those of 3"):
        FeaturePyramid(16, num_blocks=2)(random_features(3), torch.zeros(2, 3, 42, 70))


def test_without_the_branch_on_pixels_maps_are_of_tokens_alone() -> None:
    torch.manual_seed(0)
    pyramid = FeaturePyramid(16, num_blocks=1, channels=16, output_stride=16, detail=False)
    features = random_features(1)
    assert not list(pyramid.branch.parameters())
    found = pyramid(features, torch.randn(2, 3, 44, 70))
    coarse = pyramid.join[1](F.interpolate(pyramid.mix_blocks(features[0][0]), (2, 3), mode="bilinear"))
    assert [tuple(entry.shape) for entry in found] == [(2, 16, 3, 5), (2, 16, 2, 3)]
    torch.testing.assert_close(found[1], coarse)
    for entry, again in zip(found, pyramid(features, torch.zeros(2, 3, 44, 70)), strict=True):
        torch.testing.assert_close(entry, again)
