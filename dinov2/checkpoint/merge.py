"""Rank files of a run -> one file with whole tensors, without a process group.

Bytes go from mapped files into the new one, piece by piece: however large the model is, no tensor of it is held in
memory. A ``.pth`` file needs as much room again on the disk while it is written.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dinov2.checkpoint.integrity import DamagedCheckpointError
from dinov2.checkpoint.restore import newest_good_step, open_verified
from dinov2.checkpoint.sharding import RankFiles, Rows, rank_pattern
from dinov2.utils.files import shown_fault, write_with_checksum

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that lies in files.

    Attributes:
        shape: of the whole tensor.
        dtype: number format.
        pieces: returns its rows in order, in one piece or several, mapped from files and not read yet.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Sequence[Tensor]]

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def write(self, file: IO[bytes]) -> None:
        """Writes its bytes in row-major order, from one file into the other."""
        for piece in self.pieces():
            file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_safetensors(file: IO[bytes], tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors in turn, from their files into this one.

    Args:
        file: binary file object, written front to back.
        tensors: by name.
        metadata: further texts by name.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    # Wide formats first: every tensor then begins at a multiple of its own item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in order:
        tensor = tensors[name]
        end = position + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        tensors[name].write(file)


logger = logging.getLogger("dinov2")

WHATS = ("teacher", "student", "all")
SUFFIXES = (".pth", ".safetensors")
BACKBONE = "backbone."


@dataclass(frozen=True)
class MergedFile:
    """What was written.

    Attributes:
        source: pattern of the rank files, or the teacher's file.
        path: the new file.
        iteration: after which the tensors were saved; None when the source does not say.
        tensors: how many there are.
        nbytes: their size.
    """

    source: str
    path: Path
    iteration: int | None
    tensors: int
    nbytes: int

    def __str__(self) -> str:
        when = "" if self.iteration is None else f", iteration {self.iteration}"
        return f"{self.path}: {self.tensors} tensors, {self.nbytes / 2**20:.1f} MiB, from {self.source}{when}"


def merge_checkpoint(source: str | Path, output: str | Path, *, what: str = "teacher") -> MergedFile:
    """Writes whole tensors of one step into one file.

    A ``.pth`` file of the teacher is ``{"teacher": state dict}``, as a run writes it at an evaluation, and loads
    wherever weights are asked for; ``student`` likewise. ``all`` holds both, and under ``other`` the centres of the
    losses; the optimiser is left out. A ``.safetensors`` file holds the same under full names such as
    ``teacher.backbone.cls_token``. The file is written atomically, with a checksum beside it.

    Args:
        source: folder of a run, whose newest good step is taken; or one of the rank files of a step.
        output: file that ends in ``.pth`` or ``.safetensors``.
        what: ``teacher``, ``student`` or ``all``.

    Raises:
        FileNotFoundError: the folder holds no checkpoint, or a rank file is missing.
        ValueError: a file is damaged, the ending is unknown, or the step holds no such network.
        OSError: the file cannot be written.
    """
    path = _check_output(output)
    if what not in WHATS:
        raise ValueError(f"what={what!r} cannot be merged; choose among {', '.join(WHATS)}")
    files = _open(source)
    tensors = {name: tensor for name, tensor in _lazy(files).items() if what == "all" or name.startswith(f"{what}.")}
    if not tensors:
        raise ValueError(f"{files.pattern} holds no {what}; it holds {_listing(_lazy(files))}")
    iteration = int(files.files[0]["iteration"])
    if path.suffix == ".safetensors":
        metadata = {"format": "pt", "what": what, "iteration": str(iteration)}
        write_with_checksum(path, lambda file: write_safetensors(file, tensors, metadata))
    else:
        parts = ("teacher", "student") if what == "all" else (what,)
        content: dict[str, Any] = {
            part: {name.removeprefix(f"{part}."): tensors[name] for name in tensors if name.startswith(f"{part}.")}
            for part in parts
        }
        if what == "all":
            content["other"] = {name: tensors[name] for name in tensors if name.partition(".")[0] not in parts}
        _write_pth(path, content)
    return _merged(files.pattern, path, iteration, tensors)


def extract_teacher(source: str | Path, output: str | Path) -> MergedFile:
    """Writes the teacher's backbone alone, as a bare state dict of the names that released weights have.

    Args:
        source: folder of a run, a rank file, or a ``teacher_checkpoint.pth``.
        output: file that ends in ``.pth`` or ``.safetensors``.

    Raises:
        FileNotFoundError, ValueError, OSError: see `merge_checkpoint`.
    """
    path = _check_output(output)
    iteration = None
    if Path(source).is_file() and ".rank_" not in Path(source).name:
        name, whole = str(source), _teacher_file(Path(source))
    else:
        files = _open(source)
        iteration = int(files.files[0]["iteration"])
        name = files.pattern
        whole = {key.removeprefix("teacher."): item for key, item in _lazy(files).items() if key.startswith("teacher.")}
    tensors = {key.removeprefix(BACKBONE): item for key, item in whole.items() if key.startswith(BACKBONE)}
    if not tensors:
        raise ValueError(f"{name} holds no backbone of a teacher; it holds {_listing(whole)}")
    if path.suffix == ".safetensors":
        write_with_checksum(path, lambda file: write_safetensors(file, tensors, {"format": "pt"}))
    else:
        _write_pth(path, tensors)
    return _merged(name, path, iteration, tensors)


def _open(source: str | Path) -> RankFiles:
    if not Path(source).is_dir():
        return open_verified(rank_pattern(str(source)))
    pattern = newest_good_step(source)
    if not pattern:
        raise FileNotFoundError(f"{source} holds no checkpoint (model_0000000.rank_0.pth, ...)")
    return RankFiles(pattern)


def _lazy(files: RankFiles) -> dict[str, LazyTensor]:
    """All tensors of the networks and losses, in the model's order."""
    return {
        name: LazyTensor(files.shape("model", name), tensor.dtype, partial(_whole, files, name))
        for name, tensor in files.files[0]["model"].items()
    }


