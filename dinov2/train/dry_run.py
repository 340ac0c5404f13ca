"""What a run would do, before it does it: data, schedule in images and passes, parameters, memory."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dinov2.checkpoint.integrity import find_steps, parse_rank_file, tagged_name
from dinov2.checkpoint.sharding import rank_file, rank_pattern
from dinov2.config import Config, as_pair, options_without_effect
from dinov2.config.schema import DinoOptions, IbotOptions
from dinov2.data.collate import PretrainingBatch
from dinov2.data.datasets import GroupedJSON
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.pretraining import PretrainingDataset
from dinov2.distributed import get_world_size
from dinov2.fsdp import resolve_dtype
from dinov2.layers.feed_forward import swiglu_hidden_dim
from dinov2.models.vision_transformer import drop_path_rates
from dinov2.train.data import build_collate, build_pretraining_dataset, build_pretraining_loader
from dinov2.train.evaluation import open_evaluation_sets
from dinov2.train.monitors import ProbeSet, check_best_metric, open_probe
from dinov2.train.setup import (
    advise_bf16,
    checkpoint_to_resume,
    describe_precision,
    load_pretrained_student,
    scaled_learning_rate,
)
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


GIB = 2**30


def describe_run(config: Config, device: torch.device, *, resume: bool = True) -> str:
    """Checks options and data, builds the networks without memory, and says in text what a run would do.

    Args:
        config: options of the run.
        device: where it would compute.
        resume: false with ``--no-resume``.

    Raises:
        FileNotFoundError, ValueError: for data, weights or a checkpoint that is missing or wrong; one real batch and
            the probe set are read, checkpoints are not verified.
    """
    dataset = build_pretraining_dataset(config)
    images = dataset.dataset
    assert isinstance(images, ImageDataset)
    evaluation_sets = open_evaluation_sets(config)
    check_best_metric(config)
    probe = open_probe(config, images if evaluation_sets is None else evaluation_sets[1])
    with torch.device("meta"):
        model = SSLMetaArch(config)
        load_pretrained_student(config, model, log=True)
    epoch_length = config.train.OFFICIAL_EPOCH_LENGTH
    lines = [
        ("data", _data(config, dataset)),
        ("batch", f"{config.train.batch_size_per_gpu} images x {get_world_size()} process(es) on {device.type}"),
        ("precision", describe_precision(config, device)),
        ("start", _start(config, resume=resume)),
        ("schedule", _schedule(config, len(dataset))),
        ("learning rate", _learning_rate(config)),
        ("crops", _crops(config)),
        ("masks", _masks(config)),
        *((f"student {name}", f"{count_parameters(part):,} parameters") for name, part in model.student.items()),
        ("memory", _memory(config, model, device)),
        (
            "checkpoints",
            f"every {config.train.saveckp_freq * epoch_length} iterations, {config.train.keep_last or 'all'} kept, in "
            f"{config.train.output_dir}",
        ),
        ("evaluation", _evaluation(config)),
        ("probe set", _probe(config, probe)),
        *(("advice", text) for text in (advise_bf16(config, device),) if text),
        *(("warning", text) for text in (*_missing_files(images), *options_without_effect(config))),
    ]
    return "dry run: nothing is trained\n" + "\n".join(f"  {name:<18}{text}" for name, text in lines)


def _data(config: Config, dataset: PretrainingDataset) -> str:
    batch = next(iter(build_pretraining_loader(config, dataset)))
    assert isinstance(batch, PretrainingBatch)
    return f"{config.train.dataset_path}: {len(dataset)} images, one batch of {len(batch.names)} read"


def _start(config: Config, *, resume: bool) -> str:
    folder = Path(config.train.output_dir)
    steps = find_steps(folder)
    tag = tagged_name(folder)
    named = checkpoint_to_resume(config, folder, has_checkpoint=bool(tag or steps), resume=resume)
    if named:
        first = rank_file(rank_pattern(named), 0)
        if not Path(first).exists():
            raise FileNotFoundError(f"there is nothing to resume from: {first} does not exist")
        return f"goes on from {named}" + (f", or from {tag} in its own folder if that came from there" if tag else "")
    if resume and (tag or steps):
        step = parse_rank_file(tag) or (steps[0].name, steps[0].number)
        is_complete = step[1] + 1 >= _iterations(config)
        return f"{folder} holds {step[0]}: " + ("the run is complete" if is_complete else "the run goes on from there")
    if config.student.pretrained_weights:
        return f"backbone of {config.student.pretrained_weights}, random heads"
    return f"random weights (train.seed={config.train.seed})"


def _iterations(config: Config) -> int:
    return config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH


def _schedule(config: Config, num_images: int) -> str:
    images = _iterations(config) * config.train.batch_size_per_gpu * get_world_size()
    return (
        f"{config.optim.epochs} epochs x {config.train.OFFICIAL_EPOCH_LENGTH} iterations = {_iterations(config)} "
        f"iterations = {images:,} images = {images / num_images:.1f} passes over the set"
    )


def _learning_rate(config: Config) -> str:
    peak = scaled_learning_rate(config.optim, config.train.batch_size_per_gpu * get_world_size())
    warmup = config.optim.warmup_epochs * config.train.OFFICIAL_EPOCH_LENGTH
    rise = f"0 -> {peak:.3g} in {warmup} iterations" if warmup else f"{peak:.3g}"
    return rise if warmup == _iterations(config) else f"{rise} -> {config.optim.min_lr:.3g}"


def _crops(config: Config) -> str:
    grid = patch_grid(config.crops.global_crops_size, config.student.patch_size)
    return (
        f"2 x {_show(config.crops.global_crops_size)} ({grid[0]}x{grid[1]} patches), "
        f"{config.crops.local_crops_number} x {_show(config.crops.local_crops_size)}"
    )


def _masks(config: Config) -> str:
    collate = build_collate(config)
    if collate.mask_probability == 0:
        return "none"
    return (
        f"{collate.mask_probability:.0%} of global crops, {collate.mask_ratio_min_max[0]:.0%} to "
        f"{collate.mask_ratio_min_max[1]:.0%} of their patches"
    )


def _memory(config: Config, model: SSLMetaArch, device: torch.device) -> str:
    memory = estimate_memory(config, model, device, get_world_size())
    text = (
        f"about {memory.states / GIB:.2f} GiB of weights, gradients and moments and "
        f"{memory.activations / GIB:.2f} GiB of activations per process"
    )
    if device.type != "cuda":
        return text
    return f"{text}; the GPU has {torch.cuda.get_device_properties(device).total_memory / GIB:.1f} GiB"


def _missing_files(images: ImageDataset) -> list[str]:
    missing = images.missing_files() if isinstance(images, GroupedJSON) else []
    return [f"{len(missing)} of a sample of the images do not exist, such as {missing[0]}"] if missing else []


def _evaluation(config: Config) -> str:
    period = config.evaluation.eval_period_iterations
    when = f"every {period} iterations and at the end" if period else "at the end"
    sets = f"k-NN of {config.evaluation.val_dataset_path}" if config.evaluation.val_dataset_path else "no k-NN"
    return f"teacher checkpoint {when}; {sets}"


def _probe(config: Config, probe: ProbeSet | None) -> str:
    if probe is None:
        return "features are not watched"
    settings = config.evaluation
    source = settings.probe_dataset_path or settings.val_dataset_path or config.train.dataset_path
    faults = probe.unreadable()
    found = f"{len(faults)} of them cannot be read, such as {faults[0]}" if faults else "all of them read"
    return f"{len(probe)} images of {source}, {found}"


def _show(size: int | tuple[int, int]) -> str:
    return "x".join(str(side) for side in as_pair(size))
