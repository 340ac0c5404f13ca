"""What describes an image: class token, mean of the patches, or both."""

import pytest
import torch
from torch import nn

from dinov2.eval.features import ModelWithFeatures
from dinov2.eval.retrieval.ranking import describe_images
from dinov2.models.vision_transformer import DinoVisionTransformer


@pytest.fixture
def backbone() -> DinoVisionTransformer:
    torch.manual_seed(0)
    return DinoVisionTransformer(img_size=16, patch_size=8, embed_dim=12, depth=2, num_heads=2).eval()


def test_features_are_those_of_the_tokens(backbone: DinoVisionTransformer) -> None:
    images = torch.randn(3, 3, 16, 24)
    tokens = backbone(images, is_training=True)
    cls, mean = tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"].mean(dim=1)
    torch.testing.assert_close(ModelWithFeatures(backbone)(images), cls)
    torch.testing.assert_close(ModelWithFeatures(backbone, "patch_mean")(images), mean)
    both = ModelWithFeatures(backbone, "cls_patch_mean")(images)
    torch.testing.assert_close(both.norm(dim=1), torch.full((3,), 2**0.5))
    torch.testing.assert_close(both[:, :12], cls / cls.norm(dim=1, keepdim=True))


def test_an_unknown_name_is_refused(backbone: DinoVisionTransformer) -> None:
    with pytest.raises(ValueError, match="'max' is not one of cls, patch_mean, cls_patch_mean"):
        ModelWithFeatures(backbone, "max")


def test_a_network_without_patches_is_refused_at_once() -> None:
    network = nn.Sequential(nn.Flatten())
    assert ModelWithFeatures(network)(torch.zeros(2, 3, 4, 4)).shape == (2, 48)
    with pytest.raises(ValueError, match=r"Sequential gives no patch tokens, .* must be cls, found 'patch_mean'"):
        ModelWithFeatures(network, "patch_mean")
    with pytest.raises(ValueError, match=r"Sequential gives no patch tokens, .* must be cls, found 'gem'"):
        describe_images(network, "gem")
