"""Supervised training of any task: the loop, the evaluation of every epoch, the best weights, and what a run leaves."""

import logging
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from dinov2.checkpoint.run_lock import run_lock
from dinov2.checkpoint.sharding import OtherArchitectureError
from dinov2.config import Config, options_without_effect, render_config
from dinov2.config.command_line import door, option, parse, run_as
from dinov2.data.datasets.references import References
from dinov2.data.datasets.registry import with_value_range
from dinov2.data.loaders import settle_value_range
from dinov2.data.pretraining import UnreadableTally
from dinov2.distributed import (
    StallWatch,
    barrier,
    distributed_session,
    get_rank,
    get_world_size,
    is_main_process,
)
from dinov2.eval.command import find_origins, trained_on
from dinov2.eval.metrics.classification import LevelScores, MetricValue, Scores
from dinov2.eval.results import EvaluationResults
from dinov2.logging import logging_to
from dinov2.logging.metrics_file import read_metrics
from dinov2.logging.run_log import check_run_folder, prepare_run_folder
from dinov2.loop.training_loop import TrainingLoop, watched
from dinov2.tasks import TASKS, load_task_config
from dinov2.tasks.dry_run import describe_task_run, overfit
from dinov2.tasks.evaluation import BestSoFar, Evaluation, check_metric, evaluate_set, headline, show_set
from dinov2.tasks.networks import Learner, build_learner, learning_rates
from dinov2.tasks.options import TaskConfig, task_config_class
from dinov2.tasks.package import TaskPackage, load_backbone_config, load_task_package, make_package, save_task_package
from dinov2.tasks.plots import draw_end, draw_epoch
from dinov2.tasks.task import Task
from dinov2.tasks.training_data import (
    TaskSets,
    TrainingData,
    check_classes,
    name_preprocessing,
    open_task_sets,
)
from dinov2.utils.files import HeldFolder, write_text_atomically
from dinov2.utils.interruption import Interruption, until_signal
from dinov2.utils.seeds import derive_seed, seed_everything

logger = logging.getLogger("dinov2")

BEST = "best.pth"


def finetune(config: TaskConfig, *, resume: bool = True) -> int:
    """Runs `fine_tune` in the folder that the options name, with its log; all processes of a run call it.

    Returns:
        0 when the job is done, else the exit code of the signal that stopped it (see `Interruption`).
    """
    with distributed_session(config.train.device, timeout_minutes=config.train.process_group_timeout_minutes) as device:
        output_dir = prepare_run_folder(config.train.output_dir)
        with logging_to(output_dir, get_rank()):
            logger.info("%d process(es) on %s; the run's folder is %s", get_world_size(), device, output_dir)
            code = until_signal(lambda: fine_tune(config, output_dir=output_dir, device=device, resume=resume))
            if code == 0 and is_main_process():
                logger.info("done: %s", output_dir)
            return code


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
        StartAgainError: another process is lost or hangs.
        FolderInUseError: another run writes to ``output_dir``.
        TooManyUnreadableImages: more images than ``data.max_bad_fraction`` cannot be read.
        BadTargetError: a target, such as a mask, cannot be used; the file is named.
        ValueError, FileNotFoundError: the options, data, weights or checkpoints do not fit each other.
    """
    with run_lock(output_dir) as folder, watched(config.train.process_group_timeout_minutes) as watch:
        run = prepare_run(config, folder, device, resume=resume)
        if is_main_process():  # now that nothing is wrong with options and data
            write_text_atomically(output_dir / "config.yaml", render_config(run.task.config))
        code = train(run, watch) if run.task.is_trained else learn(run, watch)
        if code == 0:
            complete(run)
        return code


@dataclass(kw_only=True)
class TaskRun:
    """A run that is ready to train.

    Attributes:
        backbone_config: describes the backbone.
        sets: training, val and test.
        data: batches of the training set.
        learner: takes the steps: task, networks, optimiser.
        loop: progress, records and checkpoints.
        best: which weights are the best so far.
        evaluated_after: step after which val was evaluated last; -1 for never.
    """

    backbone_config: Config
    sets: TaskSets
    data: TrainingData
    learner: Learner
    loop: TrainingLoop
    best: BestSoFar
    evaluated_after: int

    @property
    def task(self) -> Task:
        """Of the run, with its options."""
        return self.learner.task

    def epoch_of(self, step: int) -> int:
        """Epochs that are complete after a step."""
        return (step + 1) // self.data.steps_per_epoch

    def evaluation_is_due(self, step: int) -> bool:
        """Whether val is evaluated after a step."""
        ends_epoch = (step + 1) % self.data.steps_per_epoch == 0
        every = self.task.config.evaluation.every_epochs
        return ends_epoch and (self.epoch_of(step) % every == 0 or step == self.loop.total_steps - 1)

    def evaluate(self, package: TaskPackage, name: str) -> Evaluation:
        """Evaluates a model on one of the sets; every process must call it."""
        options = self.task.config.evaluation
        return evaluate_set(package, self.sets.named()[name], options, num_workers=self.task.config.data.num_workers)

    def keep(self, step: int, values: Mapping[str, float], thresholds: Mapping[str, float]) -> None:
        """Writes the model that was made whole last as the best so far, with metrics and thresholds found on val."""
        if is_main_process():
            self.loop.folder.check()
            save_task_package(
                self.loop.output_dir / BEST,
                self.learner.networks.shipped_state(),
                self.task,
                self.backbone_config,
                light=self.sets.train.light,
                value_range=self.sets.train.value_range,
                chain=self.sets.train.preprocessing,
                figures={"epoch": self.epoch_of(step), **values},
                thresholds=thresholds,
            )


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What the options alone decide about a run, whatever its folder holds."""

    backbone_config: Config
    sets: TaskSets
    data: TrainingData
    learner: Learner
    metric: str  # chooses the best weights
    missing: Mapping[str, Sequence[str]]  # classes that sets do not show


