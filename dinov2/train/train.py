"""The pretraining loop: one step between two rulers, and around it records, checkpoints and evaluations."""

import logging
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dinov2.checkpoint.run_lock import run_lock
from dinov2.config import Config, as_pair, render_config
from dinov2.config.command_line import door, run_as
from dinov2.data.datasets.registry import named_light, named_value_range
from dinov2.distributed import StallWatch, get_rank, is_main_process
from dinov2.eval.learning import COMPARISON, did_it_learn
from dinov2.eval.results import EvaluationResults
from dinov2.logging import read_metrics
from dinov2.logging.progress import Scalar
from dinov2.logging.training_plots import plot_training
from dinov2.loop.optimization import NonFiniteLossError, agree
from dinov2.loop.training_loop import watched
from dinov2.train.baselines import compare_with_baselines
from dinov2.train.data import is_loss_of_worker, named_preprocessing
from dinov2.train.evaluation import (
    METRICS_FILE,
    TEACHER_FILE,
    evaluate_teacher,
    evaluation_folder,
    evaluation_is_due,
    flat_metrics,
    save_teacher,
    write_on_main,
)
from dinov2.train.monitors import Monitors
from dinov2.train.setup import Run, prepare
from dinov2.train.ssl_meta_arch import SSLMetaArch, update_teacher
from dinov2.utils.errors import StartAgainError
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
    again = "the same command" if resume else "the same command without --no-resume"
    interruption = Interruption(announce=is_main_process())
    with run_lock(output_dir) as folder, watched(config.train.process_group_timeout_minutes) as watch, interruption:
        try:
            with interruption.at_once():
                run = prepare(config, model, folder, device, resume=resume)
            if run.loop.start >= run.loop.total_steps and not run.evaluation_is_owed:
                logger.info("the run is complete: %d of %d iterations are done", run.loop.start, run.loop.total_steps)
                tell_what_was_learnt(run.config, output_dir)
                return 0
            return train(run.config, model, run, device, watch, interruption, again=again)
        except StoppedAtOnce:
            folder.check()  # what is not there is not saved
            logger.info("stopped outside of training, with everything saved; %s goes on", again)
            return interruption.exit_code
        except RuntimeError as error:
            if is_loss_of_worker(error):
                raise StartAgainError(f"a data-loading process of rank {get_rank()} is lost: {error}") from error
            raise


