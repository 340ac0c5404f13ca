"""What a run would do, before it does it: data, schedule in images and passes, parameters, memory."""

import contextlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from dinov2.checkpoint.integrity import find_steps, parse_rank_file, tagged_name
from dinov2.checkpoint.sharding import rank_file, rank_pattern
from dinov2.config import Config, as_pair, options_without_effect
from dinov2.config.schema import DinoOptions, IbotOptions
from dinov2.data.augmentations import DataAugmentationDINO, crop_fit
from dinov2.data.collate import PretrainingBatch
from dinov2.data.datasets import GroupedJSON
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.reading import Deadline
from dinov2.distributed import get_local_world_size, get_world_size
from dinov2.fsdp import resolve_dtype
from dinov2.models.vision_transformer import drop_path_rates
from dinov2.train.data import build_collate, build_pretraining_dataset, build_pretraining_loader
from dinov2.train.distillation import load_frozen_teacher
from dinov2.train.recipe import describe_auto, num_iterations
from dinov2.train.setup import (
    checkpoint_to_resume,
    describe_precision,
    doubt_schedule,
    load_pretrained_student,
    open_evaluation,
    scaled_learning_rate,
)
from dinov2.train.ssl_meta_arch import NUM_GLOBAL_CROPS, SSLMetaArch
from dinov2.utils.processor import memory_of_machine

GIB = 2**30

_RARE = 0.005
_PROCESS, _WORKER = 600 * 2**20, 100 * 2**20  # bytes of Python with torch, and of a process forked from it
_SIZES_READ = 64  # images, evenly spread, whose headers are looked at
_FLOAT32 = 4  # bytes
_STUDENT_COPIES = 4  # weights, gradients, two moments of AdamW


def describe_run(config: Config, device: torch.device, auto: Mapping[str, Any], *, resume: bool = True) -> str:
    """Checks options and data, builds the networks without memory, and says in text what a run would do.

    Args:
        config: options of the run, without ``auto``.
        device: where it would compute.
        auto: those that were ``auto``, with what they became.
        resume: false with ``--no-resume``.

    Raises:
        FileNotFoundError, ValueError: for data, weights or a checkpoint that is missing or wrong; one real batch and
            the probe set are read, checkpoints are not verified.
    """
    train, optim, crops, evaluation = config.train, config.optim, config.crops, config.evaluation
    dataset = build_pretraining_dataset(config)
    images = dataset.dataset
    assert isinstance(images, ImageDataset)
    batch = next(iter(build_pretraining_loader(config, dataset)))
    assert isinstance(batch, PretrainingBatch)
    _, probe = open_evaluation(config, images)
    with torch.device("meta"):
        model = SSLMetaArch(config)
        load_pretrained_student(config, model, log=True)
        if (frozen := load_frozen_teacher(config, log=True)) is not None:
            model.distil_from(frozen)

    iterations, global_batch = optim.epochs * train.OFFICIAL_EPOCH_LENGTH, train.batch_size_per_gpu * get_world_size()
    seen = iterations * global_batch
    peak, warmup = scaled_learning_rate(optim, global_batch), num_iterations(optim.warmup_epochs, config)
    rise = f"0 -> {peak:.3g} in {warmup} iterations" if warmup else f"{peak:.3g}"
    grid = patch_grid(crops.global_crops_size, config.student.patch_size)
    collate = build_collate(config)
    fewest, most = collate.mask_ratio_min_max
    masks = f"{collate.mask_probability:.0%} of global crops, {fewest:.0%} to {most:.0%} of their patches"
    memory = estimate_memory(config, model, device, get_world_size(), set_bytes=_measure_files(images))
    machine = measure_machine(device, train.output_dir)
    needed = (
        f"about {memory.states / GIB:.2f} GiB of weights, gradients and moments and "
        f"{memory.activations / GIB:.2f} GiB of activations per process"
    )
    if device.type == "cuda":
        needed += f"; the GPU has {machine.device / GIB:.1f} GiB"
    needed += f"; loading takes {memory.loading / GIB:.2f} GiB; the machine has {machine.memory / GIB:.1f} GiB"
    period = evaluation.eval_period_iterations
    when = f"every {period} iterations and at the end" if period else "at the end"
    sets = f"k-NN of {evaluation.val_dataset_path}" if evaluation.val_dataset_path else "no k-NN"
    watched = "features are not watched"
    if probe is not None:
        faults = probe.unreadable()
        source = evaluation.probe_dataset_path or evaluation.val_dataset_path or train.dataset_path
        found = f"{len(faults)} of them unreadable: {faults[0]}" if faults else "all of them read"
        watched = f"{len(probe)} images of {source}, {found}"
    fit = _describe_fit(images, dataset.augmentation, config)
    warnings = [
        *doubt_schedule(config, len(dataset)),
        *_doubt_memory(memory, machine, train.keep_last),
        *options_without_effect(config),
    ]
    if fault := images.describe_light(config.data.read_timeout_seconds):
        warnings.append(fault)
    if missing := images.missing_files() if isinstance(images, GroupedJSON) else []:
        warnings = [f"{len(missing)} of a sample of the images do not exist, such as {missing[0]}", *warnings]

    lines = [
        ("data", f"{train.dataset_path}: {len(dataset)} images, one batch of {len(batch.names)} read"),
        *([("values", f"{images.value_range} become black and white (range=)")] if images.value_range else []),
        *([("steps", f"of preprocessing: {images.preprocessing.to_values()}")] if images.preprocessing.steps else []),
        ("batch", f"{train.batch_size_per_gpu} images x {get_world_size()} process(es) on {device.type}"),
        ("precision", describe_precision(config, device)),
        ("start", _start(config, iterations, resume=resume)),
        (
            "schedule",
            f"{optim.epochs} epochs x {train.OFFICIAL_EPOCH_LENGTH} iterations = {iterations} iterations = {seen:,} "
            f"images = {seen / len(dataset):.1f} passes over the set",
        ),
        *([("auto", shown)] if (shown := describe_auto(auto)) else []),
        ("learning rate", rise if warmup == iterations else f"{rise} -> {optim.min_lr:.3g}"),
        (
            "crops",
            f"2 x {_show(crops.global_crops_size)} ({grid[0]}x{grid[1]} patches), {crops.local_crops_number} x "
            f"{_show(crops.local_crops_size)}",
        ),
        *([("crop boxes", fit)] if fit else []),
        ("masks", masks if collate.mask_probability else "none"),
        *((f"student {name}", f"{count_parameters(part):,} parameters") for name, part in model.student.items()),
        ("memory", needed),
        (
            "checkpoints",
            f"every {train.saveckp_freq * train.OFFICIAL_EPOCH_LENGTH} iterations, {train.keep_last or 'all'} kept, in "
            f"{train.output_dir}",
        ),
        ("evaluation", f"teacher checkpoint {when}; {sets}"),
        ("probe set", watched),
        *(("warning", text) for text in warnings),
    ]
    return "dry run: nothing is trained\n" + "\n".join(f"  {name:<18}{text}" for name, text in lines)


