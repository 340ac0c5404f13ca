"""Backbones from options."""

from dataclasses import replace

import pytest

from dinov2.config.schema import StudentOptions
from dinov2.layers.attention import SdpaBackend
from dinov2.layers.block import LayerScale
from dinov2.layers.feed_forward import SwiGLUFFN
from dinov2.models.build import build_backbone
from dinov2.models.vision_transformer import vit_small

OPTIONS = StudentOptions(
    arch="vit_tiny",
    patch_size=14,
    ffn_layer="swiglufused",
    qkv_bias=False,
    proj_bias=False,
    ffn_bias=False,
    num_register_tokens=4,
    interpolate_antialias=True,
    interpolate_offset=0.0,
)


def test_every_option_arrives() -> None:
    model = build_backbone(OPTIONS, img_size=(28, 42))
    assert model.embed_dim == 192
    assert model.patch_size == (14, 14)
    assert model.pos_embed.shape == (1, 1 + 2 * 3, 192)
    assert model.register_tokens.shape == (1, 4, 192)
    assert (model.interpolate_antialias, model.interpolate_offset) == (True, 0.0)
    assert not [name for name, _ in model.blocks.named_parameters() if name.endswith("bias") and "norm" not in name]
    for block in model.blocks:
        assert block.drop_path_rate == 0.3
        assert isinstance(block.mlp, SwiGLUFFN)
        assert isinstance(block.ls1, LayerScale)
        assert block.ls1.init_values == 1e-5
        assert isinstance(block.attn.backend, SdpaBackend)


def test_fewer_blocks_heads_and_units() -> None:
    model = build_backbone(replace(OPTIONS, depth=2, num_heads=2, ffn_hidden_dim=96), img_size=28)
    assert (model.n_blocks, model.num_heads) == (2, 2)
    shapes = {name: list(tensor.shape) for name, tensor in model.blocks[1].state_dict().items()}
    assert shapes["attn.qkv.weight"] == [3 * 2 * 64, 192], "heads are as wide as before"
    assert shapes["attn.proj.weight"] == [192, 2 * 64]
    assert shapes["mlp.w3.weight"] == [192, 64], "of a gated network two thirds"
    plain = build_backbone(replace(OPTIONS, ffn_layer="mlp", ffn_hidden_dim=100), img_size=28)
    assert plain.blocks[0].mlp.fc1.out_features == 100
    assert vit_small(num_heads=2).blocks[0].attn.proj.in_features == 128


def test_teacher_has_no_stochastic_depth_and_the_same_parameters() -> None:
    student = build_backbone(OPTIONS, img_size=28)
    teacher = build_backbone(OPTIONS, img_size=28, drop_path_rate=0.0)
    assert {block.drop_path_rate for block in teacher.blocks} == {0.0}
    assert student.state_dict().keys() == teacher.state_dict().keys()


def test_other_options_and_names_of_architectures() -> None:
    plain = build_backbone(replace(OPTIONS, layerscale=0.0), img_size=28)
    assert not [name for name, _ in plain.named_parameters() if "gamma" in name]
    model = build_backbone(replace(OPTIONS, drop_path_uniform=False, patch_size=(14, 7)), img_size=28)
    assert (model.blocks[0].drop_path_rate, model.blocks[-1].drop_path_rate) == (0.0, 0.3)
    assert model.grid_size == (2, 4)
    assert build_backbone(replace(OPTIONS, arch="vit_small_memeff"), img_size=28).embed_dim == 384  # upstream's name
    with pytest.raises(
        ValueError, match=r"'vit_huge'; allowed: vit_mini, vit_tiny, vit_small, vit_base, vit_large, vit_giant2"
    ):
        build_backbone(replace(OPTIONS, arch="vit_huge"), img_size=28)
