"""The command ``train``: from a config to a pretrained backbone."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2.checkpoint.checkpointer import FSDPCheckpointer
from dinov2.checkpoint.run_lock import run_lock
from dinov2.config import Config, ConfigError, load_config, options_without_effect
from dinov2.config.command_line import option, parse, run_as
from dinov2.data.value_range import ValueRange
from dinov2.distributed import distributed_session, get_rank, get_world_size, is_main_process
from dinov2.logging import logging_to
from dinov2.logging.run_log import check_run_folder, prepare_run_folder
from dinov2.models.description import fingerprint
from dinov2.train.data import name_value_range, named_preprocessing
from dinov2.train.distillation import load_frozen_teacher
from dinov2.train.dry_run import describe_run
from dinov2.train.recipe import describe_auto
from dinov2.train.setup import (
    build_optimizer,
    checkpoint_to_resume,
    describe_precision,
    load_pretrained_student,
    parallelize,
    settle,
)
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.train import do_test, do_train
from dinov2.utils.interruption import until_signal
from dinov2.utils.seeds import seed_everything

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class TrainCommand:
    """Options of the command; everything about the run itself is in the config."""

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config: Path | None = option(None, help="YAML file with the run's options", aliases=("--config-file",))
    output_dir: str = option("", help="folder of the run; the same as train.output_dir=…")
    resume: bool = option(True, help="go on from the newest checkpoint of the run's folder, if there is one")
    dry_run: bool = option(False, help="check options and data, print what would be done, and train nothing")
    eval_only: bool = option(False, help="write and score the teacher of the newest checkpoint, and train nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    command = parse(
        TrainCommand,
        argv,
        description="Pretrains a DINOv2 vision transformer on unlabelled images.",
        example="torchrun --nproc_per_node=2 run/train/train.py --config configs/train/demo_parts_cpu.yaml",
    )
    pairs = [*command.overrides, *([f"train.output_dir={command.output_dir}"] if command.output_dir else [])]
    config = load_config(command.config, pairs)
    if command.dry_run and command.eval_only:
        raise ValueError("--dry-run and --eval-only exclude each other: the first only says what would be trained")
    return pretrain(config, resume=command.resume, dry_run=command.dry_run, eval_only=command.eval_only)


def pretrain(config: Config, *, resume: bool = True, dry_run: bool = False, eval_only: bool = False) -> int:
    """Trains, or says what it would do, or evaluates what was trained; all processes of a run call it.

    Args:
        config: options of the run.
        resume: whether to go on from the newest checkpoint of the run's folder, if there is one.
        dry_run: whether to check options and data, print what would be done, and train nothing.
        eval_only: whether to write and score the teacher of the newest checkpoint, and train nothing.

    Returns:
        0 when the job is done, else the exit code of the signal that stopped it (see `Interruption`).

    Raises:
        ConfigError, ValueError, FileNotFoundError, OSError: options, data, weights, checkpoints or the folder of the
            run are wrong.
        RunError: the run cannot go on.
    """
    with distributed_session(config.train.device, timeout_minutes=config.train.process_group_timeout_minutes) as device:
        check_attention(config, device)
        named_preprocessing(config)  # complains of a wrong step before anything is built
        if dry_run:
            options, auto = settle(config, device, resume=resume)
            if is_main_process():
                check_run_folder(config.train.output_dir)
                sys.stdout.write(describe_run(options, device, auto, resume=resume) + "\n")
            return 0
        output_dir = prepare_run_folder(config.train.output_dir)

        def work() -> int:
            options, auto = settle(config, device, resume=resume or eval_only)
            logger.info("%d process(es) on %s; the run's folder is %s", get_world_size(), device, output_dir)
            logger.info("computing in %s", describe_precision(options, device))
            if is_main_process():
                if shown := describe_auto(auto):
                    logger.info("auto became %s", shown)
                for sentence in options_without_effect(options):
                    logger.warning(sentence)
            model = build_model(options, device)
            if eval_only:
                return evaluate_newest(options, model, output_dir, device)
            return do_train(options, model, output_dir=output_dir, device=device, resume=resume)

        with logging_to(output_dir, get_rank()):
            return until_signal(work)


def check_attention(config: Config, device: torch.device) -> None:
    """Refuses an attention kernel that does not run on the device.

    Raises:
        ConfigError: for xFormers without a GPU.
    """
    if config.student.attention_backend == "xformers" and device.type != "cuda":
        raise ConfigError(
            f"student.attention_backend=xformers computes on CUDA GPUs only, and this run is on {device.type}: use sdpa"
        )


def build_model(config: Config, device: torch.device) -> SSLMetaArch:
    """Builds student and teacher from the run's seed or from ``student.pretrained_weights``, on the device, wrapped.

    With ``distillation.teacher_weights`` also the frozen network that gives the targets.

    Raises:
        FileNotFoundError, ValueError: when the weights are missing, of another architecture, or match too little.
    """
    seed_everything(config.train.seed)
    model = SSLMetaArch(config)
    if load_pretrained_student(config, model, log=is_main_process()):
        model.copy_student_to_teacher()
    if (frozen := load_frozen_teacher(config, log=is_main_process())) is not None:
        model.distil_from(frozen, fingerprint(frozen))
    parallelize(model, config, device)
    return model


def evaluate_newest(config: Config, model: SSLMetaArch, output_dir: Path, device: torch.device) -> int:
    """Writes and scores the teacher of the run's newest checkpoint, or of the one that the options name.

    Raises:
        FileNotFoundError: when there is no checkpoint.
        FolderInUseError: a run is going on in the folder, which it evaluates itself.
    """
    with run_lock(output_dir):
        optimizer = build_optimizer(config, model.student, device)
        checkpointer = FSDPCheckpointer(model, output_dir, optimizer=optimizer)
        named = checkpoint_to_resume(config, output_dir, has_checkpoint=checkpointer.has_checkpoint(), resume=True)
        resumed = checkpointer.resume_or_load(named)
        if not resumed:
            raise FileNotFoundError(f"{output_dir} holds no checkpoint to evaluate")
        config = name_value_range(config, ValueRange.of(resumed.get("value_range")))
        do_test(config, model, resumed["iteration"], output_dir, device)
    return 0


if __name__ == "__main__":
    run_as("train")
