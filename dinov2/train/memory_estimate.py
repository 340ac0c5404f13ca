"""How much memory a process of a run needs, from the options alone."""

from dataclasses import dataclass

import torch
from torch import nn

from dinov2.config import Config, as_pair
from dinov2.config.schema import DinoOptions, IbotOptions
from dinov2.fsdp import resolve_dtype
from dinov2.layers.swiglu_ffn import swiglu_hidden_dim
from dinov2.models.vision_transformer import drop_path_rates
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS, SSLMetaArch

_FLOAT32 = 4  # bytes
_MLP_RATIO = 4
_STUDENT_COPIES = 4  # weights, gradients, two moments of AdamW


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per process. Estimates: allocators and kernels keep more.

    Attributes:
        states: float32 weights of student and teacher, gradients, and AdamW's two moments, after sharding.
        activations: what the student keeps for backward.
    """

    states: int
    activations: int


def estimate_memory(config: Config, model: SSLMetaArch, device: torch.device, world_size: int) -> MemoryEstimate:
    """Estimates memory per process.

    Not in it: what sharding gathers, the teacher's forward pass, and gradients of activations.

    Args:
        config: options of the run.
        model: student and teacher; may be on the meta device.
        device: where the run computes, which decides what ``auto`` precision is.
        world_size: number of processes.
    """
    heads = _head_activations(config, device)
    return MemoryEstimate(
        states=_states(config, model, world_size),
        activations=_backbone_activations(config, model, device) + heads,
    )


def count_parameters(module: nn.Module) -> int:
    """Number of scalars among a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def patch_grid(size: int | tuple[int, int], patch: int | tuple[int, int]) -> tuple[int, int]:
    """Patches down and across a crop."""
    (height, width), (patch_height, patch_width) = as_pair(size), as_pair(patch)
    return height // patch_height, width // patch_width


def _states(config: Config, model: SSLMetaArch, world_size: int) -> int:
    total = 0
    for network, precision, copies in (
        (model.student, config.compute_precision.student, _STUDENT_COPIES),
        (model.teacher, config.compute_precision.teacher, 1),
    ):
        for name, part in network.items():
            shards = 1 if getattr(precision, name).sharding_strategy == "NO_SHARD" else world_size
            total += _FLOAT32 * copies * count_parameters(part) // shards
    return total


def _backbone_activations(config: Config, model: SSLMetaArch, device: torch.device) -> int:
    student, crops = config.student, config.crops
    extra = 1 + student.num_register_tokens
    global_grid = patch_grid(crops.global_crops_size, student.patch_size)
    local_grid = patch_grid(crops.local_crops_size, student.patch_size)
    tokens = NUM_GLOBAL_CROPS * (global_grid[0] * global_grid[1] + extra)
    tokens += crops.local_crops_number * (local_grid[0] * local_grid[1] + extra)
    backbone = model.student_backbone
    depth, width = len(backbone.blocks), backbone.embed_dim
    rates = drop_path_rates(student.drop_path_rate, depth, uniform=student.drop_path_uniform)
    per_block = (1 - sum(rates) / depth) * _values_per_token(config, width)
    # Recomputed blocks keep their input; one of them at a time has everything.
    blocks = depth + per_block if config.train.activation_checkpointing else depth * per_block
    number_bytes = _bytes(config.compute_precision.student.backbone.mixed_precision.param_dtype, device)
    return int(config.train.batch_size_per_gpu * tokens * width * number_bytes * blocks)


def _values_per_token(config: Config, width: int) -> float:
    """What a block keeps of every token, in multiples of the width."""
    norms, attention = 2 * 2, 3 + 2  # inputs and outputs; joint projection, kernel's output alone and packed
    layer_scales = 2 if config.student.layerscale else 0  # inputs
    if config.student.ffn_layer == "mlp":
        return norms + attention + layer_scales + 2 * _MLP_RATIO
    return norms + attention + layer_scales + 4 * swiglu_hidden_dim(_MLP_RATIO * width) / width


def _head_activations(config: Config, device: torch.device) -> int:
    grid = patch_grid(config.crops.global_crops_size, config.student.patch_size)
    mean_ratio = sum(config.ibot.mask_ratio_min_max) / 2
    masked = NUM_GLOBAL_CROPS * config.ibot.mask_sample_probability * mean_ratio * grid[0] * grid[1]
    rows: dict[str, float] = {"dino_head": 0.0, "ibot_head": 0.0}
    if config.dino.loss_weight > 0:
        rows["dino_head"] += NUM_GLOBAL_CROPS + config.crops.local_crops_number
    if config.ibot.loss_weight > 0:
        rows["ibot_head" if config.ibot.separate_head else "dino_head"] += masked
    options: dict[str, DinoOptions | IbotOptions] = {"dino_head": config.dino, "ibot_head": config.ibot}
    total = 0.0
    for name, count in rows.items():
        if count == 0:
            continue
        head, precision = options[name], getattr(config.compute_precision.student, name)
        number_bytes = _bytes(precision.mixed_precision.param_dtype, device)
        hidden = 2 * (head.head_nlayers - 1) * head.head_hidden_dim + 3 * head.head_bottleneck_dim
        # Logits, their log-softmax and the teacher's probabilities are in float32; the last layer's weight, once
        # normalised, is kept as well.
        per_row = hidden * number_bytes + 3 * head.head_n_prototypes * _FLOAT32
        total += config.train.batch_size_per_gpu * count * per_row
        total += head.head_n_prototypes * head.head_bottleneck_dim * number_bytes
    return int(total)


def _bytes(dtype_name: str, device: torch.device) -> int:
    return torch.finfo(resolve_dtype(dtype_name, device)).bits // 8
