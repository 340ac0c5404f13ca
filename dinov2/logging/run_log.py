"""What a run writes about itself: lines for people, records for programs."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from dinov2.distributed import is_main_process
from dinov2.logging.metrics_file import MetricsFile, read_metrics
from dinov2.logging.progress import ProgressReport
from dinov2.logging.tensorboard import TensorBoardWriter

logger = logging.getLogger("dinov2")


class RunLog:
    """Writer of the run's records; only the main process writes.

    While the disk takes nothing, records wait in memory (see `MetricsFile`). Leaving it raises an `OSError` if the disk
    still takes nothing then, unless there is another error.

    Args:
        output_dir: folder of the run.
        resumed_at: first iteration to come; records of later ones, which a crash left behind, are dropped.
        metrics_bytes: length of the metrics file when the checkpoint was written, as far as it is known: what comes
            after it is dropped, but for the evaluation of the last iteration done.
        waiting: `waiting` when the checkpoint was written.
    """

    def __init__(
        self, output_dir: Path, *, resumed_at: int, metrics_bytes: int | None = None, waiting: Sequence[str] = ()
    ) -> None:
        self.output_dir = output_dir
        self._metrics: MetricsFile | None = None
        self._tensorboard: TensorBoardWriter | None = None
        if is_main_process():
            self._metrics = MetricsFile(output_dir / "metrics.jsonl")
            cut_metrics(self._metrics, resumed_at, metrics_bytes, waiting)
            self._tensorboard = TensorBoardWriter(output_dir, purge_step=resumed_at)

    @property
    def position(self) -> int:
        """Length of the metrics file, with what is `waiting`; the rest is on disk. 0 where this process writes none."""
        return self._metrics.sync() if self._metrics is not None else 0

    @property
    def waiting(self) -> list[str]:
        """Last lines of the metrics file that the disk does not take now, so that a checkpoint keeps them."""
        return self._metrics.waiting if self._metrics is not None else []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._metrics is not None and self._tensorboard is not None:
            self._tensorboard.close()
            self._metrics.__exit__(kind, error, trace)

    def write(self, report: ProgressReport | None) -> None:
        """Writes a period's report, if the period is over."""
        if report is None:
            return
        logger.info("%s", report.line)
        self._append(report.record)

    def write_evaluation(self, iteration: int, figures: Mapping[str, float], warnings: Sequence[str] = ()) -> None:
        """Writes the figures of an evaluation during training, and the warnings that they raised."""
        if figures:
            more = {"warnings": list(warnings)} if warnings else {}
            self._append({"iteration": iteration, "evaluation": dict(figures), **more})

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._metrics is not None and self._tensorboard is not None:
            self._metrics.append(record)
            if not self._metrics.waiting:  # else TensorBoard would begin one event file after the other in vain
                self._tensorboard.add_scalars(record, record["iteration"])


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
