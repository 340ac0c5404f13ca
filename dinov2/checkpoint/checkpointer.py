"""Saving and resuming a run: one file per process and step, readable by any number of processes.

A step's files are complete before any process names the step in its ``last_checkpoint`` file, and every file appears
under its name only when it is whole, with its SHA-256 beside it. A crash at any instant therefore leaves the step
before usable, and damage is found before anything is loaded.

Files are written beside training, from a copy of what is to be saved and by a thread that talks to no other process:
what all processes must agree on is agreed on in the training thread.
"""

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from fvcore.common.checkpoint import Checkpointer, PeriodicCheckpointer
from torch import Tensor, nn

from dinov2.checkpoint.integrity import (
    CHECKSUMS_SINCE,
    find_steps,
    newest_good_step,
    open_verified,
    parse_rank_file,
    tagged_name,
    tags,
)
from dinov2.checkpoint.sharding import RankFiles, load_model, load_optimizer, local_state, rank_pattern, step_id
from dinov2.distributed import all_gather_objects, get_rank, get_world_size, is_main_process
from dinov2.utils.errors import RunError
from dinov2.utils.files import SUFFIX, remove_with_checksum, write_text_atomically, write_with_checksum

logger = logging.getLogger("dinov2")

FORMAT_VERSION = CHECKSUMS_SINCE
RANDOM_STATE = "random"
MAX_FAILURES = 10
PATIENCE_SECONDS = 60.0


