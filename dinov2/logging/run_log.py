"""Folder of a run, and its log of records: metrics files for programs, curves for TensorBoard, lines for people."""

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from dinov2.distributed import barrier, is_main_process
from dinov2.logging.metrics_file import MetricsFile, read_metrics
from dinov2.logging.progress import ProgressReport

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger("dinov2")


def prepare_run_folder(folder: str | Path) -> Path:
    """Makes the folder that ``train.output_dir`` names, on all processes together.

    Raises:
        OSError: when it cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"the run's folder {folder} (train.output_dir) cannot be written: {error}") from error
    barrier()
    return folder


def check_run_folder(folder: str | Path) -> None:
    """Whether `prepare_run_folder` would succeed, as far as that can be told without leaving a trace.

    Raises:
        OSError: when the folder, or the nearest one above it that exists, cannot be written.
    """
    folder = Path(folder)
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        cause = "cannot be written" if existing.is_dir() else "is not a folder"
        raise OSError(f"the run's folder {folder} (train.output_dir) cannot be written: {existing} {cause}")


class RunLog:
    """Writer of a run's records, to ``metrics.jsonl`` and for TensorBoard; only the main process writes.

    While the disk takes nothing, records wait in memory (see `MetricsFile`), and the curves of TensorBoard have a gap.
    Leaving it raises an `OSError` if the disk still takes nothing then, unless there is another error.

    Args:
        output_dir: folder of the run.
        resumed_at: first iteration to come; records of later ones, which a crash left behind, are dropped, and hidden
            in TensorBoard.
        state: `state_dict` when the checkpoint was written; other keys are left aside. Where it is known, all that was
            written since is dropped, but for the evaluation of the last iteration done.
    """

    def __init__(self, output_dir: Path, *, resumed_at: int, state: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.curves = Path(output_dir) / "tensorboard"
        self._purge_step: int | None = resumed_at
        self._tensorboard: SummaryWriter | None = None
        self._metrics: MetricsFile | None = None
        if is_main_process():
            self._metrics = MetricsFile(Path(output_dir) / "metrics.jsonl")
            cut_metrics(self._metrics, resumed_at, state.get("metrics_bytes"), state.get("metrics_waiting") or ())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: length of the metrics file with the lines that wait, and these; the rest is on disk.

        0 and none where this process writes no file.
        """
        position = self._metrics.sync() if self._metrics is not None else 0
        return {
            "metrics_bytes": position,
            "metrics_waiting": self._metrics.waiting if self._metrics is not None else [],
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_tensorboard()
        if self._metrics is not None:
            self._metrics.__exit__(kind, error, trace)

    def write(self, report: ProgressReport | None) -> None:
        """Writes a period's report, if the period is over."""
        if report is not None:
            logger.info("%s", report.line)
            self._append(report.record)

    def write_evaluation(self, iteration: int, metrics: Mapping[str, Any], warnings: Sequence[str] = ()) -> None:
        """Writes the metrics of an evaluation during training, and the warnings that they raised."""
        if metrics:
            more = {"warnings": list(warnings)} if warnings else {}
            self._append({"iteration": iteration, "evaluation": dict(metrics), **more})

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._metrics is None:
            return
        self._metrics.append(record)
        if self._metrics.waiting:  # TensorBoard would begin one event file after the other in vain
            return
        try:
            if self._tensorboard is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run wants it

                self._tensorboard = SummaryWriter(str(self.curves), purge_step=self._purge_step)
                self._purge_step = None
            for name, value in _flatten(record):
                self._tensorboard.add_scalar(name, value, record["iteration"])
        except OSError as error:
            logger.error("%s cannot be written, its curves will have a gap: %s", self.curves, error)
            self._close_tensorboard()

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):  # what is buffered is written as far as the disk takes it
                self._tensorboard.close()
            self._tensorboard = None


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record but the iteration, nested names joined by ``/``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "iteration":
            yield prefix + name, float(value)


def cut_metrics(metrics: MetricsFile, resumed_at: int, metrics_bytes: int | None, waiting: Sequence[str] = ()) -> None:
    """Takes the file back to what it was when the checkpoint was written, and the evaluation after it."""
    last = resumed_at - 1
    if metrics_bytes is not None and resumed_at > 0:
        on_disk = metrics_bytes - sum(len(line.encode()) for line in waiting)
        later = [record for record in read_metrics(metrics.path, start=on_disk) if "evaluation" in record]
        evaluation = [record for record in later if record.get("iteration") == last][:1]
        try:
            metrics.truncate_to(on_disk)
        except ValueError as error:
            logger.warning(
                "%s: it was changed since the checkpoint; records after iteration %d are dropped", error, last
            )
        else:
            for record in [*map(json.loads, waiting), *evaluation]:
                metrics.append(record)
            return
    # What was measured before the first iteration is recorded under -1, and a new start measures it anew.
    metrics.truncate_after(last if resumed_at > 0 else -2)
