"""Writing files so that a crash at any instant leaves either the old or the new content, never half of it."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], None]) -> None:
    """Writes a file under a temporary name, flushes it to disk, then renames it over ``path``.

    Args:
        path: destination; its folder must exist.
        write: called with the binary file object to fill.

    Raises:
        OSError: when the folder cannot be written or the disk is full; ``path`` is then untouched.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically (see `write_atomically`)."""
    write_atomically(path, lambda file: _ignore(file.write(text.encode("utf-8"))))


def _ignore(_: object) -> None:
    return None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    """Makes the rename itself durable, where the platform can open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
