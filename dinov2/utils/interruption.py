"""Ctrl-C and termination signals end a run between two iterations, with everything saved."""

import atexit
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from dinov2.utils.errors import INTERRUPTED, RESUME_EXIT_CODE

logger = logging.getLogger("dinov2")

HANDLED = tuple(  # the last: the terminal was closed; Windows has only the first two
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)

# A launcher repeats the signal that the terminal has already sent to all; only a person comes back later.
REPEAT_SECONDS = 2.0
_NOTICE = b"\nasked to stop: this iteration is completed and saved first; the next signal stops at once\n"
_STDERR = 2


class StoppedAtOnce(BaseException):
    """A signal came while everything was saved; like Ctrl-C, nothing but the end of the run is meant to catch it."""


class Interruption:
    """While entered, SIGINT, SIGTERM, SIGUSR1 and SIGHUP set `requested`; a second one, later, ends the process.

    A SIGHUP that is ignored already, as ``nohup`` does, stays ignored.

    Args:
        announce: whether this process prints that it stops after the iteration; one of a job is enough.
    """

    def __init__(self, *, announce: bool = True) -> None:
        self.announce = announce
        self.signal: signal.Signals | None = None
        self._first = 0.0
        self._at_once = False
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 where a person pressed Ctrl-C; 75, "start me again", where a scheduler needs the machine.

        A process that was not asked itself stops with those that were.
        """
        return INTERRUPTED if self.signal is signal.SIGINT else RESUME_EXIT_CODE

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While entered, there is nothing to save and no end in sight, as in an evaluation: nothing is waited for.

        Raises:
            StoppedAtOnce: a signal comes, or has come before.
        """
        if self.requested:
            raise StoppedAtOnce
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __enter__(self) -> Self:
        for number in HANDLED:
            if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), now
            if os.getpid() != self._process:
                return  # forked to load data: terminals and schedulers signal it too, but its owner tells it to end
            if self._at_once:
                raise StoppedAtOnce
            if self.announce:
                # The terminal may be gone, and the disk of a redirected stream full: no reason not to save.
                with contextlib.suppress(OSError):
                    os.write(_STDERR, _NOTICE)  # not a logger, which may be in the middle of a line
        elif now - self._first > REPEAT_SECONDS:
            raise KeyboardInterrupt


def until_signal(work: Callable[[], int]) -> int:
    """Does what a signal may end at once; parts that have something to save enter an `Interruption` of their own.

    Returns:
        What ``work`` returns, or the exit code of the signal that ended it.
    """
    with Interruption(announce=False) as interruption:
        try:
            with interruption.at_once():
                return work()
        except StoppedAtOnce:
            logger.info("stopped with nothing to save; the same command starts again")
            return interruption.exit_code


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
