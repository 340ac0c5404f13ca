"""One run per folder: a lock that the system gives back when the process ends, however it ends."""

import contextlib
import errno
import logging
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.utils.errors import RunError
from dinov2.utils.files import HeldFolder, lock_file, remove_unfinished

logger = logging.getLogger("dinov2")

FILE = "run.lock"
PATIENCE_SECONDS = 10.0  # a run that is just ending, on preemption say, may still hold it
_TAKEN = (errno.EACCES, errno.EAGAIN)


class FolderInUseError(RunError):
    """Another run writes to the same folder."""


@contextmanager
def run_lock(output_dir: Path, *, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[HeldFolder]:
    """While entered, no other run can enter it for the same folder; all processes of the run call it alike.

    What an earlier run in the folder was writing when it was killed is deleted.

    The lock is one of the process alone (`fcntl.lockf`): data-loading processes that outlive a killed run for seconds
    do not hold it. It also works over NFS; where a file system knows no locks there is a warning.

    Yields:
        The folder, held open.

    Raises:
        FolderInUseError: another run holds it; the message names its process and machine.
    """
    handle, problem, held = -1, "", HeldFolder(output_dir)
    if is_main_process():
        try:
            handle = os.open(output_dir / FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            problem = _take(handle, output_dir, patience_seconds)
            if not problem:
                num_removed, num_bytes = remove_unfinished(output_dir, below=True)
                if num_removed:
                    logger.info(
                        "deleted %d unfinished file(s) of %.1f MiB that a killed run has left",
                        *(num_removed, num_bytes / 2**20),
                    )
        except OSError as error:
            why = "it is a link, and a run would write into what it leads to" if error.errno == errno.ELOOP else error
            problem = f"{output_dir / FILE} cannot be opened: {why}"
    try:
        if found := all_gather_objects(problem)[0]:
            raise FolderInUseError(found)
        yield held
    finally:
        held.close()
        if handle >= 0:
            os.close(handle)  # gives the lock back


def _take(handle: int, output_dir: Path, patience_seconds: float) -> str:
    """Locks the file and writes its holder into it; returns what is in the way."""
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        return (
            f"{output_dir / FILE} cannot be locked: it is no plain file of its own, and a run would write into it; "
            f"delete it"
        )
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            lock_file(handle)
            break
        except OSError as error:
            if error.errno not in _TAKEN:
                logger.warning(
                    "%s cannot be locked (%s): nothing keeps a second run out of this folder", output_dir, error
                )
                return ""
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "another process"
                return (
                    f"the run's folder {output_dir} is in use: {holder} trains in it. Wait for it, end it, or choose "
                    f"another train.output_dir"
                )
        time.sleep(min(0.2, patience_seconds))
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return ""
