"""From gradients to a step: parameter groups, loss scaling, clipping per sub-network, AdamW."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.config import Config
from dinov2.fsdp import resolve_dtype
from dinov2.train.param_groups import apply_step, make_param_groups
from dinov2.train.schedules import StepHyperparameters

SMALLEST_SCALE = 1.0  # of the loss in fp16: gradients that overflow even then are not the scale's fault


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


@dataclass(frozen=True)
class Optimization:
    """One optimisation step of the student.

    Attributes:
        student: sub-networks by name.
        optimizer: over all their parameters.
        scaler: scales the loss in fp16.
        clip_grad: largest gradient norm of each sub-network; 0 does not clip.
    """

    student: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    clip_grad: float

    def loss_scale(self, device: torch.device) -> Tensor:
        """Factor for the objective before backward; 1 unless fp16 is used."""
        scale: Tensor = self.scaler.scale(torch.ones((), device=device))
        return scale

    def clip(self) -> dict[str, Tensor]:
        """Takes the loss scale out of the gradients and clips each sub-network's.

        Returns:
            Gradient norms before clipping, by sub-network; the same in all processes.
        """
        self.scaler.unscale_(self.optimizer)
        return {name: self._clip(network) for name, network in self.student.items()}

    def step(self, hyperparameters: StepHyperparameters) -> None:
        """Moves the weights and clears the gradients; a step whose fp16 gradients overflowed is left out."""
        apply_step(
            self.optimizer,
            lr=hyperparameters.lr,
            weight_decay=hyperparameters.weight_decay,
            last_layer_lr=hyperparameters.last_layer_lr,
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def overflow_is_normal(self) -> bool:
        """Whether gradients that are not finite may come from the loss scale, which then shrinks.

        At a scale of 1 or less they come from something else. Waits for the device.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() > SMALLEST_SCALE

    def discard(self) -> None:
        """Forgets the gradients, and leaves weights, moments and the loss scale as they are."""
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())  # forgets that gradients were unscaled
        self.optimizer.zero_grad(set_to_none=True)

    def _clip(self, network: nn.Module) -> Tensor:
        limit = self.clip_grad if self.clip_grad > 0 else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
