"""Small layers against their formulas: layer scale, feed-forward networks, patch embedding, the block as a whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov2.layers.attention import pack_groups, split_groups
from dinov2.layers.block import Block, LayerScale
from dinov2.layers.feed_forward import Mlp, SwiGLUFFN, make_feed_forward, swiglu_hidden_dim
from dinov2.layers.patch_embed import PatchEmbed


def test_layer_scale_starts_constant_and_multiplies_channels() -> None:
    scale = LayerScale(4, 1e-5)
    assert torch.equal(scale.gamma, torch.full((4,), 1e-5))
    with torch.no_grad():
        scale.gamma.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert torch.equal(scale(torch.ones(2, 3, 4))[1, 2], torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_mlp_equals_its_formula() -> None:
    mlp = Mlp(6, 10)
    x = torch.randn(3, 6)
    hidden = F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
    torch.testing.assert_close(mlp(x), F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias))


def test_swiglu_equals_its_formula() -> None:
    network = SwiGLUFFN(6, 24, bias=False)
    x = torch.randn(3, 6)
    first, second = x @ network.w12.weight.T[:, :16], x @ network.w12.weight.T[:, 16:]
    torch.testing.assert_close(network(x), (first * first.sigmoid() * second) @ network.w3.weight.T)


def test_swiglu_width_of_released_models(reference: Callable[[str], Any]) -> None:
    for row in reference("schedule_fixture.json")["swiglu_hidden"]:
        assert swiglu_hidden_dim(row["hidden_features"]) == row["fused_hidden"]


@pytest.mark.parametrize(
    ("name", "kind"), [("mlp", Mlp), ("swiglu", SwiGLUFFN), ("swiglufused", SwiGLUFFN), ("identity", nn.Identity)]
)
def test_feed_forward_by_name(name: str, kind: type[nn.Module]) -> None:
    network = make_feed_forward(name, 8, 32, bias=False)
    assert isinstance(network, kind)
    assert not [key for key, _ in network.named_parameters() if key.endswith("bias")]


def test_unknown_feed_forward_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"unknown ffn_layer 'moe'; allowed: mlp, swiglu, swiglufused, identity"):
        make_feed_forward("moe", 8, 32)


def test_patch_embedding_is_a_linear_map_of_each_patch() -> None:
    embed = PatchEmbed((2, 3), in_chans=3, embed_dim=5)
    x = torch.randn(2, 3, 4, 9)
    patches = F.unfold(x, kernel_size=(2, 3), stride=(2, 3)).transpose(1, 2)  # [B, N, 3 * 2 * 3]
    torch.testing.assert_close(embed(x), F.linear(patches, embed.proj.weight.flatten(1), embed.proj.bias))
    assert embed.grid_size(4, 9) == (2, 3)


def test_image_that_does_not_divide_names_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"100 x 98 pixels .* patches of 14 x 14"):
        PatchEmbed(14)(torch.zeros(1, 3, 100, 98))
    with pytest.raises(ValueError, match=r"12 x 17 pixels .* patches of 4 x 6"):
        PatchEmbed((4, 6)).grid_size(12, 17)


def test_block_equals_its_formula() -> None:
    block = Block(8, 2, init_values=0.5).double().eval()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    middle = x + 0.5 * block.attn(F.layer_norm(x, (8,), eps=1e-6))
    torch.testing.assert_close(block(x), middle + 0.5 * block.mlp(F.layer_norm(middle, (8,), eps=1e-6)))


@pytest.mark.parametrize("init_values", [None, 0])
def test_block_without_layer_scale_has_no_gains(init_values: float | None) -> None:
    assert not [name for name, _ in Block(8, 2, init_values=init_values).named_parameters() if "gamma" in name]


def test_block_compiles_without_graph_breaks() -> None:
    block = Block(8, 2, drop_path_rate=0.4).eval()
    rows, shapes = pack_groups([torch.randn(2, 5, 8), torch.randn(3, 2, 8)])
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows, shapes), block(rows, shapes))
    assert len(split_groups(compiled(rows, shapes), shapes)) == 2
    compiled.train()
    assert compiled(rows, shapes).shape == rows.shape
