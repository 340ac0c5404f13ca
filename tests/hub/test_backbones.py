"""Constructors of the released backbones, on files of the true format."""

from pathlib import Path

import pytest
import torch

from dinov2.hub import backbones

NAMES = [f"dinov2_vit{size}14{suffix}" for size in "sblg" for suffix in ("", "_reg")]


@pytest.mark.parametrize("name", NAMES)
def test_every_backbone_has_the_released_shape(name: str) -> None:
    with torch.device("meta"):
        model = getattr(backbones, name)(pretrained=False)
    assert model.embed_dim == {"s": 384, "b": 768, "l": 1024, "g": 1536}[name[len("dinov2_vit")]]
    assert model.num_register_tokens == (4 if name.endswith("_reg") else 0)
    assert model.pos_embed.shape[1] == 1 + 37 * 37
    parameters = {"s": 22e6, "b": 86.6e6, "l": 304e6, "g": 1136e6}[name[len("dinov2_vit")]]
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(parameters, rel=0.02)


def test_weights_of_a_file(tmp_path: Path) -> None:
    torch.manual_seed(1)
    released = backbones.dinov2_vits14_reg(pretrained=False).eval()
    path = tmp_path / "weights.pth"
    torch.save(released.state_dict(), path)
    images = torch.randn(2, 3, 28, 42)
    torch.testing.assert_close(backbones.dinov2_vits14_reg(weights=path).eval()(images), released(images))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.pth"):
        backbones.dinov2_vits14(weights=tmp_path / "nothing.pth")


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    torch.save(backbones.dinov2_vits14(pretrained=False).state_dict(), tmp_path / "s.pth")
    with pytest.raises(ValueError, match="norm"):
        backbones.dinov2_vitb14(weights=tmp_path / "s.pth")
