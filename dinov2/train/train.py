"""The pretraining loop."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from dinov2.checkpoint.run_lock import run_lock
from dinov2.config import Config, render_config
from dinov2.data.collate import PretrainingBatch
from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import StallWatch, get_rank, is_main_process
from dinov2.eval.results import EvaluationResults
from dinov2.logging.progress import Scalar
from dinov2.logging.run_log import RunLog
from dinov2.logging.training_plots import plot_training
from dinov2.loop.optimization import Agreement, NonFiniteLossError, Optimization, agree, check_finite
from dinov2.train.data import Batches, is_loss_of_worker
from dinov2.train.evaluation import (
    TEACHER_FILE,
    evaluate_teacher,
    evaluation_folder,
    evaluation_is_due,
    flat_figures,
    save_teacher,
    write_results,
)
from dinov2.train.monitors import Monitors
from dinov2.train.setup import Preparation, StepHyperparameters, prepare
from dinov2.train.ssl_meta_arch import Predictions, SSLMetaArch, Targets, update_teacher
from dinov2.utils.errors import RunError, StartAgainError
from dinov2.utils.files import write_text_atomically
from dinov2.utils.interruption import Interruption, StoppedAtOnce

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
        0 when the run is complete, else that of the signal which stopped it (see `Interruption`).

    Raises:
        NonFiniteLossError: more than ``train.max_bad_steps`` batches in a row gave NaN or infinity.
        StartAgainError: another process is lost or hangs.
        FolderInUseError: another run writes to ``output_dir``.
        TooManyUnreadableImages: more images than ``data.max_bad_fraction`` cannot be read.
        ValueError: the data does not suffice for one batch, or a checkpoint does not fit the model.
        FileNotFoundError: ``train.resume`` is set and there is no checkpoint, or a rank file is missing.
    """
    interruption = Interruption(announce=is_main_process())
    with run_lock(output_dir), StallWatch(config.train.process_group_timeout_minutes) as watch, interruption:
        try:
            with interruption.at_once():
                run = prepare(config, model, output_dir, device, resume=resume)
            if run.is_complete:
                logger.info("the run is complete: %d of %d iterations are done", run.start, run.total_iterations)
                return 0
            return train_watched(config, model, output_dir, device, run, watch, interruption, resume=resume)
        except StoppedAtOnce:
            logger.info("stopped outside of training, with everything saved; %s goes on", _again(resume=resume))
            return interruption.exit_code
        except RuntimeError as error:
            if isinstance(error, RunError):
                raise
            if is_loss_of_worker(error):
                raise StartAgainError(f"a data-loading process of rank {get_rank()} is lost: {error}") from error
            finding = watch.explain(error)
            if finding is None:
                raise
            kind = StartAgainError if finding.start_again else RunError
            raise kind(f"a process is lost or hangs: {finding.text} ({error})") from error


