"""Calls that are given up after a time, such as reading a file from a network folder that has gone."""

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Deadline:
    """Runs one call after another in a thread of its own; a call that takes too long is left behind with its thread.

    Works in any thread and process (a fork makes a thread of its own), and needs no signals. A thread that hangs in the
    system cannot be ended, but keeps no process from ending.

    Args:
        seconds: longest time of a call; 0 for no limit, and no thread.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._process = 0
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self, call: Callable[..., T], *arguments: Any) -> T:
        """Returns or raises what ``call(*arguments)`` does.

        Raises:
            TimeoutError: it has not ended in time.
        """
        if self.seconds <= 0:
            return call(*arguments)
        if self._process != os.getpid():
            self._begin()
        answer: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._calls.put((call, arguments, answer))
        try:
            value, error = answer.get(timeout=self.seconds)
        except queue.Empty:
            self._process = 0  # the next call gets a new thread
            self._calls.put(None)  # should this one ever come back, it ends
            raise TimeoutError(f"given up after {self.seconds:g} s (data.read_timeout_seconds)") from None
        if error is not None:
            raise error
        result: T = value
        return result

    def __reduce__(self) -> tuple[type["Deadline"], tuple[float]]:
        """Threads do not travel to other processes: what is unpickled begins without one."""
        return Deadline, (self.seconds,)

    def _begin(self) -> None:
        self._calls = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._calls,), name="reads images", daemon=True).start()
        self._process = os.getpid()


def _serve(calls: "queue.SimpleQueue[Any]") -> None:
    while (task := calls.get()) is not None:
        call, arguments, answer = task
        try:
            answer.put((call(*arguments), None))
        except BaseException as error:
            answer.put((None, error))
        del call, arguments, answer, task  # an image is not kept until the next one
