"""The pretraining loop."""

import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dinov2.config import Config, render_config
from dinov2.data.unreadable import UnreadableTally
from dinov2.distributed import get_rank, get_world_size, is_main_process
from dinov2.fsdp import FSDPCheckpointer, PeriodicFSDPCheckpointer
from dinov2.logging import TrainingProgress
from dinov2.train.agreement import agree, check_finite
from dinov2.train.data import build_pretraining_dataset, build_pretraining_loader
from dinov2.train.ema import update_teacher
from dinov2.train.evaluation import (
    evaluate_teacher,
    evaluation_folder,
    evaluation_is_done,
    evaluation_is_due,
    open_evaluation_sets,
    save_teacher,
)
from dinov2.train.interruption import Interruption
from dinov2.train.optimization import Optimization, build_grad_scaler, build_optimizer
from dinov2.train.run_log import RunLog
from dinov2.train.schedules import build_schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import write_text_atomically
from dinov2.utils.random_state import RandomState
from dinov2.utils.seeds import derive_seed, seed_everything

logger = logging.getLogger("dinov2")


def do_train(config: Config, model: SSLMetaArch, *, output_dir: Path, device: torch.device, resume: bool = True) -> int:
    """Pretrains ``model`` as ``config`` says, from the start or from a checkpoint, and returns the exit code.

    Args:
        config: options of the run.
        model: on ``device``, wrapped by `parallelize`.
        output_dir: folder of the run, which exists.
        device: where this process computes.
        resume: whether to go on from the newest checkpoint of ``output_dir``, if there is one.

    Returns:
        0 when the run is complete, else 128 + the signal that stopped it.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite.
        TooManyUnreadableImages: more images than ``data.max_bad_fraction`` cannot be read.
        ValueError: the data does not suffice for one batch, or a checkpoint does not fit the model.
        FileNotFoundError: ``train.resume`` is set and there is no checkpoint, or a rank file is missing.
    """
    model.train()
    epoch_length = config.train.OFFICIAL_EPOCH_LENGTH
    total_iterations = config.optim.epochs * epoch_length
    global_batch = config.train.batch_size_per_gpu * get_world_size()
    dataset = build_pretraining_dataset(config)
    open_evaluation_sets(config)  # what is wrong with them is wrong now, not after the first period
    schedules = build_schedules(config, get_world_size())
    optimizer = build_optimizer(config, model.student, device)
    scaler = build_grad_scaler(config, device)
    optimization = Optimization(model.student, optimizer, scaler, config.optim.clip_grad)
    tally = UnreadableTally(len(dataset), config.data.max_bad_fraction)
    progress = TrainingProgress(
        total_iterations=total_iterations, epoch_length=epoch_length, log_period=config.train.log_period, device=device
    )
    seed_everything(derive_seed(config.train.seed, "train", get_rank()))
    checkpointer = FSDPCheckpointer(
        model, output_dir, optimizer=optimizer, scaler=scaler, unreadable=tally, progress=progress, random=RandomState()
    )
    periodic = PeriodicFSDPCheckpointer(
        checkpointer, config.train.saveckp_freq * epoch_length, total_iterations, config.train.keep_last
    )
    resumed = _resume(config, checkpointer, resume=resume)
    start, samples_seen = resumed.get("iteration", -1) + 1, resumed.get("samples_seen", 0)
    # A run that ended between a checkpoint and the evaluation after it makes up for it.
    evaluation_is_owed = (
        start > 0 and evaluation_is_due(config, start - 1) and not evaluation_is_done(config, output_dir, start - 1)
    )
    if start >= total_iterations and not evaluation_is_owed:
        logger.info("the run is complete: %d of %d iterations are done", start, total_iterations)
        return 0

    loader = build_pretraining_loader(config, dataset, samples_seen=samples_seen)
    if is_main_process():
        write_text_atomically(output_dir / "config.yaml", render_config(config))
    with Interruption() as interruption, RunLog(output_dir, resumed_at=start) as run_log:
        if evaluation_is_owed:
            run_log.write_evaluation(start - 1, do_test(config, model, start - 1, output_dir, device))
        finished = time.monotonic()
        for iteration, batch in zip(range(start, total_iterations), loader, strict=False):
            data_seconds = time.monotonic() - finished
            hyperparameters = schedules.at(iteration)
            losses = model.forward_backward(
                batch.to(device),
                teacher_temp=hyperparameters.teacher_temp,
                loss_scale=optimization.loss_scale(device),
            )
            grad_norms = optimization.clip()
            agreement = agree(losses, stop=interruption.requested, unreadable=batch.unreadable)
            overflow_is_normal = scaler.is_enabled()
            check_finite(agreement, losses, {} if overflow_is_normal else grad_norms, iteration, batch.names)
            tally.add(agreement.unreadable)
            optimization.step(hyperparameters)
            update_teacher(model.student, model.teacher, hyperparameters.momentum)

            samples_seen += global_batch
            now = time.monotonic()
            report = progress.update(
                iteration,
                batch_size=config.train.batch_size_per_gpu,
                data_seconds=data_seconds,
                iteration_seconds=now - finished,
                losses=agreement.losses,
                schedules=asdict(hyperparameters),
                grad_norms=grad_norms,
            )
            finished = now
            run_log.write(report)
            evaluation_is_due_now = evaluation_is_due(config, iteration)
            # Saved before it is evaluated: an evaluation that fails costs nothing.
            save = periodic.save_step if agreement.stop or evaluation_is_due_now else periodic.step
            save(iteration, samples_seen=samples_seen, resumed_from=resumed.get("resumed_from", ""))
            if agreement.stop:
                again = "the same command" if resume else "the same command without --no-resume"
                logger.info("stopped after iteration %d; %s goes on from there", iteration, again)
                return interruption.exit_code
            if evaluation_is_due_now:
                run_log.write_evaluation(iteration, do_test(config, model, iteration, output_dir, device))
                finished = time.monotonic()
    logger.info("done: %d iterations, %s", total_iterations, tally.summary())
    if is_main_process():
        run_log.plot()
    return 0


