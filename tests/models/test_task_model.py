"""Backbone and head joined: padding and cropping for any size, features of the right blocks, images of parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.heads.classification import LinearClassifier, PartClassifier
from dinov2.models.heads.features import Features, PixelHead
from dinov2.models.heads.segmentation import BNHead
from dinov2.models.task_model import ComparingTaskModel, MultiScaleInference, TaskModel, TensorTaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer


class FirstChannels(nn.Module):
    """Gives the first two channels of the first block's map as they are."""

    def forward(self, features: Features) -> Tensor:
        return features[0][0][:, :2]


@pytest.fixture
def backbone() -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(img_size=(28, 21), patch_size=(14, 7), embed_dim=16, depth=3, num_heads=2)
    return model.eval()


@pytest.mark.parametrize("size", [(1, 1), (14, 7), (28, 21), (15, 8), (27, 20), (13, 40), (1, 30)])
def test_any_size_is_padded_at_the_centre_and_cropped_back(
    backbone: DinoVisionTransformer, size: tuple[int, int]
) -> None:
    """The slow way: put the image into a larger one of zeros, predict, cut the same window out."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, *size)
    model = TensorTaskModel(backbone, BNHead(16, 3, num_blocks=2), blocks=[0, 2]).eval()
    larger = (-(-size[0] // 14) * 14, -(-size[1] // 7) * 7)
    top, left = (larger[0] - size[0]) // 2, (larger[1] - size[1]) // 2
    canvas = torch.zeros(2, 3, *larger)
    canvas[:, :, top : top + size[0], left : left + size[1]] = images
    pairs = backbone.get_intermediate_layers(canvas, n=[0, 2], reshape=True, return_class_token=True)
    logits = F.interpolate(model.head(pairs), size=larger, mode="bilinear", align_corners=False)
    expected = logits[:, :, top : top + size[0], left : left + size[1]]
    assert model(images).shape == (2, 3, *size)
    torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", [True, False])
def test_features_are_those_of_the_named_blocks_in_order(backbone: DinoVisionTransformer, norm: bool) -> None:
    images = torch.randn(2, 3, 28, 21)
    model = TensorTaskModel(backbone, FirstChannels(), blocks=[2, 0], norm=norm)
    tokens = backbone.prepare_tokens_with_masks(images)
    outputs = []
    for block in backbone.blocks:
        tokens = block(tokens)
        outputs.append(backbone.norm(tokens) if norm else tokens)
    for (patches, cls), expected in zip(model.features(images), (outputs[2], outputs[0]), strict=True):
        torch.testing.assert_close(patches.flatten(2).transpose(1, 2), expected[:, 1:])
        torch.testing.assert_close(cls, expected[:, 0])
    assert model.blocks == (2, 0)
    assert model.patch_size == (14, 7)


def test_outputs_have_names(backbone: DinoVisionTransformer) -> None:
    class Boxes(nn.Module):
        def forward(self, features: Features) -> dict[str, Tensor]:
            return {"boxes": features[0][1], "scores": features[0][1][:, :1]}

    images = torch.zeros(2, 3, 28, 21)
    (name,) = TaskModel(backbone, FirstChannels(), blocks=[0], output="depth")(images)
    assert name == "depth"
    model = TaskModel(backbone, Boxes(), blocks=[0])
    assert list(model(images)) == ["boxes", "scores"]
    assert {name.partition(".")[0] for name in model.state_dict()} == {"backbone"}


def test_classes_come_per_image(backbone: DinoVisionTransformer) -> None:
    model = TensorTaskModel(backbone, LinearClassifier(16, 5), blocks=[2])
    images = torch.randn(3, 3, 20, 20)
    logits = model(images)
    assert logits.shape == (3, 5)
    padded = F.pad(images, (0, 1, 4, 4))
    torch.testing.assert_close(model(padded), logits)


def test_parts_are_predicted_from_their_valid_images(backbone: DinoVisionTransformer) -> None:
    torch.manual_seed(0)
    head = PartClassifier(LinearClassifier(16, 4, num_blocks=2))
    nn.init.normal_(head.part_pool.rating.weight)
    model = TensorTaskModel(backbone, head, blocks=[1, 2]).eval()
    images = torch.randn(2, 3, 3, 28, 21)
    valid = torch.tensor([[True, True, False], [False, True, False]])
    logits = model(images.masked_fill(~valid.view(2, 3, 1, 1, 1), torch.nan), valid)
    assert logits.shape == (2, 4)
    torch.testing.assert_close(logits[1:], model(images[1, 1:2]))
    torch.testing.assert_close(logits[:1], model(images[:1, :2]))
    assert not torch.allclose(logits[:1], model(images[:1]))


class AllChannels(PixelHead):
    """Gives the map of the only block, its class token, and the images as they come."""

    def forward(self, features: Features, images: Tensor, shift: float = 0.0) -> dict[str, Tensor]:
        ((maps, tokens),) = features
        return {"maps": maps, "tokens": tokens + shift, "images": images}


def test_a_reference_goes_through_the_same_backbone_and_the_head_sees_what_differs(
    backbone: DinoVisionTransformer,
) -> None:
    images, reference = torch.randn(2, 2, 3, 27, 20).unbind()
    compared = ComparingTaskModel(backbone, AllChannels(), blocks=[1])
    alone = TaskModel(backbone, AllChannels(), blocks=[1])
    ours, theirs = alone(images), alone(reference)
    found = compared(images, reference, shift=0.0)
    for name in ("maps", "tokens"):
        own, difference = found[name].chunk(2, dim=1)
        torch.testing.assert_close(own, ours[name])
        torch.testing.assert_close(difference, (ours[name] - theirs[name]).abs(), atol=1e-5, rtol=1e-4)
    own, difference = found["images"].chunk(2, dim=1)
    assert torch.equal(own, ours["images"])
    assert torch.equal(difference, ours["images"] - theirs["images"])
    same = compared(images, images, shift=1.0)
    assert torch.equal(same["tokens"][:, 16:], torch.ones(2, 16)), "what is for the head reaches it"
    torch.testing.assert_close(same["maps"][:, 16:], torch.zeros_like(ours["maps"]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"\[2, 3, 27, 20\] and \[2, 3, 27, 19\]"):
        compared(images, reference[..., 1:])


def test_parts_of_another_form_are_refused(backbone: DinoVisionTransformer) -> None:
    parts = torch.zeros(2, 3, 3, 14, 7)
    over_parts = TensorTaskModel(backbone, PartClassifier(LinearClassifier(16, 4)), blocks=[2])
    with pytest.raises(ValueError, match="LinearClassifier takes single images"):
        TensorTaskModel(backbone, LinearClassifier(16, 4), blocks=[2])(parts)
    with pytest.raises(ValueError, match=r"need a mask \[2, 3\] of valid images, got \[2, 2\]"):
        over_parts(parts, torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"positions \[1\]"):
        over_parts(parts, torch.tensor([[True] * 3, [False] * 3]))
    with pytest.raises(ValueError, match=r"needs images \[parts, images, 3, H, W\]"):
        over_parts(parts[0], torch.ones(3, 1, dtype=torch.bool))


def test_images_without_pixels_and_blocks_that_do_not_exist_are_refused(backbone: DinoVisionTransformer) -> None:
    model = TensorTaskModel(backbone, BNHead(16, 2), blocks=[2])
    for height, width in ((0, 14), (14, 0)):
        with pytest.raises(ValueError, match=f"images of {height} x {width} pixels"):
            model(torch.zeros(1, 3, height, width))
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\], got \[3, 14, 7\]"):
        model(torch.zeros(3, 14, 7))
    for blocks in ([], [3], [-1], [0, 5]):
        with pytest.raises(ValueError, match="from 0 to 2"):
            TensorTaskModel(backbone, FirstChannels(), blocks=blocks)


@pytest.fixture
def model() -> TensorTaskModel:
    torch.manual_seed(0)
    backbone = DinoVisionTransformer(img_size=28, patch_size=7, embed_dim=16, depth=2, num_heads=2)
    head = BNHead(16, 3, num_blocks=2)
    torch.nn.init.normal_(head.conv_seg.weight)
    return TensorTaskModel(backbone, head, blocks=[0, 1]).eval()


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


def test_a_mirrored_image_gets_the_mirrored_mask_and_any_positive_scale_will_do(model: TensorTaskModel) -> None:
    images = torch.randn(1, 3, 21, 28)
    both = MultiScaleInference(model, scales=[1.0, 0.5])
    torch.testing.assert_close(both(images.flip(3)), both(images).flip(3), atol=1e-5, rtol=0)
    one = MultiScaleInference(model, scales=[1.0, 0.5], flip=False)
    assert not torch.allclose(one(images.flip(3)), one(images).flip(3), atol=1e-3)
    assert MultiScaleInference(model, scales=[0.1, 1.0])(torch.zeros(1, 3, 1, 1)).shape == (1, 3, 1, 1)
    for scales in ([], [0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="scales must be one or more positive numbers"):
            MultiScaleInference(model, scales=scales)
