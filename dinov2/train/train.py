"""The pretraining loop."""

import logging
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dinov2.config import Config, render_config
from dinov2.data.collate import PretrainingBatch
from dinov2.distributed import is_main_process
from dinov2.train.agreement import Agreement, agree, check_finite
from dinov2.train.data import build_pretraining_loader
from dinov2.train.ema import update_teacher
from dinov2.train.evaluation import evaluate_teacher, evaluation_folder, evaluation_is_due, save_teacher
from dinov2.train.interruption import Interruption
from dinov2.train.optimization import Optimization
from dinov2.train.preparation import prepare
from dinov2.train.run_log import RunLog
from dinov2.train.schedules import StepHyperparameters
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import write_text_atomically

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
    run = prepare(config, model, output_dir, device, resume=resume)
    if run.is_complete:
        logger.info("the run is complete: %d of %d iterations are done", run.start, run.total_iterations)
        return 0
    loader = build_pretraining_loader(config, run.dataset, samples_seen=run.samples_seen)
    if is_main_process():  # now that nothing is wrong with options and data
        write_text_atomically(output_dir / "config.yaml", render_config(config))
    model.train()
    with Interruption() as interruption, RunLog(output_dir, resumed_at=run.start) as run_log:
        if run.evaluation_is_owed:
            run_log.write_evaluation(run.start - 1, do_test(config, model, run.start - 1, output_dir, device))
        finished = time.monotonic()
        for iteration, batch in zip(range(run.start, run.total_iterations), loader, strict=False):
            data_seconds = time.monotonic() - finished
            hyperparameters = run.schedules.at(iteration)
            agreement, grad_norms = train_step(
                model, batch.to(device), run.optimization, hyperparameters, iteration, stop=interruption.requested
            )
            run.tally.add(agreement.unreadable)

            now = time.monotonic()
            report = run.progress.update(
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

            evaluate = evaluation_is_due(config, iteration)
            # Saved before it is evaluated: an evaluation that fails costs nothing.
            save_now = agreement.stop or evaluate or run.tally.exceeded
            save = run.checkpoints.save_step if save_now else run.checkpoints.step
            save(iteration, **run.save_arguments(iteration))
            run.tally.check()
            if agreement.stop:
                again = "the same command" if resume else "the same command without --no-resume"
                logger.info("stopped after iteration %d; %s goes on from there", iteration, again)
                return interruption.exit_code
            if evaluate:
                run_log.write_evaluation(iteration, do_test(config, model, iteration, output_dir, device))
                finished = time.monotonic()
    logger.info("done: %d iterations, %s", run.total_iterations, run.tally.summary())
    if is_main_process():
        run_log.plot()
    return 0


def train_step(
    model: SSLMetaArch,
    batch: PretrainingBatch,
    optimization: Optimization,
    hyperparameters: StepHyperparameters,
    iteration: int,
    *,
    stop: bool = False,
) -> tuple[Agreement, dict[str, Tensor]]:
    """One iteration: losses and gradients, a look at whether they are finite, the step, the teacher.

    Args:
        model: student, teacher and losses.
        batch: on the model's device.
        optimization: of the student.
        hyperparameters: of this iteration.
        iteration: its number.
        stop: whether this process was asked to stop.

    Returns:
        What all processes agree on, and gradient norms before clipping by sub-network.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite; nothing has been changed then.
    """
    losses = model.forward_backward(
        batch,
        teacher_temp=hyperparameters.teacher_temp,
        loss_scale=optimization.loss_scale(batch.global_crops.device),
    )
    grad_norms = optimization.clip()
    agreement = agree(losses, stop=stop, unreadable=batch.unreadable)
    overflow_is_normal = optimization.scaler.is_enabled()
    check_finite(agreement, losses, {} if overflow_is_normal else grad_norms, iteration, batch.names)
    optimization.step(hyperparameters)
    update_teacher(model.student, model.teacher, hyperparameters.momentum)
    return agreement, grad_norms


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
