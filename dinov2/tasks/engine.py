"""The supervised loop: one for classification, segmentation and depth."""

import logging
import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from dinov2.checkpoint.run_lock import run_lock
from dinov2.config import render_config
from dinov2.config.command_line import option, parse
from dinov2.distributed import distributed_session, get_rank, get_world_size, is_main_process
from dinov2.logging import logging_to
from dinov2.logging.run_log import RunLog, prepare_run_folder
from dinov2.tasks.evaluation import Verdict, judge_set
from dinov2.tasks.learner import train_step
from dinov2.tasks.options import TaskConfig, load_task_config
from dinov2.tasks.overfit import overfit
from dinov2.tasks.plots import draw_epoch
from dinov2.tasks.preparation import TaskRun, complete, prepare_run
from dinov2.utils.files import write_text_atomically
from dinov2.utils.interruption import Interruption, until_signal

logger = logging.getLogger("dinov2")


def fine_tune(config: TaskConfig, *, output_dir: Path, device: torch.device, resume: bool = True) -> int:
    """Trains a task head, and the backbone as far as the options say, and returns the exit code.

    The best weights on val are kept as ``output_dir/best.pth``; at the end they are scored on val and test, and plots
    are drawn. Started again after an interruption, the same call goes on where it stopped.

    Args:
        config: options of the run.
        output_dir: folder of the run, which exists.
        device: where this process computes.
        resume: whether to go on from the newest checkpoint of ``output_dir``, if there is one.

    Returns:
        0 when the run is complete, else that of the signal which stopped it (see `Interruption`).

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite; no step was taken with it.
        FolderInUseError: another run writes to ``output_dir``.
        TooManyUnreadableImages: more images than ``data.max_bad_fraction`` cannot be read.
        BadTargetError: a mask or depth map cannot be used; the file is named.
        ValueError, FileNotFoundError: the options, data, weights or checkpoints do not fit each other.
    """
    with run_lock(output_dir):
        run = prepare_run(config, output_dir, device, resume=resume)
        if is_main_process():  # now that nothing is wrong with options and data
            write_text_atomically(output_dir / "config.yaml", render_config(config))
        code = train(run)
        if code == 0:
            complete(run)
        return code


def train(run: TaskRun) -> int:
    """All epochs that are left, with an evaluation after each that is due; returns the exit code."""
    log = RunLog(run.output_dir, resumed_at=run.start, state=run.log_state)
    interruption = Interruption(announce=is_main_process())
    with run.checkpoints, closing(run.batches), interruption, log as run_log:
        if run.evaluation_is_owed:
            evaluate(run, run.start - 1, run_log)
        finished = time.monotonic()
        for step in range(run.start, run.total_steps):
            if run.best.is_stale:
                logger.info("stopped early: %s", run.best.describe())
                break
            batches = [next(run.batches) for _ in range(run.config.train.accumulate_steps)]
            data_seconds = time.monotonic() - finished
            rates = run.schedule.at(step)
            agreement, grad_norms = train_step(run.learner, batches, step, rates, stop=interruption.requested)
            run.tally.add(agreement.unreadable)
            run.tally.check()

            now = time.monotonic()
            report = run.progress.update(
                step,
                batch_size=run.batch_size,
                data_seconds=data_seconds,
                iteration_seconds=now - finished,
                losses=agreement.losses,
                schedules={"lr": rates.lr, "weight_decay": rates.weight_decay},
                grad_norms=grad_norms,
            )
            finished = now
            if report is not None:
                run_log.write(report)
            if agreement.stop:
                run.checkpoints.save_step(step, **run.save_arguments(step, run_log))
                logger.info("stopped after step %d of %d; the same command goes on from there", step, run.total_steps)
                return interruption.exit_code
            if run.evaluation_is_due(step):
                evaluate(run, step, run_log)
                finished = time.monotonic()
            run.checkpoints.step(step, **run.save_arguments(step, run_log))
    return 0


def evaluate(run: TaskRun, step: int, run_log: RunLog) -> Verdict | None:
    """Judges the model on val after a step, keeps it if it is the best so far, and writes figures and pictures."""
    run.evaluated_after = step
    package = run.package()
    if run.sets.val is None:
        run.keep(step, {})
        return None
    verdict = judge_set(run.learner.task, package, run.sets.val, run.judging)
    figure = verdict.figures.get(run.metric, math.nan)
    if math.isnan(figure):
        raise ValueError(f"val has no figure {run.metric}; there are {', '.join(verdict.figures) or 'none'}")
    epoch = run.epoch_of(step)
    logger.info("epoch %d: %s %.4f on val", epoch, run.metric, figure)
    run_log.write_evaluation(step, verdict.figures)
    if run.best.see(figure, epoch):
        run.keep(step, verdict.figures)
    if is_main_process():
        draw_epoch(run.output_dir, epoch, verdict, package)
    return verdict


@dataclass(frozen=True)
class FinetuneCommand:
    """Options of the command; everything about the run itself is in the config."""

    load_options: ClassVar = staticmethod(load_task_config)

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config: Path | None = option(None, help="YAML file with the run's options", aliases=("--config-file",))
    output_dir: str = option("", help="folder of the run; the same as train.output_dir=…")
    resume: bool = option(True, help="go on from the newest checkpoint of the run's folder, if there is one")
    overfit: int = option(
        0, help="debugging: learn this many training images by heart, say whether that works, and keep nothing"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    command = parse(
        FinetuneCommand,
        argv,
        description="Trains a head for classification, segmentation or depth on a pretrained backbone.",
        example="python run/train/finetune.py --config configs/task/demo_parts_depth.yaml",
    )
    if command.overfit < 0:
        raise ValueError(f"--overfit takes a number of images, at least 1; found {command.overfit}")
    pairs = [*command.overrides, *([f"train.output_dir={command.output_dir}"] if command.output_dir else [])]
    config = load_task_config(command.config, pairs)
    with distributed_session(config.train.device, timeout_minutes=config.train.process_group_timeout_minutes) as device:
        if command.overfit:
            logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
            return overfit(config, command.overfit, device)
        output_dir = prepare_run_folder(config.train.output_dir)
        with logging_to(output_dir, get_rank()):
            logger.info("%d process(es) on %s; the run's folder is %s", get_world_size(), device, output_dir)
            code = until_signal(lambda: fine_tune(config, output_dir=output_dir, device=device, resume=command.resume))
            if code == 0 and is_main_process():
                logger.info("done: %s", output_dir)
            return code


def finetune(config: TaskConfig, *, resume: bool = True) -> int:
    """Runs `fine_tune` in the folder that the options name, with its log; all processes of a run call it.

    Returns:
        0 when the job is done, else the exit code of the signal that stopped it (see `Interruption`).
    """
    with distributed_session(config.train.device, timeout_minutes=config.train.process_group_timeout_minutes) as device:
        output_dir = prepare_run_folder(config.train.output_dir)
        with logging_to(output_dir, get_rank()):
            logger.info("%d process(es) on %s; the run's folder is %s", get_world_size(), device, output_dir)
            return until_signal(lambda: fine_tune(config, output_dir=output_dir, device=device, resume=resume))
