"""What surrounds the steps of a run: where it goes on, its progress and records, and its checkpoints."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.checkpoint.checkpointer import FSDPCheckpointer, PeriodicFSDPCheckpointer
from dinov2.data.pretraining import UnreadableTally
from dinov2.distributed import StallWatch
from dinov2.logging import TrainingProgress
from dinov2.logging.progress import ProgressReport, Scalar
from dinov2.logging.run_log import RunLog
from dinov2.loop.optimization import Agreement, Optimization
from dinov2.utils.errors import RunError, StartAgainError
from dinov2.utils.files import HeldFolder
from dinov2.utils.seeds import RandomState

logger = logging.getLogger("dinov2")


@contextmanager
def watched(timeout_minutes: float) -> Iterator[StallWatch]:
    """While entered, a run on several processes is watched, and an error that one of the others caused names it.

    Args:
        timeout_minutes: of the collectives.

    Raises:
        StartAgainError: another process is lost or hangs; the same command goes on.
        RunError: another process has ended with an error of its own.
    """
    with StallWatch(timeout_minutes) as watch:
        try:
            yield watch
        except RuntimeError as error:
            finding = None if isinstance(error, RunError) else watch.explain(error)
            if finding is None:
                raise
            kind = StartAgainError if finding.start_again else RunError
            lost = "what was done since the last checkpoint is lost"
            raise kind(f"a process is lost or hangs: {finding.text}; {lost} ({error})") from error


class TrainingLoop:
    """The part of a training loop that does not know what is trained; pretraining and fine-tuning use it alike.

    Resuming is exact: what has happened in a log period, images that could not be read, and random states are part of
    every checkpoint. All processes must call all methods::

        loop = TrainingLoop(folder, networks, optimization, ..., states={"best": best})
        resumed = loop.resume(resume=resume)
        with closing(open_batches(loop.samples_seen)) as batches, loop.recording():
            for step in range(loop.start, loop.total_steps):
                batch = next(batches)
                loop.note_data()
                losses, grad_norms = ...  # the step itself, see Optimization
                report = loop.note_step(step, agreement, values, schedules=rates, grad_norms=grad_norms)
                if report is not None:
                    loop.log.write(report)
                loop.save(step, now=agreement.stop, **extras)
                if agreement.stop:
                    return interruption.exit_code

    Args:
        folder: of the run, held open.
        model: what checkpoints hold; its parameters may be sharded.
        optimization: of some of its sub-networks.
        device: where this process computes.
        total_steps: length of the run.
        epoch_length: steps that count as one epoch.
        batch_size: images of this process in one step.
        samples_per_step: images of all processes in one step.
        log_period: steps between two reports.
        save_period: steps between two checkpoints.
        keep_last: checkpoints to keep; 0 keeps all.
        max_save_failures: saves in a row that may fail; the last of them stops the run.
        tally: counts images that could not be read.
        states: further parts of a checkpoint, by name, with ``state_dict`` and ``load_state_dict``.

    Attributes:
        start: first step to do; above 0 after a resume.
        samples_seen: images that all processes together had trained on at the start.
        log: writer of the run's records; within `recording`.
    """

    log: RunLog

    def __init__(
        self,
        folder: HeldFolder,
        model: nn.Module,
        optimization: Optimization,
        *,
        device: torch.device,
        total_steps: int,
        epoch_length: int,
        batch_size: int,
        samples_per_step: int,
        log_period: int,
        save_period: int,
        keep_last: int,
        max_save_failures: int,
        tally: UnreadableTally,
        states: Mapping[str, Any],
    ) -> None:
        self.folder = folder
        self.output_dir = folder.path
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.samples_per_step = samples_per_step
        self.tally = tally
        self.progress = TrainingProgress(
            total_iterations=total_steps, epoch_length=epoch_length, log_period=log_period, device=device
        )
        self.checkpointer = FSDPCheckpointer(
            model,
            folder.path,
            optimizer=optimization.optimizer,
            check_folder=folder.check,
            max_failures=max_save_failures,
            scaler=optimization.scaler,
            unreadable=tally,
            progress=self.progress,
            random=RandomState(),
            **states,
        )
        self.checkpoints = PeriodicFSDPCheckpointer(self.checkpointer, save_period, total_steps, keep_last)
        self.start = 0
        self.samples_seen = 0
        self._log_state: Mapping[str, Any] = {}
        self._finished = self._has_data = time.monotonic()

    def resume(self, path: str = "", *, resume: bool = True) -> dict[str, Any]:
        """Restores a checkpoint, if there is one, and returns what it holds beside tensors.

        Args:
            path: a step of another folder or of an earlier time, whose records this run does not go on with; by
                default the newest good one of the run's own folder.
            resume: whether the own folder is looked at.

        Raises:
            FileNotFoundError, ValueError: see `FSDPCheckpointer.resume_or_load`.
        """
        resumed = self.checkpointer.resume_or_load(path, resume=resume)
        self.start = resumed.get("iteration", -1) + 1
        self.samples_seen = resumed.get("samples_seen", 0)
        self._log_state = {} if path else resumed
        return resumed

    @contextmanager
    def recording(self, *, repeats_evaluation: bool = False) -> Iterator[None]:
        """The time of training: opens the records, and closes them at the end.

        An error lets the save at work finish; a second Ctrl-C does not.

        Args:
            repeats_evaluation: whether the evaluation of the last step done is made again, though it has a record.
        """
        self.folder.check()
        log = RunLog(
            self.output_dir,
            resumed_at=self.start,
            state=self._log_state,
            repeats_evaluation=repeats_evaluation,
            check_folder=self.folder.check,
        )
        with self.checkpoints, log as self.log:
            self.restart_clock()
            yield

    def restart_clock(self) -> None:
        """Time until now, of an evaluation say, is none of the next step."""
        self._finished = time.monotonic()

    def note_data(self) -> None:
        """The batch is there: what passed since the last step was waiting for it."""
        self._has_data = time.monotonic()

    def note_step(
        self,
        step: int,
        agreement: Agreement,
        values: Mapping[str, Scalar],
        *,
        schedules: Mapping[str, float],
        grad_norms: Mapping[str, Tensor],
    ) -> ProgressReport | None:
        """Takes note of a finished step.

        Args:
            step: its number, from 0.
            agreement: of all processes.
            values: losses and whatever else the report averages; none of a step that was left out.
            schedules: hyper-parameters of the step.
            grad_norms: norms before clipping, by sub-network.

        Returns:
            A report for ``log.write`` at the end of a log period and after the last step, else None.
        """
        self.tally.add(agreement.unreadable)
        began, self._finished = self._finished, time.monotonic()
        return self.progress.update(
            step,
            batch_size=self.batch_size,
            data_seconds=self._has_data - began,
            iteration_seconds=self._finished - began,
            losses=values,
            schedules=schedules,
            grad_norms=grad_norms,
        )

    def log_stop(self, after: str, again: str = "the same command") -> None:
        """Says where a run goes on that was asked to stop, and has tried to save the step.

        Args:
            after: what was done last.
            again: command that goes on.

        Raises:
            LostFolderError: where nothing could be saved, nothing goes on.
        """
        self.folder.check()
        if self.checkpointer.failures:
            logger.error("what was done since the newest checkpoint is not saved, and will be done again")
        where = "the newest checkpoint" if self.checkpointer.failures else "there"
        logger.info("stopped after %s; %s goes on from %s", after, again, where)

    def save(self, step: int, *, now: bool = False, **extras: Any) -> None:
        """To be called after every step: saves when a period is over, when asked to, and before the run fails.

        Args:
            step: just done.
            now: whether it is saved whatever the period, and waited for.
            extras: further plain values that `resume` gives back.

        Raises:
            TooManyUnreadableImages: after the step is saved.
            RunError: see `FSDPCheckpointer.save`.
        """
        save = self.checkpoints.save_step if now or self.tally.exceeded else self.checkpoints.step
        save(
            step,
            samples_seen=self.samples_seen + (step + 1 - self.start) * self.samples_per_step,
            **self.log.state_dict(),
            **extras,
        )
        self.tally.check()
