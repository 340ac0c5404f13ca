"""Errors that are meant for the person who started a command, and the exit codes that go with them."""

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