def train_watched(
    config: Config,
    model: SSLMetaArch,
    output_dir: Path,
    device: torch.device,
    run: Preparation,
    watch: StallWatch,
    interruption: Interruption,
    *,
    resume: bool,
) -> int:
    """What `do_train` does, when all is prepared, in a folder that no other run writes to."""
    monitors = build_monitors(config, model, output_dir, device, run)
    batches = Batches(config, run.dataset, samples_seen=run.samples_seen)
    if is_main_process():  # now that nothing is wrong with options and data
        write_text_atomically(output_dir / "config.yaml", render_config(config))
    model.train()
    log = RunLog(output_dir, resumed_at=run.start, state=run.log_state)
    with run.checkpoints, closing(batches), log as run_log:
        watch.begin("the first look at the features")
        with interruption.at_once():
            run_log.write_evaluation(run.start - 1, monitors.begin())
        if run.evaluation_is_owed:
            watch.begin(f"the evaluation after iteration {run.start - 1}")
            evaluate_and_log(config, model, run.start - 1, output_dir, device, monitors, run_log, interruption)
        finished = time.monotonic()
        watch.begin(f"iteration {run.start}")
        for iteration, batch in zip(range(run.start, run.total_iterations), batches, strict=False):
            watch.has_data()
            data_seconds = time.monotonic() - finished
            agreement, values, grad_norms = step_or_skip(
                run, model, batch.to(device), iteration, stop=interruption.requested or bool(batches.lost)
            )
            run.tally.add(agreement.unreadable)

            now = time.monotonic()
            report = run.progress.update(
                iteration,
                batch_size=config.train.batch_size_per_gpu,
                data_seconds=data_seconds,
                iteration_seconds=now - finished,
                losses=values,
                schedules=asdict(run.schedules.at(iteration)),
                grad_norms=grad_norms,
            )
            finished = now
            if report is not None:
                report.record.update(run.bad_batches.figures())
                monitors.see_report(report.record)
                run_log.write(report)

            evaluate = evaluation_is_due(config, iteration)
            # Saved before it is evaluated: an evaluation that fails costs nothing.
            save_now = agreement.stop or evaluate or run.tally.exceeded
            save = run.checkpoints.save_step if save_now else run.checkpoints.step
            save(iteration, **run.save_arguments(iteration, run_log))
            run.tally.check()
            if agreement.stop:
                logger.info("stopped after iteration %d; %s goes on from there", iteration, _again(resume=resume))
                return interruption.exit_code
            if evaluate:
                watch.begin(f"the evaluation after iteration {iteration}")
                evaluate_and_log(config, model, iteration, output_dir, device, monitors, run_log, interruption)
                finished = time.monotonic()
            watch.begin(f"iteration {iteration + 1}")
    watch.pause()
    logger.info("done: %d iterations, %s", run.total_iterations, run.tally.summary())
    draw_curves(output_dir)
    return 0


def _again(*, resume: bool) -> str:
    return "the same command" if resume else "the same command without --no-resume"


def draw_curves(output_dir: Path) -> None:
    """Draws the run's curves into ``plots/``, on the main process; a full disk costs only them."""
    if is_main_process():
        try:
            for path in plot_training(output_dir / "metrics.jsonl", output_dir):
                logger.info("drew %s", path)
        except OSError as error:
            logger.error("the curves are not drawn, python tools/plot_run.py %s does it later: %s", output_dir, error)


def evaluate_and_log(
    config: Config,
    model: SSLMetaArch,
    iteration: int,
    output_dir: Path,
    device: torch.device,
    monitors: Monitors,
    run_log: RunLog,
    interruption: Interruption,
) -> None:
    """`do_test`, with its figures and warnings in the run's records.

    A signal ends it, and the next start makes up for it: it may take longer than what a scheduler grants.
    """
    with interruption.at_once():
        figures = do_test(config, model, iteration, output_dir, device, monitors)
    run_log.write_evaluation(iteration, figures, monitors.take_warnings())


def step_or_skip(
    run: Preparation, model: SSLMetaArch, batch: PretrainingBatch, iteration: int, *, stop: bool
) -> tuple[Agreement, dict[str, Scalar], dict[str, Tensor]]:
    """One iteration, or none where the batch gives NaN or infinity: then all is as if it had not been.

    Returns:
        What all processes agree on, values for the progress report, and gradient norms; no values of a skipped batch.

    Raises:
        NonFiniteLossError: too many batches in a row were bad.
    """
    hyperparameters = run.schedules.at(iteration)
    run.bad_batches.begin_step()
    try:
        agreement, grad_norms = train_step(
            model, batch, run.optimization, hyperparameters, iteration, stop=stop, observe=run.targets.observe
        )
    except NonFiniteLossError as error:
        run.targets.forget_batch()
        run.bad_batches.skip(error, batch, iteration, hyperparameters.teacher_temp)
        return error.agreement, {}, {}
    run.bad_batches.note_step()
    return agreement, {**agreement.losses, **run.targets.step}, grad_norms


