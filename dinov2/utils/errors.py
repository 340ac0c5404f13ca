"""Errors that are meant for the person who started a command, and how a command ends."""

import sys
from collections.abc import Callable
from typing import NoReturn

INTERRUPTED = 130  # what a shell expects after Ctrl-C
RESUME_EXIT_CODE = 75  # EX_TEMPFAIL: everything is saved, and the same command goes on


class RunError(RuntimeError):
    """A run cannot go on for a reason that lies in its data or options; the message says what to do.

    Attributes:
        exit_code: of the command that it ends.
    """

    exit_code = 1


class StartAgainError(RunError):
    """A run ended for a reason that may have passed: what was done is saved, and the same command goes on."""

    exit_code = RESUME_EXIT_CODE


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
    sys.exit(code)
