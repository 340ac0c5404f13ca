"""Everything that a pretraining run consists of beside its model, put together from the options."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.checkpoint.integrity import find_steps, tagged_name
from dinov2.config import Config, ConfigError, as_number, leaf_values, load_config
from dinov2.config.schema import NetworkPrecisionOptions, OptimOptions
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset, settle_value_range
from dinov2.data.pretraining import UnreadableTally
from dinov2.distributed import all_gather_objects, get_rank, get_world_size, is_main_process
from dinov2.eval.command import trained_on
from dinov2.eval.features import make_eval_transform
from dinov2.fsdp import checkpoint_activations, compile_units, resolve_dtype, shard
from dinov2.layers.block import Block
from dinov2.loop.optimization import Optimization
from dinov2.loop.training_loop import TrainingLoop
from dinov2.models.pretrained import load_pretrained_backbone, read_checkpoint
from dinov2.models.released import fetch_weights
from dinov2.train.bad_batches import BadBatches
from dinov2.train.data import (
    Batches,
    build_pretraining_dataset,
    data_identity,
    name_value_range,
    named_preprocessing,
    warn_of_other_data,
    warn_of_other_preprocessing,
)
from dinov2.train.evaluation import (
    check_best_metric,
    evaluation_is_done,
    evaluation_is_due,
    evaluation_size,
    open_evaluation_sets,
)
from dinov2.train.monitors import CollapseDetector, Monitors, ProbeSet
from dinov2.train.recipe import auto_values, num_iterations
from dinov2.train.ssl_meta_arch import SSLMetaArch, load_heads
from dinov2.train.target_measures import TargetMeasures
from dinov2.utils.files import HeldFolder
from dinov2.utils.param_groups import make_param_groups
from dinov2.utils.schedules import CosineSchedule, Schedule
from dinov2.utils.seeds import derive_seed, seed_everything

logger = logging.getLogger("dinov2")

_MANY_PASSES = 1000
_PUBLISHED_PASSES = 200  # 100 epochs of 1250 iterations with 2048 images each, over ImageNet's 1.28 million


def parallelize(model: SSLMetaArch, config: Config, device: torch.device) -> None:
    """Moves student and teachers to the device, then wraps them as ``compute_precision`` and ``train`` say."""
    model.to(device)
    wrapped = [
        (model.student, config.compute_precision.student),
        (model.teacher, config.compute_precision.teacher),
    ]
    if model.frozen_teacher is not None:
        wrapped.append((model.frozen_teacher.to(device), config.compute_precision.teacher))
    for networks, precision in wrapped:
        if config.train.activation_checkpointing and networks is model.student:
            checkpoint_activations(networks["backbone"], Block)
        if config.train.compile:
            compile_units(networks["backbone"], Block)
        blocks: list[nn.Module] = [module for module in networks["backbone"].modules() if isinstance(module, Block)]
        # So many groups of blocks are gathered together; with 0, every block alone.
        size = math.ceil(len(blocks) / config.student.block_chunks) if config.student.block_chunks else 1
        groups = [blocks[start : start + size] for start in range(0, len(blocks), size)]
        shard(networks["backbone"], precision.backbone, device, units=groups)
        backbone_dtype = resolve_dtype(precision.backbone.mixed_precision.param_dtype, device)
        for name, head_precision in (("dino_head", precision.dino_head), ("ibot_head", precision.ibot_head)):
            if name in networks:
                shard(networks[name], head_precision, device, fed_in_half=backbone_dtype != torch.float32)


def build_optimizer(config: Config, student: nn.ModuleDict, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the student's parameters, grouped by learning rate and weight decay (see `param_groups`)."""
    groups: list[dict[str, Any]] = []
    for name, network in student.items():
        groups += make_param_groups(
            network,
            layerwise_decay=config.optim.layerwise_decay,
            patch_embed_lr_mult=config.optim.patch_embed_lr_mult,
            prefix=f"{name}.",
        )
    betas = (config.optim.adamw_beta1, config.optim.adamw_beta2)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True if device.type == "cuda" else None)


