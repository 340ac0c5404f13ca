"""A trained task model as one file: network, classes, and everything that decides how a photo is prepared for it."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.config import Config, as_pair, load_config, parse_config, render_config
from dinov2.models.build import build_backbone
from dinov2.models.heads.build import build_head
from dinov2.models.pretrained import load_pretrained_backbone, read_checkpoint
from dinov2.models.task_model import TaskModel
from dinov2.tasks.options import TaskConfig, parse_task_config
from dinov2.utils.files import write_with_checksum
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")


def load_backbone_config(config: TaskConfig) -> Config:
    """Options of pretraining that describe the backbone.

    Raises:
        FileNotFoundError, ConfigError: naming the file of ``backbone.config_file``.
    """
    return load_config(config.backbone.config_file or None)


def build_task_model(config: TaskConfig, backbone_config: Config, *, num_outputs: int) -> TaskModel:
    """Builds backbone and head with random weights.

    Args:
        config: ``backbone`` and ``head`` describe what is built on the backbone.
        backbone_config: its ``student`` section describes the backbone.
        num_outputs: classes; 1 for depth.

    Raises:
        ValueError: for blocks that the backbone does not have.
    """
    backbone = build_backbone(
        backbone_config.student,
        img_size=backbone_config.crops.global_crops_size,
        drop_path_rate=config.backbone.drop_path_rate,
    )
    head = build_head(
        replace(config.head, kind=config.head_kind),
        task=config.task,
        embed_dim=backbone.embed_dim,
        num_blocks=len(config.backbone.blocks),
        num_outputs=num_outputs,
        patch_size=backbone.patch_size,
    )
    blocks = count_blocks(config.backbone.blocks, backbone.n_blocks)
    return TaskModel(backbone, head, blocks=blocks, norm=config.backbone.norm)


def begin_task_model(config: TaskConfig, backbone_config: Config, *, num_outputs: int, log: bool) -> TaskModel:
    """The network at the start of training: a pretrained backbone where the options name one, and a random head.

    Head and random backbone depend on ``train.seed`` alone.

    Raises:
        FileNotFoundError, ValueError: when the weights are missing, damaged or of another architecture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.train.seed, "task model"))
        model = build_task_model(config, backbone_config, num_outputs=num_outputs)
    if config.backbone.pretrained_weights:
        load_pretrained_backbone(model.backbone, config.backbone.pretrained_weights, log=log)
    elif log:
        logger.warning("backbone.pretrained_weights is empty: the backbone is random (seed %d)", config.train.seed)
    return model


def count_blocks(blocks: tuple[int, ...], num_blocks: int) -> tuple[int, ...]:
    """Numbers of blocks from 0, of numbers of which negative ones count from the last.

    Raises:
        ValueError: a block does not exist, or is named twice.
    """
    counted = tuple(block + num_blocks if block < 0 else block for block in blocks)
    if not all(0 <= block < num_blocks for block in counted):
        raise ValueError(f"backbone.blocks={list(blocks)}: the backbone has blocks 0 to {num_blocks - 1}")
    if len(set(counted)) < len(counted):
        raise ValueError(f"backbone.blocks={list(blocks)} names a block twice (it has {num_blocks})")
    return counted


FORMAT_VERSION = 1
MOST_SHOWN = 300  # characters of what does not fit
_KEYS = ("format_version", "task", "classes", "depth_unit", "light", "config", "backbone_config", "model", "figures")


@dataclass(frozen=True, kw_only=True)
class TaskPackage:
    """A task model ready for photos.

    Attributes:
        model: in evaluation mode, on its device; low-rank additions are merged.
        task: ``classification``, ``segmentation`` or ``depth``.
        classes: names by index; empty for depth.
        image_size: pixels (height, width) that photos are resized to, or the window that goes over large ones.
        resize: ``stretch``, ``shorter_side`` or ``original``; see `dinov2.data.task_transforms.EvalTransform`.
        multi_label: whether a photo may have several classes.
        per_part: whether the model answers per part, from several photos.
        max_photos: how many photos of a part it sees at once.
        depth_unit: unit of its depths; empty for relative depth and other tasks.
        light: how photos are prepared, as the ``light`` of dataset strings.
        settings: figures on val when it was written, and other plain values.
    """

    model: TaskModel
    task: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    resize: str
    multi_label: bool = False
    per_part: bool = False
    max_photos: int = 1
    depth_unit: str = ""
    light: str = "original"
    settings: dict[str, Any]


def make_package(
    model: TaskModel,
    config: TaskConfig,
    *,
    classes: tuple[str, ...],
    depth_unit: str,
    light: str,
    settings: dict[str, Any] | None = None,
) -> TaskPackage:
    """Describes a model by the options it was trained with."""
    return TaskPackage(
        model=model,
        task=config.task,
        classes=classes,
        image_size=as_pair(config.data.image_size),
        resize=config.data.resize,
        multi_label=config.data.multi_label,
        per_part=config.head.per_part,
        max_photos=config.data.max_photos,
        depth_unit=depth_unit,
        light=light,
        settings=settings or {},
    )


def save_task_package(
    path: str | Path,
    state: dict[str, Tensor],
    config: TaskConfig,
    backbone_config: Config,
    *,
    classes: tuple[str, ...],
    depth_unit: str,
    light: str,
    figures: dict[str, float],
) -> None:
    """Writes a model under its name when it is whole, with its SHA-256 beside it.

    Args:
        path: file to write, such as ``OUT/best.pth``.
        state: of a `TaskModel` without low-rank additions: ``backbone.…`` and ``head.…``, on the processor.
        config: options of the run.
        backbone_config: its ``student`` section describes the backbone.
        classes: names by index; empty for depth.
        depth_unit: unit of the depths.
        light: how photos were prepared.
        figures: on val.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "task": config.task,
        "classes": list(classes),
        "depth_unit": depth_unit,
        "light": light,
        "config": render_config(config),
        "backbone_config": render_config(backbone_config),
        "figures": dict(figures),
        "model": state,
    }
    write_with_checksum(path, lambda file: torch.save(content, file))


def load_task_package(path: str | Path, device: torch.device | str = "cpu") -> TaskPackage:
    """Reads what `save_task_package` wrote; nothing in it can run code.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, no task model, or of another version.
    """
    content = read_checkpoint(Path(path))
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ValueError(
            f"{path} is not a task model (it lacks {', '.join(missing)}); run/train/finetune.py writes best.pth"
        )
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {content['format_version']}, this version of dinov2 reads {FORMAT_VERSION}"
        )
    config = parse_task_config(content["config"], f"{path}: config")
    backbone_config = parse_config(content["backbone_config"], f"{path}: backbone_config")
    classes = tuple(content["classes"])
    model = build_task_model(config, backbone_config, num_outputs=max(1, len(classes)))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        shown = " ".join(str(error)[:MOST_SHOWN].split())
        raise ValueError(f"{path}: the weights do not fit the options beside them: {shown} …") from error
    return make_package(
        model.requires_grad_(False).eval().to(device),
        config,
        classes=classes,
        depth_unit=content["depth_unit"],
        light=content["light"],
        settings={"figures": content["figures"], "config": content["config"]},
    )