class BackgroundWrite:
    """The write of one rank file, at work from the moment it is made; what it raises is kept in ``error``.

    Args:
        write: does the work.
        path: the file.
        iteration: that was finished, from 0.
        threaded: whether to write beside the caller, or before the constructor returns.
    """

    def __init__(self, write: Callable[[], object], path: Path, iteration: int, *, threaded: bool = True) -> None:
        self.path = path
        self.iteration = iteration
        self.error: BaseException | None = None
        self._write = write
        self._thread: threading.Thread | None = None
        if threaded:
            # A process that must end at once does not wait for it: an unfinished file has no name yet.
            self._thread = threading.Thread(target=self._run, name=f"writes {path.name}", daemon=True)
            self._thread.start()
        else:
            self._run()

    @property
    def done(self) -> bool:
        """Whether the write has ended, well or badly."""
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Waits for the end, and says every minute that it is waiting."""
        while self._thread is not None and not self.done:
            self._thread.join(PATIENCE_SECONDS)
            if not self.done:
                logger.warning("still waiting for %s to be written: the disk is slow, or gone", self.path.name)

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            if self._thread is None and not isinstance(error, Exception):
                raise  # Ctrl-C in the training thread
            self.error = error


def to_host(value: Any) -> Any:
    """Copies tensors, however nested, to the processor, where nothing changes them any more.

    Everything else is copied too. Copies from a GPU go through page-locked memory, all at once, and are finished on
    return.
    """
    devices: set[torch.device] = set()

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensor = value.detach()
            if tensor.device.type == "cpu":
                return tensor.clone()
            if tensor.device.type != "cuda":
                return tensor.cpu()
            devices.add(tensor.device)
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor, non_blocking=True)
        if isinstance(value, Mapping):
            return {key: copied(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(copied(item) for item in value)
        return copy.deepcopy(value)

    result = copied(value)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return result


class FSDPCheckpointer(Checkpointer):  # type: ignore[misc]
    """Checkpointer of a sharded, replicated or plain model with its optimiser.

    Every process writes ``{name}.rank_{rank}.pth`` with its own rows of every tensor, and after all have finished
    ``last_checkpoint.rank_{rank}``. Files hold plain tensors and builtins and are read without running code. What N
    processes wrote, M processes load.

    `save`, `poll`, `wait`, `load`, `resume_or_load` and `newest` must be called by all processes alike: they agree.

    Args:
        model: the model; its parameters may be sharded.
        save_dir: folder of the run.
        optimizer: optimiser of some of the model's parameters.
        asynchronous: whether files are written beside training, from a copy in the processor's memory.
        max_failures: saves in a row that may fail; the last of them stops the run.
        save_to_disk: false where nothing is to be written, as in fvcore; the same in all processes, each of which holds
            rows of its own.
        check_folder: called before anything is written or deleted; an `OSError` counts as one of writing.
        checkpointables: further objects with ``state_dict()`` and ``load_state_dict()``; one named ``random`` holds
            this process's random states and is restored only when the number of processes is the same.

    Attributes:
        keep_last: steps to keep whenever a new one is complete; 0 keeps all.
        failures: saves in a row that have failed.
        pending: the save that has not been agreed on yet, if there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str | Path,
        *,
        optimizer: torch.optim.Optimizer,
        asynchronous: bool = True,
        max_failures: int = MAX_FAILURES,
        save_to_disk: bool = True,
        check_folder: Callable[[], None] = lambda: None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, str(save_dir), save_to_disk=save_to_disk, **checkpointables)
        self.optimizer = optimizer
        self.asynchronous = asynchronous
        self.max_failures = max_failures
        self.check_folder = check_folder
        self.keep_last = 0
        self.failures = 0
        self.pending: BackgroundWrite | None = None

    def save(self, name: str, *, iteration: int, **extras: Any) -> None:
        """Copies a step to the processor's memory and begins to write it; a former save is waited for first.

        When asynchronous, the step counts only after `poll` or `wait` has found that every process has written it.

        Args:
            name: such as ``model_0001249``.
            iteration: the iteration that was finished, from 0.
            extras: further plain values, returned by `load`.

        Raises:
            RunError: when ``max_failures`` saves in a row could not be written. Fewer cost a line in the log each.
            ValueError: when the name does not end in a number, or some processes write to disk and others do not.
        """
        path = Path(self.save_dir) / f"{name}.rank_{get_rank()}.pth"
        if parse_rank_file(path.name) is None:
            raise ValueError(f"a step's name ends in its number, such as model_0001249; this does not: {name}")
        writes = all_gather_objects(self.save_to_disk)
        if not all(writes):
            if any(writes):
                silent = ", ".join(str(rank) for rank, does in enumerate(writes) if not does)
                raise ValueError(
                    f"save_to_disk is False in the processes {silent} and True in others: a step without the rows of "
                    f"every process cannot be loaded; give all the same"
                )
            return
        if self.pending is not None and not self.pending.done:
            logger.warning("training waits: %s is still being written, and the next save is due", self.pending.path)
        self.wait()
        content: dict[str, Any] = to_host(
            {
                "format_version": FORMAT_VERSION,
                "rank": get_rank(),
                "world_size": get_world_size(),
                "iteration": iteration,
                **local_state(self.model, self.optimizer),
                **{key: value.state_dict() for key, value in self.checkpointables.items()},
                **extras,
            }
        )
        content["step_id"] = step_id(content["model"])

        def write() -> None:
            self.check_folder()
            # What this process was writing when it was killed goes first.
            folder, end = Path(self.save_dir), f".rank_{get_rank()}.pth"
            for unfinished in (f".*{end}.*.tmp", f".last_checkpoint.rank_{get_rank()}.*.tmp"):
                for left in folder.glob(unfinished):
                    left.unlink(missing_ok=True)
            for left in folder.glob(f"*{end}{SUFFIX}"):
                if not left.with_name(left.name.removesuffix(SUFFIX)).exists():
                    left.unlink(missing_ok=True)
            write_with_checksum(path, lambda file: torch.save(content, file))

        self.pending = BackgroundWrite(write, path, iteration, threaded=self.asynchronous)
        if not self.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Names the step that was being written as the last one, if every process has finished it; never waits.

        Raises:
            RunError: see `save`.
        """
        if self.pending is not None and all(all_gather_objects(self.pending.done)):
            self._settle()

    def wait(self) -> bool:
        """Waits for the write at work, if there is one, and names its step as the last one.

        Returns:
            Whether the newest save has succeeded; True when nothing was saved yet.

        Raises:
            RunError: see `save`.
        """
        if self.pending is not None:
            self.pending.join()
            self._settle()
        return self.failures == 0

    def close(self) -> None:
        """Waits for this process's write without a word to the others: for the way out after an error.

        The step is not named: after a normal end, call `wait` before.
        """
        if self.pending is not None:
            self.pending.join()
            if self.pending.error is not None:
                logger.error("%s was not saved: %s", self.pending.path, self.pending.error)
            self.pending = None

    def _settle(self) -> None:
        """Agrees on the finished write: names the step and deletes old ones, or takes it back everywhere."""
        saved, self.pending = self.pending, None
        assert saved is not None
        error = saved.error
        is_defect = error is not None and not isinstance(error, OSError)
        reports = all_gather_objects((is_defect, repr(error) if is_defect else str(error or "")))
        if error is not None and is_defect:
            raise error
        errors = [text for _, text in reports]
        if any(defect for defect, _ in reports):
            raise RunError(f"{saved.path.name} was not saved: {_by_rank(errors)}")
        if any(errors):
            if error is None:  # a write that fails cleans up after itself, and leaves an older file of that name alone
                self._remove(saved.path)
            self._note_failure(saved.iteration, errors)
            return
        prefix = saved.path.name.rpartition("_")[0].rpartition("_")[0]  # model of model_0001249.rank_0.pth
        tag_error, steps = "", []
        try:
            self.check_folder()
            write_text_atomically(Path(self.save_dir) / f"last_checkpoint.rank_{get_rank()}", f"{saved.path.name}\n")
            for tag in tags(self.save_dir) if is_main_process() else ():
                if int(tag.name.rpartition("_")[2]) >= get_world_size():  # of a rank that no longer exists
                    tag.unlink()
            steps = self.steps(prefix)
        except OSError as caught:
            tag_error = str(caught)
        named = all_gather_objects((tag_error, steps))
        errors = [text for text, _ in named]
        if any(errors):
            self._note_failure(saved.iteration, errors)
            return
        self.failures = 0
        logger.info("saved %s", saved.path)
        if self.keep_last:
            # Steps after this one belong to a run that was started again from before them.
            found = sorted({step for _, steps in named for step in steps if step <= saved.iteration})
            for step in found[: -self.keep_last]:
                self.forget(step, prefix)

    def _note_failure(self, iteration: int, errors: list[str]) -> None:
        self.failures += 1
        reason = _by_rank(errors)
        try:
            kept = tagged_name(self.save_dir) or "none"
        except OSError:
            kept = "unknown, the folder cannot be read"
        logger.error(
            "SAVING FAILED (%d in a row, the run stops at %d): iteration %d is not saved: %s. Training goes on and "
            "saves again at the next period; newest good checkpoint: %s",
            *(self.failures, self.max_failures, iteration, reason, kept),
        )
        if self.failures >= self.max_failures:
            raise RunError(
                f"{self.failures} saves in a row failed, the last after iteration {iteration}: {reason}. "
                f"The newest good checkpoint: {kept}; make room or mend the folder and start the same command again"
            )

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads a step into the model, the optimiser and everything else that is tracked.

        Args:
            path: a rank file, or the same with ``{rank}`` in place of the number.
            checkpointables: names of the further objects to load; by default all.

        Returns:
            What else the file holds: ``iteration`` and the extras given to `save`.

        Raises:
            FileNotFoundError: when a rank file is missing.
            ValueError: when a file is damaged, or comes from another architecture (the keys are named).
        """
        self.wait()
        return self._load(open_verified(rank_pattern(path)), checkpointables)

    def _load(self, files: RankFiles, checkpointables: list[str] | None = None) -> dict[str, Any]:
        load_model(self.model, files)
        load_optimizer(self.model, self.optimizer, files)
        rank = get_rank()
        own: dict[str, Any] = dict(files.files[rank if rank < files.world_size else 0])
        for key in checkpointables if checkpointables is not None else self.checkpointables:
            state = own.pop(key, None)
            if key == RANDOM_STATE and files.world_size != get_world_size():
                logger.warning(
                    "the checkpoint was written by %d processes and is loaded by %d: random states start anew",
                    files.world_size,
                    get_world_size(),
                )
            elif state:  # an idle gradient scaler saves nothing
                self.checkpointables[key].load_state_dict(state)
        logger.info("resumed from %s (iteration %d)", files.pattern, own["iteration"])
        return {key: value for key, value in own.items() if key not in ("model", "optimizer", "rows", "step_id")}

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Loads the step that ``path`` names, else the newest good one of the own folder if ``resume``, else nothing.

        Raises:
            FileNotFoundError, ValueError: see `load`. `DamagedCheckpointError` when the own folder has finished steps
                and none is good.
        """
        if path:
            return self.load(path)
        self.wait()
        files = newest_good_step(self.save_dir) if resume else None
        return {} if files is None else self._load(files)

    def has_checkpoint(self) -> bool:
        """Whether the folder holds anything to resume from."""
        return bool(tags(self.save_dir)) or bool(find_steps(self.save_dir))

    def get_checkpoint_file(self) -> str:
        """Path, with ``{rank}``, of the newest step that every process finished; empty when there is none."""
        name = tagged_name(self.save_dir)
        return rank_pattern(str(Path(self.save_dir) / name)) if name else ""

    def newest(self) -> dict[str, Any]:
        """Content of the main process's file of the newest good step, tensors unread; empty without any step.

        Raises:
            DamagedCheckpointError: see `resume_or_load`.
        """
        self.wait()
        files = newest_good_step(self.save_dir)
        return {} if files is None else files.files[0]

    def forget(self, step: int, prefix: str) -> None:
        """Deletes this process's file of a step, and those of ranks that no longer exist."""
        for found in find_steps(self.save_dir):
            for rank in found.ranks if found.name == f"{prefix}_{step:07d}" else ():
                if rank == get_rank() or (rank >= get_world_size() and is_main_process()):
                    self._remove(found.path(rank))

    def _remove(self, path: Path) -> None:
        try:
            remove_with_checksum(path)
        except OSError as error:
            logger.warning("%s cannot be deleted: %s", path, error)

    def steps(self, prefix: str) -> list[int]:
        """Steps of which this process has a file, oldest first."""
        found = [step for step in find_steps(self.save_dir) if step.name.rpartition("_")[0] == prefix]
        return [step.number for step in reversed(found) if get_rank() in step.ranks]


