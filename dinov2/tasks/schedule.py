"""Learning rate and weight decay of every step, and the optimiser they go to."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dinov2.config import TaskConfig
from dinov2.utils.param_groups import make_param_groups
from dinov2.utils.schedules import CosineSchedule, Schedule

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class StepRates:
    """Values of one step, before the multipliers of parameter groups."""

    lr: float
    weight_decay: float

    @property
    def last_layer_lr(self) -> float:
        """No layer is special here."""
        return self.lr


class TaskSchedule:
    """Linear warm-up from 0, then half a cosine or a constant.

    Args:
        config: ``optim`` says how.
        total_steps: length of the run.
        steps_per_epoch: for the length of the warm-up.
    """

    def __init__(self, config: TaskConfig, total_steps: int, steps_per_epoch: int) -> None:
        optim = config.optim
        self._weight_decay = optim.weight_decay
        self._lr: Schedule = CosineSchedule(
            optim.lr,
            optim.lr if optim.schedule == "constant" else optim.min_lr,
            total_steps,
            warmup_iters=min(round(optim.warmup_epochs * steps_per_epoch), total_steps),
        )

    def at(self, step: int) -> StepRates:
        """Values of a step, from 0."""
        return StepRates(lr=self._lr[step], weight_decay=self._weight_decay)


def build_task_optimizer(config: TaskConfig, trained: nn.ModuleDict, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser over everything that is trained.

    The head learns at ``optim.lr``, the backbone at ``optim.backbone_lr_mult`` of it with layer-wise decay; biases,
    norms and LayerScale have no weight decay.
    """
    groups: list[dict[str, Any]] = []
    for name, network in trained.items():
        is_backbone = name == "backbone"
        decay = config.optim.layerwise_decay if is_backbone else 1.0
        for group in make_param_groups(network, layerwise_decay=decay, prefix=f"{name}."):
            if is_backbone:
                group["lr_multiplier"] *= config.optim.backbone_lr_mult
            groups += _without_decay_of_norms(group, network)
    # No fused kernels off CUDA: they are fast there and rare elsewhere.
    fused = True if device.type == "cuda" else None
    momentum = config.optim.momentum
    if config.optim.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=fused)
    kind = torch.optim.AdamW if config.optim.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=0.0, betas=(momentum, 0.999), fused=fused)


def _without_decay_of_norms(group: dict[str, Any], network: nn.Module) -> list[dict[str, Any]]:
    """The group, parted into what decays and the scales of norms: in heads their names do not tell what they are."""
    norms = {
        id(parameter) for module in network.modules() if isinstance(module, _NORMS) for parameter in module.parameters()
    }
    parted: list[dict[str, Any]] = []
    for is_norm in (False, True):
        pairs = [
            pair
            for pair in zip(group["params"], group["param_names"], strict=True)
            if (id(pair[0]) in norms) == is_norm
        ]
        if pairs:
            parameters, names = map(list, zip(*pairs, strict=True))
            multiplier = 0.0 if is_norm else group["wd_multiplier"]
            parted.append({**group, "params": parameters, "param_names": names, "wd_multiplier": multiplier})
    return parted
