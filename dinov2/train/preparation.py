"""Everything that a pretraining run consists of beside its model, put together from the options."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinov2.config import Config
from dinov2.data.pretraining import PretrainingDataset
from dinov2.data.unreadable import UnreadableTally
from dinov2.distributed import get_rank, get_world_size
from dinov2.fsdp import FSDPCheckpointer, PeriodicFSDPCheckpointer
from dinov2.fsdp.optimization import Optimization
from dinov2.logging import TrainingProgress
from dinov2.logging.run_log import RunLog
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.train.bad_batches import BadBatches
from dinov2.train.data import build_pretraining_dataset
from dinov2.train.data_identity import data_identity, warn_of_other_data
from dinov2.train.evaluation import evaluation_is_done, evaluation_is_due, open_evaluation_sets
from dinov2.train.optimization import build_grad_scaler, build_optimizer
from dinov2.train.schedules import Schedules, build_schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.target_measures import TargetMeasures
from dinov2.utils.random_state import RandomState
from dinov2.utils.seeds import derive_seed, seed_everything

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class Preparation:
    """What the loop needs.

    Attributes:
        dataset: gives the crops.
        schedules: hyper-parameters by iteration.
        optimization: takes the steps.
        tally: counts images that could not be read.
        progress: measures rates and writes a line per period.
        targets: measures the teacher's targets on every batch.
        checkpoints: saves periodically.
        total_iterations: length of the run.
        global_batch: images per iteration, over all processes.
        start: first iteration to do; above 0 after a resume.
        samples_seen: images that all processes together have trained on before.
        resumed_from: checkpoint of the options that the run began from, empty for none.
        bad_batches: keeps batches that give NaN or infinity, and counts them.
        metrics_bytes: length of the metrics file after the last iteration done; None where it is not known.
        metrics_waiting: lines of it that were not on disk then.
        identity: what decides the order of the data, and is compared on resuming.
        evaluation_is_owed: whether the run was stopped between a checkpoint and the evaluation after it.
    """

    dataset: PretrainingDataset
    schedules: Schedules
    optimization: Optimization
    tally: UnreadableTally
    progress: TrainingProgress
    targets: TargetMeasures
    checkpoints: PeriodicFSDPCheckpointer
    total_iterations: int
    global_batch: int
    start: int
    samples_seen: int
    resumed_from: str
    bad_batches: BadBatches
    metrics_bytes: int | None
    metrics_waiting: list[str]
    identity: dict[str, str]
    evaluation_is_owed: bool

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.start >= self.total_iterations and not self.evaluation_is_owed

    def save_arguments(self, iteration: int, log: RunLog) -> dict[str, Any]:
        """What a checkpoint after ``iteration`` keeps beside tensors."""
        return {
            "samples_seen": self.samples_seen + (iteration + 1 - self.start) * self.global_batch,
            "resumed_from": self.resumed_from,
            "metrics_bytes": log.position,
            "metrics_waiting": log.waiting,
            "identity": self.identity,
        }

    @contextmanager
    def checkpoints_closed_after_error(self) -> Iterator[None]:
        """An error lets the save at work finish; a second Ctrl-C does not."""
        try:
            yield
        except Exception:
            self.checkpoints.close()
            raise


def prepare(config: Config, model: SSLMetaArch, output_dir: Path, device: torch.device, *, resume: bool) -> Preparation:
    """Opens the data, builds the optimiser, and restores the checkpoint to go on from, if there is one.

    Raises:
        FileNotFoundError, ValueError: see `dinov2.train.train.do_train`.
    """
    epoch_length = config.train.OFFICIAL_EPOCH_LENGTH
    total_iterations = config.optim.epochs * epoch_length
    dataset = build_pretraining_dataset(config)
    open_evaluation_sets(config)  # what is wrong with them is wrong now, not after the first period
    optimizer, scaler = build_optimizer(config, model.student, device), build_grad_scaler(config, device)
    tally = UnreadableTally(len(dataset), config.data.max_bad_fraction)
    progress = TrainingProgress(
        total_iterations=total_iterations, epoch_length=epoch_length, log_period=config.train.log_period, device=device
    )
    bad_batches = BadBatches(output_dir, config.train.max_bad_steps, config.train.seed)
    targets = TargetMeasures(model.dino_loss.student_temp)
    seed_everything(derive_seed(config.train.seed, "train", get_rank()))
    checkpointer = FSDPCheckpointer(
        model,
        output_dir,
        optimizer=optimizer,
        max_failures=config.train.max_save_failures,
        scaler=scaler,
        unreadable=tally,
        progress=progress,
        targets=targets,
        bad_batches=bad_batches,
        random=RandomState(),
    )
    resumed = restore(config, checkpointer, resume=resume)
    identity = data_identity(config, dataset.dataset)
    warn_of_other_data(resumed.get("identity", {}), identity)
    start = resumed.get("iteration", -1) + 1
    due = start > 0 and evaluation_is_due(config, start - 1)
    return Preparation(
        dataset=dataset,
        schedules=build_schedules(config, get_world_size()),
        optimization=Optimization(model.student, optimizer, scaler, config.optim.clip_grad),
        tally=tally,
        progress=progress,
        targets=targets,
        checkpoints=PeriodicFSDPCheckpointer(
            checkpointer, config.train.saveckp_freq * epoch_length, total_iterations, config.train.keep_last
        ),
        total_iterations=total_iterations,
        global_batch=config.train.batch_size_per_gpu * get_world_size(),
        start=start,
        samples_seen=resumed.get("samples_seen", 0),
        resumed_from=resumed.get("resumed_from", ""),
        bad_batches=bad_batches,
        metrics_bytes=resumed.get("metrics_bytes"),
        metrics_waiting=resumed.get("metrics_waiting", []),
        identity=identity,
        evaluation_is_owed=due and not evaluation_is_done(config, output_dir, start - 1),
    )


def load_pretrained_student(config: Config, model: SSLMetaArch, *, log: bool) -> bool:
    """Fills the student's backbone from ``student.pretrained_weights``; false where the option names none.

    Args:
        config: options of the run.
        model: holds the student, not sharded yet; may be on the meta device.
        log: whether it is told what became of each parameter.

    Raises:
        FileNotFoundError, ValueError: when the weights are missing, damaged, of another architecture, or match too
            little.
    """
    path = config.student.pretrained_weights
    if not path:
        return False
    if not Path(path).exists():
        raise FileNotFoundError(f"student.pretrained_weights={path} does not exist")
    load_pretrained_backbone(model.student_backbone, path, log=log)
    return True


def restore(config: Config, checkpointer: FSDPCheckpointer, *, resume: bool) -> dict[str, Any]:
    """Loads the checkpoint to go on from, if there is one, and returns what it holds beside tensors.

    A run that began from a checkpoint of the options goes on from its own newest one: the same command, started again
    after an interruption, must not throw away what has been done since.
    """
    named = checkpoint_to_resume(
        config, checkpointer.save_dir, has_checkpoint=checkpointer.has_checkpoint(), resume=resume
    )
    if named and checkpointer.newest().get("resumed_from") == named:
        logger.info("this run began from %s and goes on from its own newest checkpoint", named)
        named = ""
    resumed = checkpointer.resume_or_load(named, resume=resume)
    if named:  # the metrics are those of another folder, or of a later time
        resumed = resumed | {"resumed_from": named, "metrics_bytes": None, "metrics_waiting": []}
    return resumed


def checkpoint_to_resume(config: Config, folder: str | Path, *, has_checkpoint: bool, resume: bool) -> str:
    """The checkpoint that the options name, empty for the newest of the run's own folder.

    Args:
        config: options of the run.
        folder: of the run.
        has_checkpoint: whether it holds anything to resume from.
        resume: false with ``--no-resume``.

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
    if config.train.resume and not named and not has_checkpoint:
        raise FileNotFoundError(f"train.resume=true, but {folder} holds no checkpoint")
    return named.pop() if named else ""
