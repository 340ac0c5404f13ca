"""Parameter groups against reference values, with wrappers, chunked names and frozen parts."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from dinov2.layers.dino_head import DINOHead
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.param_groups import apply_step, layer_decay, make_param_groups, parameter_traits, strip_wrappers


def stand_in(entries: list[dict[str, Any]]) -> nn.Module:
    """A module whose parameters have the names, sizes and order of ``entries``."""
    root = nn.Module()
    for entry in entries:
        *path, leaf = entry["name"].split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.register_parameter(leaf, nn.Parameter(torch.zeros(entry.get("numel", 1))))
    # Torch lists a module's own parameters first, as the reference does.
    assert [name for name, _ in root.named_parameters()] == [entry["name"] for entry in entries]
    return root


def options(case: dict[str, Any]) -> dict[str, float]:
    names = {"layerwise_decay": "lr_decay_rate", "patch_embed_lr_mult": "patch_embed_lr_mult"}
    return {ours: case["args"][theirs] for ours, theirs in names.items()}


def tiny_backbone() -> nn.Module:
    names = ["cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.1.mlp.fc1.weight", "norm.bias"]
    return stand_in([{"name": name} for name in names])


def check_traits(module: nn.Module, expected: list[dict[str, Any]], **arguments: float) -> None:
    traits = parameter_traits(module, **arguments)
    assert list(traits) == [entry["name"] for entry in expected]
    for entry in expected:
        ours = traits[entry["name"]]
        assert ours["lr_multiplier"] == pytest.approx(entry["lr_multiplier"], rel=1e-12), entry["name"]
        assert ours["wd_multiplier"] == entry["wd_multiplier"], entry["name"]
        assert ours["is_last_layer"] == entry["is_last_layer"], entry["name"]


def test_traits_and_groups_equal_the_reference(reference) -> None:
    for case in reference("schedule_fixture.json")["param_groups"]:
        module = stand_in(case["groups"])
        check_traits(module, case["groups"], **options(case))
        groups = make_param_groups(module, **options(case))
        assert [group["param_names"] for group in groups] == [group["params"] for group in case["fused"]]
        parameters = dict(module.named_parameters())
        for ours, theirs in zip(groups, case["fused"], strict=True):
            assert ours["lr_multiplier"] == pytest.approx(theirs["lr_multiplier"], rel=1e-12)
            assert ours["wd_multiplier"] == theirs["wd_multiplier"]
            assert ours["is_last_layer"] == theirs["is_last_layer"]
            assert all(
                parameter is parameters[name]
                for parameter, name in zip(ours["params"], ours["param_names"], strict=True)
            )


def test_a_container_of_backbone_and_head_equals_the_reference(reference) -> None:
    fixture = reference("schedule_fixture.json")
    expected = fixture["param_groups_whole_moduledict"]
    check_traits(stand_in(expected), expected, layerwise_decay=0.9, patch_embed_lr_mult=0.2)


def test_layer_decay_equals_the_reference_where_its_flags_fit_the_name(reference) -> None:
    compared = 0
    for row in reference("schedule_fixture.json")["vit_lr_decay_rate"]:
        name, arguments = row["name"], row["kw"]
        value = layer_decay(
            name,
            decay=arguments["lr_decay_rate"],
            num_layers=arguments["num_layers"],
            is_backbone=arguments["force_is_backbone"],
        )
        chunked = re.search(r"blocks\.\d+\.(\d+)\.", name)
        # Upstream takes the chunk for the block where it is told that there are no chunks, and in a container always.
        if chunked and not (arguments["chunked_blocks"] and arguments["force_is_backbone"]):
            assert value == pytest.approx(0.9 ** (12 - int(chunked[1])), rel=1e-12), name
        else:
            assert value == pytest.approx(row["value"], rel=1e-12), row
            compared += 1
    assert compared == 46


def test_step_values_reach_the_optimiser_as_in_the_reference(reference) -> None:
    fixture = reference("schedule_fixture.json")
    models = {case["model"]: case for case in fixture["param_groups"]}
    groups = [
        group
        for model in ("vit_mlp_c0", "dino_head")
        for group in make_param_groups(stand_in(models[model]["groups"]), prefix=f"{model}.", **options(models[model]))
    ]
    optimizer = torch.optim.AdamW(groups)
    expected = fixture["apply_optim_scheduler"]
    apply_step(optimizer, lr=expected["lr"], weight_decay=expected["wd"], last_layer_lr=expected["last_layer_lr"])
    for ours, theirs in zip(optimizer.param_groups, expected["groups"], strict=True):
        assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-12)
        assert ours["weight_decay"] == pytest.approx(theirs["weight_decay"], rel=1e-12)
        assert len(ours["params"]) == len(ours["param_names"]) == theirs["n_params"]


def test_the_real_backbone_and_head_follow_the_rules() -> None:
    backbone = DinoVisionTransformer(
        img_size=28, patch_size=14, embed_dim=32, depth=3, num_heads=2, init_values=1.0, num_register_tokens=2
    )
    traits = parameter_traits(backbone, layerwise_decay=0.5, patch_embed_lr_mult=0.2)
    multipliers = {name: each["lr_multiplier"] for name, each in traits.items()}
    assert multipliers["pos_embed"] == multipliers["register_tokens"] == multipliers["mask_token"] == 0.5**4
    assert multipliers["patch_embed.proj.bias"] == pytest.approx(0.2 * 0.5**4)
    assert [multipliers[f"blocks.{block}.attn.qkv.weight"] for block in range(3)] == [0.125, 0.25, 0.5]
    assert multipliers["norm.weight"] == 1.0
    assert traits["blocks.2.ls1.gamma"]["wd_multiplier"] == 0.0
    assert traits["cls_token"]["wd_multiplier"] == 1.0
    head = parameter_traits(DINOHead(32, 16, hidden_dim=8, bottleneck_dim=4), layerwise_decay=0.5)
    assert {name for name, each in head.items() if each["is_last_layer"]} == {
        "last_layer.weight_g",
        "last_layer.weight_v",
    }
    assert {each["lr_multiplier"] for each in head.values()} == {1.0}


def test_wrappers_change_neither_traits_nor_names() -> None:
    def wrapped() -> nn.Module:
        backbone = tiny_backbone()
        for index, block in backbone.blocks.named_children():
            backbone.blocks.add_module(index, nn.ModuleDict({"_checkpoint_wrapped_module": block}))
        return torch.compile(backbone)

    assert any(
        name.startswith("_orig_mod.blocks.0._checkpoint_wrapped_module.") for name, _ in wrapped().named_parameters()
    )
    assert strip_wrappers("module._fsdp_wrapped_module.cls_token") == "cls_token"
    expected = parameter_traits(tiny_backbone(), layerwise_decay=0.5)
    assert parameter_traits(wrapped(), layerwise_decay=0.5) == expected
    assert [group["param_names"] for group in make_param_groups(wrapped(), layerwise_decay=0.5)] == [
        group["param_names"] for group in make_param_groups(tiny_backbone(), layerwise_decay=0.5)
    ]


def test_frozen_parameters_are_left_out_and_depth_still_counts_them() -> None:
    backbone = tiny_backbone()
    for parameter in backbone.blocks.get_submodule("1").parameters():
        parameter.requires_grad = False
    traits = parameter_traits(backbone, layerwise_decay=0.5)
    assert "blocks.1.mlp.fc1.weight" not in traits
    assert traits["blocks.0.norm1.weight"]["lr_multiplier"] == 0.25
    names = [name for group in make_param_groups(backbone) for name in group["param_names"]]
    assert sorted(names) == sorted(traits)
