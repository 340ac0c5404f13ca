"""Training of a grid of linear classifiers, watched on the validation set, that can stop and go on."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import get_world_size, is_main_process
from dinov2.eval.linear.batches import BatchSource
from dinov2.eval.linear.checkpoint import LinearCheckpoint
from dinov2.eval.linear.classifiers import ClassifierStack
from dinov2.eval.linear.protocol import LinearProtocol
from dinov2.eval.linear.scoring import JudgedSet, best_of
from dinov2.eval.linear.training import LinearTrainer, class_weights
from dinov2.eval.metrics import IntArray
from dinov2.eval.progress import report_progress
from dinov2.logging import MetricsFile

logger = logging.getLogger("dinov2")

METRICS_FILE = "linear_metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What a protocol means for a training set and a number of processes.

    Attributes:
        protocol: the same on every process.
        labels: ``[N]`` of the training set.
        num_classes: that the classifiers know.
        epoch_length: iterations of an epoch.
        global_batch_size: images of a step over all processes.
    """

    protocol: LinearProtocol
    labels: IntArray
    num_classes: int
    epoch_length: int
    global_batch_size: int

    @classmethod
    def plan(cls, protocol: LinearProtocol, dataset: ImageDataset, num_classes: int) -> "TrainingRun":
        """Plans the training on a dataset, and says so in the log."""
        global_batch_size = protocol.batch_size * get_world_size()
        run = cls(
            protocol=protocol,
            labels=dataset.get_targets(),
            num_classes=num_classes,
            epoch_length=protocol.length_of_epoch(len(dataset), global_batch_size),
            global_batch_size=global_batch_size,
        )
        if is_main_process():
            logger.info(
                "%d linear classifiers: %d epochs of %d iterations of %d images (%.4g passes over %d images)",
                len(protocol.grid),
                protocol.epochs,
                run.epoch_length,
                global_batch_size,
                run.num_iterations * global_batch_size / len(dataset),
                len(dataset),
            )
        return run

    @property
    def num_iterations(self) -> int:
        """Steps of the whole training."""
        return self.protocol.epochs * self.epoch_length

    @property
    def eval_period(self) -> int:
        """Steps between two looks at the validation set."""
        return self.protocol.eval_period_iterations or self.epoch_length

    def as_dict(self) -> dict[str, Any]:
        """What decides the classifiers, beside the images and the backbone, as plain values."""
        return {
            "learning_rates": list(self.protocol.learning_rates),
            "n_last_blocks": list(self.protocol.n_last_blocks),
            "epochs": self.protocol.epochs,
            "epoch_length": self.epoch_length,
            "global_batch_size": self.global_batch_size,
            "class_weighting": self.protocol.class_weighting,
            "seed": self.protocol.seed,
        }


def train_classifiers(
    stacks: Sequence[ClassifierStack],
    make_source: Callable[[], BatchSource],
    run: TrainingRun,
    val: JudgedSet,
    *,
    checkpoint: LinearCheckpoint | None = None,
    resume: bool = True,
) -> None:
    """Trains classifiers in place, on all processes of the run together.

    Args:
        stacks: fresh classifiers.
        make_source: gives the source of the batches; not called when there is nothing left to do.
        run: the plan.
        val: looked at during the training for the log alone; nothing is decided by it here.
        checkpoint: written at every look, and beside it ``linear_metrics.jsonl``; by default nothing is written.
        resume: whether to go on from the checkpoint if its file is there.

    Raises:
        ValueError: when the file cannot be resumed from, or every classifier diverges.
    """
    trainer = LinearTrainer(
        stacks,
        num_iterations=run.num_iterations,
        global_batch_size=run.global_batch_size,
        class_weights=class_weights(run.labels, run.num_classes, run.protocol.class_weighting),
    )
    if checkpoint is not None and resume and checkpoint.resume(trainer) and is_main_process():
        logger.info("going on from %s, iteration %d of %d", checkpoint.path, trainer.iteration, run.num_iterations)
    if trainer.iteration == run.num_iterations:
        return
    remaining = run.num_iterations - trainer.iteration
    with ExitStack() as stack:
        metrics = None
        if checkpoint is not None and is_main_process():
            metrics = stack.enter_context(_open_metrics(checkpoint.path.parent, trainer.iteration))
        batches = make_source().batches(trainer.iteration, run.num_iterations)
        for rows, labels in report_progress(
            batches, "linear training", run.global_batch_size, remaining * run.global_batch_size
        ):
            losses = trainer.step(rows, labels)
            if trainer.iteration % run.eval_period == 0 or trainer.iteration == run.num_iterations:
                record = _look(trainer, losses.cpu().numpy(), run, val)
                if metrics is not None:
                    metrics.append(record)
                if checkpoint is not None:
                    checkpoint.save(trainer)


def _look(trainer: LinearTrainer, losses: np.ndarray[Any, Any], run: TrainingRun, val: JudgedSet) -> dict[str, Any]:
    """What there is to say after a step, which the main process puts into the log."""
    metric = run.protocol.val_metric
    best, figure = best_of(trainer.stacks, val, metric)
    finite = losses[np.isfinite(losses)]
    record = {
        "iteration": trainer.iteration,
        "lowest_loss": float(finite.min()) if len(finite) else None,
        "num_diverged": len(losses) - len(finite),
        "best": best,
        metric: figure,
    }
    if is_main_process():
        logger.info(
            "iteration %d of %d: lowest loss %.4f; best %s on the validation set %.4f (%s)",
            trainer.iteration,
            run.num_iterations,
            finite.min() if len(finite) else float("nan"),
            metric.replace("_", " "),
            figure,
            best,
        )
    return record


def _open_metrics(folder: Path, iteration: int) -> MetricsFile:
    """The file of numbers, without what a training that went further than this one wrote."""
    metrics = MetricsFile(folder / METRICS_FILE)
    metrics.truncate_after(iteration if iteration else -1)
    return metrics
