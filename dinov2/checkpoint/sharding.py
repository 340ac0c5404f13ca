"""Which rows of every tensor this process holds, and putting them back from the files of any number of processes."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from dinov2.distributed import all_gather_objects, get_rank, is_main_process


@dataclass(frozen=True)
class Rows:
    """The part of a tensor that lies here: rows ``start`` to ``start + count`` of ``total``; scalars have one row."""

    start: int
    count: int
    total: int


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; a plain tensor is held whole. Shares memory with ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_rows(tensor: Tensor) -> Rows:
    """Which rows of ``tensor`` this process holds.

    FSDP2 splits the first axis into pieces of ``ceil(rows / processes)``, the last ones shorter or empty.
    """
    total = tensor.shape[0] if tensor.ndim else 1
    if not isinstance(tensor, DTensor):
        return Rows(0, total, total)
    start, count = 0, total
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            assert placement.dim == 0, "parameters are split along their first axis"
            piece = -(-total // tensor.device_mesh.size(axis))
            start = min(tensor.device_mesh.get_local_rank(axis) * piece, total)
            count = min(piece, total - start)
    assert tensor.to_local().shape[0] == count, "the split of this tensor is not the expected one"
    return Rows(start, count, total)


class RankFiles:
    """The files that the processes of a run wrote for one step, read as one set of whole tensors.

    Tensors stay on disk until their rows are asked for.

    Raises:
        FileNotFoundError: when a file of the set is missing, by name.
        ValueError: when a file is truncated or is not a checkpoint of this project, by name.
    """

    def __init__(self, pattern: str) -> None:
        """Opens all files of a step; ``pattern`` holds ``{rank}`` where the number stands."""
        first = load_file(rank_file(pattern, 0))
        world_size = int(first["world_size"])
        self.files = [first] + [load_file(rank_file(pattern, rank)) for rank in range(1, world_size)]
        self.pattern = pattern
        for rank, file in enumerate(self.files):
            if (file["rank"], file["world_size"], file["iteration"]) != (rank, world_size, first["iteration"]):
                raise ValueError(
                    f"{rank_file(pattern, rank)} is of rank {file['rank']} of {file['world_size']}, iteration "
                    f"{file['iteration']}; rank 0 is of {world_size}, iteration {first['iteration']}"
                )
            if file.get("step_id") != first.get("step_id"):
                raise ValueError(
                    f"{rank_file(pattern, rank)} is of another run than {rank_file(pattern, 0)}, though of the same "
                    "iteration: a save over an older run's step was cut off"
                )

    @property
    def world_size(self) -> int:
        """How many processes wrote the step."""
        return len(self.files)

    def names(self, part: str) -> set[str]:
        """Names of the tensors in ``part`` (``model``, or ``optimizer.<state>``)."""
        return set(self._tensors(0, part))

    def shape(self, part: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        tensor: Tensor = self._tensors(0, part)[name]
        return (self._rows(0, name).total, *tensor.shape[1:]) if tensor.ndim else ()

    def pieces(self, part: str, name: str, rows: Rows, *, of_rank: int = 0) -> list[Tensor]:
        """The asked rows of a tensor as they lie in the files, in order; nothing is copied into memory.

        Where every file holds the whole tensor, the one of process ``of_rank`` counts, if there is one: running
        statistics of batch norm are each process's own.
        """
        owner = of_rank % self.world_size
        first: Tensor = self._tensors(owner, part)[name]
        if first.ndim == 0:
            return [first]
        whole = self._rows(owner, name)
        if whole.count == whole.total:
            return [first[rows.start : rows.start + rows.count]]
        pieces = []
        position = rows.start
        for rank in range(self.world_size):
            held = self._rows(rank, name)
            stop = min(rows.start + rows.count, held.start + held.count)
            if held.start <= position < stop:
                tensor = self._tensors(rank, part)[name]
                pieces.append(tensor[position - held.start : stop - held.start])
                position = stop
        return pieces or [first[:0]]  # of so small a tensor, a process may hold no row

    def _tensors(self, rank: int, part: str) -> Mapping[str, Any]:
        content: Mapping[str, Any] = self.files[rank]
        for key in part.split("."):
            content = content[key]
        return content

    def _rows(self, rank: int, name: str) -> Rows:
        return Rows(*self.files[rank]["rows"][name])


def rank_file(pattern: str, rank: int) -> str:
    """The path of one process's file; braces in the names of folders are left alone."""
    return str(rank).join(pattern.rsplit("{rank}", 1))


