"""What a run writes about itself: lines for people, records for programs, plots at the end."""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from dinov2.distributed import is_main_process
from dinov2.logging import MetricsFile, ProgressReport, TensorBoardWriter
from dinov2.logging.plots import plot_training

logger = logging.getLogger("dinov2")


class RunLog:
    """Writer of the run's records; only the main process writes.

    Args:
        output_dir: folder of the run.
        resumed_at: first iteration to come; records of later ones, which a crash left behind, are dropped.
    """

    def __init__(self, output_dir: Path, *, resumed_at: int) -> None:
        self.output_dir = output_dir
        self._metrics: MetricsFile | None = None
        self._tensorboard: TensorBoardWriter | None = None
        if is_main_process():
            self._metrics = MetricsFile(output_dir / "metrics.jsonl")
            self._metrics.truncate_after(resumed_at - 1)
            self._tensorboard = TensorBoardWriter(output_dir, purge_step=resumed_at)

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

    def write_evaluation(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of an evaluation during training."""
        if figures and self._metrics is not None and self._tensorboard is not None:
            self._metrics.append({"iteration": iteration, "evaluation": dict(figures)})
            self._tensorboard.add_scalars({"evaluation": dict(figures)}, iteration)

    def plot(self) -> None:
        """Draws the run's curves into ``plots/``."""
        for path in plot_training(self.output_dir / "metrics.jsonl", self.output_dir):
            logger.info("drew %s", path)
