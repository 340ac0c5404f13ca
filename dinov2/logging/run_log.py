"""What a run writes about itself: lines for people, records for programs."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from dinov2.distributed import is_main_process
from dinov2.logging.metrics_file import MetricsFile, read_metrics
from dinov2.logging.progress import ProgressReport
from dinov2.logging.tensorboard import TensorBoardWriter

logger = logging.getLogger("dinov2")


class RunLog:
    """Writer of the run's records; only the main process writes.

    Args:
        output_dir: folder of the run.
        resumed_at: first iteration to come; records of later ones, which a crash left behind, are dropped.
        metrics_bytes: length of the metrics file when the checkpoint was written, as far as it is known: what comes
            after it is dropped, but for the evaluation of the last iteration done.
    """

    def __init__(self, output_dir: Path, *, resumed_at: int, metrics_bytes: int | None = None) -> None:
        self.output_dir = output_dir
        self._metrics: MetricsFile | None = None
        self._tensorboard: TensorBoardWriter | None = None
        if is_main_process():
            self._metrics = MetricsFile(output_dir / "metrics.jsonl")
            cut_metrics(self._metrics, resumed_at, metrics_bytes)
            self._tensorboard = TensorBoardWriter(output_dir, purge_step=resumed_at)

    @property
    def position(self) -> int:
        """Length of the metrics file, which is on disk then; 0 where this process does not write it."""
        return self._metrics.sync() if self._metrics is not None else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in (self._metrics, self._tensorboard):
            if writer is not None:
                writer.close()

    def write(self, report: ProgressReport | None) -> None:
        """Writes a period's report, if the period is over."""
        if report is None:
            return
        logger.info("%s", report.line)
        if self._metrics is not None and self._tensorboard is not None:
            self._metrics.append(report.record)
            self._tensorboard.add_scalars(report.record, report.record["iteration"])

    def write_evaluation(self, iteration: int, figures: Mapping[str, float], warnings: Sequence[str] = ()) -> None:
        """Writes the figures of an evaluation during training, and the warnings that they raised."""
        if figures and self._metrics is not None and self._tensorboard is not None:
            more = {"warnings": list(warnings)} if warnings else {}
            self._metrics.append({"iteration": iteration, "evaluation": dict(figures), **more})
            self._tensorboard.add_scalars({"evaluation": dict(figures)}, iteration)


def cut_metrics(metrics: MetricsFile, resumed_at: int, metrics_bytes: int | None) -> None:
    """Takes the file back to what it was when the checkpoint was written, and the evaluation after it."""
    last = resumed_at - 1
    if metrics_bytes is not None and resumed_at > 0:
        later = [record for record in read_metrics(metrics.path, start=metrics_bytes) if "evaluation" in record]
        evaluation = [record for record in later if record.get("iteration") == last][:1]
        try:
            metrics.truncate_to(metrics_bytes)
        except ValueError as error:
            logger.warning(
                "%s: it was changed since the checkpoint; records after iteration %d are dropped", error, last
            )
        else:
            for record in evaluation:
                metrics.append(record)
            return
    # What was measured before the first iteration is recorded under -1, and a new start measures it anew.
    metrics.truncate_after(last if resumed_at > 0 else -2)
