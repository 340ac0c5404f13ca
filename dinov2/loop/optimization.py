"""From gradients to a step that all processes agree on: loss scaling, clipping, the optimiser, moving averages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.distributed import all_gather_objects, all_reduce_sum, get_rank, get_world_size
from dinov2.utils.errors import RunError
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


IMAGES_SHOWN = 8


class NonFiniteLossError(RunError):
    """A loss or gradient is NaN or infinite; no optimiser step was taken with it."""

    agreement: "Agreement"
    losses: dict[str, float]  # this process's own
    grad_norms: dict[str, float]
    to_blame: bool = True  # whether this process's batch may be the cause


@dataclass(frozen=True)
class Agreement:
    """The same in every process.

    Attributes:
        losses: mean over processes, by name.
        stop: whether any process was asked to stop.
        unreadable: names of the images of this step that could not be read, of all processes.
    """

    losses: dict[str, float]
    stop: bool
    unreadable: tuple[str, ...]


def agree(losses: Mapping[str, Tensor], *, stop: bool, unreadable: Sequence[str] = ()) -> Agreement:
    """Exchanges a step's losses and wishes, in one small collective and one wait for the device.

    Args:
        losses: scalars on the model's device; the same names in every process.
        stop: whether this process was asked to stop.
        unreadable: names of the images of this process that could not be read.
    """
    values = [loss.float() for loss in losses.values()]
    wishes = torch.tensor([float(stop), float(len(unreadable))], device=values[0].device)
    numbers: list[float] = all_reduce_sum(torch.cat([torch.stack(values), wishes])).tolist()
    *sums, stops, missing = numbers
    names: tuple[str, ...] = ()
    if missing:
        names = tuple(name for group in all_gather_objects(tuple(unreadable)) for name in group)
    means = {name: value / get_world_size() for name, value in zip(losses, sums, strict=True)}
    return Agreement(means, stop=stops > 0, unreadable=names)


def check_finite(
    agreement: Agreement,
    losses: Mapping[str, Tensor],
    grad_norms: Mapping[str, Tensor],
    iteration: int,
    images: Sequence[str],
) -> None:
    """Stops the run before the optimiser step when a loss, or a gradient norm, is NaN or infinite.

    Args:
        agreement: of this step; all processes then raise together.
        losses: this process's own losses, to tell whose batch is to blame.
        grad_norms: norms by sub-network, the same in all processes.
        iteration: number of the step.
        images: names of the images in this process's batch.

    Raises:
        NonFiniteLossError: naming the term, the iteration and the images; raised by all processes together.
    """
    bad_losses = [name for name, value in agreement.losses.items() if not math.isfinite(value)]
    bad_norms = [name for name, norm in grad_norms.items() if not math.isfinite(norm.item())]
    if not bad_losses and not bad_norms:
        return
    values = {name: loss.item() for name, loss in losses.items()}
    own = [name for name, value in values.items() if not math.isfinite(value)]
    reports = [report for report in all_gather_objects(_report(own, images)) if report]
    if not bad_losses:
        reports = [f"the losses are finite; the images of rank {get_rank()} were {_some(images)}"]
    terms = ", ".join(bad_losses) or "the gradient of " + ", ".join(bad_norms)
    error = NonFiniteLossError(
        f"{terms} is not finite at iteration {iteration}; no step was taken. {'; '.join(reports)}. Look at these "
        f"images, or go on from the last checkpoint with a lower learning rate or another train.seed: with the same "
        f"options a run repeats itself exactly."
    )
    error.agreement, error.losses, error.to_blame = agreement, values, bool(own) or not bad_losses
    error.grad_norms = {name: norm.item() for name, norm in grad_norms.items()}
    raise error


def _report(own: Sequence[str], images: Sequence[str]) -> str:
    return f"rank {get_rank()}: {', '.join(own)} from the images {_some(images)}" if own else ""


def _some(images: Sequence[str]) -> str:
    more = f" and {len(images) - IMAGES_SHOWN} more" if len(images) > IMAGES_SHOWN else ""
    return ", ".join(images[:IMAGES_SHOWN]) + more
