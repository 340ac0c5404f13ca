"""Which rows of a tensor this process holds, and reading rows back from the files of any number of processes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


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

    def read(self, part: str, name: str, rows: Rows) -> Tensor:
        """Returns the asked rows of a tensor, put together from whatever files hold them."""
        pieces = self.pieces(part, name, rows)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

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
        content: Any = self.files[rank]
        for key in part.split("."):
            content = content[key]
        return content  # type: ignore[no-any-return]

    def _rows(self, rank: int, name: str) -> Rows:
        return Rows(*self.files[rank]["rows"][name])


def rank_file(pattern: str, rank: int) -> str:
    """The path of one process's file; other braces in the path are left alone."""
    return pattern.replace("{rank}", str(rank))


def rank_pattern(path: str) -> str:
    """Puts ``{rank}`` in place of the number in ``….rank_<number>.pth``.

    Raises:
        ValueError: when the path names no rank.
    """
    if "{rank}" in path:
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
        raise FileNotFoundError(f"checkpoint file {path} does not exist{_beside(path)}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise almost anything
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is truncated or not a checkpoint: {reason}") from error
    missing = [key for key in REQUIRED_KEYS if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of a training run: it lacks {', '.join(missing)}")
    return content  # type: ignore[no-any-return]


def _beside(path: Path) -> str:
    """What else lies there, for an error message."""
    others = sorted(other.name for other in _checkpoint_files(path.parent))
    return f"; beside it lie {', '.join(others[:6])}" if others else ""


def _checkpoint_files(folder: Path) -> Iterator[Path]:
    return folder.glob("*.rank_*.pth") if folder.is_dir() else iter(())
