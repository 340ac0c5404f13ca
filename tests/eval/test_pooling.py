import pytest
import torch
from torch import Tensor, nn

from dinov2.eval.retrieval.ranking import (
    RETRIEVAL_FEATURES,
    ModelWithScales,
    describe_images,
    generalized_mean,
    patch_size_of,
    round_to_patches,
)
from dinov2.models.vision_transformer import DinoVisionTransformer


@pytest.fixture(scope="module")
def backbone() -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(img_size=28, patch_size=14, embed_dim=24, depth=2, num_heads=2, init_values=1.0)
    return model.requires_grad_(False).eval()


def images(height: int = 28, width: int = 42) -> Tensor:
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_power_1_is_the_mean() -> None:
    tokens = torch.randn(2, 5, 7)
    torch.testing.assert_close(generalized_mean(tokens, 1.0), tokens.mean(dim=1))
    torch.testing.assert_close(generalized_mean(tokens, 1.0 + 1e-6), tokens.mean(dim=1), atol=1e-4, rtol=1e-4)


def test_odd_power_is_the_published_formula() -> None:
    tokens = torch.randn(4, 6, 5, dtype=torch.float64)
    cubes = (tokens**3).mean(dim=1).float()
    torch.testing.assert_close(generalized_mean(tokens, 3.0) ** 3, cubes, rtol=1e-4, atol=1e-5)
    positive = tokens.abs()
    torch.testing.assert_close(generalized_mean(positive, 2.5), (positive**2.5).mean(dim=1).pow(1 / 2.5).float())


def test_large_power_is_the_value_farthest_from_zero() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [0.5, -8.0], [-0.2, 3.0]]])
    torch.testing.assert_close(generalized_mean(tokens, 400.0), torch.tensor([[1.0, -8.0]]), rtol=0.01, atol=0)


def test_generalized_mean_follows_scale_and_sign_and_never_overflows() -> None:
    tokens = torch.randn(2, 5, 7)
    expected = generalized_mean(tokens, 3.0)
    torch.testing.assert_close(generalized_mean(tokens * 1e30, 3.0), expected * 1e30)
    torch.testing.assert_close(generalized_mean(-tokens, 3.0), -expected)
    assert generalized_mean(torch.zeros(1, 3, 2), 3.0).tolist() == [[0.0, 0.0]]
    assert generalized_mean(tokens.clamp(-1, 1).half() * 60_000, 3.0).isfinite().all()


@pytest.mark.parametrize("features", RETRIEVAL_FEATURES)
def test_descriptions_have_unit_length_and_come_from_the_named_tokens(
    backbone: DinoVisionTransformer, features: str
) -> None:
    found = describe_images(backbone, features, gem_power=2.0)(images())
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    tokens = backbone(images(), is_training=True)
    patches = tokens["x_norm_patchtokens"]
    assert patches.shape[1] == 6
    expected = {
        "cls": tokens["x_norm_clstoken"],
        "patch_mean": patches.mean(dim=1),
        "gem": generalized_mean(patches, 2.0),
    }
    if features in expected:
        torch.testing.assert_close(found, nn.functional.normalize(expected[features], dim=1))


def test_gem_of_power_1_is_patch_mean(backbone: DinoVisionTransformer) -> None:
    gem, mean = (describe_images(backbone, name, gem_power=1.0)(images()) for name in ("gem", "patch_mean"))
    torch.testing.assert_close(gem, mean)


def test_scales_are_summed_and_normalised(backbone: DinoVisionTransformer) -> None:
    scales = (1.0, 0.5, 1.4142)
    found = describe_images(backbone, scales=scales)(images(56, 28))
    sizes = [(56, 28), (28, 14), (84, 42)]  # 79.2 x 39.6 comes to whole patches
    single = describe_images(backbone)
    parts = []
    for size in sizes:
        scaled = images(56, 28)
        if size != (56, 28):
            scaled = nn.functional.interpolate(scaled, size=size, mode="bilinear", antialias=True)
        parts.append(single(scaled))
    torch.testing.assert_close(found, nn.functional.normalize(torch.stack(parts).sum(dim=0), dim=1))
    assert (found - parts[0]).abs().max() > 1e-3


def test_a_plain_network_is_scaled_to_whole_pixels() -> None:
    seen = []

    class Network(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            seen.append(tuple(batch.shape[-2:]))
            return nn.functional.normalize(batch.mean(dim=(2, 3)), dim=1)

    ModelWithScales(Network(), (1.0, 0.7071, 0.01), patch_size_of(Network()))(images(30, 20))
    assert seen == [(30, 20), (21, 14), (1, 1)]


def test_rounding_to_patches() -> None:
    assert round_to_patches((1024, 768), (14, 14)) == (1022, 770)
    assert round_to_patches((3, 40), (14, 16)) == (14, 32)  # 2.5 patches: to the even number


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": "max"}, "features 'max' is not one of cls, patch_mean, cls_patch_mean, gem"),
        ({"features": "gem", "gem_power": 0.0}, "power of the generalised mean must be above 0"),
        ({"scales": ()}, "scales must be one or more different factors above 0"),
        ({"scales": (1.0, 0.0)}, "scales must be"),
        ({"scales": (1.0, 1.0)}, "scales must be"),
        ({"scales": (float("nan"),)}, "scales must be"),
    ],
)
def test_bad_settings(backbone: DinoVisionTransformer, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_images(backbone, **arguments)
