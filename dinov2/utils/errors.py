"""Errors that are meant for the person who started a command, and how a command ends."""

import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130  # what a shell expects after Ctrl-C


class RunError(RuntimeError):
    """A run cannot go on for a reason that lies in its data or options; the message says what to do."""


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Runs a command and ends the process: code 0 when the job was done.

    Wrong options and data (`ValueError`, `OSError`, `RunError`) end it with code 1 and their message alone; where the
    command keeps a log, the traceback stands there. Ctrl-C ends it with code 130. Anything else is a defect and shows
    its traceback.
    """
    try:
        code = main()
    except (ValueError, OSError, RunError) as error:
        sys.stderr.write(f"error: {error}\n")
        code = 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        code = INTERRUPTED
    sys.exit(code)
