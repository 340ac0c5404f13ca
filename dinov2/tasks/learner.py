"""One optimisation step of a task: losses, gradients, a look at whether they are finite, the step, the average."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinov2.data.task_samples import TaskSample
from dinov2.fsdp.agreement import Agreement, NonFiniteLossError, agree, check_finite
from dinov2.fsdp.optimization import Optimization
from dinov2.tasks.networks import TaskNetworks
from dinov2.tasks.schedule import StepRates
from dinov2.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What takes a step.

    Attributes:
        task: its loss.
        networks: what is trained.
        optimization: of ``networks.trained``.
        image_names: of a batch, for messages.
    """

    task: Task
    networks: TaskNetworks
    optimization: Optimization
    image_names: Callable[[TaskSample], list[str]]


def train_step(
    learner: Learner, batches: list[TaskSample], step: int, rates: StepRates, *, stop: bool
) -> tuple[Agreement, dict[str, Tensor]]:
    """One step of the optimiser, from one or several batches.

    Returns:
        What all processes agree on, and gradient norms before clipping by sub-network.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite; nothing has been changed then but random states.
    """
    learner.networks.set_training()
    losses: dict[str, Tensor] = {}
    names: list[str] = []
    for number, batch in enumerate(batches):
        learner.networks.synchronise_gradients(number == len(batches) - 1)
        for name, value in forward_backward(learner, batch, share=1 / len(batches)).items():
            losses[name] = losses.get(name, torch.zeros_like(value)) + value / len(batches)
        names += learner.image_names(batch)
    grad_norms = learner.optimization.clip()
    unreadable = tuple(name for batch in batches for name in batch["unreadable"])
    agreement = agree(losses, stop=stop, unreadable=unreadable)
    overflow_is_normal = learner.optimization.overflow_is_normal()
    try:
        check_finite(agreement, losses, {} if overflow_is_normal else grad_norms, step, names)
    except NonFiniteLossError:
        learner.optimization.discard()
        raise
    learner.optimization.step(rates)
    learner.networks.update_average(step)
    return agreement, grad_norms


def forward_backward(learner: Learner, batch: TaskSample, *, share: float) -> dict[str, Tensor]:
    """Losses of a batch and their gradients.

    Args:
        learner: computes them.
        batch: collated, on any device.
        share: of this batch in the step.

    Returns:
        ``total_loss`` and its terms, detached scalars, not multiplied by ``share``.
    """
    sample: Any = {
        name: value.to(learner.networks.device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    with learner.networks.computing():
        outputs = learner.networks.model(sample["image"], sample.get("valid"))
    terms = learner.task.loss(outputs, sample)
    total = torch.stack(list(terms.values())).sum()
    (total * share * learner.optimization.loss_scale(learner.networks.device)).backward()
    named = {f"{name}_loss": term.detach() for name, term in terms.items()}
    return {"total_loss": total.detach(), **named}
