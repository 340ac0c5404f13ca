"""Joining a released backbone and a task head, each with the released weights, those of a file, or none."""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dinov2.hub.backbones import make_backbone
from dinov2.hub.head_weights import load_head_weights
from dinov2.hub.released import local_file
from dinov2.models.task_model import TaskModel


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