def rank_pattern(path: str) -> str:
    """Puts ``{rank}`` in place of the number in ``….rank_<number>.pth``.

    Raises:
        ValueError: when the path names no rank.
    """
    if "{rank}" in path.rpartition("/")[2]:
        return path
    pattern, count = re.subn(r"\.rank_\d+\.pth$", ".rank_{rank}.pth", path)
    if count == 0:
        raise ValueError(
            f"{path} is not a rank file: expected a name such as model_0011249.rank_{{rank}}.pth "
            "(weights of a backbone alone go into student.pretrained_weights)"
        )
    return pattern


REQUIRED_KEYS = ("model", "optimizer", "rows", "rank", "world_size", "iteration")


def load_file(path: str | Path) -> dict[str, Any]:
    """Opens one checkpoint file without running code from it; tensors are mapped, not read.

    Raises:
        FileNotFoundError: when it does not exist.
        ValueError: when it is truncated, corrupt, or something else.
    """
    path = Path(path)
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob("*.rank_*.pth"))
        beside = f"; beside it lie {', '.join(others[:6])}" if others else ""
        raise FileNotFoundError(f"checkpoint file {path} does not exist{beside}")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise almost anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is truncated or not a checkpoint: {reason}") from error
    missing = [key for key in REQUIRED_KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of a training run: it lacks {', '.join(missing)}")
    return content


def local_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This process's rows of every tensor, sharing memory with them, as a rank file holds them.

    Returns:
        ``model``: parameters and buffers by name; ``rows``: ``[start, count, total]`` by name; ``optimizer``: states by
        kind and parameter name, such as ``{"exp_avg": {"student.backbone.norm.weight": …}}``.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    held = {name: held_rows(tensor) for name, tensor in tensors.items()}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            moments.setdefault(kind, {})[name] = local_part(tensor)
    return {
        "model": {name: local_part(tensor) for name, tensor in tensors.items()},
        "rows": {name: [rows.start, rows.count, rows.total] for name, rows in held.items()},
        "optimizer": moments,
    }


class OtherArchitectureError(ValueError):
    """A checkpoint's parameters are not those of the model."""


@torch.no_grad()
def load_model(model: nn.Module, files: RankFiles) -> None:
    """Fills this process's rows of the model.

    Raises:
        OtherArchitectureError: the files come from another architecture; nothing is changed then.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    saved = files.names("model")
    problems = [f"  not in the checkpoint: {name}" for name in sorted(tensors.keys() - saved)]
    problems += [f"  only in the checkpoint: {name}" for name in sorted(saved - tensors.keys())]
    problems += [
        f"  {name}: {files.shape('model', name)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in tensors.items()
        if name in saved and files.shape("model", name) != tuple(tensor.shape)
    ]
    if problems:
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        listed = "\n".join(problems[:12]) + more
        raise OtherArchitectureError(f"{files.pattern} was written by another architecture:\n{listed}")
    for name, tensor in tensors.items():
        _fill(local_part(tensor), files.pieces("model", name, held_rows(tensor), of_rank=get_rank()))


@torch.no_grad()
def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, files: RankFiles) -> None:
    """Fills this process's rows of the optimiser's states, making those that are not there yet."""
    # Fused kernels want the count of steps beside the parameters, the others on the processor.
    counts_on_device = bool(optimizer.defaults.get("fused"))
    for kind in files.files[0]["optimizer"]:
        part = f"optimizer.{kind}"
        saved = files.names(part)
        for name, parameter in model.named_parameters():
            if name not in saved:
                continue
            if files.shape(part, name) == ():
                value = torch.zeros((), device=parameter.device if counts_on_device else "cpu")
            else:
                value = torch.zeros_like(parameter)
            _fill(local_part(value), files.pieces(part, name, held_rows(parameter)))
            optimizer.state[parameter][kind] = value


def _fill(tensor: Tensor, pieces: Sequence[Tensor]) -> None:
    """Copies consecutive rows from the files straight to their place: joining them first would cost memory twice."""
    if tensor.ndim == 0:
        tensor.copy_(pieces[0])
        return
    start = 0
    for piece in pieces:
        tensor[start : start + len(piece)].copy_(piece)
        start += len(piece)
    assert start == len(tensor)


def step_id(tensors: dict[str, Tensor]) -> str:
    """A digest of the first values of every process's tensors: equal for equal runs, else different.

    It tells the files of one save from those that another run left under the same names.
    """
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.reshape(-1)[:16].contiguous().view(torch.uint8).numpy().tobytes())
    return hashlib.sha256("".join(all_gather_objects(digest.hexdigest())).encode()).hexdigest()


def full_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Collects whole tensors on the main process, one at a time; other processes get an empty dict.

    Every process must call it. Tensors are on the processor and independent of the network.
    """
    state = {}
    for name, tensor in network.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_main_process():
            state[name] = whole.detach().cpu().clone()
    return state
