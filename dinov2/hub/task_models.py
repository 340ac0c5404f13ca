"""Joining a released backbone and a task head, each with the released weights, those of a file, or none."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.hub.backbones import local_file, make_backbone
from dinov2.models.pretrained import read_checkpoint
from dinov2.models.task_model import TaskModel
from dinov2.utils.param_groups import strip_wrappers

logger = logging.getLogger("dinov2")

_CONTAINERS = ("state_dict", "model")
# Upstream's depth and segmentation heads, and the head of a model of ours; classifiers come without a prefix.
_PREFIXES = ("decode_head.", "head.")
MAX_LISTED = 8


def load_head_weights(head: nn.Module, path: str | Path) -> None:
    """Fills a head from a released head, a task file of ours, or a bare state dict.

    Understood are bare names (released classifiers: ``weight``, ``bias``), names behind ``decode_head.`` (released
    depth and segmentation heads) or ``head.`` (task files), at the top or under ``state_dict`` or ``model``. What else
    a file holds is left alone. The head is changed only when everything fits.

    Raises:
        FileNotFoundError: when the file does not exist.
        ValueError: when it cannot be read safely, lacks a parameter of the head, or has one of another shape: it then
            belongs to another kind of head, another backbone or another number of classes.
    """
    path = Path(path)
    found = _head_tensors(_read(path))
    expected = head.state_dict()
    # Counts of training steps, which no prediction depends on; older files come without them.
    required = [name for name in expected if not name.endswith("num_batches_tracked")]
    missing = [name for name in required if name not in found]
    if missing:
        raise ValueError(
            f"{path} does not hold a {type(head).__name__}: {len(missing)} of its {len(required)} parameters are "
            f"missing ({_listing(missing)}); found: {_listing(found) or 'no tensors'}"
        )
    wrong = [
        f"{name} is {list(found[name].shape)} in the file and {list(tensor.shape)} in the head"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(
            f"{path} holds a {type(head).__name__} for another backbone, number of blocks or of classes: "
            f"{_listing(wrong, '; ')}"
        )
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        logger.warning("%s: %d tensors that the head does not have: %s", path, len(unexpected), _listing(unexpected))
    head.load_state_dict({name: found[name] for name in expected if name in found}, strict=False)


def _read(path: Path) -> Mapping[str, Any]:
    # Released depth heads carry the best score of their training as a NumPy scalar. Rebuilding one from its bytes runs
    # no code. NumPy 2 moved the function, and a file names it by the place where its writer found it.
    rebuild_scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [
        (rebuild_scalar, "numpy.core.multiarray.scalar"),
        (rebuild_scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(name)) for name in ("float64", "float32", "int64")),
    ]
    with torch.serialization.safe_globals(allowed):
        return read_checkpoint(path)


def _head_tensors(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the head, under its own names."""
    container = next((key for key in _CONTAINERS if isinstance(checkpoint.get(key), Mapping)), None)
    state = checkpoint if container is None else checkpoint[container]
    tensors = {strip_wrappers(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}
    for prefix in _PREFIXES:
        behind = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if behind:
            return behind
    return tensors


def _listing(names: list[str] | Mapping[str, Tensor], separator: str = ", ") -> str:
    listed = list(names)
    more = len(listed) - MAX_LISTED
    return separator.join(listed[:MAX_LISTED]) + (f"{separator}and {more} more" if more > 0 else "")


def make_task_model(
    name: str,
    head: nn.Module,
    *,
    blocks: Sequence[int],
    norm: bool,
    released_head: str | None,
    pretrained: bool,
    backbone_weights: str | Path | None,
    head_weights: str | Path | None,
    registers: bool = False,
) -> TaskModel:
    """Loads what is to be loaded into a head and a backbone and joins them.

    Args:
        name: of the backbone, such as ``vits14``.
        head: with random weights.
        blocks: see `TaskModel`.
        norm: see `TaskModel`.
        released_head: address of the released head; None where none was released.
        pretrained: whether released weights are fetched for what has no file.
        backbone_weights: file or URL of the backbone.
        head_weights: file or URL of the head.
        registers: whether the backbone has register tokens.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: when a file does not exist.
        ValueError: when weights do not fit, or are wanted where none were released.
        urllib.error.URLError: when a download fails.
    """
    # The head first: its files are small, and what is wrong with them shows before gigabytes are fetched.
    source = head_weights or (released_head if pretrained else None)
    if source is not None:
        load_head_weights(head, local_file(source))
    elif pretrained:
        raise ValueError(
            "no such head was released: give a file as head_weights, or pretrained=False for random weights"
        )
    backbone = make_backbone(
        name, registers=registers, pretrained=pretrained or backbone_weights is not None, weights=backbone_weights
    )
    return TaskModel(backbone, head, blocks=blocks, norm=norm).eval()


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises a ValueError for a value that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
