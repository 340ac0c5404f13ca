"""Tiny models of every task for tests of exported files, and drawn images for them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.config import load_config
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.data.prepare.demo_parts import make_demo_parts
from dinov2.models.heads.anomaly import MemoryHead
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.predict.model import Model
from dinov2.tasks import TASKS, parse_task_config
from dinov2.tasks.package import make_package, save_task_package

SIZE = 40  # of images; the position embedding is for 32


def tiny_vit(**options: Any) -> DinoVisionTransformer:
    """What ``vit_tiny`` is to stand for: four blocks of width 24."""
    return DinoVisionTransformer(**{"embed_dim": 24, "depth": 4, "num_heads": 2} | options)


def tiny_backbone(**options: Any) -> DinoVisionTransformer:
    """Weights large enough that every part matters."""
    torch.manual_seed(0)
    backbone = tiny_vit(**{"img_size": 32, "patch_size": 8, "init_values": 1.0} | options)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.2)
    return backbone.eval().requires_grad_(False)


def tiny_model(parts: Path, task: str = "", head: str = "auto", *, reference: bool = False, **options: Any) -> Model:
    """A backbone, or a model of a task (``joint`` for two) with random weights, for the images of `draw_parts`."""
    backbone = tiny_backbone(**options)
    if task == "joint":
        models = {name: tiny_model(parts, name, **options) for name in ("classification", "segmentation")}
        heads = {name: model.package for name, model in models.items() if model.package is not None}
        return Model(backbone, (SIZE, SIZE), True, heads=heads)
    if not task:
        return Model(backbone, (SIZE, SIZE), True)
    text = (
        f"task: {task}\ndata: {{image_size: {SIZE}, resize: stretch, reference: {str(reference).lower()}}}\n"
        f"backbone: {{blocks: [0, 1, 2, 3]}}\n"
        f"head: {{kind: {head}, channels: 16, num_bins: 8, num_queries: 12, output_stride: 8}}\n"
    )
    config = parse_task_config(text, "test")
    facts = TASKS[task].read_facts(config, open_parts(parts), "the set")
    made = TASKS[task](config, facts)
    network = made.build_model(backbone, facts.num_outputs).eval().requires_grad_(False)
    torch.manual_seed(1)
    for parameter in network.head.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    if isinstance(network.head, MemoryHead):
        centres = nn.functional.normalize(torch.randn(40, 4 * backbone.embed_dim), dim=1)
        network.head.remember(centres, radius=0.1, num_patches=100)
    return Model(backbone, (SIZE, SIZE), True, make_package(network, made, light="original"))


def write_model(path: Path, model: Model) -> None:
    """The file of a model with a head, for tests in which ``vit_tiny`` is `tiny_vit`."""
    assert model.package is not None
    config = load_config(
        None, ["student.arch=vit_tiny", "student.patch_size=8", "crops.global_crops_size=32", "student.layerscale=1.0"]
    )
    state = model.package.model.state_dict()
    save_task_package(path, state, model.package.task, config, light="original", figures={})


def draw_parts(folder: Path) -> Path:
    """Plates with what every task wants to know."""
    make_demo_parts(folder / "parts", parts=12, photos=2, image_size=64)
    return folder / "parts"


def open_parts(parts: Path) -> ImageDataset:
    """Its images of validation."""
    return make_dataset(dataset_str=f"GroupedJSON:split=VAL:root={parts}")
