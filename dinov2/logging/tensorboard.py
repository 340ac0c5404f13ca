"""The run's scalars for TensorBoard."""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2.distributed import is_main_process

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


logger = logging.getLogger("dinov2")


class TensorBoardWriter:
    """Writes scalars under ``output_dir/tensorboard``; on any process but the main one it does nothing.

    TensorBoard is imported, and the event file opened, with the first value written. When the disk is full or gone, the
    curves have a gap, and go on in another event file.

    Args:
        output_dir: the run's folder.
        purge_step: on resume, the first iteration that will be run again; TensorBoard then hides older values from
            there on.
    """

    def __init__(self, output_dir: str | Path, *, purge_step: int | None = None) -> None:
        self.folder = Path(output_dir) / "tensorboard"
        self._purge_step = purge_step
        self._writer: SummaryWriter | None = None

    def add_scalars(self, record: Mapping[str, Any], iteration: int) -> None:
        """Writes every number of a record; nested names are joined by ``/``, and anything but a number is left out."""
        if not is_main_process():
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every run wants it

                self._writer = SummaryWriter(str(self.folder), purge_step=self._purge_step)
                self._purge_step = None
            for name, value in _flatten(record):
                self._writer.add_scalar(name, value, iteration)
        except OSError as error:
            logger.error("%s cannot be written, its curves will have a gap: %s", self.folder, error)
            self.close()

    def close(self) -> None:
        """Writes out what is buffered, as far as the disk takes it, and closes the event file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
            self._writer = None


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "iteration":
            yield prefix + name, float(value)
