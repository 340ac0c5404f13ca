"""Folder of a run, and its log of records: metrics files for programs, curves for TensorBoard, lines for people."""

import contextlib
import json
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.logging.metrics_file import MetricsFile, read_metrics
from dinov2.logging.progress import ProgressReport

logger = logging.getLogger("dinov2")


def prepare_run_folder(folder: str | Path) -> Path:
    """Makes the folder that ``train.output_dir`` names, on all processes together.

    Raises:
        ValueError: the processes, which are one run, were given different folders.
        OSError: when it cannot be made or written by one of them.
    """
    folder = Path(folder)
    given = all_gather_objects(str(folder.absolute()))
    if len(set(given)) > 1:
        raise ValueError(
            f"{len(given)} processes were started as one run but have different folders (train.output_dir): "
            f"{', '.join(sorted(set(given)))}; start runs of their own without torchrun, or by srun with one task each"
        )
    fault = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fault = str(error)
    for rank, found in enumerate(all_gather_objects(fault)):
        if found:
            where = f" on rank {rank}" if len(given) > 1 else ""
            raise OSError(f"the run's folder {folder} (train.output_dir) cannot be written{where}: {found}")
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
        repeats_evaluation: whether the evaluation of the last iteration done is made again: its record goes too.
        check_folder: called before a file is begun there; an `OSError` counts as one of writing.
        state: `state_dict` when the checkpoint was written; other keys are left aside. Where it is known, all that was
            written since is dropped, but for the evaluation of the last iteration done.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        resumed_at: int,
        state: Mapping[str, Any] = MappingProxyType({}),
        repeats_evaluation: bool = False,
        check_folder: Callable[[], None] = lambda: None,
    ) -> None:
        self.curves = Path(output_dir) / "tensorboard"
        self._check_folder = check_folder
        self._purge_step: int | None = resumed_at
        self._events: EventFile | None = None
        self._has_gap = False
        self._metrics: MetricsFile | None = None
        if is_main_process():
            self._metrics = MetricsFile(Path(output_dir) / "metrics.jsonl")
            cut_metrics(
                self._metrics,
                resumed_at,
                state.get("metrics_bytes"),
                state.get("metrics_waiting") or (),
                keep_evaluation=not repeats_evaluation,
            )

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
        self._close_events()
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
            if self._events is None:
                self._check_folder()
                self._events = EventFile(self.curves, purge_step=self._purge_step)
                self._purge_step = None
            self._events.add_scalars(dict(_flatten(record)), record["iteration"])
            self._has_gap = False
        except OSError as error:
            if not self._has_gap:
                logger.error("%s cannot be written, its curves will have a gap: %s", self.curves, error)
            self._has_gap = True
            self._close_events()

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


class EventFile:
    """A file of scalars for TensorBoard, each handed to the operating system at once.

    The writers of TensorBoard write in a thread of their own and open the file anew each time: what goes wrong is a
    traceback between the lines of the log, and a folder that is lost is made again, in whatever has taken its place.

    Args:
        folder: of the file, made in an existing one where needed.
        purge_step: TensorBoard hides what other files of the folder say from this step on; None for nothing.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, *, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # not every run wants it
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        now = time.time_ns()  # TensorBoard reads files in the order of their names
        name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now % 10**9:09d}"
        self._file = (folder / name).open("xb")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Writes the values of one step.

        Raises:
            OSError: the disk is full, or gone.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=scalars))

    def close(self) -> None:
        """Closes the file; what is in it stays."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._file.flush()


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a record but the iteration, nested names joined by ``/``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "iteration":
            yield prefix + name, float(value)


def cut_metrics(
    metrics: MetricsFile,
    resumed_at: int,
    metrics_bytes: int | None,
    waiting: Sequence[str] = (),
    *,
    keep_evaluation: bool = True,
) -> None:
    """Takes the file back to what it was when the checkpoint was written, and the evaluation after it."""
    last = resumed_at - 1
    if metrics_bytes is not None and resumed_at > 0:
        on_disk = metrics_bytes - sum(len(line.encode()) for line in waiting)
        later = [record for record in read_metrics(metrics.path, start=on_disk) if "evaluation" in record]
        evaluation = [record for record in later if record.get("iteration") == last][: int(keep_evaluation)]
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
