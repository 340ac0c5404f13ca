"""The networks of a supervised run: what is trained, what is averaged over steps, and what is shipped."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dinov2.checkpoint.sharding import local_part
from dinov2.config import Config
from dinov2.config.schema import MixedPrecisionOptions, ModulePrecisionOptions
from dinov2.distributed import all_reduce_sum, get_world_size, is_main_process
from dinov2.fsdp import resolve_dtype, shard
from dinov2.layers.block import Block
from dinov2.layers.lora import lora_parameters, merge_lora
from dinov2.models.freezing import choose_trainable
from dinov2.models.task_model import TaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.package import begin_task_model

logger = logging.getLogger("dinov2")


class TaskNetworks(nn.Module):
    """Backbone and head as they are trained, and their average over steps if one is wanted.

    A frozen backbone is no part of the checkpoints: it comes from the options again.

    Args:
        config: options of the run.
        backbone_config: describes the backbone.
        num_outputs: classes; 1 for depth.
        device: where they go.

    Attributes:
        model: is trained; maybe sharded.
        trained: the sub-networks that are trained, by name.
        average: of ``trained``, sharded alike; None without.
        dtype: of the computation.

    Raises:
        FileNotFoundError, ValueError: see `begin_task_model` and `choose_trainable`.
    """

    def __init__(self, config: TaskConfig, backbone_config: Config, *, num_outputs: int, device: torch.device) -> None:
        super().__init__()
        model = begin_task_model(config, backbone_config, num_outputs=num_outputs, log=is_main_process())
        options = config.backbone
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
        self.momentum = config.train.ema_momentum
        self.dtype = resolve_dtype(config.train.precision, device)
        self.device = device
        frozen = self.parts.num_trainable == 0
        whole = _with_head(model, copy.deepcopy(model.head)) if frozen else copy.deepcopy(model)
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

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside, the precision of the options holds."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            yield

    def synchronise_gradients(self, wanted: bool) -> None:
        """Whether the next backward pass exchanges gradients with other processes."""
        for module in self.trained.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(wanted)

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
        """The model that is judged and shipped, whole in every process; every process must call it.

        It is the average over steps where there is one. Running statistics, which every process gathers over its own
        images, are averaged over processes. What is returned changes with the next call.
        """
        whole = self._models[1]
        for name, network in (self.average or self.trained).items():
            targets = whole.get_submodule(name).state_dict()
            buffers = dict(network.named_buffers())
            for key, tensor in network.state_dict().items():
                value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if key in buffers and value.is_floating_point():
                    value = all_reduce_sum(value.clone()) / get_world_size()
                targets[key].copy_(value)
        return whole

    def shipped_state(self) -> dict[str, Tensor]:
        """Weights of `whole` on the processor, with low-rank additions merged into the layers they belong to."""
        model = self._models[1]
        if any(True for _ in lora_parameters(model)):
            model = copy.deepcopy(model)
            merge_lora(model.backbone)
        return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _with_head(model: TaskModel, head: nn.Module) -> TaskModel:
    """The same backbone with another head."""
    return TaskModel(model.backbone, head, blocks=model.blocks, norm=model.norm)
