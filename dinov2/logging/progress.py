"""Progress of a training loop: one line for people and one record for programs every few iterations."""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from dinov2.distributed import all_gather_objects


def memory_gib(device: torch.device | None = None) -> float:
    """Memory in GiB: the peak that torch allocated on a CUDA device, or what this process holds where there is none.

    Args:
        device: device of the work; None stands for the current CUDA device where one is in use, else for the CPU.
    """
    if device is None and torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.device("cuda")
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return int(psutil.Process().memory_info().rss) / 2**30


def format_duration(seconds: float) -> str:
    """``0:12:40``, with days in front where there are any: ``2 d 3:04:05``. A negative length counts as zero."""
    total = round(max(seconds, 0.0))
    days, rest = divmod(total, 86_400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


Scalar = Tensor | float | int


def hold(value: Scalar) -> Tensor | float:
    """Keeps a number for later without waiting for the device that computes it.

    Tensors are copied on their device, since a compiled or captured step may overwrite its outputs.

    Args:
        value: a number or a tensor of one element. A sharded tensor must be made whole first.

    Raises:
        ValueError: when a tensor holds other than one element.
    """
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() != 1:
        raise ValueError(f"a metric must be one number, got a tensor of shape {tuple(value.shape)}")
    return value.detach().reshape(()).to(torch.promote_types(value.dtype, torch.float32), copy=True)


def _to_floats(values: Sequence[Tensor | float]) -> list[float]:
    """Reads held numbers, with one wait per device and dtype instead of one per value."""
    numbers = [0.0] * len(values)
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            groups.setdefault((value.device, value.dtype), []).append((index, value))
        else:
            numbers[index] = value
    for group in groups.values():
        for (index, _), number in zip(group, torch.stack([value for _, value in group]).tolist(), strict=True):
            numbers[index] = number
    return numbers


# Schedules that the line shows: name on the line and format.
_LINE_SCHEDULES = {
    "lr": ("lr", ".1e"),
    "weight_decay": ("wd", ".3f"),
    "momentum": ("mom", ".4f"),
    "teacher_temp": ("temp", ".3f"),
}
_ETA_ITERATIONS = 100  # the remaining time follows the newest iterations only (by one period, if that is longer)


@dataclass(frozen=True)
class ProgressReport:
    """What one log period came to.

    Attributes:
        line: for people.
        record: for the metrics file. ``iteration`` counts from 0, as checkpoint names do, while the line tells how many
            are done. Everything that depends on the machine's speed or memory is under ``timing``; all the rest is the
            same for every run with the same options, data and number of processes.
    """

    line: str
    record: dict[str, Any]


@dataclass
class _Period:
    """Sums of one period on this process; metric values are not read from the device yet."""

    values: dict[str, list[Tensor | float]] = field(default_factory=dict)
    iterations: int = 0
    images: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0

    def read(self) -> dict[str, list[float]]:
        """The values as numbers, waiting for the device once."""
        numbers = iter(_to_floats([value for series in self.values.values() for value in series]))
        return {name: [next(numbers) for _ in series] for name, series in self.values.items()}


class TrainingProgress:
    """Gathers what happens in each iteration and reports every ``log_period`` iterations, and after the last.

    Nothing is read from the device between reports. Losses and gradient norms of a report are means over its
    iterations and over all processes, so every process must call `update` for every iteration.

    Args:
        total_iterations: length of the run.
        epoch_length: iterations that count as one epoch.
        log_period: iterations between two reports.
        device: where memory is measured.
        clock: gives seconds that only go forward.
        memory: gives the memory in use, in GiB; by default that of ``device``.

    Raises:
        ValueError: when a length is below 1.
    """

    def __init__(
        self,
        *,
        total_iterations: int,
        epoch_length: int,
        log_period: int,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
        memory: Callable[[], float] | None = None,
    ) -> None:
        lengths = {"total_iterations": total_iterations, "epoch_length": epoch_length, "log_period": log_period}
        for name, length in lengths.items():
            if length < 1:
                raise ValueError(f"{name} must be at least 1, got {length}")
        self._total_iterations = total_iterations
        self._epoch_length = epoch_length
        self._log_period = log_period
        self._clock = clock
        self._memory = memory or (lambda: memory_gib(device))
        self._began = clock()
        self._earlier_seconds = 0.0
        self._period = _Period()
        self._recent: deque[float] = deque(maxlen=max(_ETA_ITERATIONS, log_period))  # seconds of the newest iterations
        self._first_seconds: float | None = None

    def update(
        self,
        iteration: int,
        *,
        batch_size: int,
        data_seconds: float,
        iteration_seconds: float,
        losses: Mapping[str, Scalar],
        schedules: Mapping[str, float],
        grad_norms: Mapping[str, Scalar] | None = None,
    ) -> ProgressReport | None:
        """Takes note of a finished iteration.

        Args:
            iteration: its number, from 0.
            batch_size: images of this process.
            data_seconds: time spent waiting for the batch.
            iteration_seconds: time from the end of the previous iteration to the end of this one, waiting included.
            losses: ``total_loss`` and the terms, as numbers or tensors of one element.
            schedules: ``lr``, ``weight_decay``, ``momentum``, ``teacher_temp``, ``last_layer_lr`` of this iteration.
            grad_norms: norms before clipping, by module; recorded as ``grad_norm_{module}``.

        Returns:
            A report at the end of a period and after the last iteration, else None.
        """
        norms = {f"grad_norm_{name}": value for name, value in (grad_norms or {}).items()}
        for name, value in {**losses, **norms}.items():
            self._period.values.setdefault(name, []).append(hold(value))
        self._period.iterations += 1
        self._period.images += batch_size
        self._period.seconds += iteration_seconds
        self._period.data_seconds += data_seconds
        # The first iteration compiles, tunes and fills queues: no measure of those to come.
        if self._first_seconds is None:
            self._first_seconds = iteration_seconds
        else:
            self._recent.append(iteration_seconds)
        done = iteration + 1
        if done % self._log_period and done < self._total_iterations:
            return None
        return self._report(iteration, batch_size, schedules)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on in the middle of a period: builtins only."""
        return {"values": self._period.read(), "seconds": self._seconds()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`. Rates and remaining time are measured anew: the machine may be another."""
        self._period = _Period(values={name: list(series) for name, series in state["values"].items()})
        self._earlier_seconds = float(state["seconds"])
        self._began = self._clock()

    def _seconds(self) -> float:
        return self._earlier_seconds + self._clock() - self._began

    def _report(self, iteration: int, batch_size: int, schedules: Mapping[str, float]) -> ProgressReport:
        period, self._period = self._period, _Period()
        mine: dict[str, Any] = {
            "sums": {name: (len(series), sum(series)) for name, series in period.read().items()},
            "batch_size": batch_size,
            "images": period.images,
            "seconds": period.seconds,
            "data_seconds": period.data_seconds,
            "memory": self._memory(),
        }
        processes = all_gather_objects(mine)
        names = dict.fromkeys(name for process in processes for name in process["sums"])
        means = {}
        for name in sorted(names, key=lambda name: name != "total_loss"):  # the total loss first
            counts, totals = zip(*(one["sums"][name] for one in processes if name in one["sums"]), strict=True)
            means[name] = sum(totals) / sum(counts)
        seconds = max(process["seconds"] for process in processes)
        recent = sum(self._recent) / len(self._recent) if self._recent else self._first_seconds or 0.0
        record: dict[str, Any] = {
            "iteration": iteration,
            **means,
            **schedules,
            "batch_size": sum(process["batch_size"] for process in processes),
            "timing": {
                "images_per_second": _ratio(sum(process["images"] for process in processes), seconds),
                # The process that waits longest holds up all the others.
                "data_wait_fraction": max(_ratio(one["data_seconds"], one["seconds"]) for one in processes),
                "iteration_seconds": seconds / period.iterations,
                "memory_gib": max(process["memory"] for process in processes),
                "seconds": self._seconds(),
                "eta_seconds": (self._total_iterations - iteration - 1) * recent,
            },
        }
        return ProgressReport(self._line(record), record)

    def _line(self, record: Mapping[str, Any]) -> str:
        done, timing = record["iteration"] + 1, record["timing"]
        losses = [
            f"{name.removesuffix('_loss').removeprefix('dino_').removesuffix('_crops')} {value:.4g}"
            for name, value in record.items()
            if name.endswith("loss")
        ]
        schedules = [
            f"{label} {record[name]:{form}}" for name, (label, form) in _LINE_SCHEDULES.items() if name in record
        ]
        rate = timing["images_per_second"]
        parts = [
            f"iteration {done}/{self._total_iterations} (epoch {done / self._epoch_length:.2f})",
            " ".join(losses),
            " ".join(schedules),
            f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s",
            f"data wait {100 * timing['data_wait_fraction']:.0f} %",
            f"mem {timing['memory_gib']:.1f} GiB",
            f"ETA {format_duration(timing['eta_seconds'])}",
        ]
        return " | ".join(part for part in parts if part)


def _ratio(part: float, whole: float) -> float:
    """``part / whole``; 0 where nothing was measured."""
    return part / whole if whole > 0 else 0.0
