"""`MetricLogger` and `SmoothedValue`, by the names that code written for upstream imports; runs use `RunLog`."""

import logging
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from torch import Tensor

from dinov2.distributed import all_gather_objects
from dinov2.logging.progress import format_duration, memory_gib

logger = logging.getLogger("dinov2")

T = TypeVar("T")

NAN = float("nan")


class SmoothedValue:
    """One series of values: statistics of a recent window, and the average of all; NaN without values.

    Args:
        window_size: how many of the newest values the window holds.
        fmt: text of the value; may use ``median``, ``avg``, ``global_avg``, ``max`` and ``value``.

    Attributes:
        count: samples behind the global average.
        total: weighted sum of all values.
    """

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})") -> None:
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.fmt = fmt
        self.count, self.total = 0, 0.0
        self.synchronized = (0, 0.0)  # the part of both that all processes know
        self._window: deque[float] = deque(maxlen=window_size)

    def update(self, value: Tensor | float, num: int = 1) -> None:
        """Adds a value, or a tensor of one element, that stands for ``num`` samples."""
        self._window.append(float(value))
        self.count += num
        self.total += self._window[-1] * num

    # Of the window, but for the global average.
    median = property(lambda self: statistics.median(self._window or [NAN]))
    avg = property(lambda self: statistics.fmean(self._window or [NAN]))
    max = property(lambda self: max(self._window, default=NAN))
    value = property(lambda self: self._window[-1] if self._window else NAN)
    global_avg = property(lambda self: self.total / self.count if self.count else NAN)

    def __str__(self) -> str:
        return self.fmt.format(
            **{name: getattr(self, name) for name in ("median", "avg", "global_avg", "max", "value")}
        )


class MetricLogger:
    """Named `SmoothedValue` series, and a loop over a data loader that logs them with ETA and memory.

    Args:
        delimiter: text between two values of a line.
    """

    def __init__(self, delimiter: str = "  ") -> None:
        self.delimiter = delimiter
        self.meters: dict[str, SmoothedValue] = {}

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Sets up a series with a window or format of its own."""
        self.meters[name] = meter

    def update(self, **values: Tensor | float) -> None:
        """Adds one value to each named series."""
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue()).update(value)

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Makes global averages those of all processes; every process must call it, windows stay its own.

        Calling it again adds only what came since, unlike upstream, where a second call counts the first sums anew.
        Processes need not know the same names.
        """
        news = {}
        for name, meter in self.meters.items():
            news[name] = (meter.count - meter.synchronized[0], meter.total - meter.synchronized[1])
            meter.count, meter.total = meter.synchronized
        for process in all_gather_objects(news):
            for name, (count, total) in process.items():
                meter = self.meters.setdefault(name, SmoothedValue())
                meter.count, meter.total = meter.count + count, meter.total + total
        for meter in self.meters.values():
            meter.synchronized = (meter.count, meter.total)

    def log_every(
        self,
        iterable: Iterable[T],
        print_freq: int,
        header: str = "",
        n_iterations: int | None = None,
        start_iteration: int = 0,
    ) -> Iterator[T]:
        """Yields the items of ``iterable`` and logs a line every ``print_freq`` of them, and at the last.

        Args:
            iterable: may be endless when ``n_iterations`` is given; no item is fetched that is not yielded.
            print_freq: iterations between two lines.
            header: text before each line.
            n_iterations: number at which to stop; by default all of ``iterable``.
            start_iteration: number of the first iteration, above 0 when a loop is resumed.

        Raises:
            ValueError: when ``print_freq`` is below 1.
        """
        if print_freq < 1:
            raise ValueError(f"print_freq must be at least 1, got {print_freq}")
        if n_iterations is None and isinstance(iterable, Sized):
            n_iterations = start_iteration + len(iterable)
        items, done, began = iter(iterable), start_iteration, time.perf_counter()
        while n_iterations is None or done < n_iterations:
            try:
                item = next(items)
            except StopIteration:
                break
            yield item
            done += 1
            if (done - 1) % print_freq == 0 or done == n_iterations:
                seconds = (time.perf_counter() - began) / (done - start_iteration)
                parts = [f"{header} [{done}{'' if n_iterations is None else f'/{n_iterations}'}]".strip()]
                if n_iterations is not None:
                    parts.append(f"eta: {format_duration((n_iterations - done) * seconds)}")
                parts += [str(self)] if self.meters else []
                parts += [f"time: {seconds:.4f} s", f"mem: {memory_gib():.1f} GiB"]
                logger.info("%s", self.delimiter.join(parts))
        elapsed = format_duration(time.perf_counter() - began)
        logger.info("%s", f"{header} took {elapsed} ({done - start_iteration} done)".strip())
