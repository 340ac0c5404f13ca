"""Schedules: values that change over the iterations of a run."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt


class Schedule:
    """One value per iteration, and a final value for every iteration after them.

    ``schedule[iteration]`` counts from 0. There is no end: later iterations give the final value. Negative iterations
    raise ``IndexError`` (upstream counts them from the end, which hides mistakes).
    """

    def __init__(self, values: npt.ArrayLike, final_value: float) -> None:
        self._values = np.array(values, dtype=np.float64)
        self._values.flags.writeable = False
        self.final_value = float(final_value)

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The values before the final one, read-only."""
        return self._values

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[float]:
        return iter(self._values.tolist())

    def __getitem__(self, iteration: int) -> float:
        if iteration < 0:
            raise IndexError(f"iterations count from 0, found {iteration}")
        return float(self._values[iteration]) if iteration < len(self._values) else self.final_value

    def frozen_until(self, iteration: int) -> "Schedule":
        """The same schedule with 0 in place of every value before ``iteration``."""
        values = self._values.copy()
        values[:iteration] = 0.0
        return Schedule(values, self.final_value)


class CosineSchedule(Schedule):
    """Zeros, a linear warm-up, then half a cosine from the base value to the final value.

    Args:
        base_value: where the warm-up ends and the cosine starts.
        final_value: what the cosine falls (or rises) to; also the value after the end.
        total_iters: length of the three parts together.
        warmup_iters: length of the warm-up; its last value is ``base_value``.
        start_warmup_value: first value of the warm-up.
        freeze_iters: number of zeros before the warm-up.

    Raises:
        ValueError: a length is negative, or zeros and warm-up are longer than the whole.

    Reference:
        Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", section 3.
    """

    def __init__(
        self,
        base_value: float,
        final_value: float,
        total_iters: int,
        warmup_iters: int = 0,
        start_warmup_value: float = 0.0,
        freeze_iters: int = 0,
    ) -> None:
        if min(total_iters, warmup_iters, freeze_iters) < 0:
            raise ValueError(
                f"total_iters, warmup_iters and freeze_iters must not be negative, "
                f"found {total_iters}, {warmup_iters} and {freeze_iters}"
            )
        if warmup_iters + freeze_iters > total_iters:
            raise ValueError(
                f"warmup_iters + freeze_iters must not exceed total_iters, "
                f"found {warmup_iters} + {freeze_iters} > {total_iters}"
            )
        num_cosine = total_iters - warmup_iters - freeze_iters
        progress = np.arange(num_cosine) / max(num_cosine, 1)  # [0, 1)
        values = np.concatenate(
            [
                np.zeros(freeze_iters),
                np.linspace(start_warmup_value, base_value, warmup_iters),
                final_value + (base_value - final_value) * (1 + np.cos(np.pi * progress)) / 2,
            ]
        )
        super().__init__(values, final_value)
