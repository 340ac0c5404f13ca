"""Joining and leaving the group of processes of a run."""

import datetime
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dinov2.distributed.device import choose_device

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
