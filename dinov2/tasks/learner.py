"""One optimisation step of a task: losses, gradients, a look at whether they are finite, the step, the average."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.data.task_dataset import TaskSample
from dinov2.loop.optimization import Agreement, Optimization, agree
from dinov2.tasks.networks import TaskNetworks
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.task import Task
from dinov2.utils.param_groups import make_param_groups
from dinov2.utils.schedules import CosineSchedule, Schedule

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class StepRates:
    """Values of one step, before the multipliers of parameter groups."""

    lr: float
    weight_decay: float


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
    learner.optimization.check_finite(agreement, losses, grad_norms, step, names)
    learner.optimization.step(lr=rates.lr, weight_decay=rates.weight_decay)
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


class BestSoFar:
    """Follows a figure over epochs.

    Args:
        metric: its name, for messages.
        higher_is_better: whether larger is better.
        patience: epochs without improvement after which the run is stale; 0 for never.

    Attributes:
        figure: the best, NaN before the first.
        epoch: of the best; -1 before the first.
    """

    def __init__(self, metric: str, *, higher_is_better: bool, patience: int) -> None:
        self.metric = metric
        self.higher_is_better = higher_is_better
        self.patience = patience
        self.figure = math.nan
        self.epoch = -1
        self._last_epoch = -1

    def see(self, figure: float, epoch: int) -> bool:
        """Takes note of an evaluation; returns whether it is the best so far, equals not counting."""
        self._last_epoch = epoch
        better = figure > self.figure if self.higher_is_better else figure < self.figure
        if math.isnan(self.figure) or better:
            self.figure, self.epoch = figure, epoch
            return True
        return False

    @property
    def is_stale(self) -> bool:
        """Whether nothing has improved for too long."""
        return self.patience > 0 and self._last_epoch - self.epoch >= self.patience

    def describe(self) -> str:
        """For people."""
        if self.epoch < 0:
            return "nothing was judged"
        return f"the best {self.metric} is {self.figure:.4f}, after epoch {self.epoch} of {self._last_epoch}"

    def state_dict(self) -> dict[str, Any]:
        """Builtins only."""
        return {"figure": self.figure, "epoch": self.epoch, "last_epoch": self._last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.figure, self.epoch, self._last_epoch = state["figure"], state["epoch"], state["last_epoch"]
