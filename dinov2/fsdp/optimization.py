"""From gradients to a step: loss scaling, clipping per sub-network, the optimiser."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.utils.param_groups import apply_step

SMALLEST_SCALE = 1.0  # of the loss in fp16: gradients that overflow even then are not the scale's fault


class StepValues(Protocol):
    """Hyper-parameters of one step, before the multipliers of parameter groups."""

    @property
    def lr(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def last_layer_lr(self) -> float: ...


@dataclass(frozen=True)
class Optimization:
    """One optimisation step of the networks that are trained.

    Attributes:
        networks: sub-networks by name.
        optimizer: over all their parameters.
        scaler: scales the loss in fp16.
        clip_grad: largest gradient norm of each sub-network; 0 does not clip.
    """

    networks: nn.ModuleDict
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
        return {name: self._clip(network) for name, network in self.networks.items()}

    def step(self, hyperparameters: StepValues) -> None:
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
