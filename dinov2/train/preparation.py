"""Everything that a pretraining run consists of beside its model, put together from the options."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinov2.config import Config
from dinov2.data.pretraining import PretrainingDataset
from dinov2.data.unreadable import UnreadableTally
from dinov2.distributed import get_rank, get_world_size
from dinov2.fsdp import FSDPCheckpointer, PeriodicFSDPCheckpointer
from dinov2.logging import TrainingProgress
from dinov2.train.data import build_pretraining_dataset
from dinov2.train.evaluation import evaluation_is_done, evaluation_is_due, open_evaluation_sets
from dinov2.train.optimization import Optimization, build_grad_scaler, build_optimizer
from dinov2.train.schedules import Schedules, build_schedules
from dinov2.train.ssl_meta_arch import SSLMetaArch
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
        checkpoints: saves periodically.
        total_iterations: length of the run.
        global_batch: images per iteration, over all processes.
        start: first iteration to do; above 0 after a resume.
        samples_seen: images that all processes together have trained on before.
        resumed_from: checkpoint of the options that the run began from, empty for none.
        evaluation_is_owed: whether the run was stopped between a checkpoint and the evaluation after it.
    """

    dataset: PretrainingDataset
    schedules: Schedules
    optimization: Optimization
    tally: UnreadableTally
    progress: TrainingProgress
    checkpoints: PeriodicFSDPCheckpointer
    total_iterations: int
    global_batch: int
    start: int
    samples_seen: int
    resumed_from: str
    evaluation_is_owed: bool

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.start >= self.total_iterations and not self.evaluation_is_owed

    def save_arguments(self, iteration: int) -> dict[str, Any]:
        """What a checkpoint after ``iteration`` keeps beside tensors."""
        samples_seen = self.samples_seen + (iteration + 1 - self.start) * self.global_batch
        return {"samples_seen": samples_seen, "resumed_from": self.resumed_from}


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
    seed_everything(derive_seed(config.train.seed, "train", get_rank()))
    checkpointer = FSDPCheckpointer(
        model, output_dir, optimizer=optimizer, scaler=scaler, unreadable=tally, progress=progress, random=RandomState()
    )
    resumed = restore(config, checkpointer, resume=resume)
    start = resumed.get("iteration", -1) + 1
    due = start > 0 and evaluation_is_due(config, start - 1)
    return Preparation(
        dataset=dataset,
        schedules=build_schedules(config, get_world_size()),
        optimization=Optimization(model.student, optimizer, scaler, config.optim.clip_grad),
        tally=tally,
        progress=progress,
        checkpoints=PeriodicFSDPCheckpointer(
            checkpointer, config.train.saveckp_freq * epoch_length, total_iterations, config.train.keep_last
        ),
        total_iterations=total_iterations,
        global_batch=config.train.batch_size_per_gpu * get_world_size(),
        start=start,
        samples_seen=resumed.get("samples_seen", 0),
        resumed_from=resumed.get("resumed_from", ""),
        evaluation_is_owed=due and not evaluation_is_done(config, output_dir, start - 1),
    )


def restore(config: Config, checkpointer: FSDPCheckpointer, *, resume: bool) -> dict[str, Any]:
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
