"""What metrics share that see a set in pieces: their memory, and joining what several processes have seen."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2.distributed import all_gather_objects, get_rank

Array = npt.NDArray[Any]
Pixels = Tensor | Array


class StreamedMetric(ABC):
    """A metric that takes a set in pieces and forgets them.

    What it remembers are named arrays of two kinds: ``sums`` are added up when two metrics are joined, ``rows`` are put
    behind each other. The figures do not depend on how a set was cut into pieces, nor (but for rounding) on their
    order. Every image must be given once: rows that a sampler repeats to make processes equally long must be left out.
    """

    def __init__(self, *, sums: Mapping[str, Array], rows: Mapping[str, Array]) -> None:
        self._sums = dict(sums)
        self._rows = {name: [values] for name, values in rows.items()}

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Figures of all that was given so far; those that do not exist, such as an IoU of nothing, are absent."""

    def state(self) -> dict[str, Array]:
        """What the metric remembers: plain arrays, to be kept or sent to `merge` of a metric of the same settings."""
        return {name: values.copy() for name, values in self._sums.items()} | {
            name: self.rows(name) for name in self._rows
        }

    def merge(self, state: Mapping[str, Array]) -> None:
        """Adds what another metric of the same settings has seen.

        Args:
            state: of the other metric, see `state`.

        Raises:
            ValueError: it is the state of another kind of metric, or of other classes or bins.
        """
        own = self.state()
        if state.keys() != own.keys():
            raise ValueError(f"a metric that remembers {', '.join(own)} cannot take in {', '.join(state)}")
        for name, values in state.items():
            axis = 1 if name in self._rows else 0
            if values.shape[axis:] != own[name].shape[axis:]:
                raise ValueError(f"{name} of shape {list(values.shape)} does not fit that of {list(own[name].shape)}")
        for name, values in state.items():
            if name in self._rows:
                self._rows[name].append(values)
            else:
                self._sums[name] = self._sums[name] + values

    def merge_processes(self) -> None:
        """Adds what all other processes have seen; every process must call it, once, and all know the same then."""
        for rank, state in enumerate(all_gather_objects(self.state())):
            if rank != get_rank():
                self.merge(state)

    def add(self, name: str, values: Array | float) -> None:
        """Adds to a sum."""
        self._sums[name] = self._sums[name] + values

    def append(self, name: str, values: Array) -> None:
        """Puts rows behind those that are there."""
        self._rows[name].append(values)

    def total(self, name: str) -> Array:
        """A sum so far."""
        return self._sums[name]

    def rows(self, name: str) -> Array:
        """All rows so far."""
        return np.concatenate(self._rows[name])


def as_array(values: Pixels) -> Array:
    """Values of an array, or of a tensor on any device; bfloat16, which NumPy lacks, as float32."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray((values.float() if values.dtype == torch.bfloat16 else values).numpy())
    return values


def as_images(values: Pixels, what: str) -> Array:
    """``[H, W]`` or ``[B, H, W]`` as ``[B, H, W]``; raises ValueError for any other shape."""
    array = as_array(values)
    if array.ndim not in (2, 3):
        raise ValueError(f"{what} must be [H, W] or [B, H, W], found shape {list(array.shape)}")
    return array if array.ndim == 3 else array[None]


def check_same_size(first: Array, second: Array, first_name: str, second_name: str) -> None:
    """Raises ValueError where two arrays differ in shape."""
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name} must have one shape, found {list(first.shape)} and {list(second.shape)}"
        )