def begin(config: TaskConfig, device: torch.device) -> Beginning:
    """Opens the data, checks them, and builds networks and optimiser.

    Raises:
        FileNotFoundError, ValueError: see `fine_tune`.
    """
    seed_everything(config.train.seed)
    backbone_config = load_backbone_config(config)
    trained = trained_on(config.backbone.pretrained_weights, backbone_config)
    config = name_preprocessing(config, trained.preprocessing, backbone_config.student.in_channels)
    sets = open_task_sets(config, trained.value_range)
    trained.warn_of_light(config.data.train_dataset_path, sets.train)
    if is_main_process():
        for sentence in options_without_effect(config):
            logger.warning("%s", sentence)
    task: Task = config.task_class(config, sets.facts)
    data = TrainingData(task, sets.train, patch_size=backbone_config.student.patch_size)
    missing = check_classes(data, sets.val)
    metric = task.metric if config.evaluation.metric == "auto" else config.evaluation.metric
    if sets.val is not None:
        check_metric(task, sets.val, metric, config.data.val_dataset_path, missing.get("val", ()))
    learner = build_learner(task, data, backbone_config, num_outputs=sets.facts.num_outputs, device=device)
    return Beginning(
        backbone_config=backbone_config, sets=sets, data=data, learner=learner, metric=metric, missing=missing
    )


