"""Tensors of a model and its optimiser: this process's part of them, and filling them from rank files.

Loading goes tensor by tensor: beside the model itself, one tensor's rows are in memory at a time.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.distributed import all_gather_objects, get_rank
from dinov2.fsdp.shards import RankFiles, held_rows, local_part


def local_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """This process's rows of every tensor, sharing memory with them, as a rank file holds them.

    Returns:
        ``model``: parameters and buffers by name; ``rows``: ``[start, count, total]`` by name; ``optimizer``: states by
        kind and parameter name, such as ``{"exp_avg": {"student.backbone.norm.weight": …}}``.
    """
    tensors = dict(_named_tensors(model))
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        for kind, tensor in optimizer.state.get(parameter, {}).items():
            moments.setdefault(kind, {})[name] = local_part(tensor)
    return {
        "model": {key: local_part(tensor) for key, tensor in tensors.items()},
        "rows": {key: _as_list(tensor) for key, tensor in tensors.items()},
        "optimizer": moments,
    }


@torch.no_grad()
def load_model(model: nn.Module, files: RankFiles, path: str) -> None:
    """Fills this process's rows of the model.

    Raises:
        ValueError: when the files come from another architecture; nothing is changed then.
    """
    tensors = dict(_named_tensors(model))
    _check_same_architecture({key: tuple(tensor.shape) for key, tensor in tensors.items()}, files, path)
    for key, tensor in tensors.items():
        _fill(local_part(tensor), files.pieces("model", key, held_rows(tensor), of_rank=get_rank()))


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


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _as_list(tensor: Tensor) -> list[int]:
    rows = held_rows(tensor)
    return [rows.start, rows.count, rows.total]


def _check_same_architecture(shapes: dict[str, tuple[int, ...]], files: RankFiles, path: str) -> None:
    saved = files.names("model")
    problems = [f"  not in the checkpoint: {name}" for name in sorted(shapes.keys() - saved)]
    problems += [f"  only in the checkpoint: {name}" for name in sorted(saved - shapes.keys())]
    problems += [
        f"  {name}: {files.shape('model', name)} in the checkpoint, {shape} in the model"
        for name, shape in shapes.items()
        if name in saved and files.shape("model", name) != shape
    ]
    if problems:
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{path} was written by another architecture:\n" + "\n".join(problems[:12]) + more)
