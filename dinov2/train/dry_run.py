"""What a run would do, before it does it: data, schedule in images and passes, parameters, memory."""

from pathlib import Path

import torch

from dinov2.config import Config, as_pair, options_without_effect
from dinov2.data.collate import PretrainingBatch
from dinov2.data.datasets import GroupedJSON
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.pretraining import PretrainingDataset
from dinov2.distributed import get_world_size
from dinov2.fsdp.integrity import find_steps, parse_rank_file, tagged_name
from dinov2.fsdp.shards import rank_file, rank_pattern
from dinov2.train.data import build_collate, build_pretraining_dataset, build_pretraining_loader
from dinov2.train.evaluation import open_evaluation_sets
from dinov2.train.memory_estimate import count_parameters, estimate_memory, patch_grid
from dinov2.train.monitors import check_best_metric, open_probe
from dinov2.train.precision import advise_bf16, describe_precision
from dinov2.train.preparation import checkpoint_to_resume, load_pretrained_student
from dinov2.train.probe import ProbeSet
from dinov2.train.schedules import scaled_learning_rate
from dinov2.train.ssl_meta_arch import SSLMetaArch

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