def train(
    config: Config,
    model: SSLMetaArch,
    run: Run,
    device: torch.device,
    watch: StallWatch,
    interruption: Interruption,
    *,
    again: str,
) -> int:
    """What `do_train` does, when all is prepared, in a folder that no other run writes to."""
    loop, batches, monitors = run.loop, run.batches, run.monitors
    optimization, targets, bad_batches = run.optimization, run.targets, run.bad_batches
    output_dir, period = loop.output_dir, config.evaluation.eval_period_iterations
    if is_main_process():  # now that nothing is wrong with options and data
        write_text_atomically(output_dir / "config.yaml", render_config(config))
    model.train()

    def evaluate(iteration: int) -> None:
        watch.begin(f"the evaluation after iteration {iteration}")
        # A signal ends it, and the next start makes up for it: it may take longer than what a scheduler grants.
        with interruption.at_once():
            metrics = do_test(config, model, iteration, output_dir, device, monitors)
        loop.log.write_evaluation(iteration, metrics, monitors.take_warnings())
        loop.restart_clock()

    with closing(batches), loop.recording(repeats_evaluation=run.evaluation_is_owed):
        watch.begin("the first look at the features")
        with interruption.at_once():
            loop.log.write_evaluation(loop.start - 1, monitors.begin())
        if run.evaluation_is_owed:
            evaluate(loop.start - 1)
        loop.restart_clock()
        for iteration in range(loop.start, loop.total_steps):
            # ----------------------------------------------------------------------------------------------------------
            watch.begin(f"iteration {iteration}")
            batch = next(batches).to(device)
            watch.has_data()
            loop.note_data()

            now = {name: schedule[iteration] for name, schedule in run.schedules.items()}
            bad_batches.begin_step()
            centers = [center.clone() for center in model.centers]
            losses = model.forward_backward(
                batch,
                teacher_temp=now["teacher_temp"],
                loss_scale=optimization.loss_scale(device),
                observe=targets.observe,
            )
            grad_norms = optimization.clip()
            agreement = agree(losses, stop=interruption.requested or bool(batches.lost), unreadable=batch.unreadable)
            values: dict[str, Scalar] = {}
            try:
                optimization.check_finite(agreement, losses, grad_norms, iteration, batch.names)
            except NonFiniteLossError as error:  # then all is as if the batch had not been, but for random states
                for center, before in zip(model.centers, centers, strict=True):
                    center.copy_(before)
                targets.forget_batch()
                grad_norms = {}
                bad_batches.skip(error, batch, iteration, now["teacher_temp"])
            else:
                optimization.step(lr=now["lr"], weight_decay=now["weight_decay"], last_layer_lr=now["last_layer_lr"])
                update_teacher(model.student, model.teacher, now["momentum"])
                bad_batches.in_a_row = 0
                values = {**agreement.losses, **targets.step}
            # ----------------------------------------------------------------------------------------------------------
            report = loop.note_step(iteration, agreement, values, schedules=now, grad_norms=grad_norms)
            if report is not None:
                if bad_batches.total:
                    report.record["skipped_batches"] = bad_batches.total
                monitors.complete_report(report.record)
                loop.log.write(report)

            is_due = evaluation_is_due(iteration, period=period, total_iterations=loop.total_steps)
            # Saved before it is evaluated: an evaluation that fails costs nothing.
            loop.save(iteration, now=agreement.stop or is_due, **run.extras)
            if agreement.stop:
                loop.log_stop(f"iteration {iteration}", again)
                return interruption.exit_code
            if is_due:
                evaluate(iteration)
    watch.pause()
    logger.info("done: %d iterations, %s", loop.total_steps, loop.tally.summary())
    if is_main_process():
        try:
            loop.folder.check()
            for path in plot_training(output_dir / METRICS_FILE, output_dir):
                logger.info("drew %s", path)
        except OSError as error:  # a full disk costs only them
            logger.error("the curves are not drawn, python tools/plot_run.py %s does it later: %s", output_dir, error)
    tell_what_was_learnt(config, output_dir)
    return 0


def next_commands(config: Config, output_dir: Path) -> list[str]:
    """What to do with a finished run, as commands that work where it was started.

    They write the report, and with labelled sets score the teacher beside a random backbone and train a head on it;
    without them, draw its features.
    """
    last = config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH - 1
    folders = (output_dir / "eval" / "best", evaluation_folder(output_dir, last))
    teacher = next((folder / TEACHER_FILE for folder in folders if (folder / TEACHER_FILE).is_file()), None)
    commands = [[*door("report_run", "tools/report_run.py"), f"{output_dir}"]]
    if teacher is None:
        return [shlex.join(words) for words in commands]
    weights = ("--config-file", f"{output_dir / 'config.yaml'}", "--pretrained-weights", f"{teacher}")
    train_set, val_set = config.evaluation.train_dataset_path, config.evaluation.val_dataset_path
    if not train_set:
        pictures = ("--dataset", config.train.dataset_path, "--output", f"{output_dir / 'plots' / 'features'}")
        commands.append([*door("visualize_features", "tools/visualize_features.py"), *weights, *pictures])
        return [shlex.join(words) for words in commands]
    scores = ("--compare-random", "--output-dir", f"{output_dir / 'eval' / 'knn'}")
    commands.append([*door("knn", "eval/knn.py"), *weights, *scores])
    height, width = as_pair(config.crops.global_crops_size)
    commands.append(
        [
            *(*door("finetune", "run/train/finetune.py"), "task=classification"),
            *(f"backbone.config_file={output_dir / 'config.yaml'}", f"backbone.pretrained_weights={teacher}"),
            *(f"data.train_dataset_path={train_set}", f"data.val_dataset_path={val_set}"),
            *(f"data.image_size=[{height},{width}]", f"train.output_dir={output_dir}_classification"),
        ]
    )
    return [shlex.join(words) for words in commands]


