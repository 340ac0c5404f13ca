"""Everything that a supervised run consists of, put together from the options."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dinov2.checkpoint.checkpointer import FSDPCheckpointer, PeriodicFSDPCheckpointer
from dinov2.config import Config, options_without_effect, render_config
from dinov2.data.pretraining import UnreadableTally
from dinov2.distributed import barrier, get_rank, is_main_process
from dinov2.eval.metrics.classification import LevelScores, MetricValue, Scores
from dinov2.eval.results import EvaluationResults, find_origins
from dinov2.logging import TrainingProgress
from dinov2.logging.metrics_file import read_metrics
from dinov2.logging.run_log import RunLog
from dinov2.loop.optimization import Optimization
from dinov2.tasks.classification import ClassificationTask
from dinov2.tasks.depth import DepthTask
from dinov2.tasks.evaluation import JudgingOptions, Verdict, check_metric, judge_set
from dinov2.tasks.learner import BestSoFar, Learner, TaskSchedule, build_task_optimizer
from dinov2.tasks.networks import TaskNetworks
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.package import TaskPackage, load_backbone_config, load_task_package, make_package, save_task_package
from dinov2.tasks.plots import draw_end
from dinov2.tasks.segmentation import SegmentationTask
from dinov2.tasks.task import Task
from dinov2.tasks.training_data import EndlessBatches, TaskSets, TrainingData, open_task_sets
from dinov2.utils.seeds import RandomState, derive_seed, seed_everything

logger = logging.getLogger("dinov2")

BEST = "best.pth"
TASKS: dict[str, type[ClassificationTask] | type[SegmentationTask] | type[DepthTask]] = {
    task.name: task for task in (ClassificationTask, SegmentationTask, DepthTask)
}


@dataclass(kw_only=True)
class TaskRun:
    """What the loop needs.

    Attributes:
        config: options of the run.
        backbone_config: describes the backbone.
        output_dir: folder of the run.
        sets: training, val and test.
        learner: takes the steps: task, networks, optimiser.
        batches: endless, this process's own.
        schedule: learning rate by step.
        tally: counts images that could not be read.
        progress: measures rates and writes a line per period.
        checkpoints: saves periodically.
        best: which weights are the best so far.
        batch_size: photos (parts) of this process in one step.
        samples_per_step: photos (parts) of all processes in one step.
        samples_seen: those that all processes had learnt from at the start.
        steps_per_epoch: steps that count as one epoch.
        total_steps: length of the run.
        start: first step to do; above 0 after a resume.
        log_state: of the `RunLog` after the last step done.
        evaluated_after: step after which val was judged last; -1 for never.
    """

    config: TaskConfig
    backbone_config: Config
    output_dir: Path
    sets: TaskSets
    learner: Learner
    batches: EndlessBatches
    schedule: TaskSchedule
    tally: UnreadableTally
    progress: TrainingProgress
    checkpoints: PeriodicFSDPCheckpointer
    best: BestSoFar
    batch_size: int
    samples_per_step: int
    samples_seen: int
    steps_per_epoch: int
    total_steps: int
    start: int
    log_state: Mapping[str, Any]
    evaluated_after: int

    @property
    def metric(self) -> str:
        """Metric that chooses the best weights."""
        return self.best.metric

    @property
    def judging(self) -> JudgingOptions:
        """How val and test are run through the model."""
        evaluation = self.config.evaluation
        return JudgingOptions(
            batch_size=evaluation.batch_size,
            flips=evaluation.flips,
            scales=evaluation.scales,
            num_workers=self.config.data.num_workers,
            num_pictures=evaluation.num_pictures,
        )

    @property
    def evaluation_is_owed(self) -> bool:
        """Whether the run was stopped between the last step of an epoch and its evaluation."""
        return self.start > 0 and self.evaluation_is_due(self.start - 1) and self.evaluated_after != self.start - 1

    def epoch_of(self, step: int) -> int:
        """Epochs that are complete after a step."""
        return (step + 1) // self.steps_per_epoch

    def evaluation_is_due(self, step: int) -> bool:
        """Whether val is judged after a step."""
        ends_epoch = (step + 1) % self.steps_per_epoch == 0
        every = self.config.evaluation.every_epochs
        return ends_epoch and (self.epoch_of(step) % every == 0 or step == self.total_steps - 1)

    def package(self) -> TaskPackage:
        """The model as it is now, whole in every process; every process must call it."""
        facts = self.sets.facts
        return make_package(
            self.learner.networks.whole(),
            self.config,
            classes=facts.classes,
            depth_unit=self.learner.task.unit,
            light=self.sets.train.light,
        )

    def keep(self, step: int, figures: dict[str, float]) -> None:
        """Writes the model of the last `package` as the best so far."""
        if is_main_process():
            facts = self.sets.facts
            save_task_package(
                self.output_dir / BEST,
                self.learner.networks.shipped_state(),
                self.config,
                self.backbone_config,
                classes=facts.classes,
                depth_unit=self.learner.task.unit,
                light=self.sets.train.light,
                figures={"epoch": self.epoch_of(step), **figures},
            )

    def save_arguments(self, step: int, log: RunLog) -> dict[str, Any]:
        """What a checkpoint after ``step`` keeps beside tensors."""
        return {
            "samples_seen": self.samples_seen + (step + 1 - self.start) * self.samples_per_step,
            **log.state_dict(),
            "evaluated_after": self.evaluated_after,
            "options": render_config(self.config),
        }


def prepare_run(config: TaskConfig, output_dir: Path, device: torch.device, *, resume: bool) -> TaskRun:
    """Opens the data, builds networks and optimiser, and restores the checkpoint to go on from, if there is one.

    Raises:
        FileNotFoundError, ValueError: see `dinov2.tasks.engine.fine_tune`.
    """
    seed_everything(config.train.seed)
    backbone_config = load_backbone_config(config)
    sets = open_task_sets(config)
    if is_main_process():
        for sentence in options_without_effect(config):
            logger.warning("%s", sentence)
    data = TrainingData(config, sets.train, sets.facts)
    networks = TaskNetworks(config, backbone_config, num_outputs=sets.facts.num_outputs, device=device)
    task = build_task(config, data, sets, device)
    metric = task.metric if config.evaluation.metric == "auto" else config.evaluation.metric
    if sets.val is not None:
        check_metric(task, sets.val, metric)
    higher_is_better = task.higher_is_better if metric == task.metric else not _is_error(metric)
    total_steps = config.optim.epochs * data.steps_per_epoch
    optimizer = build_task_optimizer(config, networks.trained, device)
    scaler = torch.amp.GradScaler(device.type, enabled=networks.dtype == torch.float16)
    tally = UnreadableTally(len(sets.train), config.data.max_bad_fraction)
    progress = TrainingProgress(
        total_iterations=total_steps,
        epoch_length=data.steps_per_epoch,
        log_period=config.train.log_period,
        device=device,
    )
    best = BestSoFar(metric, higher_is_better=higher_is_better, patience=config.train.early_stopping_epochs)
    seed_everything(derive_seed(config.train.seed, "fine-tune", get_rank()))
    checkpointer = FSDPCheckpointer(
        networks,
        output_dir,
        optimizer=optimizer,
        max_failures=config.train.max_save_failures,
        scaler=scaler,
        unreadable=tally,
        progress=progress,
        best=best,
        random=RandomState(),
    )
    resumed = checkpointer.resume_or_load("", resume=resume)
    if resumed:
        warn_of_other_options(resumed["options"], render_config(config))
    samples_seen = resumed.get("samples_seen", 0)
    return TaskRun(
        config=config,
        backbone_config=backbone_config,
        output_dir=output_dir,
        sets=sets,
        learner=Learner(
            task=task,
            networks=networks,
            optimization=Optimization(networks.trained, optimizer, scaler, config.optim.clip_grad),
            image_names=data.names,
        ),
        batches=data.batches(samples_seen=samples_seen),
        schedule=TaskSchedule(config, total_steps, data.steps_per_epoch),
        tally=tally,
        progress=progress,
        checkpoints=PeriodicFSDPCheckpointer(
            checkpointer, config.train.save_epochs * data.steps_per_epoch, total_steps, config.train.keep_last
        ),
        best=best,
        batch_size=data.batch_size * config.train.accumulate_steps,
        samples_per_step=data.samples_per_step,
        samples_seen=samples_seen,
        steps_per_epoch=data.steps_per_epoch,
        total_steps=total_steps,
        start=resumed.get("iteration", -1) + 1,
        log_state=resumed,
        evaluated_after=resumed.get("evaluated_after", -1),
    )


def build_task(config: TaskConfig, data: TrainingData, sets: TaskSets, device: torch.device) -> Task:
    """The task that the options name, its loss weighted by the classes of the training set."""
    task = TASKS[config.task](config, sets.facts, data.class_weights(sets.facts))
    task.criterion.to(device)
    return task


def warn_of_other_options(before: str, now: str) -> None:
    """Says which options are others than when the run was interrupted: it then is another run from here on."""
    changed = sorted(set(now.splitlines()) - set(before.splitlines()))
    if changed and is_main_process():
        logger.warning("the run is resumed with other options: %s", "; ".join(line.strip() for line in changed[:8]))


def _is_error(metric: str) -> bool:
    """Whether less of a figure is better."""
    name = metric.rpartition("/")[2]
    return name in ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog") or "escape_rate" in name


def complete(run: TaskRun) -> dict[str, EvaluationResults]:
    """Scores ``best.pth`` on val and test, and writes ``OUT/val``, ``OUT/test`` and ``OUT/plots``.

    Every process must call it. Doing it again writes the same.

    Returns:
        Results by set.
    """
    barrier()  # the main process may still be writing it
    package = load_task_package(run.output_dir / BEST, run.learner.networks.device)
    logger.info("best weights: %s", run.best.describe())
    origins = find_origins(run.sets.named(), str(run.output_dir / BEST))
    results = {}
    verdicts: dict[str, Verdict] = {}
    for name, dataset in (("val", run.sets.val), ("test", run.sets.test)):
        if dataset is None:
            continue
        verdict = judge_set(run.learner.task, package, dataset, run.judging)
        verdicts[name] = verdict
        results[name] = make_results(run, name, verdict, origins)
        if is_main_process():
            results[name].write(run.output_dir / name)
            logger.info("%s\n%s", name, results[name].table())
    if is_main_process():
        draw_end(
            run.output_dir,
            read_metrics(run.output_dir / "metrics.jsonl"),
            verdicts,
            package,
            steps_per_epoch=run.steps_per_epoch,
            best_epoch=run.best.epoch,
        )
    barrier()
    return results


def make_results(run: TaskRun, name: str, verdict: Verdict, origins: dict[str, Any]) -> EvaluationResults:
    """Results of a set in the form that all evaluators share.

    Figures with intervals over parts come from the judge where it has them; all others stand under ``figures``.
    """
    scores = dict(verdict.judge.scores())
    plain = {key: MetricValue(value=value) for key, value in verdict.figures.items()}
    count = origins["datasets"][name]["num_images"]
    level = LevelScores(count=count, metrics=plain)
    if not scores or run.learner.task.name == "segmentation":
        scores = {run.learner.task.name: Scores(image=level, part=replace(level, metrics={})), **scores}
    return EvaluationResults(
        evaluator=f"finetune {run.learner.task.name}",
        settings={"set": name, "metric": run.metric, "best_epoch": run.best.epoch, "config": render_config(run.config)},
        classes=run.sets.facts.classes,
        scores=scores,
        extra={"figures": verdict.figures, "confusion": verdict.judge.confusion()},
        predictions=verdict.judge.predictions(),
        **origins,
    )
