"""Locks on open files, which end with the process that holds them; on Windows as on other systems."""

import importlib
import os
from typing import Any

_PLACE = 2**30  # the byte that is locked on Windows, beyond the content, so that others can read that


def lock_file(handle: int) -> None:
    """Locks an open file for this process, without waiting.

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
