"""Everything that a supervised run consists of, put together from the options."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinov2.config import Config, TaskConfig, render_config
from dinov2.data.unreadable import UnreadableTally
from dinov2.distributed import get_rank, is_main_process
from dinov2.fsdp import FSDPCheckpointer, PeriodicFSDPCheckpointer
from dinov2.fsdp.optimization import Optimization
from dinov2.logging import TrainingProgress
from dinov2.logging.run_log import RunLog
from dinov2.tasks.best import BestSoFar
from dinov2.tasks.classification import ClassificationTask
from dinov2.tasks.depth import DepthTask
from dinov2.tasks.idle_options import warn_of_idle_options
from dinov2.tasks.judging import JudgingOptions, check_metric
from dinov2.tasks.learner import Learner
from dinov2.tasks.model import load_backbone_config
from dinov2.tasks.networks import TaskNetworks
from dinov2.tasks.package import TaskPackage, make_package, save_task_package
from dinov2.tasks.schedule import TaskSchedule, build_task_optimizer
from dinov2.tasks.segmentation import SegmentationTask
from dinov2.tasks.sets import TaskSets, open_task_sets
from dinov2.tasks.task import Task
from dinov2.tasks.training_data import EndlessBatches, TrainingData
from dinov2.utils.random_state import RandomState
from dinov2.utils.seeds import derive_seed, seed_everything

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
        metrics_bytes: length of the metrics file after the last step done; None where it is not known.
        metrics_waiting: lines of it that were not on disk then.
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
    metrics_bytes: int | None
    metrics_waiting: list[str]
    evaluated_after: int

    @property
    def metric(self) -> str:
        """Figure that chooses the best weights."""
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
            "metrics_bytes": log.position,
            "metrics_waiting": log.waiting,
            "evaluated_after": self.evaluated_after,
            "options": render_config(self.config),
        }

    @contextmanager
    def checkpoints_closed_after_error(self) -> Iterator[None]:
        """An error lets the save at work finish; a second Ctrl-C does not."""
        try:
            yield
        except Exception:
            self.checkpoints.close()
            raise


def prepare_run(config: TaskConfig, output_dir: Path, device: torch.device, *, resume: bool) -> TaskRun:
    """Opens the data, builds networks and optimiser, and restores the checkpoint to go on from, if there is one.

    Raises:
        FileNotFoundError, ValueError: see `dinov2.tasks.fine_tune.fine_tune`.
    """
    seed_everything(config.train.seed)
    backbone_config = load_backbone_config(config)
    sets = open_task_sets(config)
    if is_main_process():
        warn_of_idle_options(config)
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
        metrics_bytes=resumed.get("metrics_bytes"),
        metrics_waiting=resumed.get("metrics_waiting", []),
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
