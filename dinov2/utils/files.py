"""Writing files so that a crash at any instant leaves either the old or the new content, never half of it."""

import contextlib
import hashlib
import importlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

_PLACE = 2**30  # the byte that is locked on Windows, beyond the content, so that others can read that


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
    temporary = temporary_path(path)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less what the process's mask takes away
    _lock_unfinished(handle)
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


# Names of `temporary_path`, and those that the best teacher had in earlier versions.
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{12}\.tmp(\.sha256)?|\.teacher_checkpoint\.pth(\.sha256)?\.tmp")
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # Windows has neither


def temporary_path(path: Path) -> Path:
    """A new name beside a file under which it is written, and which `remove_unfinished` knows."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def _lock_unfinished(handle: int) -> None:
    """Shows other processes that a file with a temporary name is still written, until this one closes it or ends."""
    with contextlib.suppress(OSError):  # a file system without locks: nobody takes it for a dead process's then
        lock_file(handle)


def remove_unfinished(folder: Path, *, below: bool = False) -> tuple[int, int]:
    """Deletes what processes that were killed had begun to write, under temporary names; not what others still write.

    Args:
        folder: where to look; links are not followed.
        below: whether to look into its subfolders too, but for those that belong to another run.

    Returns:
        How many files there were, and their size in bytes.
    """
    num_removed = num_bytes = 0
    for place, inner, names in os.walk(folder):
        if not below:
            inner.clear()
        elif Path(place) != folder and "run.lock" in names:
            inner.clear()
            continue
        for name in filter(_UNFINISHED.fullmatch, names):
            try:
                handle = os.open(os.path.join(place, name), os.O_RDWR | _NO_LINKS)
                try:
                    lock_file(handle)
                    num_bytes += os.fstat(handle).st_size
                    os.unlink(os.path.join(place, name))
                    num_removed += 1
                finally:
                    os.close(handle)
            except OSError:
                continue  # somebody writes it, or deletes it too
    return num_removed, num_bytes


class LostFolderError(OSError):
    """What lies at the path of a folder is not this folder any more."""


class HeldFolder:
    """A folder that is held open, so that it is noticed when another one, or none, has taken its place.

    A disk that is lost leaves an empty folder, a link can be switched, and a folder be moved while the run of another
    comes to lie at its path: nothing must be written, or deleted, there.

    Args:
        path: of the folder, which exists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def check(self) -> None:
        """Returns when the folder is where it was.

        Raises:
            LostFolderError: it is not.
        """
        try:
            if os.path.samestat(os.fstat(self._handle), os.stat(self.path)):
                return
            cause = "another folder lies there"
        except OSError as error:
            cause = str(error.strerror)
        raise LostFolderError(
            f"the folder {self.path} was moved or replaced, or its disk is gone ({cause}): nothing is written there"
        )

    def __fspath__(self) -> str:
        return str(self.path)

    def close(self) -> None:
        """Lets the folder go."""
        os.close(self._handle)


def output_folder(place: "str | os.PathLike[str]") -> Path:
    """The folder for results, made where needed; one that is held must be where it was.

    Raises:
        OSError: it cannot be made, or was lost.
    """
    folder = Path(place)
    if isinstance(place, HeldFolder):
        place.check()
    else:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_text_atomically(path: str | Path, text: str) -> None:
    """Writes ``text`` as UTF-8, atomically (see `write_atomically`).

    Bytes of a file name that are in no known encoding become escapes such as ``\\udcff``, which JSON reads back.
    """
    write_atomically(path, lambda file: file.write(text.encode("utf-8", errors="backslashreplace")))


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


def is_plain_name(name: str) -> bool:
    """Whether a text is the name of a file or folder, on Linux and on Windows, and leads nowhere else."""
    names = {name, PurePosixPath(name).name, PureWindowsPath(name).name}
    return len(names) == 1 and name not in ("", "..") and "\0" not in name


SUFFIX = ".sha256"
MISSING = "is missing"
NO_CHECKSUM = "has no checksum"


