"""Looks before a supervised run: what it would do and take, and whether a few images can be learnt by heart."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from dinov2.checkpoint.integrity import find_steps
from dinov2.config import as_pair, options_without_effect
from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import get_world_size, is_main_process
from dinov2.eval.command import trained_on
from dinov2.logging.progress import format_duration, memory_gib
from dinov2.tasks.evaluation import evaluate_set
from dinov2.tasks.networks import Learner, build_learner
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.package import load_backbone_config, make_package
from dinov2.tasks.task import Task
from dinov2.tasks.training_data import (
    TaskSets,
    TrainingData,
    name_preprocessing,
    open_task_sets,
    spread_over_classes,
)
from dinov2.utils.errors import RunError
from dinov2.utils.processor import memory_of_machine
from dinov2.utils.seeds import seed_everything

logger = logging.getLogger("dinov2")

STEPS = 3  # the first one warms up
MAX_OVERFIT_STEPS = 400
_OVERFIT_LOG_PERIOD = 20
_RARE = 0.01  # share of a class from which on it needs help
_MAX_CLASSES = 20  # whose counts are shown


def describe_task_run(
    learner: Learner, data: TrainingData, sets: TaskSets, *, metric: str, missing: Mapping[str, Sequence[str]]
) -> str:
    """Reads a few batches, takes a few steps of learning rate 0, and says in text what a run would do.

    Nothing is written. All processes call it; what is measured is that of this process.

    Args:
        learner: as at the start of the run.
        data: of the run.
        sets: of the run.
        metric: chooses the best weights.
        missing: classes that sets do not show, see `check_classes`.

    Raises:
        OSError, ValueError: a batch cannot be read.
        NonFiniteLossError: a loss or gradient is NaN or infinite.
    """
    task, config, head = learner.task, learner.task.config, learner.networks.model.head
    seconds, losses, unreadable, shape = _try_steps(learner, data)
    memory, device, optim = memory_gib(learner.networks.device), learner.networks.device, config.optim
    on_gpu = device.type == "cuda"
    whole = (torch.cuda.get_device_properties(device).total_memory if on_gpu else memory_of_machine()) / 2**30
    steps = data.steps_per_epoch
    total = config.optim.epochs * steps
    counts = data.count_classes() if task.classes else []
    schedule = [
        (
            "schedule",
            f"{config.optim.epochs} epochs = passes over the set x {steps} steps = {total} steps = "
            f"{total * data.samples_per_step:,} samples",
        ),
        (
            "learning rate",
            (f"0 -> {optim.lr:.3g} in {optim.warmup_epochs:g} epochs" if optim.warmup_epochs else f"{optim.lr:.3g}")
            + f", then {optim.schedule}",
        ),
    ]
    tried = [
        ("losses", ", ".join(f"{name} {value:.4g}" for name, value in losses.items())),
        ("memory", f"{memory:.2f} GiB after {STEPS} steps, in this process, of {whole:.1f} GiB"),
        ("time", f"{seconds:.2f} s per step, so about {format_duration(seconds * total)} without evaluations"),
    ]
    lines = [
        *((name, _describe_set(dataset)) for name, dataset in sets.named().items()),
        ("classes", _describe_classes(task.classes, counts, task.counted)),
        (
            "batch",
            f"{data.batch_size} x {config.train.accumulate_steps} (accumulate_steps) x {get_world_size()} process(es) "
            f"on {device.type}, inputs {shape}",
        ),
        *(schedule if task.is_trained else [("schedule", "the head is computed in one look at the set")]),
        ("network", f"{learner.networks.parts}"),
        (
            "head",
            f"{task.head_kind(config)}, {sum(weight.numel() for weight in head.parameters()):,} parameters",
        ),
        (
            "best weights",
            f"by {metric} on val, every {config.evaluation.every_epochs} epoch(s)" if sets.val else "the last ones",
        ),
        *(tried if task.is_trained else ()),
        ("start", _start(Path(config.train.output_dir), total)),
        *(("warning", text) for text in _warnings(learner, data, counts, unreadable, missing)),
    ]
    return "dry run: nothing is trained, nothing is written\n" + "\n".join(
        f"  {name:<16}{text}" for name, text in lines
    )


def _try_steps(learner: Learner, data: TrainingData) -> tuple[float, dict[str, float], tuple[str, ...], list[int]]:
    """Seconds per step, losses, images that could not be read, and the shape of a batch."""
    unreadable: list[str] = []
    losses: dict[str, float] = {}
    finished = [time.monotonic()]
    with closing(data.batches()) as batches:
        for _ in range(STEPS):
            samples = [next(batches) for _ in range(learner.task.config.train.accumulate_steps)]
            if learner.task.is_trained:
                agreement, _ = learner.step(samples, 0, lr=0.0, weight_decay=0.0)
                losses = agreement.losses
                unreadable += agreement.unreadable
            finished.append(time.monotonic())
    shape = list(samples[0]["image"].shape)
    return (finished[-1] - finished[1]) / (STEPS - 1), losses, tuple(unreadable), shape


def _describe_set(dataset: ImageDataset) -> str:
    try:
        height, width = as_pair(dataset.get_image(0).size[::-1])
        first = f"the first {height} x {width} pixels (height x width)"
    except OSError:
        first = "of which the first cannot be read"
    parts = len(set(dataset.get_group_ids()))
    grouped = f" of {parts} parts" if parts < len(dataset) else ""
    return f"{len(dataset)} images{grouped}, {first}"


def _describe_classes(classes: Sequence[str], counts: Sequence[int], counted: str) -> str:
    if not classes:
        return "none: values are predicted"
    whole = max(sum(counts), 1)
    shown = [f"{name} {count / whole:.2%}" for name, count in zip(classes, counts, strict=True)][:_MAX_CLASSES]
    return f"{len(classes)}, shares of the training set's {counted}s: " + ", ".join(shown)


def _start(folder: Path, total: int) -> str:
    steps = find_steps(folder) if folder.is_dir() else []
    if not steps:
        return f"anew, in {folder}"
    done = steps[0].number + 1
    return f"{folder} holds {steps[0].name}: " + (
        "the run is complete" if done >= total else f"it goes on at step {done}"
    )


def _warnings(
    learner: Learner,
    data: TrainingData,
    counts: Sequence[int],
    unreadable: Sequence[str],
    missing: Mapping[str, Sequence[str]],
) -> list[str]:
    task, config = learner.task, learner.task.config
    warnings = [*options_without_effect(config)]
    if unreadable:
        warnings.append(f"{len(unreadable)} images could not be read, such as {unreadable[0]}")
    warnings += [f"{name} never shows {', '.join(classes)}" for name, classes in missing.items() if classes]
    whole = sum(counts)
    rare = [
        f"{name} ({count / whole:.2%})"
        for name, count in zip(task.classes, counts, strict=True)
        if 0 < count < _RARE * whole
    ]
    if rare and config.loss.class_weights == "none" and not config.data.balance_classes:
        warnings.append(
            f"rare: {', '.join(rare)} of the training set's {task.counted}s; see loss.class_weights, "
            "data.balance_classes, and for masks loss.dice or loss.focal"
        )
    if len(data) < data.samples_per_step:
        warnings.append(
            f"a step takes {data.samples_per_step} samples and the set has {len(data)}: some come twice in it"
        )
    return warnings


def overfit(config: TaskConfig, num_images: int, device: torch.device) -> list[float]:
    """Learns a few training images by heart, to see that everything is wired up; nothing is written.

    Images are prepared as for evaluation, without random changes; weight decay, dropout, label smoothing and averaging
    are off, and the learning rate is constant. The images are spread over the classes, and are evaluated now and then.
    `Task.overfit_reached` decides.

    Args:
        config: options of the run.
        num_images: how many (parts, with ``head.per_part``).
        device: where this process computes.

    Returns:
        The loss of every step, before it was taken.

    Raises:
        RunError: they are not learnt after `MAX_OVERFIT_STEPS` steps; the message tells what that may mean.
    """
    config = replace(
        config,
        backbone=replace(config.backbone, drop_path_rate=0.0, lora_dropout=0.0),
        head=replace(config.head, dropout=0.0),
        loss=replace(config.loss, label_smoothing=0.0),
        data=replace(
            config.data,
            balance_classes=False,
            # What is evaluated is what was learnt: whole images, no windows.
            resize="stretch" if config.task_class.windowed else config.data.resize,
        ),
        train=replace(config.train, ema_momentum=0.0, accumulate_steps=1),
    )
    seed_everything(config.train.seed)
    backbone_config = load_backbone_config(config)
    trained = trained_on(config.backbone.pretrained_weights, backbone_config)
    config = name_preprocessing(config, trained.preprocessing, backbone_config.student.in_channels)
    sets = open_task_sets(config, trained.value_range)
    everything = TrainingData(config.task_class(config, sets.facts), sets.train, augment=False)
    if not everything.task.is_trained:
        raise RunError(f"--overfit tries training, and the head {config.task_class.head_kind(config)} needs none")
    chosen = spread_over_classes(everything.labels, num_images, config.train.seed)
    config = replace(config, train=replace(config.train, batch_size_per_gpu=len(chosen)))
    task: Task = config.task_class(config, sets.facts)
    data = TrainingData(task, sets.train, indices=chosen, augment=False)
    learner = build_learner(task, data, backbone_config, num_outputs=sets.facts.num_outputs, device=device)
    losses: list[float] = []
    reached = ""
    with closing(data.batches(num_workers=0)) as batches:
        for step in range(MAX_OVERFIT_STEPS):
            agreement, _ = learner.step([next(batches)], step, lr=config.optim.lr, weight_decay=0.0)
            losses.append(agreement.losses["total_loss"])
            values = {"loss": losses[-1], "first_loss": losses[0]}
            due = (step + 1) % _OVERFIT_LOG_PERIOD == 0
            if due and not task.max_images:  # parts have other numbers in an evaluation
                package = make_package(learner.networks.whole(), task, light=sets.train.light)
                quiet = replace(config.evaluation, num_pictures=0)
                values |= evaluate_set(package, sets.train, quiet, indices=chosen).values
                if not math.isnan(found := values.get(task.metric, math.nan)):
                    reached = f"{task.metric} {found:.4f} on these images, "
            if is_main_process() and (due or step == 0):
                logger.info("step %d: %sloss %.4f", step, reached, losses[-1])
            if task.overfit_reached(values):
                if is_main_process():
                    logger.info(
                        "overfit %d: %sthe loss fell from %.4f to %.4f in %d steps: all is wired up",
                        num_images, reached, losses[0], losses[-1], len(losses),
                    )  # fmt: skip
                return losses
    raise RunError(
        f"--overfit {num_images}: {reached}the loss fell from {losses[0]:.4f} to {losses[-1]:.4f} only, in "
        f"{len(losses)} steps. Either labels and images do not belong together, or optim.lr={config.optim.lr} is far "
        f"off, or the head (backbone.mode={config.backbone.mode}) is too weak for them"
    )
