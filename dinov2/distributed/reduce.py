"""Collectives that are the identity when there is one process, so that callers need no special case."""

from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from dinov2.distributed.session import get_world_size

T = TypeVar("T")


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Returns the sum over all processes; ``tensor`` itself is not changed when there is more than one process."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Returns the element-wise maximum over all processes; ``tensor`` itself is not changed."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    if get_world_size() == 1:
        return tensor
    result = tensor.detach().clone()
    dist.all_reduce(result, op=op)
    return result


def all_gather_objects(value: T) -> list[T]:
    """Returns every process's ``value``, in rank order. For small things: values are pickled between peers."""
    if get_world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return cast(list[T], gathered)


def all_gather_rows(rows: Tensor) -> Tensor:
    """Concatenates ``rows`` ``[n, ...]`` of all processes along the first axis, in rank order; ``n`` must be equal."""
    world_size = get_world_size()
    if world_size == 1:
        return rows
    gathered = rows.new_empty((world_size * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered
