"""A small model with an optimiser, its checkpointer, and what tests look at afterwards."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dinov2.checkpoint.checkpointer import FSDPCheckpointer
from tests.processes import leave_group, run_processes


def build(folder: Path, seed: int = 0, width: int = 3, **more: Any) -> FSDPCheckpointer:
    """A model with buffers that has taken a step of AdamW; saves at once unless told otherwise."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return FSDPCheckpointer(model, folder, optimizer=optimizer, **{"asynchronous": False} | more)


def save_steps(folder: Path, *steps: int) -> dict[int, list[Tensor]]:
    """Saves steps of different values, and returns these."""
    found = {}
    for step in steps:
        checkpointer = build(folder, seed=step)
        checkpointer.save(f"model_{step:07d}", iteration=step)
        found[step] = states(checkpointer)
    return found


def states(checkpointer: FSDPCheckpointer) -> list[Tensor]:
    moments = [tensor for state in checkpointer.optimizer.state.values() for _, tensor in sorted(state.items())]
    return [tensor.clone() for tensor in [*checkpointer.model.state_dict().values(), *moments]]


def is_equal(ours: list[Tensor], expected: list[Tensor]) -> bool:
    assert len(ours) == len(expected) > 0
    return all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))


def names(folder: Path) -> list[str]:
    """Files of a folder, checksums aside."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".sha256")


def flip(file: Path) -> None:
    """Changes a bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def run_python(*words: str, code: str = "", folder: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Runs Python with these words, or with a script and these, from a folder."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder or "."), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *(["-c", code] if code else []), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def build_sharded(folder: Path, seed: int = 0, **more: Any) -> FSDPCheckpointer:
    """A sharded model of uneven row counts, the same for any number of processes, whose optimiser holds moments."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, 3), nn.Linear(3, 1))
    model.register_buffer("center", torch.randn(1, 5))
    values = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for name, parameter in model.named_parameters():
        parameter.grad = dist.tensor.distribute_tensor(values[name], parameter.device_mesh, parameter.placements)
    optimizer.step()
    optimizer.zero_grad()
    return FSDPCheckpointer(model, folder, optimizer=optimizer, **{"asynchronous": True} | more)


def whole(checkpointer: FSDPCheckpointer) -> dict[str, Tensor]:
    """Whole tensors of the model and of the moments, in every process."""
    found = dict(checkpointer.model.state_dict())
    for name, parameter in checkpointer.model.named_parameters():
        found |= {f"{kind}.{name}": tensor for kind, tensor in checkpointer.optimizer.state[parameter].items()}
    return {name: (t.full_tensor() if isinstance(t, dist.tensor.DTensor) else t).clone() for name, t in found.items()}


def in_processes(count: int, folder: Path, work: Callable[[Path], None]) -> None:
    """Runs ``work(folder)`` in so many processes of a gloo group."""
    (folder / "stores").mkdir(exist_ok=True)
    store = folder / "stores" / f"{time.monotonic_ns()}"
    run_processes(partial(_in_group, count, store, work, folder), count=count)


def _in_group(count: int, store: Path, work: Callable[[Path], None], folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), count), rank=rank, world_size=count)
    try:
        work(folder)
    except BaseException:
        dist.destroy_process_group()
        raise
    leave_group()
