"""A trained task model as one file: network, classes, and everything that decides how a photo is prepared for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.config import Config, TaskConfig, as_pair, parse_config, parse_task_config, render_config
from dinov2.models.pretrained import read_checkpoint
from dinov2.models.task_model import TaskModel
from dinov2.tasks.model import build_task_model
from dinov2.utils.checksums import write_with_checksum

FORMAT_VERSION = 1
MOST_SHOWN = 300  # characters of what does not fit
_KEYS = ("format_version", "task", "classes", "depth_unit", "light", "config", "backbone_config", "model", "figures")


@dataclass(frozen=True, kw_only=True)
class TaskPackage:
    """A task model ready for photos.

    Attributes:
        model: in evaluation mode, on its device; low-rank additions are merged.
        task: ``classification``, ``segmentation`` or ``depth``.
        classes: names by index; empty for depth.
        image_size: pixels (height, width) that photos are resized to, or the window that goes over large ones.
        resize: ``stretch``, ``shorter_side`` or ``original``; see `dinov2.data.task_transforms.EvalTransform`.
        multi_label: whether a photo may have several classes.
        per_part: whether the model answers per part, from several photos.
        max_photos: how many photos of a part it sees at once.
        depth_unit: unit of its depths; empty for relative depth and other tasks.
        light: how photos are prepared, as the ``light`` of dataset strings.
        settings: figures on val when it was written, and other plain values.
    """

    model: TaskModel
    task: str
    classes: tuple[str, ...]
    image_size: tuple[int, int]
    resize: str
    multi_label: bool = False
    per_part: bool = False
    max_photos: int = 1
    depth_unit: str = ""
    light: str = "original"
    settings: dict[str, Any]


def make_package(
    model: TaskModel,
    config: TaskConfig,
    *,
    classes: tuple[str, ...],
    depth_unit: str,
    light: str,
    settings: dict[str, Any] | None = None,
) -> TaskPackage:
    """Describes a model by the options it was trained with."""
    return TaskPackage(
        model=model,
        task=config.task,
        classes=classes,
        image_size=as_pair(config.data.image_size),
        resize=config.data.resize,
        multi_label=config.data.multi_label,
        per_part=config.head.per_part,
        max_photos=config.data.max_photos,
        depth_unit=depth_unit,
        light=light,
        settings=settings or {},
    )


def save_task_package(
    path: str | Path,
    state: dict[str, Tensor],
    config: TaskConfig,
    backbone_config: Config,
    *,
    classes: tuple[str, ...],
    depth_unit: str,
    light: str,
    figures: dict[str, float],
) -> None:
    """Writes a model under its name when it is whole, with its SHA-256 beside it.

    Args:
        path: file to write, such as ``OUT/best.pth``.
        state: of a `TaskModel` without low-rank additions: ``backbone.…`` and ``head.…``, on the processor.
        config: options of the run.
        backbone_config: its ``student`` section describes the backbone.
        classes: names by index; empty for depth.
        depth_unit: unit of the depths.
        light: how photos were prepared.
        figures: on val.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "task": config.task,
        "classes": list(classes),
        "depth_unit": depth_unit,
        "light": light,
        "config": render_config(config),
        "backbone_config": render_config(backbone_config),
        "figures": dict(figures),
        "model": state,
    }
    write_with_checksum(path, lambda file: torch.save(content, file))


def load_task_package(path: str | Path, device: torch.device | str = "cpu") -> TaskPackage:
    """Reads what `save_task_package` wrote; nothing in it can run code.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, no task model, or of another version.
    """
    content = read_checkpoint(Path(path))
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ValueError(
            f"{path} is not a task model (it lacks {', '.join(missing)}); run/train/finetune.py writes best.pth"
        )
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {content['format_version']}, this version of dinov2 reads {FORMAT_VERSION}"
        )
    config = parse_task_config(content["config"], f"{path}: config")
    backbone_config = parse_config(content["backbone_config"], f"{path}: backbone_config")
    classes = tuple(content["classes"])
    model = build_task_model(config, backbone_config, num_outputs=max(1, len(classes)))
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        shown = " ".join(str(error)[:MOST_SHOWN].split())
        raise ValueError(f"{path}: the weights do not fit the options beside them: {shown} …") from error
    return make_package(
        model.requires_grad_(False).eval().to(device),
        config,
        classes=classes,
        depth_unit=content["depth_unit"],
        light=content["light"],
        settings={"figures": content["figures"], "config": content["config"]},
    )