def _by_rank(errors: list[str]) -> str:
    """The errors of those processes that have one."""
    found = [(rank, error) for rank, error in enumerate(errors) if error]
    return "; ".join(error if len(errors) == 1 else f"rank {rank}: {error}" for rank, error in found)


class PeriodicFSDPCheckpointer(PeriodicCheckpointer):  # type: ignore[misc]
    """Saves every ``period`` iterations and at the end, and keeps the newest checkpoints only.

    Old steps are deleted when a newer one is complete in all processes. Steps after the one just saved, which a run
    that starts again from an earlier step finds, are left alone. As a context around the loop, it lets the save at work
    finish after an error; a second Ctrl-C does not wait.

    Args:
        checkpointer: writes the files.
        period: iterations between checkpoints.
        max_iter: length of the run; its last iteration is saved too.
        keep_last: steps to keep; 0 keeps all. Those of an earlier start of the same run count.
        max_to_keep: the same under fvcore's name, where None keeps all.
        retry_seconds: pause before the last iteration is saved again, should that fail.
    """

    def __init__(
        self,
        checkpointer: FSDPCheckpointer,
        period: int,
        max_iter: int,
        keep_last: int = 0,
        *,
        max_to_keep: int | None = None,
        retry_seconds: float = 30.0,
    ) -> None:
        keep_last = keep_last or max_to_keep or 0
        super().__init__(checkpointer, period, max_iter, keep_last or None)
        self.retry_seconds = retry_seconds
        checkpointer.keep_last = keep_last

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.checkpointer.close()

    def step(self, iteration: int, **extras: Any) -> None:
        """To be called after every iteration by every process.

        Raises:
            RunError: see `FSDPCheckpointer.save`.
        """
        if (iteration + 1) % self.period == 0 or iteration == self.max_iter - 1:
            self.save_step(iteration, wait=False, **extras)
        else:
            self.checkpointer.poll()

    def save_step(self, iteration: int, *, wait: bool = True, **extras: Any) -> bool:
        """Saves now, whatever the period.

        The last iteration is always waited for, and tried again until it is saved or too many saves in a row failed.

        Returns:
            Whether it is saved; True when it is not waited for.

        Raises:
            RunError: see `FSDPCheckpointer.save`.
        """
        last = iteration == self.max_iter - 1
        name = f"{self.file_prefix}_{iteration:07d}"
        self.checkpointer.save(name, iteration=iteration, **extras)
        if not wait and not last:
            return True
        while not self.checkpointer.wait():
            if not last:
                return False
            logger.error("the last iteration is not saved: trying again in %g s", self.retry_seconds)
            time.sleep(self.retry_seconds)
            self.checkpointer.save(name, iteration=iteration, **extras)
        return True
