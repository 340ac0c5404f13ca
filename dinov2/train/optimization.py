"""AdamW over the student, and the scaling of its loss, as the options of pretraining say."""

from typing import Any

import torch
from torch import nn

from dinov2.config import Config
from dinov2.fsdp import resolve_dtype
from dinov2.utils.param_groups import make_param_groups


def build_optimizer(config: Config, student: nn.ModuleDict, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the student's parameters, grouped by learning rate and weight decay (see `param_groups`)."""
    groups: list[dict[str, Any]] = []
    for name, network in student.items():
        groups += make_param_groups(
            network,
            layerwise_decay=config.optim.layerwise_decay,
            patch_embed_lr_mult=config.optim.patch_embed_lr_mult,
            prefix=f"{name}.",
        )
    betas = (config.optim.adamw_beta1, config.optim.adamw_beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True if device.type == "cuda" else None)


def build_grad_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling where a student sub-network computes in fp16 and ``grad_scaler`` is on; otherwise idle."""
    precision = config.compute_precision
    networks = (precision.student.backbone, precision.student.dino_head, precision.student.ibot_head)
    halves = any(resolve_dtype(part.mixed_precision.param_dtype, device) == torch.float16 for part in networks)
    return torch.amp.GradScaler(device.type, enabled=precision.grad_scaler and halves)
