"""Ctrl-C and termination signals end a run between two iterations, with everything saved."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Self

from dinov2.distributed import is_main_process

# A launcher repeats the signal that the terminal has already sent to all; only a person comes back later.
REPEAT_SECONDS = 2.0
_NOTICE = b"\nstopping after this iteration, with everything saved; the next signal stops at once\n"
_STDERR = 2


class Interruption:
    """While entered, SIGINT and SIGTERM set `requested` instead of ending the process; a second one ends it at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._first = 0.0
        self._previous: dict[signal.Signals, object] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._first = signal.Signals(number), now
            if is_main_process():
                os.write(_STDERR, _NOTICE)  # a logger's stream may be in the middle of a line
        elif now - self._first > REPEAT_SECONDS:
            raise KeyboardInterrupt
