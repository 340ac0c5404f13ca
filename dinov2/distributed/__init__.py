"""Facts about this process among its peers, the device it computes on, and reductions that need no process group."""

from dinov2.distributed.reduce import all_gather_objects, all_gather_rows, all_reduce_max, all_reduce_sum
from dinov2.distributed.session import (
    barrier,
    choose_device,
    distributed_session,
    get_local_world_size,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
    may_abort_at_exit,
)
from dinov2.distributed.stall import StallWatch

__all__ = [
    "StallWatch",
    "all_gather_objects",
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_sum",
    "barrier",
    "choose_device",
    "distributed_session",
    "get_local_world_size",
    "get_rank",
    "get_world_size",
    "is_distributed",
    "is_main_process",
    "may_abort_at_exit",
]
