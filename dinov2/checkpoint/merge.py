"""Rank files of a run -> one file with whole tensors, without a process group.

Bytes go from mapped files into the new one, piece by piece: however large the model is, no tensor of it is held in
memory. While the new file is written, its size is needed on the disk once more.
"""

import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from dinov2.checkpoint.integrity import DamagedCheckpointError, newest_good_step, open_verified
from dinov2.checkpoint.sharding import RankFiles, Rows, rank_pattern
from dinov2.config import ConfigError, load_config, read_yaml, render_config
from dinov2.utils.files import remove_unfinished, shown_fault, write_with_checksum

logger = logging.getLogger("dinov2")

WHATS = ("teacher", "student", "all")
SUFFIXES = (".pth", ".safetensors")
BACKBONE = "backbone."
SAFETENSORS = {  # names of this format
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
    ``teacher.backbone.cls_token``. The options in the folder's ``config.yaml`` come along as the text ``config``, in a
    ``.safetensors`` file among its metadata. The file is written atomically, with a checksum beside it.

    Args:
        source: folder of a run, whose newest good step is taken; or one of the rank files of a step.
        output: file that ends in ``.pth`` or ``.safetensors``.
        what: ``teacher``, ``student`` or ``all``.

    Raises:
        FileNotFoundError: the folder holds no checkpoint, or a rank file is missing.
        ValueError: a file is damaged (``config.yaml`` too), the ending is unknown, or the step holds no such network.
        OSError: the file cannot be written.
    """
    path = _check_output(output)
    if what not in WHATS:
        raise ValueError(f"what={what!r} cannot be merged; choose among {', '.join(WHATS)}")
    files = _open(source)
    names = [name for name in files.files[0]["model"] if what == "all" or name.startswith(f"{what}.")]
    if not names:
        raise ValueError(f"{files.pattern} holds no {what}; it holds {_listing(files.names('model'))}")

    def nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        parts: dict[str, dict[str, Tensor]]
        parts = {part: {} for part in (("teacher", "student", "other") if what == "all" else (what,))}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part in ("teacher", "student"):
                parts[part][rest] = tensor
            else:
                parts["other"][name] = tensor
        return parts | options

    iteration, options = int(files.files[0]["iteration"]), _options_of_run(files)
    metadata = {"format": "pt", "what": what, "iteration": str(iteration), **options}
    size = _write(path, partial(_map_whole, files, dict(zip(names, names, strict=True))), nested, metadata)
    return MergedFile(files.pattern, path, iteration, *size)


def extract_teacher(source: str | Path, output: str | Path) -> MergedFile:
    """Writes the teacher's backbone alone, as a bare state dict of the names that released weights have.

    A ``.safetensors`` file also keeps the options of the run, where they are known, as ``config`` among its metadata. A
    ``.pth`` file does not say how images were preprocessed; where they were, a warning does.

    Args:
        source: folder of a run, a rank file, or a ``teacher_checkpoint.pth``.
        output: file that ends in ``.pth`` or ``.safetensors``.

    Raises:
        FileNotFoundError, ValueError, OSError: see `merge_checkpoint`.
    """
    path = _check_output(output)
    files, iteration, prefix = None, None, ""
    if Path(source).is_file() and ".rank_" not in Path(source).name:
        name = str(source)
        if fault := shown_fault(Path(source)):
            raise DamagedCheckpointError(f"{name} {fault}")
        try:  # tensors are mapped and not read yet
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # bytes that are no checkpoint make the unpickler raise almost anything
            raise ValueError(f"{name} cannot be read as a teacher's file: {error}") from error
        if not isinstance(content, Mapping) or not isinstance(content.get("teacher"), Mapping):
            raise ValueError(f"{name} is no teacher's file: it lacks the key teacher")
        state = content["teacher"]
        options = {"config": content["config"]} if "config" in content else {}
    else:
        files, prefix = _open(source), "teacher."
        name, iteration, state = files.pattern, int(files.files[0]["iteration"]), files.files[0]["model"]
        options = _options_of_run(files)
    start = prefix + BACKBONE
    names = {key.removeprefix(start): key for key in state if key.startswith(start)}
    if not names:
        held = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
        raise ValueError(f"{name} holds no backbone of a teacher; it holds {_listing(held)}")

    if path.suffix == ".pth" and (steps := _preprocessing_of(options)):
        logger.warning(
            "%s holds bare weights, and does not say that its images were preprocessed: %s. A .safetensors file keeps "
            "that; else name the steps by --preprocessing or data.preprocessing wherever the file is used",
            *(path, steps),
        )

    def tensors(scratch: IO[bytes]) -> dict[str, Tensor]:
        if files is not None:
            return _map_whole(files, names, scratch)
        return {short: state[key] for short, key in names.items()}

    return MergedFile(name, path, iteration, *_write(path, tensors, dict, {"format": "pt", **options}))


def _preprocessing_of(options: Mapping[str, str]) -> Any:
    """What the text of a run's options names as ``data.preprocessing``; None for nothing."""
    content = read_yaml(options.get("config", ""), "config")
    data = content.get("data") if isinstance(content, Mapping) else None
    return data.get("preprocessing") if isinstance(data, Mapping) else None


def _open(source: str | Path) -> RankFiles:
    if not Path(source).is_dir():
        if ".rank_" not in Path(source).name and not Path(source).exists():
            raise FileNotFoundError(f"no file or folder {source}")
        return open_verified(rank_pattern(str(source)))
    files = newest_good_step(source)
    if files is None:
        raise FileNotFoundError(f"{source} holds no checkpoint (model_0000000.rank_0.pth, ...)")
    return files


def _options_of_run(files: RankFiles) -> dict[str, str]:
    """The text of ``config.yaml`` where there is one; only pretraining's, whose tensors name networks, is checked."""
    path = Path(files.pattern).parent / "config.yaml"
    if not path.is_file():
        return {}
    if not any(name.startswith(("teacher.", "student.")) for name in files.names("model")):
        return {"config": path.read_text(encoding="utf-8")}
    try:
        rendered = render_config(load_config(path))
    except ConfigError as error:
        raise ConfigError(f"{error}. Mend the file, or move it away: options go into the new file") from error
    text = path.read_text(encoding="utf-8")
    if text != rendered:
        logger.warning(
            "%s is not as a run of this version writes it: it is cut, edited, or of another version; "
            "options that it lacks count as their defaults wherever the new file is read",
            path,
        )
    return {"config": text}


def _map_whole(files: RankFiles, names: Mapping[str, str], scratch: IO[bytes]) -> dict[str, Tensor]:
    """Joins the rows of tensors, given by new name, at the end of a scratch file, and maps them from there."""
    tensors: dict[str, Tensor] = {}
    for new_name, name in names.items():
        shape, dtype = files.shape("model", name), files.files[0]["model"][name].dtype
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        if nbytes == 0:
            tensors[new_name] = torch.empty(shape, dtype=dtype)
            continue
        start, rows = scratch.tell(), shape[0] if shape else 1
        for piece in files.pieces("model", name, Rows(0, rows, rows)):
            scratch.write(_bytes(piece))
        scratch.flush()
        pages = np.memmap(scratch, dtype=np.uint8, mode="c", offset=start, shape=(nbytes,))
        scratch.seek(start + nbytes)
        tensors[new_name] = torch.from_numpy(pages).view(dtype).reshape(shape)
    return tensors


def _write(
    path: Path,
    map_tensors: Callable[[IO[bytes]], dict[str, Tensor]],
    nested: Callable[[dict[str, Tensor]], dict[str, Any]],
    metadata: dict[str, str],
) -> tuple[int, int]:
    """Writes a file with its checksum; returns how many tensors it holds and their size in bytes."""
    remove_unfinished(path.parent)  # of commands like this one that were killed
    with tempfile.TemporaryFile(dir=path.parent) as scratch:
        tensors = map_tensors(scratch)
        if path.suffix == ".pth":
            write_with_checksum(path, lambda file: torch.save(nested(tensors), file))
        else:
            write_with_checksum(path, partial(write_safetensors, tensors, metadata))
        return len(tensors), sum(tensor.nbytes for tensor in tensors.values())


def write_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], file: IO[bytes]) -> None:
    """The library's own writer takes a path, where a killed process leaves an unfinished file that nobody knows."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    tensors = dict(
        sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    )  # each at a multiple of its size
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": SAFETENSORS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _check_output(output: str | Path) -> Path:
    path = Path(output)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the new file's name must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} of the new file does not exist")
    return path


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.partition(".")[0] for name in names})) or "nothing"