def build_grad_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling where a student sub-network computes in fp16 and ``grad_scaler`` is on; otherwise idle."""
    precision = config.compute_precision
    networks = (precision.student.backbone, precision.student.dino_head, precision.student.ibot_head)
    halves = any(resolve_dtype(part.mixed_precision.param_dtype, device) == torch.float16 for part in networks)
    return torch.amp.GradScaler(device.type, enabled=precision.grad_scaler and halves)


def build_optimization(config: Config, student: nn.ModuleDict, device: torch.device) -> Optimization:
    """The optimiser of a run with its loss scaling and clipping."""
    optimizer, scaler = build_optimizer(config, student, device), build_grad_scaler(config, device)
    return Optimization(student, optimizer, scaler, config.optim.clip_grad)


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def describe_precision(config: Config, device: torch.device) -> str:
    """The format of parameters and activations of each part of the student, and the teacher's where it differs."""
    parts = ["backbone", "dino_head", *(["ibot_head"] if config.ibot.separate_head else [])]

    def shown(network: NetworkPrecisionOptions) -> str:
        kinds = [resolve_dtype(getattr(network, part).mixed_precision.param_dtype, device) for part in parts]
        names = [_NAMES[kind] for kind in kinds]
        pairs = (f"{part} {name}" for part, name in zip(parts, names, strict=True))
        return names[0] if len(set(names)) == 1 else ", ".join(pairs)

    student, teacher = shown(config.compute_precision.student), shown(config.compute_precision.teacher)
    return student if teacher == student else f"{student}; teacher: {teacher}"


def doubt_schedule(config: Config, num_images: int) -> list[str]:
    """What is odd about a run's length for a set of this size."""
    train, optim = config.train, config.optim
    global_batch = train.batch_size_per_gpu * get_world_size()
    passes = optim.epochs * train.OFFICIAL_EPOCH_LENGTH * global_batch / num_images
    one_pass = math.ceil(num_images / global_batch)
    if passes > _MANY_PASSES:
        return [
            f"{passes:,.0f} passes over {num_images:,} images are far more than such a set carries, and most of the "
            f"time is wasted: train.OFFICIAL_EPOCH_LENGTH={one_pass} optim.epochs={_PUBLISHED_PASSES} makes "
            f"{_PUBLISHED_PASSES}, as the published short run does"
        ]
    if passes < 1:
        return [
            f"the run ends before it has seen {1 - passes:.0%} of the images: train.OFFICIAL_EPOCH_LENGTH={one_pass} "
            f"makes {optim.epochs} pass{'es' if optim.epochs > 1 else ''}"
        ]
    return []


def scaled_learning_rate(optim: OptimOptions, global_batch_size: int) -> float:
    """The peak learning rate for a batch of ``global_batch_size`` images over all processes.

    A positive ``optim.lr`` is used as it is; otherwise ``optim.base_lr`` is scaled by ``optim.scaling_rule``.

    Raises:
        ValueError: the rule is unknown.
    """
    if optim.lr > 0:
        return optim.lr
    base_lr = as_number(optim.base_lr)
    match optim.scaling_rule:
        case "sqrt_wrt_1024":
            return base_lr * sqrt(global_batch_size / 1024)
        case "linear_wrt_256":
            return base_lr * global_batch_size / 256
        case "none":
            return base_lr
        case unknown:
            raise ValueError(
                f"optim.scaling_rule: found {unknown!r}, allowed are 'sqrt_wrt_1024', 'linear_wrt_256' and 'none'"
            )


