"""Batches whose loss or gradient is not finite: kept for replay, skipped, and counted."""

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.data.collate import PretrainingBatch
from dinov2.distributed import get_rank, get_world_size, is_main_process
from dinov2.loop.optimization import NonFiniteLossError
from dinov2.utils.files import HeldFolder, shown_fault, write_with_checksum

logger = logging.getLogger("dinov2")

FOLDER = "bad_batches"
MAX_FILES = 20  # per process


class BadBatches:
    """Decides whether a run goes on after a batch that gave NaN or infinity, and writes the batch down.

    All processes call it alike and decide alike. The counts are part of a checkpoint, so that a resumed run stops where
    the undisturbed one does.

    Args:
        output_dir: folder of the run, held open; batches go to ``bad_batches/`` in it.
        max_in_a_row: batches in a row that are skipped; one more ends the run.
        seed: the run's seed, kept with the batch.

    Attributes:
        in_a_row: skipped since the last step; whoever takes a step sets it to 0.
        total: skipped since the run began.
    """

    def __init__(self, output_dir: HeldFolder, max_in_a_row: int, seed: int) -> None:
        self.folder = output_dir.path / FOLDER
        self._check_folder = output_dir.check
        self.max_in_a_row = max_in_a_row
        self.seed = seed
        self.in_a_row = 0
        self.total = 0
        self._before: dict[str, Tensor] = {}

    def begin_step(self) -> None:
        """Remembers torch's random states, which a replay starts from."""
        self._before = {"torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            self._before["cuda"] = torch.cuda.get_rng_state()

    def skip(self, error: NonFiniteLossError, batch: PretrainingBatch, iteration: int, teacher_temp: float) -> None:
        """Writes the batch of the processes to blame, and returns when the run may go on without it.

        Args:
            error: of `Optimization.check_finite`; nothing has been changed then.
            batch: of this process.
            iteration: that is left out.
            teacher_temp: of the iteration.

        Raises:
            NonFiniteLossError: ``error``, when too many batches in a row were bad.
        """
        self.in_a_row += 1
        self.total += 1
        if error.to_blame:
            self._dump(error, batch, iteration, teacher_temp)
        if self.in_a_row > self.max_in_a_row:
            raise error
        if is_main_process():
            logger.error(
                "BATCH SKIPPED (%d in a row; after %d the next one stops the run; %d in all): %s",
                *(self.in_a_row, self.max_in_a_row, self.total, error),
            )

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Takes over the counts of a checkpoint."""
        self.in_a_row, self.total = state["in_a_row"], state["total"]

    def _dump(self, error: NonFiniteLossError, batch: PretrainingBatch, iteration: int, teacher_temp: float) -> None:
        path = self.folder / f"iteration_{iteration:07d}.rank_{get_rank()}.pth"
        values = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in vars(batch).items()}
        content = {
            "format_version": 1,
            "iteration": iteration,
            "rank": get_rank(),
            "world_size": get_world_size(),
            "seed": self.seed,
            "teacher_temp": teacher_temp,
            "message": str(error),
            "losses": error.losses,
            "grad_norms": error.grad_norms,
            "random": self._before,
            "batch": values | {"names": list(batch.names), "unreadable": list(batch.unreadable)},
        }
        try:
            self._check_folder()
            self.folder.mkdir(exist_ok=True)
            there = sum(1 for other in self.folder.glob(f"*.rank_{get_rank()}.pth") if other != path)
            if there >= MAX_FILES:
                logger.warning("%s is not written: %s holds %d batches already", path.name, self.folder, there)
                return
            write_with_checksum(path, lambda file: torch.save(content, file))
            logger.error("the batch is in %s: python tools/replay_batch.py %s", path, self.folder.parent)
        except OSError as failure:
            logger.error("the bad batch of iteration %d could not be written: %s", iteration, failure)


def load_bad_batch(path: Path) -> tuple[PretrainingBatch, dict[str, Any]]:
    """Reads a file of ``bad_batches/``, without running code.

    Returns:
        The batch, and everything else that the file holds.

    Raises:
        ValueError: the file is damaged or something else.
    """
    if fault := shown_fault(path):
        raise ValueError(f"{path} {fault}")
    try:
        content: dict[str, Any] = torch.load(path, weights_only=True)
        batch = content.pop("batch")
        names, unreadable = tuple(batch.pop("names")), tuple(batch.pop("unreadable"))
        return PretrainingBatch(**batch, names=names, unreadable=unreadable), content
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or holds no batch: {error}") from error
