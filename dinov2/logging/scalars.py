"""Numbers that may still be on their way out of a device: kept as they are, read all at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

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


def to_floats(values: Sequence[Tensor | float]) -> list[float]:
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
