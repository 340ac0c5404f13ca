"""Learning rates and weight decay of a supervised run: who gets which, and when."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dinov2.layers.lora import apply_lora
from dinov2.models.heads.segmentation import BNHead, ConvDecoder
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.tasks import load_task_config
from dinov2.tasks.networks import TaskSchedule, build_task_optimizer

DEPTH = 3


def backbone() -> DinoVisionTransformer:
    return DinoVisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=DEPTH, num_heads=2, init_values=1.0)


def optimised(trained: nn.ModuleDict, *pairs: str) -> dict[str, SimpleNamespace]:
    """Multipliers of every parameter by name, as the optimiser has them."""
    optimizer = build_task_optimizer(load_task_config(None, list(pairs)), trained, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter, said in zip(group["params"], group["param_names"], strict=True):
            assert names[id(parameter)] == said
            assert said not in found
            found[said] = SimpleNamespace(lr=group["lr_multiplier"], wd=group["wd_multiplier"])
    return found


@pytest.mark.parametrize("head", [ConvDecoder(24, 2, num_blocks=1, patch_size=8, channels=32), BNHead(24, 2)])
def test_biases_and_norms_of_head_and_backbone_do_not_decay_and_all_else_does(head: nn.Module) -> None:
    trained = nn.ModuleDict({"backbone": backbone(), "head": head})
    found = optimised(trained)
    assert found.keys() == dict(trained.named_parameters()).keys()
    for name, parameter in trained.named_parameters():
        # Of these networks, biases, norms and LayerScale are the vectors.
        assert found[name].wd == float(parameter.ndim > 1), name


def test_the_head_learns_at_the_rate_and_blocks_ever_slower_towards_the_input() -> None:
    trained = nn.ModuleDict({"backbone": backbone(), "head": BNHead(24, 2)})
    found = optimised(trained, "optim.backbone_lr_mult=0.5", "optim.layerwise_decay=0.8")
    assert found["head.conv_seg.weight"].lr == 1
    assert found["backbone.norm.weight"].lr == 0.5
    for block in range(DEPTH):
        for name in ("attn.qkv.weight", "norm1.bias", "ls1.gamma"):
            assert found[f"backbone.blocks.{block}.{name}"].lr == pytest.approx(0.5 * 0.8 ** (DEPTH - block))
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        assert found[f"backbone.{name}"].lr == pytest.approx(0.5 * 0.8 ** (DEPTH + 1))


def test_of_a_backbone_with_additions_these_alone_are_optimised() -> None:
    network = backbone()
    apply_lora(network, rank=2, alpha=4)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
    found = optimised(nn.ModuleDict({"backbone": network}))
    assert len(found) == 4 * DEPTH
    assert all("lora_" in name for name in found)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_the_optimiser_is_the_one_asked_for(kind: str) -> None:
    trained = nn.ModuleDict({"head": BNHead(4, 2)})
    config = load_task_config(None, [f"optim.optimizer={kind}", "optim.momentum=0.7"])
    optimizer = build_task_optimizer(config, trained, torch.device("cpu"))
    assert type(optimizer).__name__.lower() == kind
    defaults = optimizer.defaults
    assert (defaults["momentum"] if kind == "sgd" else defaults["betas"][0]) == 0.7


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_the_rate_rises_linearly_and_then_falls_or_stays(kind: str) -> None:
    pairs = [f"optim.schedule={kind}", "optim.lr=0.4", "optim.warmup_epochs=0.5", "optim.min_lr=0.1"]
    schedule = TaskSchedule(load_task_config(None, pairs), total_steps=24, steps_per_epoch=8)
    rates = [schedule.at(step).lr for step in range(24)]
    assert rates[:4] == pytest.approx([0.4 * step / 3 for step in range(4)])
    fallen = [0.1 + 0.3 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert rates[4:] == pytest.approx([0.4] * 20 if kind == "constant" else fallen)
    assert {schedule.at(step).weight_decay for step in range(24)} == {0.05}
