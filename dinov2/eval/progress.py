"""How far a long evaluation is, said every few seconds."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from dinov2.distributed import is_main_process
from dinov2.logging.measures import format_duration, memory_gib

logger = logging.getLogger("dinov2")

T = TypeVar("T")


def report_progress(
    steps: Iterable[T], name: str, rows_per_step: int, num_rows: int, *, every_seconds: float = 10.0
) -> Iterator[T]:
    """Yields the steps unchanged; the main process logs rows done, rate, time left and memory, and a line at the end.

    Args:
        steps: what the caller loops over.
        name: of the loop, for the log.
        rows_per_step: rows that all processes together finish in one step.
        num_rows: how many rows there are.
        every_seconds: least time between two lines.
    """
    start = spoken = time.monotonic()
    done = 0
    for step in steps:
        yield step
        done = min(done + rows_per_step, num_rows)
        now = time.monotonic()
        if is_main_process() and (done == num_rows or now - spoken >= every_seconds):
            spoken = now
            rate = done / max(now - start, 1e-9)
            left = format_duration((num_rows - done) / rate)
            logger.info(
                "%s: %d of %d, %.1f per second, %s left, %.1f GiB", name, done, num_rows, rate, left, memory_gib()
            )
