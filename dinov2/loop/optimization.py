"""From gradients to a step that all processes agree on: loss scaling, clipping, finite values, the optimiser."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinov2.distributed import all_gather_objects, all_reduce_sum, get_rank, get_world_size
from dinov2.utils.errors import RunError
from dinov2.utils.param_groups import apply_step

MIN_SCALE = 1.0  # of the loss in fp16: gradients that overflow even then are not the scale's fault
IMAGES_SHOWN = 8


class NonFiniteLossError(RunError):
    """A loss or gradient is NaN or infinite; no optimiser step was taken with it.

    Args:
        message: for people.
        losses: this process's own, by name.
        grad_norms: by sub-network.
        to_blame: whether this process's batch may be the cause.
    """

    def __init__(
        self, message: str, losses: Mapping[str, float], grad_norms: Mapping[str, float], *, to_blame: bool = True
    ) -> None:
        super().__init__(message)
        self.losses, self.grad_norms, self.to_blame = dict(losses), dict(grad_norms), to_blame


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


@dataclass(frozen=True)
class Optimization:
    """The optimiser's part of a step, for pretraining and fine-tuning alike.

    After backward, in this order: `clip`, `agree`, `check_finite`, `step`.

    Attributes:
        networks: sub-networks by name.
        optimizer: over all their parameters, in groups of `make_param_groups`.
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
        limit = self.clip_grad if self.clip_grad > 0 else float("inf")
        norms = {
            name: torch.nn.utils.clip_grad_norm_(network.parameters(), limit) for name, network in self.networks.items()
        }
        return {name: norm.full_tensor() if isinstance(norm, DTensor) else norm for name, norm in norms.items()}

    def check_finite(
        self,
        agreement: Agreement,
        losses: Mapping[str, Tensor],
        grad_norms: Mapping[str, Tensor],
        iteration: int,
        images: Sequence[str],
    ) -> None:
        """Forgets the gradients and raises, before the step, when a loss or a gradient norm is NaN or infinite.

        Weights, moments and the loss scale stay as they are then. Norms that overflow because of the loss scale of
        fp16 pass: `step` leaves such a step out and lowers the scale.

        Args:
            agreement: of this step; all processes then raise together.
            losses: this process's own losses, to tell whose batch is to blame.
            grad_norms: norms by sub-network, the same in all processes.
            iteration: number of the step.
            images: names of the images in this process's batch.

        Raises:
            NonFiniteLossError: naming the term, the iteration and the images; raised by all processes together.
        """
        if self.scaler.is_enabled() and self.scaler.get_scale() > MIN_SCALE:
            grad_norms = {}
        bad_losses = [name for name, value in agreement.losses.items() if not math.isfinite(value)]
        norms = {name: norm.item() for name, norm in grad_norms.items()}
        bad_norms = [name for name, norm in norms.items() if not math.isfinite(norm)]
        if not bad_losses and not bad_norms:
            return
        if self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale())  # forgets that gradients were unscaled
        self.optimizer.zero_grad(set_to_none=True)

        more = f" and {len(images) - IMAGES_SHOWN} more" if len(images) > IMAGES_SHOWN else ""
        shown = ", ".join(images[:IMAGES_SHOWN]) + more
        values = {name: loss.item() for name, loss in losses.items()}
        own = [name for name, value in values.items() if not math.isfinite(value)]
        report = f"rank {get_rank()}: {', '.join(own)} from the images {shown}" if own else ""
        reports = [report for report in all_gather_objects(report) if report]
        if not bad_losses:
            reports = [f"the losses are finite; the images of rank {get_rank()} were {shown}"]
        terms = ", ".join(bad_losses) or "the gradient of " + ", ".join(bad_norms)
        raise NonFiniteLossError(
            f"{terms} is not finite at iteration {iteration}; no step was taken. {'; '.join(reports)}. Look at these "
            f"images, or go on from the last checkpoint with a lower learning rate or another train.seed: with the "
            f"same options a run repeats itself exactly.",
            values,
            norms,
            to_blame=bool(own) or not bad_losses,
        )

    def step(self, *, lr: float, weight_decay: float, last_layer_lr: float | None = None) -> None:
        """Updates the weights and clears the gradients; a step whose fp16 gradients overflowed is left out.

        Args:
            lr: learning rate before the multipliers of parameter groups.
            weight_decay: likewise.
            last_layer_lr: learning rate of the heads' last layers; by default ``lr``.
        """
        last_layer_lr = lr if last_layer_lr is None else last_layer_lr
        apply_step(self.optimizer, lr=lr, weight_decay=weight_decay, last_layer_lr=last_layer_lr)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