def do_test(
    config: Config, model: SSLMetaArch, iteration: int, output_dir: Path, device: torch.device
) -> dict[str, float]:
    """Writes ``eval/training_{iteration}/teacher_checkpoint.pth`` and scores the teacher by k-NN where sets are named.

    Every process must call it; it leaves random states and the training mode as they were.

    Returns:
        Figures by name, such as ``knn_part_auroc_k10``; empty without evaluation sets.
    """
    folder = evaluation_folder(output_dir, iteration)
    weights = save_teacher(model, folder)
    return evaluate_teacher(config, model, folder, device, weights=str(weights))


def _resume(config: Config, checkpointer: FSDPCheckpointer, *, resume: bool) -> dict[str, Any]:
    """Loads the checkpoint to go on from, if there is one, and returns what it holds beside tensors.

    A run that began from a checkpoint of the options goes on from its own newest one: the same command, started again
    after an interruption, must not throw away what has been done since.
    """
    named = checkpoint_to_resume(config, checkpointer, resume=resume)
    if named and checkpointer.newest().get("resumed_from") == named:
        logger.info("this run began from %s and goes on from its own newest checkpoint", named)
        named = ""
    resumed = checkpointer.resume_or_load(named, resume=resume)
    return resumed | {"resumed_from": named} if named else resumed


def checkpoint_to_resume(config: Config, checkpointer: FSDPCheckpointer, *, resume: bool) -> str:
    """The checkpoint that the options name, empty for the newest of the run's own folder.

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
    if config.train.resume and not named and not checkpointer.has_checkpoint():
        raise FileNotFoundError(f"train.resume=true, but {checkpointer.save_dir} holds no checkpoint")
    return named.pop() if named else ""