def prepare_run(config: TaskConfig, folder: HeldFolder, device: torch.device, *, resume: bool) -> TaskRun:
    """Begins a run, and restores the checkpoint to go on from, if there is one.

    Raises:
        FileNotFoundError, ValueError: see `fine_tune`.
    """
    beginning = begin(config, device)
    sets, data, learner, metric = beginning.sets, beginning.data, beginning.learner, beginning.metric
    task = learner.task
    second = next((name for name in (task.second_metric, task.metric) if name != metric), "")
    best = BestSoFar(
        metric,
        higher_is_better=task.higher_is_better(metric),
        patience=config.train.early_stopping_epochs,
        second=second,
        second_higher=task.higher_is_better(second),
    )
    seed_everything(derive_seed(config.train.seed, "fine-tune", get_rank()))
    loop = TrainingLoop(
        folder,
        learner.networks,
        learner.optimization,
        device=device,
        total_steps=config.optim.epochs * data.steps_per_epoch,
        epoch_length=data.steps_per_epoch,
        batch_size=data.batch_size * config.train.accumulate_steps,
        samples_per_step=data.samples_per_step,
        log_period=config.train.log_period,
        save_period=config.train.save_epochs * data.steps_per_epoch,
        keep_last=config.train.keep_last,
        max_save_failures=config.train.max_save_failures,
        tally=UnreadableTally(len(sets.train), config.data.max_bad_fraction),
        states={"best": best},
    )
    try:
        resumed = loop.resume(resume=resume)
    except OtherArchitectureError as error:
        raise ValueError(
            f"{error}\n{folder.path} holds a run of another task, head, backbone or set of classes: give this run a "
            "folder of its own (train.output_dir)"
        ) from error
    if (before := resumed.get("facts", str(sets.facts))) != str(sets.facts):
        raise ValueError(
            f"{folder.path} holds a run with {before}, and {config.data.train_dataset_path} has {sets.facts}: give "
            "this run a folder of its own (train.output_dir)"
        )
    config = task.config = _settle_value_range(config, sets, resumed)
    if resumed and is_main_process():
        changed = sorted(set(render_config(config).splitlines()) - set(resumed["options"].splitlines()))
        if changed:  # from here on it is another run
            shown = "; ".join(line.strip() for line in changed[:8])
            logger.warning("the run is resumed with other options: %s", shown)
    if best.epoch > 0 and best.chosen_by != metric:
        records = read_metrics(folder.path / "metrics.jsonl")
        evaluations = [record for record in records if "evaluation" in record and "iteration" in record]
        best.look_up(
            ((record["iteration"] + 1) // data.steps_per_epoch, record["evaluation"]) for record in evaluations
        )
    return TaskRun(
        backbone_config=beginning.backbone_config,
        sets=sets,
        data=data,
        learner=learner,
        loop=loop,
        best=best,
        evaluated_after=resumed.get("evaluated_after", -1),
    )


def _settle_value_range(config: TaskConfig, sets: TaskSets, resumed: Mapping[str, Any]) -> TaskConfig:
    """Gives all sets the range of values of the run; returns the options with that range in their dataset strings."""
    named, data = sets.named(), config.data
    stored = resumed.get("value_range", [] if resumed else None)
    found = settle_value_range(
        [(getattr(data, f"{name}_dataset_path"), images) for name, images in named.items()], stored
    )
    return replace(
        config,
        data=replace(
            data,
            train_dataset_path=with_value_range(data.train_dataset_path, found),
            val_dataset_path=with_value_range(data.val_dataset_path, found),
            test_dataset_path=with_value_range(data.test_dataset_path, found),
        ),
    )


def train(run: TaskRun, watch: StallWatch) -> int:
    """All epochs that are left, with an evaluation after each that is due; returns the exit code."""
    loop, config = run.loop, run.task.config
    lr = learning_rates(config, loop.total_steps, run.data.steps_per_epoch)
    extras = {
        "options": render_config(config),
        "facts": str(run.sets.facts),
        "value_range": run.sets.train.value_range.ends if run.sets.train.value_range else [],
    }
    warnings: list[str] = []  # that the next record tells
    interruption = Interruption(announce=is_main_process())
    with closing(run.data.batches(samples_seen=loop.samples_seen)) as batches, interruption, loop.recording():
        if loop.start > 0 and run.evaluation_is_due(loop.start - 1) and run.evaluated_after != loop.start - 1:
            evaluate_epoch(run, loop.start - 1)  # the run was stopped between an epoch and its evaluation
            loop.restart_clock()
        for step in range(loop.start, loop.total_steps):
            if run.best.is_stale:
                logger.info("stopped early: %s", run.best)
                break
            watch.begin(f"step {step}")
            samples = [next(batches) for _ in range(config.train.accumulate_steps)]
            watch.has_data()
            loop.note_data()
            schedules = {"lr": lr[step], "weight_decay": config.optim.weight_decay}
            agreement, grad_norms = run.learner.step(samples, step, **schedules, stop=interruption.requested)
            report = loop.note_step(step, agreement, agreement.losses, schedules=schedules, grad_norms=grad_norms)
            if warning := run.learner.watch.warning(agreement.losses, grad_norms):
                warnings.append(warning)
                if is_main_process():
                    logger.warning("%s", warning)
            if report is not None:
                if warnings:
                    report.record["warnings"] = warnings.copy()
                    warnings.clear()
                loop.log.write(report)
            if not agreement.stop and run.evaluation_is_due(step):
                watch.begin(f"the evaluation after step {step}")
                evaluate_epoch(run, step)
                loop.restart_clock()
            loop.save(step, now=agreement.stop, evaluated_after=run.evaluated_after, **extras)
            if agreement.stop:
                loop.log_stop(f"step {step} of {loop.total_steps}")
                return interruption.exit_code
    watch.pause()
    return 0


def learn(run: TaskRun, watch: StallWatch) -> int:
    """Computes a head that needs no training, in one look at the training set, and evaluates it; returns the exit code.

    An interrupted run starts again.
    """
    task, networks, images = run.task, run.learner.networks, run.sets.train
    model = networks.model.eval()
    package = make_package(model, task, light=images.light, value_range=images.value_range, chain=images.preprocessing)
    options, workers = task.config.evaluation, task.config.data.num_workers
    watch.pause()
    with run.loop.recording():
        task.learn(model, images, lambda shown: show_set(package, shown, options, num_workers=workers))
        evaluate_epoch(run, run.loop.total_steps - 1)
    return 0


def evaluate_epoch(run: TaskRun, step: int) -> None:
    """Evaluates the model on val after a step, keeps it if it is the best so far, and writes metrics and pictures."""
    run.evaluated_after = step
    images = run.sets.train
    package = make_package(
        run.learner.networks.whole(),
        run.task,
        light=images.light,
        value_range=images.value_range,
        chain=images.preprocessing,
    )
    if run.sets.val is None:
        run.keep(step, {}, {})
        return
    evaluation = run.evaluate(package, "val")
    value = evaluation.values.get(run.best.metric, math.nan)
    if math.isnan(value):
        found = ", ".join(evaluation.values) or "none"
        raise ValueError(f"val has no metric {run.best.metric}; there are {found}")
    epoch = run.epoch_of(step)
    logger.info("epoch %d: %s %.4f on val", epoch, run.best.metric, value)
    run.loop.log.write_evaluation(step, evaluation.values, evaluation.warnings)
    if is_main_process():
        for warning in evaluation.warnings:
            logger.warning("epoch %d: %s", epoch, warning)
    if run.best.update(evaluation.values, epoch):
        run.keep(step, evaluation.values, evaluation.metrics.thresholds())
    if is_main_process():
        run.loop.folder.check()
        draw_epoch(run.loop.output_dir, epoch, evaluation)


def complete(run: TaskRun) -> dict[str, EvaluationResults]:
    """Scores ``best.pth`` on val and test, and writes ``OUT/val``, ``OUT/test`` and ``OUT/plots``.

    Every process must call it. Doing it again writes the same. Metrics with intervals over parts come from the task
    where it has them; all others stand under its name.

    Returns:
        Results by set.
    """
    barrier()  # the main process may still be writing it
    folder, task = run.loop.output_dir, run.task
    run.loop.folder.check()
    package = load_task_package(folder / BEST, run.learner.networks.device, task.config.tasks)
    logger.info("best weights: %s", run.best)
    if package.thresholds:
        chosen = ", ".join(
            f"{name} {value:.3g}"
            for name, value in package.thresholds.items()
            if name in task.threshold_names(task.classes)
        )
        logger.info("thresholds chosen on val: %s", chosen)
    origins = find_origins(run.sets.named(), str(folder / BEST))
    results: dict[str, EvaluationResults] = {}
    evaluations: dict[str, Evaluation] = {}
    for name in run.sets.named():
        if name == "train":
            continue
        evaluation = evaluations[name] = run.evaluate(package, name)
        scores = dict(evaluation.metrics.scores())
        if task.name not in scores:
            plain = {key: MetricValue(value=value) for key, value in evaluation.values.items()}
            level = LevelScores(count=origins["datasets"][name]["num_images"], metrics=plain)
            scores = {
                task.name: Scores(
                    image=level, part=replace(level, count=origins["datasets"][name]["num_parts"], metrics={})
                ),
                **scores,
            }
        results[name] = EvaluationResults(
            evaluator=f"finetune {task.name}",
            settings={
                "set": name,
                "metric": run.best.metric,
                "best_epoch": run.best.epoch,
                "config": render_config(task.config),
            },
            classes=task.classes,
            scores=scores,
            extra={
                "figures": evaluation.values,
                "confusion": evaluation.metrics.confusion(),
                **({"warnings": list(evaluation.warnings)} if evaluation.warnings else {}),
            },
            predictions=evaluation.metrics.predictions(),
            **origins,
        )
        if is_main_process():
            run.loop.folder.check()
            results[name].write(folder / name)
            logger.info("%s", headline(name, task, evaluation, scores))
            for warning in evaluation.warnings:
                logger.warning("%s: %s", name, warning)
    if is_main_process():
        draw_end(
            folder,
            read_metrics(folder / "metrics.jsonl"),
            evaluations,
            task,
            steps_per_epoch=run.data.steps_per_epoch,
            best_epoch=run.best.epoch,
        )
        logger.info("next: %s", _next_command(folder, run.sets, compares=task.config.data.reference))
    barrier()
    return results


def _next_command(folder: Path, sets: TaskSets, *, compares: bool) -> str:
    """What draws the predictions of the best weights on images, complete."""
    dataset = sets.test or sets.val or sets.train
    shown = Path(dataset.get_image_path(0))
    images = str(shown.parent) if shown.is_file() else "IMAGES"
    places = ("--weights", f"{folder / BEST}", "--input", images, "--output-dir", f"{folder / 'found'}")
    words = [*door("infer_image", "run/infer/image.py"), *places]
    if compares:
        other = References(dataset).path(0)
        beside = other.parent if (other.parent / shown.name).is_file() and other.parent != shown.parent else other
        words += ["--reference", str(beside)]
    return shlex.join(words)


def dry_run(config: TaskConfig, device: torch.device) -> str:
    """What `fine_tune` would do, in text, see `describe_task_run`; nothing is written. All processes call it.

    Raises:
        OSError, ValueError: something is wrong with options, data, weights or the folder of the run.
    """
    check_run_folder(config.train.output_dir)
    found = begin(config, device)
    return describe_task_run(found.learner, found.data, found.sets, metric=found.metric, missing=found.missing)


@dataclass(frozen=True)
class FinetuneCommand:
    """Options of the command; everything about the run itself is in the config."""

    load_options: ClassVar = staticmethod(load_task_config)
    config_class: ClassVar = task_config_class(TASKS)

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config: Path | None = option(None, help="YAML file with the run's options", aliases=("--config-file",))
    output_dir: str = option("", help="folder of the run; the same as train.output_dir=…")
    resume: bool = option(True, help="go on from the newest checkpoint of the run's folder, if there is one")
    dry_run: bool = option(
        False, help="build everything, try a few steps, say what the run would do and take, and write nothing"
    )
    image_size: tuple[str, ...] = option(
        (), help="one number, or height and width; the same as data.image_size=…", aliases=("--imgsz",)
    )
    overfit: int = option(
        0, help="debugging: learn this many training images by heart, say whether that works, and keep nothing"
    )

    def pairs(self) -> list[str]:
        """Options of the config, with those that have a flag."""
        sizes = [word for word in self.image_size if "=" not in word]
        pairs = [*self.overrides, *(word for word in self.image_size if "=" in word)]  # those that follow the flag
        if sizes:
            pairs.append("data.image_size=" + (sizes[0] if len(sizes) == 1 else f"[{','.join(sizes)}]"))
        return [*pairs, *([f"train.output_dir={self.output_dir}"] if self.output_dir else [])]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    command = parse(
        FinetuneCommand,
        argv,
        description=f"Trains a head for {', '.join(TASKS)} on a pretrained backbone.",
        example="python run/train/finetune.py --config configs/task/demo_parts_depth.yaml",
    )
    if command.overfit < 0:
        raise ValueError(f"--overfit takes a number of images, at least 1; found {command.overfit}")
    config = load_task_config(command.config, command.pairs())
    if command.overfit and command.dry_run:
        raise ValueError("--dry-run and --overfit are two checks: give one of them")
    if not command.overfit and not command.dry_run:
        return finetune(config, resume=command.resume)
    with distributed_session(config.train.device, timeout_minutes=config.train.process_group_timeout_minutes) as device:
        logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
        if command.overfit:
            overfit(config, command.overfit, device)
            return 0
        text = dry_run(config, device)
        if is_main_process():
            words = [
                word for word in (sys.argv[1:] if argv is None else argv) if word not in ("--dry-run", "--dry_run")
            ]
            line = shlex.join([*door("finetune", "run/train/finetune.py"), *words])
            if get_world_size() > 1:  # a launcher stands before it, which is not known here
                line = "the same command without --dry-run"
            sys.stdout.write(f"{text}\n  {'next':<16}{line}\n")
    return 0


if __name__ == "__main__":
    run_as("finetune")
