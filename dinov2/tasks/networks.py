"""What a supervised run trains: networks, their average over steps, the optimiser, and one step of it."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dinov2.checkpoint.sharding import local_part
from dinov2.config import Config
from dinov2.config.schema import MixedPrecisionOptions, ModulePrecisionOptions
from dinov2.data.task_dataset import TaskSample
from dinov2.distributed import all_reduce_sum, get_world_size, is_main_process
from dinov2.fsdp import resolve_dtype, shard
from dinov2.layers.block import Block
from dinov2.layers.lora import lora_parameters, merge_lora
from dinov2.loop.optimization import Agreement, Optimization, agree
from dinov2.models.freezing import choose_trainable
from dinov2.models.task_model import TaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.package import begin_task_model
from dinov2.tasks.task import Task
from dinov2.tasks.training_data import TrainingData
from dinov2.utils.param_groups import make_param_groups
from dinov2.utils.schedules import CosineSchedule, Schedule

logger = logging.getLogger("dinov2")

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


class TaskNetworks(nn.Module):
    """Backbone and head as they are trained, and their average over steps if one is wanted.

    A frozen backbone is no part of the checkpoints: it comes from the options again.

    Args:
        task: with the options of the run.
        backbone_config: describes the backbone.
        num_outputs: channels of the head.
        device: where they go.

    Attributes:
        model: is trained; maybe sharded.
        trained: the sub-networks that are trained, by name.
        average: of ``trained``, sharded alike; None without.
        dtype: of the computation.

    Raises:
        FileNotFoundError, ValueError: see `begin_task_model` and `choose_trainable`.
    """

    def __init__(self, task: Task, backbone_config: Config, *, num_outputs: int, device: torch.device) -> None:
        super().__init__()
        config, options = task.config, task.config.backbone
        model = begin_task_model(task, backbone_config, num_outputs=num_outputs, log=is_main_process())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.train.seed)  # of low-rank additions
            self.parts = choose_trainable(
                model.backbone,
                options.mode,
                last_blocks=options.last_blocks,
                lora_rank=options.lora_rank,
                lora_alpha=options.lora_alpha,
                lora_dropout=options.lora_dropout,
                lora_targets=options.lora_targets,
            )
        if is_main_process():
            logger.info("%s", self.parts)
        model.to(device)
        self.momentum = config.train.ema_momentum if task.is_trained else 0.0
        self.dtype = resolve_dtype(config.train.precision, device)
        self.device = device
        frozen = self.parts.num_trainable == 0
        # A frozen backbone is shared.
        whole = copy.deepcopy(model, {id(model.backbone): model.backbone} if frozen else {})
        whole.requires_grad_(False).eval()
        networks = {"head": model.head} if frozen else {"backbone": model.backbone, "head": model.head}
        self.trained = nn.ModuleDict(networks)
        self.average = copy.deepcopy(self.trained).requires_grad_(False) if self.momentum else None
        # Weights, gradients and buffers stay in float32; autocast decides what is computed in.
        formats = MixedPrecisionOptions(param_dtype="fp32", reduce_dtype="fp32")
        precision = ModulePrecisionOptions(sharding_strategy=config.train.sharding_strategy, mixed_precision=formats)
        for networks_of_a_kind in (self.trained, self.average):
            for network in (networks_of_a_kind or nn.ModuleDict()).values():
                units = [[module] for module in network.modules() if isinstance(module, Block)]
                shard(network, precision, device, units=units)
                if isinstance(network, DinoVisionTransformer):
                    # Task models enter a backbone by this method, which must gather parameters as `forward` does.
                    register_fsdp_forward_method(network, "get_intermediate_layers")
        # In a tuple they are no sub-modules: their parts are registered above, or are none of a checkpoint's business.
        self._models = (model, whole)

    @property
    def model(self) -> TaskModel:
        """What is trained."""
        return self._models[0]

    def set_training(self) -> None:
        """Training mode for what is trained; what is frozen stays as it is in evaluation."""
        self.model.train()
        self.parts.set_train_mode(self.model.backbone)

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Moves the average towards what is trained, further in the first steps; running statistics are copied.

        Args:
            step: its number, from 0: early averages must not remember the random start.
        """
        if self.average is None:
            return
        momentum = min(self.momentum, (1 + step) / (10 + step))
        for ours, theirs in zip(self.average.parameters(), self.trained.parameters(), strict=True):
            local_part(ours).lerp_(local_part(theirs), 1 - momentum)
        for statistic, latest in zip(self.average.buffers(), self.trained.buffers(), strict=True):
            statistic.copy_(latest)

    @torch.no_grad()
    def whole(self) -> TaskModel:
        """The model that is evaluated and shipped, whole in every process; every process must call it.

        It is the average over steps where there is one. Running statistics, which every process gathers over its own
        images, are averaged over processes. What is returned changes with the next call.
        """
        whole = self._models[1]
        for name, network in (self.average or self.trained).items():
            buffers = dict(network.named_buffers())
            values: dict[str, Tensor] = {}
            for key, tensor in network.state_dict().items():
                value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if key in buffers and value.is_floating_point():
                    value = all_reduce_sum(value.clone()) / get_world_size()
                values[key] = value
            whole.get_submodule(name).load_state_dict(values)  # a head may be larger than it was
        return whole

    def shipped_state(self) -> dict[str, Tensor]:
        """Weights of `whole` on the processor, with low-rank additions merged into the layers they belong to."""
        model = self._models[1]
        if any(True for _ in lora_parameters(model)):
            model = copy.deepcopy(model)
            merge_lora(model.backbone)
        return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def learning_rates(config: TaskConfig, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Learning rate by step: linear warm-up from 0, then half a cosine or a constant, as ``optim`` says."""
    optim = config.optim
    return CosineSchedule(
        optim.lr,
        optim.lr if optim.schedule == "constant" else optim.min_lr,
        total_steps,
        warmup_iters=min(round(optim.warmup_epochs * steps_per_epoch), total_steps),
    )


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
            # In heads, the names of norms' scales do not tell what they are.
            norms = {
                id(parameter)
                for module in network.modules()
                if isinstance(module, _NORMS)
                for parameter in module.parameters()
            }
            pairs = list(zip(group["params"], group["param_names"], strict=True))
            for is_norm in (False, True):
                chosen = [pair for pair in pairs if (id(pair[0]) in norms) == is_norm]
                if chosen:
                    multiplier = 0.0 if is_norm else group["wd_multiplier"]
                    parameters, names = (list(column) for column in zip(*chosen, strict=True))
                    groups.append({**group, "params": parameters, "param_names": names, "wd_multiplier": multiplier})
    # No fused kernels off CUDA: they are fast there and rare elsewhere.
    fused = True if device.type == "cuda" else None
    groups = groups or [{"params": []}]  # of a head that is computed, not trained
    momentum = config.optim.momentum
    if config.optim.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=fused)
    kind = torch.optim.AdamW if config.optim.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=0.0, betas=(momentum, 0.999), fused=fused)


_PATIENCE = 3  # steps in a row: heads may begin with weights of 0, and the learning rate of the first step is 0
_ROUNDING = 1e-6  # share of a value by which equal ones may differ


class DeadHeadWatch:
    """Notices a head that has stopped learning: its gradients are exactly 0, or it says the same of everything."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []  # of the step, whether they are constant
        self._in_a_row = {"gradients": 0, "outputs": 0}
        self._is_told = False  # of a head that is dead since then

    @torch.no_grad()
    def look(self, outputs: Any) -> None:
        """Takes in what a forward pass gave."""
        for value in outputs.values() if isinstance(outputs, Mapping) else ():
            if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
                channels = value.detach().float().transpose(0, 1).flatten(1)  # [C, images and pixels]
                if channels.shape[1] > 1:
                    low, high = channels.amin(dim=1), channels.amax(dim=1)
                    self._outputs.append((high - low <= _ROUNDING * high.abs().maximum(low.abs())).all())

    def warning(self, losses: Mapping[str, float], grad_norms: Mapping[str, Tensor]) -> str:
        """What is to be said after a step; empty for nothing, and until a head that was told of has come back.

        Args:
            losses: of the step; where the loss is 0 there was nothing to learn from.
            grad_norms: by sub-network.
        """
        outputs, self._outputs = self._outputs, []
        loss = losses["total_loss"]
        signs = {
            "gradients": "head" in grad_norms and float(grad_norms["head"]) == 0,
            "outputs": bool(outputs) and bool(torch.stack(outputs).all()),
        }
        for name, sign in signs.items():
            self._in_a_row[name] = self._in_a_row[name] + 1 if sign and loss else 0
        was_told, longest = self._is_told, max(self._in_a_row.values())
        self._is_told = longest >= _PATIENCE or (was_told and longest > 0)
        if was_told or not self._is_told:
            return ""
        what = (
            "its gradients are exactly 0"
            if self._in_a_row["gradients"]
            else "it says the same of all images and pixels"
        )
        return (
            f"DEAD HEAD: for {_PATIENCE} steps {what}, while the loss is {loss:.4g}: it has stopped learning, and will "
            "not begin again by itself. Take a lower optim.lr or a longer optim.warmup_epochs, and look at --overfit 8"
        )


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What takes a step.

    Attributes:
        task: its loss.
        networks: what is trained.
        optimization: of ``networks.trained``.
        image_names: of a batch, for messages.
        watch: is shown every output.
    """

    task: Task
    networks: TaskNetworks
    optimization: Optimization
    image_names: Callable[[TaskSample], list[str]]
    watch: DeadHeadWatch = field(default_factory=DeadHeadWatch)

    def step(
        self, batches: Sequence[TaskSample], step: int, *, lr: float, weight_decay: float, stop: bool = False
    ) -> tuple[Agreement, dict[str, Tensor]]:
        """One step of the optimiser, from one or several batches.

        Args:
            batches: collated.
            step: its number, from 0.
            lr: learning rate, before the multipliers of parameter groups.
            weight_decay: likewise.
            stop: whether this process was asked to stop.

        Returns:
            What all processes agree on, and gradient norms before clipping by sub-network.

        Raises:
            NonFiniteLossError: a loss or gradient is NaN or infinite; nothing was changed then but random states.
        """
        networks = self.networks
        networks.set_training()
        losses: dict[str, Tensor] = {}
        names: list[str] = []
        for number, batch in enumerate(batches):
            for module in networks.trained.modules():
                if isinstance(module, FSDPModule):  # gradients are exchanged with other processes once
                    module.set_requires_gradient_sync(number == len(batches) - 1)
            for name, value in self.forward_backward(batch, share=1 / len(batches)).items():
                losses[name] = losses.get(name, torch.zeros_like(value)) + value / len(batches)
            names += self.image_names(batch)
        grad_norms = self.optimization.clip()
        unreadable = tuple(name for batch in batches for name in batch["unreadable"])
        agreement = agree(losses, stop=stop, unreadable=unreadable)
        self.optimization.check_finite(agreement, losses, grad_norms, step, names)
        self.optimization.step(lr=lr, weight_decay=weight_decay)
        networks.update_average(step)
        return agreement, grad_norms

    def forward_backward(self, batch: TaskSample, *, share: float) -> dict[str, Tensor]:
        """Losses of a batch and their gradients.

        Args:
            batch: collated, on any device.
            share: of this batch in the step.

        Returns:
            ``total_loss`` and its terms, detached scalars, not multiplied by ``share``.
        """
        device = self.networks.device
        sample: Any = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        with torch.autocast(device.type, self.networks.dtype, enabled=self.networks.dtype != torch.float32):
            outputs = self.task.forward(self.networks.model, sample)
        self.watch.look(outputs)
        terms = self.task.loss(outputs, sample)
        total = torch.stack(list(terms.values())).sum()
        (total * share * self.optimization.loss_scale(device)).backward()
        named = {f"{name}_loss": term.detach() for name, term in terms.items()}
        return {"total_loss": total.detach(), **named}


def build_learner(
    task: Task, data: TrainingData, backbone_config: Config, *, num_outputs: int, device: torch.device
) -> Learner:
    """Networks and optimiser as they are at the start, and the loss, weighted by the classes of the training set.

    Raises:
        FileNotFoundError, ValueError: see `TaskNetworks`.
    """
    networks = TaskNetworks(task, backbone_config, num_outputs=num_outputs, device=device)
    task.prepare_loss(data.class_weights(), device)
    optimizer = build_task_optimizer(task.config, networks.trained, device)
    scaler = torch.amp.GradScaler(device.type, enabled=networks.dtype == torch.float16)
    optimization = Optimization(networks.trained, optimizer, scaler, task.config.optim.clip_grad)
    return Learner(task=task, networks=networks, optimization=optimization, image_names=data.names)