class HashingWriter:
    """A file object that hashes what it passes on.

    Libraries written in C++ turn an error of the file into one of their own, or stumble over a second one while they
    clean up. So the first `OSError` is kept in ``error``, what follows is dropped, and `write_with_checksum` raises it.

    Args:
        file: gets the bytes; it is written front to back.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.error: OSError | None = None
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        """Writes and hashes, and returns the number of bytes."""
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
            else:
                self._hash.update(data)
        return size

    def flush(self) -> None:
        """Nothing: the file is flushed once, at its end."""

    def digest(self) -> str:
        """SHA-256 of everything so far, as 64 hexadecimal digits."""
        return self._hash.hexdigest()


def sidecar(path: str | Path) -> Path:
    """Where the digest of a file lies."""
    path = Path(path)
    return path.with_name(path.name + SUFFIX)


def write_with_checksum(path: str | Path, write: Callable[[Any], object]) -> str:
    """Writes a file atomically, hashes it on the way, and puts its digest beside it.

    The digest is on disk before the file gets its name: a file without one was written by something else.

    Args:
        path: destination; its folder must exist.
        write: called with an object that has ``write`` and ``flush``, such as ``torch.save`` takes.

    Returns:
        The digest.

    Raises:
        OSError: when the folder cannot be written or the disk is full; a file that was there before stays good.
    """
    path = Path(path)
    digest = ""

    def fill(file: IO[bytes]) -> None:
        nonlocal digest
        hashing = HashingWriter(file)
        try:
            write(hashing)
        except Exception:
            if hashing.error is not None:
                raise hashing.error from None
            raise
        if hashing.error is not None:
            raise hashing.error
        digest = hashing.digest()

    try:
        write_atomically(
            path, fill, before_naming=lambda: write_text_atomically(sidecar(path), _line(digest, path.name))
        )
    except BaseException:
        with contextlib.suppress(OSError):
            if not path.exists():
                sidecar(path).unlink(missing_ok=True)
        raise
    return digest


def remove_with_checksum(path: str | Path) -> None:
    """Deletes a file and its digest, where they exist."""
    Path(path).unlink(missing_ok=True)
    sidecar(path).unlink(missing_ok=True)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum_fault(path: str | Path) -> str:
    """What is wrong with a file according to the digest beside it, in a few words; empty when it is good."""
    path = Path(path)
    try:
        if not path.is_file():
            return MISSING
        if not sidecar(path).is_file():
            return f"{NO_CHECKSUM} ({path.name}{SUFFIX}): it was never finished, or the checksum was lost"
        expected = sidecar(path).read_bytes()
        if re.fullmatch(rb"[0-9a-f]{64}  " + re.escape(path.name.encode()) + rb"\n", expected) is None:
            return f"has a damaged checksum file {path.name}{SUFFIX}"
        if expected != _line(file_digest(path), path.name).encode():
            return f"is damaged: its {path.stat().st_size} bytes do not have the SHA-256 of {path.name}{SUFFIX}"
    except OSError as error:
        return f"cannot be read: {error}"
    return ""


def shown_fault(path: str | Path) -> str:
    """What the digest beside a file shows to be wrong with it; empty when it is good, and when it has no digest.

    For files that may come from elsewhere, or from a version that made no digests.
    """
    return checksum_fault(path) if sidecar(path).exists() else ""


def _line(digest: str, name: str) -> str:
    return f"{digest}  {name}\n"


def lock_file(handle: int) -> None:
    """Locks an open file for this process, until it ends or closes the file; does not wait.

    Raises:
        OSError: another process holds it, or the file system has no locks.
    """
    try:
        import fcntl  # only now: Windows has none
    except ImportError:
        windows: Any = importlib.import_module("msvcrt")
        before = os.lseek(handle, 0, os.SEEK_CUR)
        os.lseek(handle, _PLACE, os.SEEK_SET)
        try:
            windows.locking(handle, windows.LK_NBLCK, 1)
        finally:
            os.lseek(handle, before, os.SEEK_SET)
    else:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