def _start(config: Config, total_iterations: int, *, resume: bool) -> str:
    """Which weights the run would start from."""
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
        name, number = parse_rank_file(tag) or (steps[0].name, steps[0].number)
        is_complete = number + 1 >= total_iterations
        return f"{folder} holds {name}: " + ("the run is complete" if is_complete else "the run goes on from there")
    if config.student.pretrained_weights:
        return f"backbone of {config.student.pretrained_weights}, random heads"
    return f"random weights (train.seed={config.train.seed})"


def _describe_fit(images: ImageDataset, augmentation: object, config: Config) -> str:
    """How often the crops of a set's images need a fallback; empty where that hardly happens, or no image is read."""
    assert isinstance(augmentation, DataAugmentationDINO)
    in_time = Deadline(config.data.read_timeout_seconds)
    sizes = []
    for index in range(0, len(images), -(-len(images) // _SIZES_READ)):
        with contextlib.suppress(OSError):  # such images are told of elsewhere
            height, width = in_time(images.get_image_size, index)
            sizes.append((width, height))
    if not sizes:
        return ""
    fit = crop_fit(augmentation, sizes)
    sentences = []
    if max(fit.global_fallback, fit.local_fallback) >= _RARE:
        sentences.append(
            f"{fit.global_fallback:.0%} of global and {fit.local_fallback:.0%} of local crops are squeezed along their "
            f"image, as no box of the crop's shape has their share of its area"
        )
    if fit.pieces:
        sentences.append(f"{fit.pieces:.0%} of the images are so long that a sample's crops come from one piece")
    if sentences:
        median = sorted(width / height for width, height in sizes)[len(sizes) // 2]
        sentences.append(f"width : height of {len(sizes)} images is {median:.3g} (median)")
    return "; ".join(sentences)


def _measure_files(images: ImageDataset) -> float:
    """Bytes of a set's files, estimated from some; infinity where images are no files of their own."""
    sizes = []
    for index in range(0, len(images), -(-len(images) // _SIZES_READ)):
        with contextlib.suppress(OSError):
            sizes.append(images.get_image_path(index).stat().st_size)
    return len(images) * sum(sizes) / len(sizes) if sizes else math.inf


def _doubt_memory(memory: "MemoryEstimate", machine: "Machine", keep_last: int) -> list[str]:
    """Where a run needs more than there is."""
    gpu_needs = memory.states + memory.activations if machine.device else 0
    needs = memory.loading + (0 if machine.device else (memory.states + memory.activations) * machine.processes)
    smaller = "a smaller train.batch_size_per_gpu, student.arch or dino.head_n_prototypes"
    doubts = []
    if gpu_needs > machine.device:
        doubts.append(
            f"the run needs about {gpu_needs / GIB:.1f} GiB on a GPU that has {machine.device / GIB:.1f}: "
            f"train.activation_checkpointing=true or {smaller} needs less"
        )
    if needs > machine.free:
        held = f"has {machine.free / GIB:.1f} free" if needs <= machine.memory else f"has {machine.memory / GIB:.1f}"
        remedy = "" if machine.device else f", or {smaller}, needs less"
        doubts.append(
            f"the run needs about {needs / GIB:.1f} GiB of memory on a machine that {held}, and may be killed: a "
            f"smaller train.num_workers or data.cache_gib{remedy or ' needs less'}"
        )
    files = memory.checkpoint * (keep_last + 1 if keep_last else 2)
    if files > machine.disk:
        doubts.append(
            f"{'the checkpoints kept' if keep_last else 'two checkpoints'} take about {files / GIB:.1f} GiB on a disk "
            f"that has {machine.disk / GIB:.1f} free"
        )
    return doubts


def _show(size: int | tuple[int, int]) -> str:
    return "x".join(map(str, as_pair(size)))


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. Estimates: allocators and kernels keep more.

    Attributes:
        states: float32 weights of student and teachers, gradients, and AdamW's two moments, after sharding, per
            process.
        activations: what the student keeps for backward, per process.
        loading: what the training and loading processes of this machine hold beside that: their programs, batches on
            their way, and cached image files.
        checkpoint: one checkpoint, all ranks together.
    """

    states: int
    activations: int
    loading: int
    checkpoint: int


@dataclass(frozen=True)
class Machine:
    """What a machine offers, in bytes.

    Attributes:
        device: memory of the GPU; 0 where the run computes in the machine's own memory.
        memory: of the machine, or of the container or job that this process is in.
        free: what of it is available now.
        disk: free where the run's files go.
        processes: training processes on this machine.
    """

    device: int
    memory: int
    free: int
    disk: int
    processes: int


def measure_machine(device: torch.device, output_dir: str | Path) -> Machine:
    """Looks at what this machine has.

    Args:
        device: where the run computes.
        output_dir: folder of the run, which need not exist.
    """
    memory = memory_of_machine()
    folder = Path(output_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    is_cuda = device.type == "cuda"
    return Machine(
        device=torch.cuda.get_device_properties(device).total_memory if is_cuda else 0,
        memory=memory,
        free=min(memory, int(psutil.virtual_memory().available)),
        disk=shutil.disk_usage(folder).free,
        processes=get_local_world_size(),
    )


def estimate_memory(
    config: Config, model: SSLMetaArch, device: torch.device, world_size: int, *, set_bytes: float = math.inf
) -> MemoryEstimate:
    """Estimates memory.

    Not in it: what sharding gathers, the teacher's forward pass, and gradients of activations.

    Args:
        config: options of the run.
        model: student and teacher; may be on the meta device.
        device: where the run computes, which decides what ``auto`` precision is.
        world_size: number of processes.
        set_bytes: size of the set's files, of which no more can be cached.
    """
    states = whole = 0
    for network, precision, copies in (
        (model.student, config.compute_precision.student, _STUDENT_COPIES),
        (model.teacher, config.compute_precision.teacher, 1),
    ):
        for name, part in network.items():
            shards = 1 if getattr(precision, name).sharding_strategy == "NO_SHARD" else world_size
            states += _FLOAT32 * copies * count_parameters(part) // shards
            whole += _FLOAT32 * max(copies - 1, 1) * count_parameters(part)  # gradients are not saved
    for name, part in {} if model.frozen_teacher is None else model.frozen_teacher.items():
        strategy = getattr(config.compute_precision.teacher, name).sharding_strategy
        states += _FLOAT32 * count_parameters(part) // (1 if strategy == "NO_SHARD" else world_size)
    crops, train = config.crops, config.train
    pixels = NUM_GLOBAL_CROPS * math.prod(as_pair(crops.global_crops_size))
    pixels += crops.local_crops_number * math.prod(as_pair(crops.local_crops_size))
    batch = train.batch_size_per_gpu * 3 * pixels * _FLOAT32
    # Each loading process makes one batch while others wait; so do those that the training process holds.
    loading = _PROCESS + train.num_workers * _WORKER + batch * (2 * train.num_workers + 1)
    # Every loading process caches what it reads itself.
    loading += (
        int(min(config.data.cache_gib * GIB, set_bytes * max(train.num_workers, 1))) if train.cache_dataset else 0
    )
    return MemoryEstimate(
        states=states,
        activations=_backbone_activations(config, model, device) + _head_activations(config, device),
        loading=loading * get_local_world_size(),
        checkpoint=whole,
    )


def count_parameters(module: nn.Module) -> int:
    """Number of scalars among a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def patch_grid(size: int | tuple[int, int], patch: int | tuple[int, int]) -> tuple[int, int]:
    """Patches down and across a crop."""
    (height, width), (patch_height, patch_width) = as_pair(size), as_pair(patch)
    return height // patch_height, width // patch_width


def _backbone_activations(config: Config, model: SSLMetaArch, device: torch.device) -> int:
    student, crops = config.student, config.crops
    extra = 1 + student.num_register_tokens
    global_grid = patch_grid(crops.global_crops_size, student.patch_size)
    local_grid = patch_grid(crops.local_crops_size, student.patch_size)
    tokens = NUM_GLOBAL_CROPS * (global_grid[0] * global_grid[1] + extra)
    tokens += crops.local_crops_number * (local_grid[0] * local_grid[1] + extra)
    depth, width = len(model.student_backbone.blocks), model.student_backbone.embed_dim
    # What a block keeps of every token, in multiples of the width.
    norms = 2 * 2  # inputs and outputs
    # Joint projection, kernel's output alone and packed.
    shapes = {name: tensor.shape for name, tensor in model.student_backbone.named_parameters()}
    attention = (3 + 2) * shapes["blocks.0.attn.proj.weight"][1] / width
    layer_scales = 2 if student.layerscale else 0  # inputs
    gated = student.ffn_layer != "mlp"
    mlp = (4 if gated else 2) * shapes[f"blocks.0.mlp.{'w3' if gated else 'fc2'}.weight"][1] / width
    rates = drop_path_rates(student.drop_path_rate, depth, uniform=student.drop_path_uniform)
    per_block = (1 - sum(rates) / depth) * (norms + attention + layer_scales + mlp)
    # Recomputed blocks keep their input; one of them at a time has everything.
    blocks = depth + per_block if config.train.activation_checkpointing else depth * per_block
    number_bytes = _bytes(config.compute_precision.student.backbone.mixed_precision.param_dtype, device)
    return int(config.train.batch_size_per_gpu * tokens * width * number_bytes * blocks)


def _head_activations(config: Config, device: torch.device) -> int:
    grid = patch_grid(config.crops.global_crops_size, config.student.patch_size)
    masked = NUM_GLOBAL_CROPS * config.ibot.mask_sample_probability * sum(config.ibot.mask_ratio_min_max) / 2
    rows = {"dino_head": 0.0, "ibot_head": 0.0}
    if config.dino.loss_weight > 0:
        rows["dino_head"] += NUM_GLOBAL_CROPS + config.crops.local_crops_number
    if config.ibot.loss_weight > 0:
        rows["ibot_head" if config.ibot.separate_head else "dino_head"] += masked * grid[0] * grid[1]
    total = 0.0
    heads: tuple[DinoOptions | IbotOptions, ...] = (config.dino, config.ibot)
    for (name, count), head in zip(rows.items(), heads, strict=True):
        if count == 0:
            continue
        number_bytes = _bytes(getattr(config.compute_precision.student, name).mixed_precision.param_dtype, device)
        hidden = 2 * (head.head_nlayers - 1) * head.head_hidden_dim + 3 * head.head_bottleneck_dim
        # Logits, their log-softmax and the teacher's probabilities are in float32; the last layer's weight, once
        # normalised, is kept as well.
        per_row = hidden * number_bytes + 3 * head.head_n_prototypes * _FLOAT32
        total += config.train.batch_size_per_gpu * count * per_row
        total += head.head_n_prototypes * head.head_bottleneck_dim * number_bytes
    return int(total)


def _bytes(dtype_name: str, device: torch.device) -> int:
    return torch.finfo(resolve_dtype(dtype_name, device)).bits // 8
