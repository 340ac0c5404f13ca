"""How the processes of a test begin, and how they end when all is done."""

import os
import sys
from collections.abc import Callable
from multiprocessing.context import BaseContext
from typing import Any, NoReturn

import torch.distributed as dist
import torch.multiprocessing as mp

# What takes seconds to import, imported once for all of them.
PRELOADED = ("pytest", "torch.distributed.fsdp", "dinov2.tasks.engine", "dinov2.eval.linear", "dinov2.eval.retrieval")


def forking_context() -> BaseContext:
    """Starts processes by forking one that has only imported; this one, having used torch, must not fork.

    They see the environment and the folder that this process had when the first of them was started.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def run_processes(work: Callable[..., None], *args: Any, count: int = 2) -> None:
    """Calls ``work(rank, *args)`` in so many processes, and waits for them.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one has failed.
    """
    forking_context()
    mp.start_processes(work, args=args, nprocs=count, start_method="forkserver")


def leave_group() -> NoReturn:
    """Ends this process with code 0, without ending the interpreter.

    Gloo's threads can outlive the group, and one that drops a tensor while the interpreter ends aborts the process
    (https://github.com/pytorch/pytorch/pull/179291): the likely cause of an abort seen once in a few hundred processes.
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
