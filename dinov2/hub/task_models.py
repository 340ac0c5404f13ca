"""Joining a released backbone and a task head, each with the released weights, those of a file, or none."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.hub.backbones import make_backbone
from dinov2.models.layouts import listing
from dinov2.models.pretrained import read_checkpoint
from dinov2.models.released import fetch_weights
from dinov2.models.task_model import TensorTaskModel
from dinov2.utils.param_groups import strip_wrappers

logger = logging.getLogger("dinov2")

_CONTAINERS = ("state_dict", "model")
# Upstream's depth and segmentation heads, and the head of a model of ours; classifiers come without a prefix.
_PREFIXES = ("decode_head.", "head.")


def load_head_weights(head: nn.Module, source: str | Path) -> None:
    """Fills a head from a released head, a task file of ours, or a bare state dict.

    Understood are bare names (released classifiers: ``weight``, ``bias``), names behind ``decode_head.`` (released
    depth and segmentation heads) or ``head.`` (task files), at the top or under ``state_dict`` or ``model``. What else
    a file holds is left alone. The head is changed only when everything fits. Where the file may lie says
    `fetch_weights`.

    Raises:
        ConnectionError: when a download fails.
        FileNotFoundError: when the file does not exist.
        ValueError: when it cannot be read safely, lacks a parameter of the head, or has one of another shape: it then
            belongs to another kind of head, another backbone or another number of classes.
    """
    path = fetch_weights(source)
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
        checkpoint = read_checkpoint(path)
    container = next((key for key in _CONTAINERS if isinstance(checkpoint.get(key), Mapping)), None)
    state = checkpoint if container is None else checkpoint[container]
    tensors = {strip_wrappers(str(name)): value for name, value in state.items() if isinstance(value, Tensor)}
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in tensors)), "")
    found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    expected = head.state_dict()
    # Counts of training steps, which no prediction depends on; older files come without them.
    required = [name for name in expected if not name.endswith("num_batches_tracked")]
    missing = [name for name in required if name not in found]
    if missing:
        raise ValueError(
            f"{path} does not hold a {type(head).__name__}: {len(missing)} of its {len(required)} parameters are "
            f"missing ({listing(missing)}); found: {listing(found) or 'no tensors'}"
        )
    wrong = [
        f"{name} is {list(found[name].shape)} in the file and {list(tensor.shape)} in the head"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(
            f"{path} holds a {type(head).__name__} for another backbone, number of blocks or of classes: "
            f"{listing(wrong, '; ')}"
        )
    unexpected = [name for name in found if name not in expected]
    if unexpected:
        logger.warning("%s: %d tensors that the head does not have: %s", path, len(unexpected), listing(unexpected))
    head.load_state_dict({name: found[name] for name in expected if name in found}, strict=False)


class WeightOptions(TypedDict, total=False):
    """Where the weights of a network with a released head come from.

    Attributes:
        pretrained: whether released weights are fetched for what has no source below (the default); without, it is
            random.
        backbone_weights: a file or an address in place of the released backbone, see `fetch_weights`; a task file of
            ours is understood.
        head_weights: the same for the head.
    """

    pretrained: bool
    backbone_weights: str | Path | None
    head_weights: str | Path | None


def make_task_model(
    name: str,
    head: nn.Module,
    *,
    blocks: Sequence[int],
    norm: bool,
    released_head: str | None,
    pretrained: bool = True,
    backbone_weights: str | Path | None = None,
    head_weights: str | Path | None = None,
) -> TensorTaskModel:
    """Loads what is to be loaded into a head and a backbone and joins them.

    Args:
        name: of a released backbone, such as ``dinov2_vits14``.
        head: with random weights.
        blocks: see `TensorTaskModel`.
        norm: see `TensorTaskModel`.
        released_head: address of the released head; None where none was released.
        pretrained: see `WeightOptions`, like the following.
        backbone_weights: file or address of the backbone.
        head_weights: file or address of the head.

    Returns:
        The model, in evaluation mode.

    Raises:
        ConnectionError: when a download fails.
        FileNotFoundError: when a file does not exist.
        ValueError: when weights do not fit, or are wanted where none were released.
    """
    # The head first: its files are small, and what is wrong with them shows before gigabytes are fetched.
    source = head_weights or (released_head if pretrained else None)
    if source is not None:
        load_head_weights(head, source)
    elif pretrained:
        raise ValueError(
            "no such head was released: give a file as head_weights, or pretrained=False for random weights"
        )
    backbone = make_backbone(name, pretrained=pretrained or backbone_weights is not None, weights=backbone_weights)
    return TensorTaskModel(backbone, head, blocks=blocks, norm=norm).eval()


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises a ValueError for a value that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
