"""A run's numbers for programs: one JSON object per line in ``metrics.jsonl``."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

from dinov2.utils.files import write_atomically


class MetricsFile:
    """Appends records to a file of JSON lines, each handed to the operating system at once.

    JSON knows no NaN and no infinity: both are written as null. A finite float is written with as many digits as it
    takes to read the same float back. Only one process may write; the caller sees to that. An unfinished last line,
    left by a crash, is removed when the file is opened.

    Args:
        path: the file, created with its folder where needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab")
        self._unsynced = True
        self._drop_torn_line()

    @property
    def position(self) -> int:
        """Length of the file in bytes; `truncate_to` takes it back to here."""
        return self._file.tell()

    def sync(self) -> int:
        """Flushes the file to disk and returns its `position`, which a checkpoint keeps."""
        if self._unsynced:
            os.fsync(self._file.fileno())
            self._unsynced = False
        return self.position

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record; tensors and NumPy values of one element become plain numbers.

        Raises:
            TypeError: for a value that JSON cannot hold.
        """
        line = json.dumps(_plain(record), allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        self._unsynced = True

    def truncate_after(self, iteration: int) -> int:
        """Drops the records of iterations above ``iteration``, as a run resumed from there will write them again.

        Returns:
            How many records were dropped. Records without an iteration are kept.

        Raises:
            ValueError: when a line is not a JSON object.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = []
        for number, line in enumerate(lines, start=1):
            recorded = _parse(line, self.path, number).get("iteration")
            if recorded is None or recorded <= iteration:
                kept.append(line)
        if len(kept) < len(lines):
            write_atomically(self.path, lambda file: file.writelines(kept))
            self._file.close()
            self._file = self.path.open("ab")
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
        self._file.seek(position)

    def close(self) -> None:
        """Closes the file; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        self.truncate_to(content.rfind(b"\n") + 1)


def read_metrics(path: str | Path, *, start: int = 0) -> list[dict[str, Any]]:
    """Reads the records of a metrics file; a last line that is still being written is left out.

    Args:
        path: the file.
        start: byte at which to begin: a `MetricsFile.position`. Anywhere else the rest of the line is left out.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when a line is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no metrics file at {path}")
    content = path.read_bytes()
    if start > 0:
        content = content[start if content[start - 1 : start] == b"\n" else content.find(b"\n", start) + 1 :]
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}")
    return record


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
