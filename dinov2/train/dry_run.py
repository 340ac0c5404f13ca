"""What a run would do, before it does it: data, schedule in images and passes, parameters, memory."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2.config import Config, as_pair
from dinov2.data.collate import PretrainingBatch
from dinov2.data.datasets import GroupedJSON
from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import get_world_size
from dinov2.fsdp import resolve_dtype
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.train.data import build_collate, build_pretraining_dataset, build_pretraining_loader
from dinov2.train.evaluation import open_evaluation_sets
from dinov2.train.monitors import check_best_metric, open_probe
from dinov2.train.probe import ProbeSet
from dinov2.train.schedules import build_schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per process. Estimates: allocators and kernels keep more.

    Attributes:
        states: float32 weights of student and teacher, gradients, and AdamW's two moments, after sharding.
        activations: what the student keeps for backward.
    """

    states: int
    activations: int


def describe_run(config: Config, device: torch.device) -> str:
    """Checks options and data, builds the networks without memory, and says in text what a run would do.

    Args:
        config: options of the run.
        device: where it would compute.

    Raises:
        FileNotFoundError, ValueError: for data that is missing or wrong; one real batch and the probe set are read.
    """
    dataset = build_pretraining_dataset(config)
    batch = next(iter(build_pretraining_loader(config, dataset)))
    assert isinstance(batch, PretrainingBatch)
    images_of_run = dataset.dataset
    assert isinstance(images_of_run, ImageDataset)
    missing = images_of_run.missing_files() if isinstance(images_of_run, GroupedJSON) else []
    evaluation_sets = open_evaluation_sets(config)
    check_best_metric(config)
    probe = open_probe(config, images_of_run if evaluation_sets is None else evaluation_sets[1])
    world_size = get_world_size()
    schedules = build_schedules(config, world_size)
    iterations = config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH
    global_batch = config.train.batch_size_per_gpu * world_size
    images = iterations * global_batch
    with torch.device("meta"):
        model = SSLMetaArch(config)
        if config.student.pretrained_weights:
            load_pretrained_backbone(model.student_backbone, config.student.pretrained_weights)
    memory = estimate_memory(config, model, device, world_size)
    warmup = config.optim.warmup_epochs * config.train.OFFICIAL_EPOCH_LENGTH
    grid, collate = _grid(config), build_collate(config)
    lines = [
        ("data", f"{config.train.dataset_path}: {len(dataset)} images, one batch of {len(batch.names)} read"),
        *([("warning", _missing_files(missing))] if missing else []),
        ("batch", f"{config.train.batch_size_per_gpu} images x {world_size} process(es) on {device.type}"),
        (
            "schedule",
            f"{config.optim.epochs} epochs x {config.train.OFFICIAL_EPOCH_LENGTH} iterations = {iterations} iterations "
            f"= {images:,} images = {images / len(dataset):.1f} passes over the set",
        ),
        (
            "learning rate",
            f"0 -> {max(schedules.lr[i] for i in {warmup, 0}):.3g} in {warmup} iterations -> {config.optim.min_lr:.3g}",
        ),
        (
            "crops",
            f"2 x {_show(config.crops.global_crops_size)} ({grid[0]}x{grid[1]} patches), "
            f"{config.crops.local_crops_number} x {_show(config.crops.local_crops_size)}",
        ),
        (
            "masks",
            f"{collate.mask_probability:.0%} of global crops, {collate.mask_ratio_min_max[0]:.0%} to "
            f"{collate.mask_ratio_min_max[1]:.0%} of their patches",
        ),
        *((f"student {name}", f"{_count(part):,} parameters") for name, part in model.student.items()),
        (
            "memory",
            f"about {memory.states / GIB:.2f} GiB of weights, gradients and moments and "
            f"{memory.activations / GIB:.2f} GiB of activations per process",
        ),
        (
            "checkpoints",
            f"every {config.train.saveckp_freq * config.train.OFFICIAL_EPOCH_LENGTH} iterations, "
            f"{config.train.keep_last or 'all'} kept, in {config.train.output_dir}",
        ),
        ("evaluation", _evaluation(config)),
        ("probe set", _probe(config, probe)),
    ]
    return "dry run: nothing is trained\n" + "\n".join(f"  {name:<18}{text}" for name, text in lines)


def estimate_memory(config: Config, model: SSLMetaArch, device: torch.device, world_size: int) -> MemoryEstimate:
    """Estimates memory per process.

    States are 4 bytes x (teacher + student x 4: weights, gradients and two moments), divided among processes unless
    replicated. Activations are those of the student: per token and block about 34 values of the width with mlp ratio 4
    (or one, when blocks are recomputed), and per row of the heads three values per prototype in float32.
    """
    precision = config.compute_precision.student.backbone
    shards = 1 if precision.sharding_strategy == "NO_SHARD" else world_size
    states = 4 * (_count(model.teacher) + 4 * _count(model.student)) // shards
    backbone = model.student_backbone
    grid, local = _grid(config), as_pair(config.crops.local_crops_size)
    patch = as_pair(config.student.patch_size)
    extra = 1 + config.student.num_register_tokens
    tokens = 2 * (grid[0] * grid[1] + extra)
    local_tokens = (local[0] // patch[0]) * (local[1] // patch[1]) + extra
    tokens += config.crops.local_crops_number * local_tokens
    depth, width = len(backbone.blocks), backbone.embed_dim
    width_bytes = torch.finfo(resolve_dtype(precision.mixed_precision.param_dtype, device)).bits // 8
    per_token = (1 if config.train.activation_checkpointing else 34) * width * width_bytes * depth
    masked = math.ceil(
        grid[0] * grid[1] * sum(config.ibot.mask_ratio_min_max) / 2 * 2 * config.ibot.mask_sample_probability
    )
    rows = 2 + config.crops.local_crops_number + masked
    prototypes = max(config.dino.head_n_prototypes, config.ibot.head_n_prototypes)
    activations = config.train.batch_size_per_gpu * (tokens * per_token + rows * prototypes * 12)
    return MemoryEstimate(states=states, activations=activations)


def _missing_files(missing: list[Path]) -> str:
    return f"{len(missing)} of a sample of the images do not exist, such as {missing[0]}"


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


def _grid(config: Config) -> tuple[int, int]:
    size, patch = as_pair(config.crops.global_crops_size), as_pair(config.student.patch_size)
    return size[0] // patch[0], size[1] // patch[1]


def _show(size: int | tuple[int, int]) -> str:
    return "x".join(str(side) for side in as_pair(size))


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