def build_schedules(config: Config, world_size: int) -> dict[str, Schedule]:
    """Hyper-parameters over the iterations of a run on ``world_size`` processes.

    ``lr``, ``weight_decay`` and ``last_layer_lr`` are before the multipliers of parameter groups; ``momentum`` is that
    of the teacher's average, ``teacher_temp`` the temperature of its softmax.

    The warm-up of the teacher temperature may be longer than the run, which then ends below the final temperature.

    Raises:
        ValueError: the learning rate's warm-up is longer than the run, or the scaling rule is unknown.
    """
    optim, teacher = config.optim, config.teacher
    total_iters, warmup_iters = num_iterations(optim.epochs, config), num_iterations(optim.warmup_epochs, config)
    if warmup_iters > total_iters:
        raise ValueError(
            f"optim.warmup_epochs must not exceed optim.epochs, found {optim.warmup_epochs} > {optim.epochs}"
        )
    lr = CosineSchedule(
        base_value=scaled_learning_rate(optim, config.train.batch_size_per_gpu * world_size),
        final_value=optim.min_lr,
        total_iters=total_iters,
        warmup_iters=warmup_iters,
    )
    temperature_warmup_iters = num_iterations(teacher.warmup_teacher_temp_epochs, config)
    temperature = as_number(teacher.teacher_temp)
    momentum = as_number(teacher.momentum_teacher), as_number(teacher.final_momentum_teacher)
    return {
        "lr": lr,
        "weight_decay": CosineSchedule(optim.weight_decay, optim.weight_decay_end, total_iters),
        "momentum": CosineSchedule(*momentum, total_iters),
        "teacher_temp": CosineSchedule(
            base_value=temperature,
            final_value=temperature,
            total_iters=temperature_warmup_iters,
            warmup_iters=temperature_warmup_iters,
            start_warmup_value=teacher.warmup_teacher_temp,
        ),
        "last_layer_lr": lr.frozen_until(num_iterations(optim.freeze_last_layer_epochs, config)),
    }


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the loop needs beside the model.

    Attributes:
        config: options, with the range of values of the training images in all dataset strings.
        loop: progress, records and checkpoints.
        batches: endless, from where the run goes on.
        schedules: hyper-parameters by name and iteration, see `build_schedules`.
        optimization: of the student.
        targets: measures the teacher's targets on every batch.
        bad_batches: keeps batches that give NaN or infinity, and counts them.
        monitors: measure the teacher, and warn.
        extras: what every checkpoint keeps: ``resumed_from``, the checkpoint of the options that the run began from,
            empty for none; ``identity``, what decides the order of the data, ``preprocessing`` and ``distilled_from``,
            compared on resuming; and ``value_range``, with which a resumed run goes on reading its images.
        evaluation_is_owed: whether the run was stopped between a checkpoint and the evaluation after it.
    """

    config: Config
    loop: TrainingLoop
    batches: Batches
    schedules: Mapping[str, Schedule]
    optimization: Optimization
    targets: TargetMeasures
    bad_batches: BadBatches
    monitors: Monitors
    extras: dict[str, Any]
    evaluation_is_owed: bool


def prepare(config: Config, model: SSLMetaArch, folder: HeldFolder, device: torch.device, *, resume: bool) -> Run:
    """Opens the data, builds the optimiser, and restores the checkpoint to go on from, if there is one.

    Raises:
        FileNotFoundError, ValueError: see `dinov2.train.train.do_train`.
    """
    train, evaluation, epoch_length = config.train, config.evaluation, config.train.OFFICIAL_EPOCH_LENGTH
    total_iterations = config.optim.epochs * epoch_length
    warmup_iterations = num_iterations(config.optim.warmup_epochs, config)
    dataset = build_pretraining_dataset(config)
    images = dataset.dataset
    assert isinstance(images, ImageDataset)
    optimization = build_optimization(config, model.student, device)
    targets = TargetMeasures(model.dino_loss.student_temp)
    output_dir = folder.path
    bad_batches = BadBatches(folder, train.max_bad_steps, train.seed)
    seed_everything(derive_seed(train.seed, "train", get_rank()))
    loop = TrainingLoop(
        folder,
        model,
        optimization,
        device=device,
        total_steps=total_iterations,
        epoch_length=epoch_length,
        batch_size=train.batch_size_per_gpu,
        samples_per_step=train.batch_size_per_gpu * get_world_size(),
        log_period=train.log_period,
        save_period=train.saveckp_freq * epoch_length,
        keep_last=train.keep_last,
        max_save_failures=train.max_save_failures,
        tally=UnreadableTally(len(dataset), config.data.max_bad_fraction),
        states={"targets": targets, "bad_batches": bad_batches},
    )
    checkpointer = loop.checkpointer
    named = checkpoint_to_resume(config, output_dir, has_checkpoint=checkpointer.has_checkpoint(), resume=resume)
    if named and checkpointer.newest().get("resumed_from") == named:
        # The same command, started again after an interruption, must not throw away what has been done since.
        logger.info("this run began from %s and goes on from its own newest checkpoint", named)
        named = ""
    resumed = loop.resume(named, resume=resume)
    stored = resumed.get("value_range", [] if resumed else None)
    config = name_value_range(config, settle_value_range([(train.dataset_path, images)], stored))
    if is_main_process():
        for doubt in doubt_schedule(config, len(dataset)):
            logger.warning("%s", doubt)
        if fault := images.describe_light(config.data.read_timeout_seconds):
            logger.warning("%s: %s", config.train.dataset_path, fault)
    val, probe = open_evaluation(config, images)
    identity = data_identity(train, images)
    warn_of_other_data(resumed.get("identity", {}), identity)
    if resumed:
        warn_of_other_preprocessing(resumed.get("preprocessing", []), images.preprocessing)
        if resumed.get("distilled_from", "") != model.distilled_from and is_main_process():
            logger.warning("distillation.teacher_weights is another network than before the run was resumed")

    per_image = evaluation.best_metric.startswith("image")
    num_scored = 0 if val is None else len(val) if per_image else len(set(val.get_group_ids()))
    last, period = loop.start - 1, evaluation.eval_period_iterations
    is_due = last >= 0 and evaluation_is_due(last, period=period, total_iterations=total_iterations)
    return Run(
        config=config,
        loop=loop,
        batches=Batches(config, dataset, samples_seen=loop.samples_seen),
        schedules=build_schedules(config, get_world_size()),
        optimization=optimization,
        targets=targets,
        bad_batches=bad_batches,
        monitors=Monitors(
            model=model,
            output_dir=output_dir,
            check_folder=folder.check,
            device=device,
            probe=probe,
            detector=CollapseDetector(
                warmup_iterations, total_iterations, model.teacher_backbone.embed_dim, num_scored=num_scored
            ),
            targets=targets,
            start=loop.start,
            best_metric=evaluation.best_metric,
            batch_size=evaluation.batch_size,
            num_workers=train.num_workers,
        ),
        extras={
            "resumed_from": named or resumed.get("resumed_from", ""),
            "identity": identity,
            "value_range": images.value_range.ends if images.value_range is not None else [],
            "preprocessing": images.preprocessing.to_values(),
            "distilled_from": model.distilled_from,
        },
        evaluation_is_owed=is_due and not evaluation_is_done(evaluation, output_dir, last),
    )


def open_evaluation(config: Config, training_images: ImageDataset) -> tuple[ImageDataset | None, ProbeSet | None]:
    """Opens the labelled images to classify, and those whose features are watched.

    What is wrong with them, or with ``evaluation.best_metric``, is wrong now, and not after the first period. There is
    no probe set where none is wanted, or where there are no two images to compare.

    Raises:
        ConfigError, FileNotFoundError, ValueError: a set, or the metric, is missing or wrong.
    """
    settings, image_size = config.evaluation, evaluation_size(config)
    check_best_metric(settings.best_metric)
    try:
        sets = open_evaluation_sets(settings, image_size, training_images.value_range, training_images.preprocessing)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}\n  it belongs to k-NN during training: evaluation.train_dataset_path= "
            f"evaluation.val_dataset_path= trains without"
        ) from error
    val = None if sets is None else sets[1]
    source = training_images if val is None else val
    if settings.probe_dataset_path:
        source = make_dataset(
            dataset_str=settings.probe_dataset_path,
            value_range=training_images.value_range,
            preprocessing=training_images.preprocessing,
            read_timeout=config.data.read_timeout_seconds,
        )
    if min(settings.probe_images, len(source)) < 2:
        if settings.probe_images > 0:
            logger.warning("features are not watched: that takes two images at least")
        return val, None
    transform = make_eval_transform(image_size, whole_image=settings.whole_image)
    timeout = config.data.read_timeout_seconds
    return val, ProbeSet(source, settings.probe_images, transform, image_size, read_timeout=timeout)


def load_pretrained_student(config: Config, model: SSLMetaArch, *, log: bool) -> bool:
    """Fills the student's backbone from ``student.pretrained_weights``; false where the option names none.

    With ``student.pretrained_heads`` its heads too.

    Args:
        config: options of the run.
        model: holds the student, not sharded yet; may be on the meta device.
        log: whether it is told what became of each parameter.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: when the weights cannot be downloaded, are missing, damaged, of
            another architecture, or match too little.
    """
    source = config.student.pretrained_weights
    if not source:
        return False
    path = fetch_weights(source)
    if not path.exists():
        raise FileNotFoundError(f"student.pretrained_weights={source} does not exist")
    load_pretrained_backbone(model.student_backbone, source, log=log)
    if config.student.pretrained_heads:
        load_heads(
            model.student,
            read_checkpoint(path),
            f"student.pretrained_weights={source}",
            missing="student.pretrained_heads=true asks for it",
            different="give dino and ibot the head_… options of its run, or set student.pretrained_heads=false",
        )
    trained = trained_on(path, Config())
    if log and trained.preprocessing.steps:
        trained.choose_preprocessing(named_preprocessing(config), "data.preprocessing", config.student.in_channels)
    return True


def checkpoint_to_resume(config: Config, folder: str | Path, *, has_checkpoint: bool, resume: bool) -> str:
    """The checkpoint that the options name, empty for the newest of the run's own folder.

    Args:
        config: options of the run.
        folder: of the run.
        has_checkpoint: whether it holds anything to resume from.
        resume: false with ``--no-resume``.

    Raises:
        ValueError: ``--no-resume`` contradicts the options, or two of them name different checkpoints.
        FileNotFoundError: ``train.resume`` demands a checkpoint and there is none.
    """
    named = {path for path in (config.MODEL.WEIGHTS, config.train.resume_path) if path}
    if len(named) > 1:
        raise ValueError(
            f"MODEL.WEIGHTS and train.resume_path name different checkpoints: {' and '.join(sorted(named))}"
        )
    if not resume:
        if named or config.train.resume:
            raise ValueError("--no-resume contradicts train.resume, train.resume_path and MODEL.WEIGHTS")
        return ""
    if config.train.resume and not named and not has_checkpoint:
        raise FileNotFoundError(f"train.resume=true, but {folder} holds no checkpoint")
    return named.pop() if named else ""


def settle(config: Config, device: torch.device, *, resume: bool = True) -> tuple[Config, dict[str, Any]]:
    """The options with a value for each ``auto``, and these values by name; all processes call it.

    Args:
        config: options of the run; returned as they are where none is ``auto``.
        device: where this process computes.
        resume: false with ``--no-resume``.

    Raises:
        ValueError, FileNotFoundError: see `checkpoint_to_resume`.
    """
    if not auto_values(config, device, {}):
        return config, {}
    # Machines may differ: the first decides for all.
    values = all_gather_objects(auto_values(config, device, _stored_options(config, resume=resume)))[0]
    return load_config(config, values), values


def _stored_options(config: Config, *, resume: bool) -> dict[str, Any]:
    """Options of the run that is gone on with, by name; empty for a new one, or where they cannot be read."""
    folder = Path(config.train.output_dir)
    has_checkpoint = bool(tagged_name(folder) or find_steps(folder))
    named = checkpoint_to_resume(config, folder, has_checkpoint=has_checkpoint, resume=resume)
    if not named and not (resume and has_checkpoint):
        return {}
    path = (Path(named).parent if named else folder) / "config.yaml"
    try:
        return dict(leaf_values(load_config(path)))
    except (OSError, ConfigError) as error:
        logger.warning("what auto meant when the run began is not known, and is settled anew: %s", error)
        return {}
