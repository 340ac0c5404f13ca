"""A pruned network computes what the whole one does without the parts that were taken out."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinov2.config.schema import StudentOptions
from dinov2.models import build
from dinov2.models.build import build_backbone, student_options_of
from dinov2.models.pruning import (
    ALIKE,
    BackboneSize,
    Costs,
    KeptBlock,
    Scores,
    choose_size,
    count_flops,
    feed_forward_layers,
    prune_backbone,
    score_by_activation,
    score_by_magnitude,
)
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_mini

OPTIONS = StudentOptions(arch="vit_tiny", patch_size=8, layerscale=1.0, drop_path_rate=0.0, num_register_tokens=1)
SIZE = (32, 24)
SMALLER = BackboneSize(depth=3, num_heads=2, hidden_dim=40)


def small_vit(**options: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(**{"embed_dim": 24, "depth": 4, "num_heads": 3, "head_dim": 8} | options)


@pytest.fixture(autouse=True)
def _sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "ARCHITECTURES", {"vit_tiny": small_vit})


def make(**options: Any) -> tuple[DinoVisionTransformer, StudentOptions]:
    torch.manual_seed(0)
    student = StudentOptions(**{**vars(OPTIONS), **options})
    backbone = build_backbone(student, img_size=SIZE)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone.double().eval().requires_grad_(False), student


def images() -> Tensor:
    return torch.randn(4, 3, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@contextmanager
def without(backbone: DinoVisionTransformer, kept: list[KeptBlock], scores: Scores) -> Iterator[None]:
    """Lets the whole network run with means in place of heads and units, and without blocks: the definition."""

    def replaced(stay: Tensor, means: Tensor, layer: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        given = arguments[0].unflatten(-1, means.shape).clone()
        gone = [index for index in range(len(means)) if index not in stay.tolist()]
        given[..., gone, :] = means[gone].to(given.dtype)
        return (given.flatten(-2),)

    stays = {entry.index: entry for entry in kept}
    handles = []
    for index, block in enumerate(backbone.blocks):
        if index not in stays:
            handles.append(block.register_forward_hook(lambda module, arguments, output: arguments[0]))
            continue
        pairs = (
            (block.attn.proj, stays[index].heads, scores.mean_heads[index]),
            (feed_forward_layers(block)[1], stays[index].units, scores.mean_units[index]),
        )
        handles += [layer.register_forward_pre_hook(partial(replaced, *rest)) for layer, *rest in pairs]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("by", ["magnitude", "activation"])
@pytest.mark.parametrize("options", [{}, {"ffn_layer": "swiglu", "layerscale": 0.0}, {"proj_bias": False}])
def test_the_features_are_those_of_the_whole_network_without_what_was_taken_out(
    by: str, options: dict[str, Any]
) -> None:
    backbone, student = make(**options)
    seen = score_by_activation(backbone, [images()[:3], images()[3:]])
    scores = seen
    if by == "magnitude":
        found = score_by_magnitude(backbone)
        assert not any(mean.any() for mean in [*found.mean_heads, *found.mean_units]), "nothing stands in"
        scores = Scores(found.heads, found.units, found.mean_heads, found.mean_units, seen.blocks)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    pruned, described, kept = prune_backbone(backbone, student, SMALLER, scores)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())

    assert BackboneSize.of(pruned) == SMALLER
    assert (described.depth, described.num_heads) == (3, 2)
    assert [len(entry.heads) for entry in kept] == [2] * 3
    with without(backbone, kept, scores):
        expected = backbone.forward_features(images())
    got = pruned.double().forward_features(images())
    for name in ("x_norm_clstoken", "x_norm_patchtokens", "x_prenorm"):
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)
    again = build_backbone(described, img_size=SIZE)
    again.load_state_dict(pruned.state_dict())


def test_scores_by_their_definitions() -> None:
    backbone, _ = make()
    magnitude, seen = score_by_magnitude(backbone), score_by_activation(backbone, [images()])
    block, given = backbone.blocks[1], {}
    assert isinstance(block.attn.qkv, nn.Linear)
    mine = [slice(8 * part + 8, 8 * part + 16) for part in (0, 3, 6)]  # head 1 of queries, keys and values
    weights = [block.attn.qkv.weight[rows] for rows in mine] + [block.attn.qkv.bias[rows] for rows in mine]
    weights.append(block.attn.proj.weight[:, 8:16])
    assert float(magnitude.heads[1][1]) == pytest.approx(sum(float(part.square().sum()) for part in weights) ** 0.5)
    parts = (block.mlp.fc1.weight[5], block.mlp.fc1.bias[5:6], block.mlp.fc2.weight[:, 5])
    assert float(magnitude.units[1][5]) == pytest.approx(float(torch.cat(parts).norm()))

    handles = [block.attn.proj.register_forward_pre_hook(lambda _, arguments: given.update(attn=arguments[0]))]
    handles.append(block.register_forward_hook(lambda _, arguments, output: given.update(x=arguments[0], y=output)))
    backbone(images())
    for handle in handles:
        handle.remove()
    added = block.ls1.gamma * (given["attn"][..., 8:16] @ block.attn.proj.weight[:, 8:16].T)
    away = (added - added.mean((0, 1))).norm(dim=-1)
    assert float(seen.heads[1][1]) == pytest.approx(float(away.square().mean().sqrt()), rel=1e-4)
    assert seen.blocks is not None
    cosine = nn.functional.cosine_similarity(given["x"], given["y"], dim=-1).mean()
    assert seen.blocks[1] == pytest.approx(1 - float(cosine), abs=1e-6)
    with pytest.raises(ValueError, match="need images"):
        score_by_activation(backbone, [])
    with pytest.raises(ValueError, match="change features least is seen on images only"):
        prune_backbone(*make(), SMALLER, magnitude)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("heads", "mlp"), BackboneSize(6, 2, 528)),
        (("mlp",), BackboneSize(6, 3, 392)),
        (("depth",), BackboneSize(4, 3, 768)),
        (("depth", "heads", "mlp"), BackboneSize(5, 2, 688)),
    ],
)
def test_a_size_of_the_wanted_cost_that_thins_parts_alike(parts: tuple[str, ...], expected: BackboneSize) -> None:
    with torch.device("meta"):
        backbone = vit_mini(img_size=96)
    costs, size = Costs.of(backbone, (96, 96)), BackboneSize.of(backbone)
    with FlopCounterMode(display=False) as counter:
        backbone.eval()(torch.empty(1, 3, 96, 96, device="meta"))
    whole = counter.get_total_flops()
    assert costs.total(size) == whole
    chosen = choose_size(costs, size, parts, 0.7)
    assert chosen == expected
    with torch.device("meta"):
        pruned = vit_mini(img_size=96, depth=chosen.depth, num_heads=chosen.num_heads, ffn_hidden_dim=chosen.hidden_dim)
    fraction = count_flops(pruned, (96, 96)) / whole
    assert fraction == pytest.approx(costs.total(chosen) / whole)
    assert (0.7 - ALIKE if "mlp" in parts else 0.6) < fraction <= 0.7


def test_what_cannot_be_reached_is_refused_with_what_would_help() -> None:
    backbone, _ = make()
    costs, size = Costs.of(backbone, SIZE), BackboneSize.of(backbone)
    with pytest.raises(ValueError, match=r"40% of the FLOPs is not reached by pruning heads: .*; prune mlp or depth"):
        choose_size(costs, size, ("heads",), 0.4)
    with pytest.raises(ValueError, match=r"lie between 0 and 1, found 1\.5"):
        choose_size(costs, size, ("heads",), 1.5)
    with pytest.raises(ValueError, match="are among heads, mlp, depth; found width"):
        choose_size(costs, size, ("width",), 0.5)
    backbone.blocks[0].mlp = nn.Identity()
    with pytest.raises(ValueError, match="Identity has no hidden units"):
        BackboneSize.of(backbone)


def test_widths_are_told_from_parameters() -> None:
    for layer in ("mlp", "swiglu"):
        backbone, student = make(ffn_layer=layer)
        pruned, described, _ = prune_backbone(backbone, student, BackboneSize(4, 2, 48), score_by_magnitude(backbone))
        told = student_options_of(pruned.state_dict())
        assert (told["arch"], told["num_heads"], told["ffn_hidden_dim"]) == ("vit_tiny", 2, described.ffn_hidden_dim)
        whole = student_options_of(backbone.state_dict())
        assert (whole["num_heads"], whole["ffn_hidden_dim"]) == (0, 0)