def _whole(files: RankFiles, name: str) -> list[Tensor]:
    total = Rows(*files.files[0]["rows"][name]).total
    return files.pieces("model", name, Rows(0, total, total))


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _teacher_file(path: Path) -> dict[str, LazyTensor]:
    if fault := shown_fault(path):
        raise DamagedCheckpointError(f"{path} {fault}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # bytes that are no checkpoint make the unpickler raise almost anything
        raise ValueError(f"{path} cannot be read as a teacher's file: {error}") from error
    state = content.get("teacher") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} is no teacher's file: it lacks the key teacher")
    return {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, partial(_alone, tensor)) for name, tensor in state.items()
    }


def _write_pth(path: Path, content: dict[str, Any]) -> None:
    """``torch.save`` of tensors that lie on disk: it wants all of them at once, so they are mapped, not held."""
    with tempfile.TemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as scratch:
        mapped = _map(content, scratch)
        write_with_checksum(path, lambda file: torch.save(mapped, file))


def _map(content: Any, scratch: IO[bytes]) -> Any:
    """Puts every tensor into the scratch file and maps it from there."""
    if not isinstance(content, LazyTensor):
        return {key: _map(value, scratch) for key, value in content.items()}
    if content.nbytes == 0:
        return torch.empty(content.shape, dtype=content.dtype)
    start = scratch.seek(0, 2)
    content.write(scratch)
    scratch.flush()
    pages = np.memmap(scratch, dtype=np.uint8, mode="c", offset=start, shape=(content.nbytes,))
    return torch.from_numpy(pages).view(content.dtype).reshape(content.shape)


def _check_output(output: str | Path) -> Path:
    path = Path(output)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the new file's name must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} of the new file does not exist")
    return path


def _merged(source: str, path: Path, iteration: int | None, tensors: Mapping[str, LazyTensor]) -> MergedFile:
    return MergedFile(source, path, iteration, len(tensors), sum(tensor.nbytes for tensor in tensors.values()))


def _listing(names: Mapping[str, object]) -> str:
    return ", ".join(sorted({name.partition(".")[0] for name in names})) or "nothing"
