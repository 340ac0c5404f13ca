"""Which process a run waits for, when it does not go on."""

import datetime
import logging
import threading
import time
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from dinov2.distributed.facts import get_rank, get_world_size

logger = logging.getLogger("dinov2")

_LOOK_AFTER = 0.6  # share of the time-out without progress after which processes look for one another,
_LOOK_FOR = 0.2  # and for how long; so the rank is named before the time-out ends the run


class StallWatch:
    """A thread in every process that names the lost or hung one, before the time-out of collectives ends the run.

    Where an iteration takes much longer than it should, all processes meet in a group of their own. Those that do not
    come are lost, stopped or out of reach; if all come, those that wait for data or are iterations behind are named.
    Does nothing where there is one process.

    Args:
        timeout_minutes: of the collectives.

    Attributes:
        finding: who is missing; empty as long as all is well.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self.finding = ""
        self._seconds = timeout_minutes * 60
        self._last: tuple[float, int] | None = None
        self._has_data = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._group: Any = None

    def __enter__(self) -> Self:
        if get_world_size() > 1:
            limit = datetime.timedelta(seconds=self._seconds * _LOOK_FOR)
            self._group = dist.new_group(backend="gloo", timeout=limit)
            self._thread = threading.Thread(target=self._run, name="looks for lost processes", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def progress(self, iteration: int) -> None:
        """An iteration is done; from now on the next one is expected in time."""
        self._last, self._has_data, self.finding = (time.monotonic(), iteration), False, ""

    def has_data(self) -> None:
        """This process has the data of the next iteration."""
        self._has_data = True

    def pause(self) -> None:
        """What comes now may take its time, until `progress` is called again."""
        self._last = None

    def wait_for_finding(self) -> str:
        """Who is missing, after an error: waits for a search that is at work."""
        deadline = time.monotonic() + self._seconds * _LOOK_FOR
        while self._thread is not None and self._last is not None and not self.finding:
            if time.monotonic() - self._last[0] < self._seconds * _LOOK_AFTER or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return self.finding

    def _run(self) -> None:
        looked_at = None
        while not self._done.wait(min(self._seconds / 50, 5.0)):
            last = self._last
            if last is None or last == looked_at or time.monotonic() - last[0] < self._seconds * _LOOK_AFTER:
                continue
            looked_at = last
            finding = self._look(last[1])
            if self._last == last and not self._done.is_set():
                self.finding = finding
                logger.error(
                    "NO PROGRESS for %.0f s after iteration %d: %s. After %.0f s the run ends",
                    *(time.monotonic() - last[0], last[1], finding, self._seconds),
                )

    def _look(self, iteration: int) -> str:
        limit = datetime.timedelta(seconds=self._seconds * _LOOK_FOR)
        try:
            dist.monitored_barrier(self._group, timeout=limit, wait_all_ranks=True)
            done: list[Any] = [None] * get_world_size()
            dist.all_gather_object(done, (iteration, self._has_data), group=self._group)
        except (RuntimeError, ValueError) as error:
            return f"rank {get_rank()} looked for the others: {str(error).splitlines()[0]}"
        last = [rank for rank, where in enumerate(done) if where == min(done)]
        if len(last) == len(done):
            return f"all {len(done)} processes are there, and slow or waiting for one another"
        doing = "computes" if min(done)[1] else "waits for images"
        return f"all processes are there; behind the others: rank {', '.join(map(str, last))}, which {doing}"
