"""How a command ends: its exit code, and what is left out on the way."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from dinov2.distributed import may_abort_at_exit
from dinov2.utils.errors import INTERRUPTED, RunError


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process: code 0 when the job was done.

    Wrong options and data (`ValueError`, `OSError`, `RunError`) end it with code 1 and their message alone; where the
    command keeps a log, the traceback stands there. `StartAgainError` ends it with code 75, Ctrl-C with code 130.
    Anything else is a defect and shows its traceback.
    """
    try:
        code = main()
    except (ValueError, OSError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code if isinstance(error, RunError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = INTERRUPTED
    if may_abort_at_exit():
        end_at_once(code)
    sys.exit(code)


def end_at_once(code: int) -> NoReturn:
    """Ends the process after everything that an ordinary end waits for, but without the interpreter's teardown."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1  # what was printed is lost, as on a full disk
    os._exit(code)
