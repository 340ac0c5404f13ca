"""The network of a task: a backbone from a pretraining config, its weights, and a head."""

import logging
from dataclasses import replace

import torch

from dinov2.config import Config, TaskConfig, load_config
from dinov2.config.task_checks import head_kind
from dinov2.models.build import build_backbone
from dinov2.models.heads.build import build_head
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.models.task_model import TaskModel
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
        replace(config.head, kind=head_kind(config)),
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
