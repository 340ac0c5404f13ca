"""Precision, compilation, activation checkpointing and sharding, applied to a network from outside.

The network's code knows nothing of any of them: it is plain `torch.nn`. Order matters and is fixed here: checkpointing
wraps the plain blocks, compilation sees the checkpointed blocks, sharding comes last.
"""

import functools
import logging
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from dinov2.config.schema import ModulePrecisionOptions
from dinov2.distributed import get_world_size

logger = logging.getLogger("dinov2")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(name: str, device: torch.device, *, auto: torch.dtype | None = None) -> torch.dtype:
    """Returns the number format that a name means on a device.

    Args:
        name: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        device: where the network computes.
        auto: what ``auto`` means; by default bf16 on a GPU that has it, else float32.
    """
    if name == "auto":
        if auto is not None:
            return auto
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name == "fp16" and device.type == "cpu":
        _warn_fp16_on_cpu()
        return torch.float32
    return DTYPES[name]


@functools.cache
def _warn_fp16_on_cpu() -> None:
    logger.warning("fp16 was asked for, but processors do not train in it: computing in fp32")


def checkpoint_activations(network: nn.Module, unit_class: type[nn.Module]) -> None:
    """Makes every module of ``unit_class`` recompute its forward pass during backward."""
    for module in network.modules():
        if isinstance(module, unit_class):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def compile_units(network: nn.Module, unit_class: type[nn.Module]) -> None:
    """Compiles every module of ``unit_class`` in place; parameter names stay."""
    for module in network.modules():
        if isinstance(module, unit_class):
            module.compile(dynamic=True)


def shard(
    network: nn.Module,
    precision: ModulePrecisionOptions,
    device: torch.device,
    *,
    units: Sequence[Sequence[nn.Module]] = (),
    fed_in_half: bool = False,
) -> nn.Module:
    """Spreads a network over all processes with FSDP2, or leaves it as it is where there is nothing to do.

    With one process and float32 the network stays plain, unless its inputs need a cast. Otherwise ``SHARD_GRAD_OP``
    keeps parameters gathered between forward and backward, ``FULL_SHARD`` frees and gathers them again, ``NO_SHARD``
    keeps a full copy in every process and sums gradients. Parameters and optimiser state stay float32; the forward pass
    sees ``param_dtype``.

    Args:
        network: a module whose parameters are equal in all processes; changed in place.
        precision: strategy and number formats.
        device: where it computes.
        units: groups of sub-modules that are gathered together, each group one communication.
        fed_in_half: whether inputs come in a shorter format than float32; they are cast to ``param_dtype``.

    Returns:
        The same ``network``.
    """
    formats = precision.mixed_precision
    param_dtype = resolve_dtype(formats.param_dtype, device)
    reduce_dtype = resolve_dtype(formats.reduce_dtype, device, auto=torch.float32)
    buffer_dtype = resolve_dtype(formats.buffer_dtype, device, auto=torch.float32)
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(buffer_dtype)
    if get_world_size() == 1 and param_dtype == torch.float32 and not fed_in_half:
        return network
    # Outputs of the backbone are views of one matrix of tokens; torch warns of in-place changes, and nothing makes any.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    if precision.sharding_strategy == "NO_SHARD":  # every process is a shard group of its own
        mesh = init_device_mesh(device.type, (get_world_size(), 1), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (get_world_size(),), mesh_dim_names=("shard",))
    free_after_forward = precision.sharding_strategy == "FULL_SHARD"
    for unit in units:
        fully_shard(list(unit), mesh=mesh, mp_policy=policy, reshard_after_forward=free_after_forward)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=free_after_forward)
    return network


def release_gathered_parameters(network: nn.Module) -> None:
    """Frees what a forward pass without backward left gathered, so that parameters are shards again."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
