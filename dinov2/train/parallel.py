"""Applies the options of precision, memory and speed to the method's networks."""

import math

import torch
from torch import nn

from dinov2.config import Config
from dinov2.fsdp import checkpoint_activations, compile_units, resolve_dtype, shard
from dinov2.layers.block import Block
from dinov2.train.ssl_meta_arch import SSLMetaArch


def parallelize(model: SSLMetaArch, config: Config, device: torch.device) -> None:
    """Moves student and teacher to the device, then wraps them as ``compute_precision`` and ``train`` say."""
    model.to(device)
    for networks, precision in (
        (model.student, config.compute_precision.student),
        (model.teacher, config.compute_precision.teacher),
    ):
        if config.train.activation_checkpointing and networks is model.student:
            checkpoint_activations(networks["backbone"], Block)
        if config.train.compile:
            compile_units(networks["backbone"], Block)
        blocks: list[nn.Module] = [module for module in networks["backbone"].modules() if isinstance(module, Block)]
        shard(networks["backbone"], precision.backbone, device, units=_groups(blocks, config.student.block_chunks))
        backbone_dtype = resolve_dtype(precision.backbone.mixed_precision.param_dtype, device)
        for name, head_precision in (("dino_head", precision.dino_head), ("ibot_head", precision.ibot_head)):
            if name in networks:
                shard(networks[name], head_precision, device, fed_in_half=backbone_dtype != torch.float32)


def _groups(blocks: list[nn.Module], num_groups: int) -> list[list[nn.Module]]:
    """Splits blocks into groups that are gathered together; 0 groups: every block alone."""
    size = math.ceil(len(blocks) / num_groups) if num_groups else 1
    return [blocks[start : start + size] for start in range(0, len(blocks), size)]
