"""Writing files so that a crash at any instant leaves either the old or the new content, never half of it."""

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(
    path: str | Path, write: Callable[[IO[bytes]], object], *, before_naming: Callable[[], object] | None = None
) -> None:
    """Writes a file under a temporary name, flushes it to disk, then renames it over ``path`` and flushes the folder.

    Several threads may write at once, each its own file.

    Args:
        path: destination; its folder must exist.
        write: called with the binary file object to fill.
        before_naming: called when the content is on disk and before it gets its name; an error there counts as one of
            writing.

    Raises:
        OSError: when the folder cannot be written or the disk is full; ``path`` is then untouched and nothing is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less what the process's mask takes away
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                # A process forked meanwhile may hold the file open: cut to nothing, it frees a full disk all the same.
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), 0)
                raise
        if before_naming is not None:
            before_naming()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_text_atomically(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically (see `write_atomically`)."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


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