def tell_what_was_learnt(config: Config, output_dir: Path) -> None:
    """The main process logs whether the run learnt, as its records tell (see `did_it_learn`), and what to do next."""
    if not is_main_process():
        return
    try:
        records = read_metrics(output_dir / METRICS_FILE)
    except (OSError, ValueError) as error:
        logger.error("whether the run learnt cannot be told: %s", error)
        return
    learning = did_it_learn(
        records,
        batch_size=config.train.batch_size_per_gpu,
        total_iterations=config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH,
        best_metric=config.evaluation.best_metric,
        from_pretrained=bool(config.student.pretrained_weights),
        patch_size=max(as_pair(config.student.patch_size)),
    )
    if learning is not None:
        logger.info("%s", learning)
    for command in next_commands(config, output_dir):
        logger.info("next: %s", command)


def do_test(
    config: Config,
    model: SSLMetaArch,
    iteration: int,
    output_dir: Path,
    device: torch.device,
    monitors: Monitors | None = None,
) -> dict[str, Any]:
    """Writes ``eval/training_{iteration}/teacher_checkpoint.pth`` and evaluates the teacher.

    It is scored by k-NN where labelled sets are named. The monitors of a run also measure its features on the probe
    set, and keep it if it is the best so far; its score is compared with what it has to beat. Every process must call
    it; it leaves random states and the training mode as they were. In the middle of a run, a teacher that cannot be
    written is evaluated all the same, results that cannot be written stay in the run's records, and a teacher that
    cannot be evaluated by k-NN ends no run.

    Returns:
        Metrics by name, such as ``knn_part_auroc_k10`` and ``probe_cls_rank``, and the ``comparison``; empty with
        neither sets nor monitors.

    Raises:
        OSError: files of the last iteration, or outside of a run, cannot be written.
        ValueError: outside of a run, an image of the labelled sets cannot be read, or features are not finite.
    """
    folder = evaluation_folder(output_dir, iteration)
    goes_on = monitors is not None and iteration + 1 < config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH
    weights: Path | None = None
    check: Callable[[], None] = monitors.check_folder if monitors is not None else lambda: None
    with _tolerated("A TEACHER IS NOT SAVED, training goes on, and the next one is tried", OSError, when=goes_on):
        images = config.train.dataset_path
        prepared = named_value_range(images), named_light(images), named_preprocessing(config)
        weights = save_teacher(model, folder, render_config(config), *prepared, check_folder=check)
    results: EvaluationResults | None = None
    message = "THE TEACHER IS NOT EVALUATED by k-NN, training goes on"
    with _tolerated(message, OSError, ValueError, when=monitors is not None):
        results = evaluate_teacher(config, model, device, weights=str(folder / TEACHER_FILE))
    if results is not None:
        with _tolerated("RESULTS OF AN EVALUATION ARE NOT SAVED, training goes on", OSError, when=goes_on):
            write_on_main(partial(results.write, folder), f"the results in {folder}", check_folder=check)
    metrics = {} if results is None else flat_metrics(results)
    if monitors is None:
        return metrics
    found: dict[str, Any] = monitors.evaluate(iteration, metrics, weights)
    if results is not None:
        with _tolerated("THE TEACHER IS NOT COMPARED with what it has to beat, training goes on", OSError, ValueError):
            found[COMPARISON] = compare_with_baselines(config, results, output_dir, device, check_folder=check)
    return found


@contextmanager
def _tolerated(message: str, *errors: type[Exception], when: bool = True) -> Iterator[None]:
    """Turns errors into a line of the log where a run must not end because of them."""
    try:
        yield
    except errors as error:
        if not when:
            raise
        logger.error("%s: %s", message, error)


if __name__ == "__main__":
    run_as("train")