def train_step(
    model: SSLMetaArch,
    batch: PretrainingBatch,
    optimization: Optimization,
    hyperparameters: StepHyperparameters,
    iteration: int,
    *,
    stop: bool = False,
    observe: Callable[[Targets, Predictions], None] | None = None,
) -> tuple[Agreement, dict[str, Tensor]]:
    """One iteration: losses and gradients, a look at whether they are finite, the step, the teacher.

    Args:
        model: student, teacher and losses.
        batch: on the model's device.
        optimization: of the student.
        hyperparameters: of this iteration.
        iteration: its number.
        stop: whether this process was asked to stop.
        observe: is shown what teacher and student say; must change nothing.

    Returns:
        What all processes agree on, and gradient norms before clipping by sub-network.

    Raises:
        NonFiniteLossError: a loss or gradient is NaN or infinite; nothing has been changed then but random states.
    """
    centers = [(buffer, buffer.clone()) for loss in (model.dino_loss, model.ibot_loss) for buffer in loss.buffers()]
    losses = model.forward_backward(
        batch,
        teacher_temp=hyperparameters.teacher_temp,
        loss_scale=optimization.loss_scale(batch.global_crops.device),
        observe=observe,
    )
    grad_norms = optimization.clip()
    agreement = agree(losses, stop=stop, unreadable=batch.unreadable)
    try:
        overflow_is_normal = optimization.overflow_is_normal()
        check_finite(agreement, losses, {} if overflow_is_normal else grad_norms, iteration, batch.names)
    except NonFiniteLossError:
        optimization.discard()
        for buffer, before in centers:
            buffer.copy_(before)
        raise
    optimization.step(hyperparameters)
    update_teacher(model.student, model.teacher, hyperparameters.momentum)
    return agreement, grad_norms


def do_test(
    config: Config,
    model: SSLMetaArch,
    iteration: int,
    output_dir: Path,
    device: torch.device,
    monitors: Monitors | None = None,
) -> dict[str, float]:
    """Writes ``eval/training_{iteration}/teacher_checkpoint.pth`` and judges the teacher.

    It is scored by k-NN where labelled sets are named. The monitors of a run also measure its features on the probe
    set, and keep it if it is the best so far. Every process must call it; it leaves random states and the training mode
    as they were. In the middle of a run, a teacher that cannot be written is judged all the same, results that cannot
    be written stay in the run's records, and a teacher that cannot be judged by k-NN ends no run.

    Returns:
        Figures by name, such as ``knn_part_auroc_k10`` and ``probe_cls_rank``; empty with neither sets nor monitors.

    Raises:
        OSError: files of the last iteration, or outside of a run, cannot be written.
        ValueError: outside of a run, an image of the labelled sets cannot be read, or features are not finite.
    """
    folder = evaluation_folder(output_dir, iteration)
    goes_on = monitors is not None and iteration + 1 < config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH
    weights: Path | None = None
    try:
        weights = save_teacher(model, folder, config)
    except OSError as error:
        if not goes_on:
            raise
        logger.error("A TEACHER IS NOT SAVED, training goes on, and the next one is tried: %s", error)
    results = judge_or_go_on(config, model, device, str(folder / TEACHER_FILE), may_fail=monitors is not None)
    figures = {} if results is None else flat_figures(results)
    try:
        if results is not None:
            write_results(results, folder)
    except OSError as error:
        if not goes_on:
            raise
        logger.error("RESULTS OF AN EVALUATION ARE NOT SAVED, training goes on: %s", error)
    return figures if monitors is None else monitors.see_evaluation(iteration, figures, weights)


def judge_or_go_on(
    config: Config, model: SSLMetaArch, device: torch.device, weights: str, *, may_fail: bool
) -> EvaluationResults | None:
    """`evaluate_teacher`; with ``may_fail``, an image that cannot be read, say, costs the figures and not the run."""
    try:
        return evaluate_teacher(config, model, device, weights=weights)
    except (OSError, ValueError) as error:
        if not may_fail:
            raise
        logger.error("THE TEACHER IS NOT JUDGED by k-NN, training goes on: %s", error)
        return None


def build_monitors(
    config: Config, model: SSLMetaArch, output_dir: Path, device: torch.device, run: Preparation
) -> Monitors:
    """Opens what is watched during a run; what is wrong with it is wrong before the first step."""
    images = run.dataset.dataset
    assert isinstance(images, ImageDataset)
    return Monitors(config, model, output_dir, device, targets=run.targets, training_images=images, start=run.start)
