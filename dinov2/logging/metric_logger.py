"""Running averages of named values, and a loop that prints them."""

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from torch import Tensor

from dinov2.distributed import all_gather_objects
from dinov2.logging.progress import Scalar, format_duration, hold, memory_gib, to_floats

logger = logging.getLogger("dinov2")

T = TypeVar("T")

_MAX_UNREAD = 1024  # values held on a device before they are read whether asked for or not


class SmoothedValue:
    """One series of values: statistics of a recent window, and the average of all.

    Tensors are kept on their device and read only when a statistic is asked for.

    Args:
        window_size: how many of the newest values the window holds.
        fmt: text of the value; may use ``median``, ``avg``, ``global_avg``, ``max`` and ``value``.
    """

    def __init__(self, window_size: int = 20, fmt: str = "{median:.4f} ({global_avg:.4f})") -> None:
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.fmt = fmt
        self._window: deque[float] = deque(maxlen=window_size)
        self._unread: list[tuple[Tensor | float, int]] = []
        self._local = (0, 0.0)  # count and total of this process since the last synchronisation
        self._shared = (0, 0.0)  # count and total of all processes up to it

    def update(self, value: Scalar, num: int = 1) -> None:
        """Adds a value that stands for ``num`` samples (it weighs as much in the global average)."""
        self._unread.append((hold(value), num))
        if len(self._unread) >= _MAX_UNREAD:
            self._read()

    @property
    def count(self) -> int:
        """Samples behind the global average."""
        self._read()
        return self._local[0] + self._shared[0]

    @property
    def total(self) -> float:
        """Weighted sum of all values."""
        self._read()
        return self._local[1] + self._shared[1]

    @property
    def global_avg(self) -> float:
        """Average over all samples; NaN when there are none."""
        return self.total / self.count if self.count else float("nan")

    @property
    def median(self) -> float:
        """Median of the window; NaN when it is empty."""
        return statistics.median(window) if (window := self._values()) else float("nan")

    @property
    def avg(self) -> float:
        """Mean of the window; NaN when it is empty."""
        return sum(window) / len(window) if (window := self._values()) else float("nan")

    @property
    def max(self) -> float:
        """Largest value of the window; NaN when it is empty."""
        return max(self._values(), default=float("nan"))

    @property
    def value(self) -> float:
        """The newest value; NaN when there is none."""
        return window[-1] if (window := self._values()) else float("nan")

    def __str__(self) -> str:
        return self.fmt.format(
            median=self.median, avg=self.avg, global_avg=self.global_avg, max=self.max, value=self.value
        )

    def take_local(self) -> tuple[int, float]:
        """Count and total since the last synchronisation, which the caller hands back summed, by `add_shared`."""
        self._read()
        taken, self._local = self._local, (0, 0.0)
        return taken

    def add_shared(self, count: int, total: float) -> None:
        """Adds the count and total of all processes to the global average."""
        self._shared = (self._shared[0] + count, self._shared[1] + total)

    def _values(self) -> deque[float]:
        self._read()
        return self._window

    def _read(self) -> None:
        if not self._unread:
            return
        numbers = to_floats([value for value, _ in self._unread])
        count, total = self._local
        for number, (_, num) in zip(numbers, self._unread, strict=True):
            count, total = count + num, total + number * num
        self._local = (count, total)
        self._window.extend(numbers)
        self._unread.clear()


class MetricLogger:
    """Named `SmoothedValue` series and a loop over a data loader that logs them with rate, ETA and memory.

    Args:
        delimiter: text between two values of a line.
        clock: gives seconds that only go forward.
    """

    def __init__(self, delimiter: str = "  ", *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.delimiter = delimiter
        self.meters: dict[str, SmoothedValue] = {}
        self._clock = clock

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        """Sets up a series with a window or format of its own."""
        self.meters[name] = meter

    def update(self, **values: Scalar) -> None:
        """Adds one value to each named series; a tensor must hold one element and is not waited for."""
        for name, value in values.items():
            self.meters.setdefault(name, SmoothedValue()).update(value)

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        """Makes global averages those of all processes; every process must call it, windows stay its own.

        Calling it again adds only what came since, unlike upstream, where a second call counts the first sums anew.
        Processes need not know the same names.
        """
        mine = {name: meter.take_local() for name, meter in self.meters.items()}
        for process in all_gather_objects(mine):
            for name, (count, total) in process.items():
                self.meters.setdefault(name, SmoothedValue()).add_shared(count, total)

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
        iteration_seconds, data_seconds = (SmoothedValue(fmt="{avg:.4f} s") for _ in range(2))
        iterator = iter(iterable)
        iteration = start_iteration
        began = asked = self._clock()
        while n_iterations is None or iteration < n_iterations:
            try:
                item = next(iterator)
            except StopIteration:
                break
            data_seconds.update(self._clock() - asked)
            yield item
            iteration += 1
            now = self._clock()
            iteration_seconds.update(now - asked)
            asked = now
            if (iteration - 1) % print_freq == 0 or iteration == n_iterations:
                logger.info(self._line(header, iteration, n_iterations, iteration_seconds, data_seconds))
        seconds, done = self._clock() - began, iteration - start_iteration
        name = f"{header} " if header else ""
        logger.info(
            f"{name}took {format_duration(seconds)} ({seconds / max(done, 1):.4f} s per iteration, {done} done)"
        )

    def _line(
        self, header: str, done: int, n_iterations: int | None, seconds: SmoothedValue, data_seconds: SmoothedValue
    ) -> str:
        parts = [
            f"{header} [{done}]"
            if n_iterations is None
            else f"{header} [{done:{len(str(n_iterations))}d}/{n_iterations}]"
        ]
        if n_iterations is not None:
            parts.append(f"eta: {format_duration((n_iterations - done) * seconds.avg)}")
        if self.meters:
            parts.append(str(self))
        parts += [f"time: {seconds}", f"data: {data_seconds}", f"mem: {memory_gib():.1f} GiB"]
        return self.delimiter.join(parts).strip()
