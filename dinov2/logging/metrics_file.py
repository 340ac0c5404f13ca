"""A run's numbers for programs: one JSON object per line in ``metrics.jsonl``."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

from dinov2.utils.files import write_atomically

logger = logging.getLogger("dinov2")

MAX_SHOWN = 8  # numbers of damaged lines


class MetricsFile:
    """Appends records to a file of JSON lines, each handed to the operating system at once.

    JSON knows no NaN and no infinity: both are written as null. A finite float is written with as many digits as it
    takes to read the same float back. Only one process may write; the caller sees to that. An unfinished last line,
    left by a crash, is removed when the file is opened.

    A disk that is full, or a folder that vanishes, loses nothing: lines wait in memory, and every call tries again to
    write them. `close` is the last one that does.

    Args:
        path: the file, created with its folder where needed.

    Raises:
        OSError: when the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()
        self._tail: list[bytes] = []  # lines that may not be on the disk,
        self._num_handed = 0  # and how many of them the operating system has
        self._unsynced = True  # whether there may be something to flush
        self._behind = False  # whether the file does not hold all of them, or holds half of one
        self._start_at(self._file.tell())
        content = self.path.read_bytes()
        self.truncate_to(content.rfind(b"\n") + 1)

    @property
    def position(self) -> int:
        """Length of the file in bytes, with the lines that wait; `truncate_to` takes it back to here."""
        return self._on_disk + sum(map(len, self._tail))

    @property
    def waiting(self) -> list[str]:
        """Lines that wait in memory because the file cannot be written: the end of what counts for `position`."""
        return [line.decode() for line in self._tail] if self._behind else []

    def sync(self) -> int:
        """Flushes the file to disk, as far as it can be written, and returns its `position`."""
        if self._unsynced and (not self._behind or self._catch_up()):
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self._num_handed = 0  # what was not flushed may be lost
                self._fall_behind(error)
            else:
                self._start_at(self.position)
                self._unsynced = False
        return self.position

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record; tensors and NumPy values of one element become plain numbers.

        Raises:
            TypeError: for a value that JSON cannot hold.
        """
        line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
        self._tail.append(line)
        self._unsynced = True
        if self._behind:
            self._catch_up()
            return
        try:
            self._hand_over()
        except OSError as error:
            self._fall_behind(error)

    def truncate_after(self, iteration: int) -> int:
        """Drops the records of iterations above ``iteration``, as a run resumed from there will write them again.

        Returns:
            How many lines were dropped, those that are damaged too. Records without an iteration are kept.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [
            line
            for line, record in zip(lines, _parse_lines(lines, self.path), strict=True)
            if record is not None and (not isinstance(at := record.get("iteration"), int) or at <= iteration)
        ]
        if len(kept) < len(lines):
            write_atomically(self.path, lambda file: file.writelines(kept))
            self._file.close()
            self._open()
            self._start_at(self._file.tell())
        return len(lines) - len(kept)

    def truncate_to(self, position: int) -> None:
        """Cuts the file back to an earlier `position`.

        Raises:
            ValueError: when the file is shorter than that, or no line ends there; nothing is cut then.
        """
        if not 0 <= position <= self.position:
            raise ValueError(f"{self.path} holds {self.position} bytes and cannot be cut to {position}")
        with self.path.open("rb") as file:
            file.seek(max(position - 1, 0))
            if position > 0 and file.read(1) != b"\n":
                raise ValueError(f"{self.path} cannot be cut to {position} bytes: no line ends there")
        self._file.truncate(position)
        self._start_at(position)

    def close(self) -> None:
        """Closes the file; closing twice is harmless.

        Raises:
            OSError: when lines wait that still cannot be written; they are lost.
        """
        are_lost = self._behind and not self._catch_up()
        with contextlib.suppress(OSError):  # there is nothing left to write
            self._file.close()
        self._behind = False
        if are_lost:
            raise OSError(f"{self.path} cannot be written: its last {len(self._tail)} line(s) are lost")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as stack:
            if error is not None:
                stack.enter_context(contextlib.suppress(OSError))  # which is not what went wrong first
            self.close()

    def _open(self) -> None:
        # What a link leads to, a run would cut.
        self._file = FileIO(self.path, "ab", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o666))
        self._identity = os.fstat(self._file.fileno())

    def _start_at(self, position: int) -> None:
        """So long is the file, and nothing waits."""
        self._on_disk = position
        self._tail.clear()
        self._num_handed = 0
        self._unsynced = True

    def _hand_over(self) -> None:
        for line in self._tail[self._num_handed :]:
            _write_all(self._file, line)
            self._num_handed += 1

    def _fall_behind(self, error: OSError) -> None:
        self._behind = True
        logger.error("%s CANNOT BE WRITTEN, its lines wait in memory and are tried again: %s", self.path, error)

    def _catch_up(self) -> bool:
        """Opens the file anew, as its folder may have been away, and writes what waits; whether that went well."""
        with contextlib.suppress(OSError):
            self._file.close()
        try:
            file = self.path.open("r+b", buffering=0)  # never a new one, in the empty folder of a lost disk,
            if not os.path.samestat(os.fstat(file.fileno()), self._identity):  # and never that of another run
                file.close()
                return False
            self._file = file
            whole = self._on_disk + sum(map(len, self._tail[: self._num_handed]))
            if self._file.seek(0, os.SEEK_END) < whole:
                return False
            self._file.truncate(whole)  # half a line may be there
            self._file.seek(whole)
            self._hand_over()
        except OSError:
            return False
        self._behind = False
        logger.warning("%s can be written again: %d line(s) that waited are in it", self.path, len(self._tail))
        return True


def _write_all(file: FileIO, data: bytes) -> None:
    """A disk that fills up takes a part, and says so only when asked to take the rest."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def read_metrics(path: str | Path, *, start: int = 0) -> list[dict[str, Any]]:
    """Reads the records of a metrics file; a last line that is still being written is left out.

    Damaged lines are left out too, with a loud line: a bit that flips in a record costs this record.

    Args:
        path: the file.
        start: byte at which to begin: a `MetricsFile.position`. Anywhere else the rest of the line is left out.

    Raises:
        FileNotFoundError: when there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no metrics file at {path}")
    content = path.read_bytes()
    if start > 0:
        start = start if content[start - 1 : start] == b"\n" else content.find(b"\n", start) + 1
    lines = content[start : content.rfind(b"\n") + 1].splitlines()
    records = _parse_lines(lines, path, first=content.count(b"\n", 0, start) + 1)
    return [record for record in records if record is not None]


def _parse_lines(lines: Sequence[bytes], path: Path, *, first: int = 1) -> list[dict[str, Any] | None]:
    """The records in lines, None for those that are damaged, which are named by number."""
    records: list[dict[str, Any] | None] = []
    damaged: list[str] = []
    for number, line in enumerate(lines, start=first):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            damaged.append(str(number))
            record = None
        records.append(record)
    if damaged:
        shown = ", ".join(damaged[:MAX_SHOWN]) + (", …" if len(damaged) > MAX_SHOWN else "")
        logger.error("%s: %d damaged line(s) are left out, no JSON objects: %s", path, len(damaged), shown)
    return records


def _plain(value: Any) -> Any:
    """The value as JSON can hold it."""
    if isinstance(value, Tensor | np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
