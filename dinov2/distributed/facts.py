"""Who this process is. Without a process group the answers are those of a single process."""

import os

import torch.distributed as dist


def is_distributed() -> bool:
    """Whether a process group exists (it may hold one process only)."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process's number among all processes of the run, from 0."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """How many processes take part in the run."""
    return dist.get_world_size() if is_distributed() else 1


def get_local_rank() -> int:
    """This process's number on its machine, from 0; it selects the GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_distributed() else 0


def is_main_process() -> bool:
    """Whether this process writes the shared files and speaks for the run."""
    return get_rank() == 0


def barrier() -> None:
    """Waits for every process; returns at once when there is only one."""
    if get_world_size() > 1:
        dist.barrier()
