"""Every known layout of a checkpoint gives the same backbone under our names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2.models.pretrained import extract_backbone, unchunk_block_name
from dinov2.utils.param_groups import strip_wrappers

State = dict[str, Tensor]
BACKBONE: State = {
    name: torch.full((1,), float(number))
    for number, name in enumerate(("cls_token", "blocks.0.norm1.weight", "blocks.11.mlp.fc1.weight", "norm.bias"))
}
OTHER: State = {name: tensor + 100 for name, tensor in BACKBONE.items()}


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def wrapped(state: State, wrapper: str) -> State:
    return {name.replace("blocks.0.", f"blocks.0.{wrapper}."): tensor for name, tensor in state.items()}


HEAD: State = {"dino_head.last_layer.weight_g": torch.zeros(1)}
LAYOUTS: dict[str, dict[str, Any]] = {
    "bare": BACKBONE,
    "data parallel": prefixed("module.", BACKBONE),
    "data parallel twice": prefixed("module.module.", BACKBONE),
    "backbone": prefixed("backbone.", BACKBONE) | HEAD,
    "student.backbone": prefixed("student.backbone.", BACKBONE) | prefixed("student.", HEAD),
    "teacher before student": prefixed("student.backbone.", OTHER) | prefixed("teacher.backbone.", BACKBONE),
    "compiled": prefixed("_orig_mod.", BACKBONE),
    "compiled block": wrapped(BACKBONE, "_orig_mod"),
    "fsdp": wrapped(prefixed("_fsdp_wrapped_module.", BACKBONE), "_fsdp_wrapped_module"),
    "activation checkpointing": wrapped(BACKBONE, "_checkpoint_wrapped_module"),
    "fsdp and checkpointing": wrapped(BACKBONE, "_fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod"),
    "compiled in data parallel": prefixed("_orig_mod.module.", BACKBONE),
    "teacher": {"teacher": prefixed("backbone.", BACKBONE) | HEAD},
    "teacher of data parallel": {"teacher": prefixed("module.backbone.", BACKBONE), "epoch": 3},
    "teacher without prefix": {"teacher": BACKBONE},
    "student alone": {"student": prefixed("module.backbone.", BACKBONE)},
    "both": {"student": prefixed("backbone.", OTHER), "teacher": prefixed("backbone.", BACKBONE)},
    "both, bare": {"student": OTHER, "teacher": BACKBONE},
    "model": {"model": prefixed("teacher.backbone.", BACKBONE) | prefixed("student.backbone.", OTHER), "iteration": 7},
    "model and optimizer": {"model": BACKBONE, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}},
    "state_dict": {"state_dict": prefixed("backbone.", BACKBONE) | {"decode_head.conv.weight": torch.zeros(1)}},
    "nested": {"model": {"teacher": {"backbone": BACKBONE}, "student": {"backbone": OTHER}}},
    "with plain values": BACKBONE | {"epoch": 3, "name": "run"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    state = extract_backbone(LAYOUTS[layout])
    assert state.tensors.keys() == BACKBONE.keys()
    assert all(state.tensors[name] is tensor for name, tensor in BACKBONE.items())
    assert (layout in ("bare", "model and optimizer", "with plain values")) == (not state.renamed)


def test_report_of_names() -> None:
    state = extract_backbone({"teacher": prefixed("backbone.", BACKBONE) | HEAD, "student": OTHER})
    assert state.renamed["cls_token"] == "teacher.backbone.cls_token"
    assert "teacher.dino_head.last_layer.weight_g" in state.ignored
    assert "student.cls_token" in state.ignored
    assert len(state.ignored) == 1 + len(OTHER)


def test_chunked_blocks_get_their_global_number(reference: Callable[[str], Any]) -> None:
    for row in reference("schedule_fixture.json")["block_chunk_layout"]:
        if "error" in row:
            continue
        names = [unchunk_block_name(f"{key}.norm1.weight") for key in row["block_keys"]]
        assert names == [f"blocks.{index}.norm1.weight" for index in range(row["depth"])]


@pytest.mark.parametrize("name", ["blocks.3.norm1.weight", "blocks.10.mlp.fc1.bias", "mlp.0.weight", "cls_token"])
def test_names_that_are_ours_stay(name: str) -> None:
    assert unchunk_block_name(name) == name
    assert strip_wrappers(name) == name


def test_a_file_without_tensors_names_its_keys() -> None:
    with pytest.raises(ValueError, match=r"no parameter tensors .* top-level keys: epoch, args"):
        extract_backbone({"epoch": 3, "args": {"lr": 0.1}})
    with pytest.raises(ValueError, match="top-level keys: none"):
        extract_backbone({})


def test_two_names_for_one_parameter_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"end up as 'blocks\.0\.norm1\.weight'"):
        extract_backbone({"blocks.0.norm1.weight": torch.zeros(1), "blocks.0.0.norm1.weight": torch.zeros(1)})
