"""Base of the metrics that take a set in pieces: states and their joining are torchmetrics' business."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from dinov2.distributed import all_gather_objects, get_rank

Array = npt.NDArray[Any]
Pixels = Tensor | Array


class StreamedMetric(Metric):
    """A metric that takes a set in pieces and forgets them; ``compute`` gives its values by name.

    Its states are sums, or rows that are put behind each other. The values do not depend on how a set was cut into
    pieces, nor (but for rounding) on their order. Every image must be given once: rows that a sampler repeats to make
    processes equally long must be left out. Values that do not exist, such as an IoU of nothing, are absent.

    Nothing is sent before `merge_processes`, so that one process alone may look at its values.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)

    @property
    def update_called(self) -> bool:
        """True, so that torchmetrics does not warn: the values of an empty set are none, or counts of 0."""
        return True

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.int64) -> None:
        """Adds a state that starts at 0; metrics are joined by addition."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def add_rows(self, name: str) -> None:
        """Adds a state that is a list of tensors; metrics are joined by putting their lists together."""
        self.add_state(name, [], dist_reduce_fx="cat")

    def merge_processes(self) -> None:
        """Adds what all other processes have seen; every process must call it, once, and all know the same then.

        States lie on the CPU and differ in length, so they are gathered as objects: that works with any backend.
        """
        for rank, states in enumerate(all_gather_objects(self.metric_state)):
            if rank != get_rank():
                self.merge_state(states)


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
