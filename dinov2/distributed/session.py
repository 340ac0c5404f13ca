"""Rank, device and process group of this process; without a group the answers are those of a single process."""

import datetime
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
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


def get_local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", get_world_size()))


def is_main_process() -> bool:
    """Whether this process writes the shared files and speaks for the run."""
    return get_rank() == 0


def barrier() -> None:
    """Waits for every process; returns at once when there is only one."""
    if get_world_size() > 1:
        dist.barrier()


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """Returns the device to compute on.

    Args:
        name: ``cpu``, ``cuda``, ``mps``, or ``auto`` for the best that is there.
        local_rank: this process's number on its machine, which selects the GPU.

    Raises:
        ValueError: when the device asked for is not there, or there are fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps was asked for, but this machine has none")
    if name == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError("device cuda was asked for, but torch sees no GPU")
        if local_rank >= count:
            raise ValueError(
                f"process {local_rank} of this machine has no GPU: torch sees {count}; start fewer processes"
            )
        return torch.device("cuda", local_rank)
    return torch.device(name)


_threads_left = threading.Event()


def may_abort_at_exit() -> bool:
    """Whether the interpreter's teardown could abort this process.

    Gloo's threads can outlive their group, and one that lets go of a tensor while the interpreter is taken apart aborts
    the process (https://github.com/pytorch/pytorch/pull/179291): a run whose work is done and saved would fail.
    """
    return _threads_left.is_set()


@contextmanager
def distributed_session(device: str = "auto", *, timeout_minutes: float = 10.0) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, or makes a group of one, and yields this process's device.

    NCCL connects GPUs and gloo everything else. A group exists even for one process, so that sharding and mixed
    precision need no special case. A process that already is in a group stays in it.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        timeout_minutes: how long a collective waits for a peer before the run fails.

    Raises:
        ValueError: on a device that is not there, or an incomplete launch environment.
    """
    if dist.is_initialized():
        yield choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
        return
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if launched:
        missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"RANK and WORLD_SIZE are set but {', '.join(missing)} not: start with torchrun, or unset them"
            )
    chosen = choose_device(device, int(os.environ["LOCAL_RANK"]) if launched else 0)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if launched:
        dist.init_process_group(backend, timeout=timeout, device_id=chosen if backend == "nccl" else None)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    try:
        yield chosen
    finally:
        if backend == "gloo" and dist.get_world_size() > 1:
            _threads_left.set()
        dist.destroy_process_group()
