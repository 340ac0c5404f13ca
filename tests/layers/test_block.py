"""Small layers against their formulas: layer scale, feed-forward networks, patch embedding, the block as a whole."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.attention import GroupShapes, pack_groups, split_groups
from dinov2.layers.block import Block, LayerScale, add_residual_of_subset, drop_path
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


def test_plain_drop_path_zeroes_whole_samples_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(20_000, 3, 2), 0.25)
    per_sample = dropped.flatten(1)
    assert torch.equal(per_sample.min(1).values, per_sample.max(1).values)
    torch.testing.assert_close(per_sample[:, 0].unique(), torch.tensor([0.0, 1 / 0.75]))
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("batch", "rate", "num_kept"), [(10, 0.3, 7), (4, 0.4, 2), (1, 0.9, 1), (3, 0.99, 1)])
def test_exactly_the_kept_samples_change_and_the_branch_sees_no_other(batch: int, rate: float, num_kept: int) -> None:
    seen: list[GroupShapes] = []

    def branch(rows: Tensor, shapes: GroupShapes) -> Tensor:
        seen.append(shapes)
        assert rows.shape[0] == sum(b * n for b, n in shapes)
        return torch.ones_like(rows)

    groups = [torch.zeros(batch, 5, 2), torch.zeros(2 * batch, 3, 2)]
    rows, shapes = pack_groups(groups)
    first, second = split_groups(add_residual_of_subset(rows, shapes, branch, rate), shapes)
    num_kept_of_second = max(int(2 * batch * (1 - rate)), 1)
    assert seen == [((num_kept, 5), (num_kept_of_second, 3))]
    for group, kept in ((first, num_kept), (second, num_kept_of_second)):
        per_sample = group.flatten(1)
        assert torch.equal(per_sample.min(1).values, per_sample.max(1).values)
        assert (per_sample[:, 0] > 0).sum() == kept
        assert per_sample.sum().item() == pytest.approx(per_sample.numel(), rel=1e-6)


def test_subset_residual_equals_a_loop_over_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    permutations = {4: torch.tensor([2, 0, 3, 1]), 3: torch.tensor([1, 2, 0])}
    monkeypatch.setattr(torch, "randperm", lambda n, **_: permutations[n])
    groups = [torch.randn(4, 3, 2, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)]
    rows, shapes = pack_groups(groups)
    results = split_groups(add_residual_of_subset(rows, shapes, lambda x, _: x * x, 0.4), shapes)
    for group, result in zip(groups, results, strict=True):
        expected = group.clone()
        batch = len(group)
        kept = permutations[batch][: int(batch * 0.6)]
        for sample in kept:
            expected[sample] += group[sample] ** 2 * batch / len(kept)
        torch.testing.assert_close(result, expected)


def test_scale_is_not_rounded_in_bfloat16() -> None:
    rows, shapes = pack_groups([torch.zeros(128, 1, 128, dtype=torch.bfloat16)])
    values = torch.arange(128, 256).to(torch.bfloat16)
    result = add_residual_of_subset(rows, shapes, lambda x, _: values.expand_as(x), 0.3).max(0).values
    assert torch.equal(result, (values.double() * 128 / 89).to(torch.bfloat16))
    assert not torch.equal(result, values * torch.tensor(128 / 89).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("rate", "training", "packed", "expected"),
    [
        (0.4, True, True, [4, 6, 4, 6]),
        (0.05, True, True, [4, 6, 4, 6]),
        (0.4, True, False, [4, 4]),
        (0.1, True, False, []),
        (0.0, True, True, []),
        (0.4, False, True, []),
        (0.4, False, False, []),
    ],
)
def test_when_a_block_draws_permutations(
    rate: float, training: bool, packed: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def spy(n: int, **_: object) -> Tensor:
        drawn.append(n)
        return torch.arange(n)

    monkeypatch.setattr(torch, "randperm", spy)
    block = Block(8, 2, drop_path_rate=rate).train(training)
    groups = [torch.randn(4, 5, 8), torch.randn(6, 3, 8)]
    rows, shapes = pack_groups(groups)
    output = block(rows, shapes) if packed else block(groups[0])
    assert output.shape == (rows.shape if packed else groups[0].shape)
    assert drawn == expected
