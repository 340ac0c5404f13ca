"""A trained task model as one file: network, classes, and everything that decides how an image is prepared for it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.config import Config, as_pair, load_config, parse_config, render_config
from dinov2.data.image_reader import ImageReader
from dinov2.data.preprocessing import Chain
from dinov2.data.value_range import ValueRange
from dinov2.models.build import build_backbone
from dinov2.models.description import config_of_weights
from dinov2.models.pretrained import load_pretrained_backbone, read_checkpoint
from dinov2.models.task_model import TaskModel
from dinov2.tasks import TASKS, parse_task_config
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.task import Task, TaskFacts
from dinov2.utils.files import write_with_checksum
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")


def load_backbone_config(config: TaskConfig) -> Config:
    """Options of pretraining that describe the backbone: of ``backbone.config_file``, or as the weights tell them.

    Raises:
        FileNotFoundError, ConfigError: naming the file of ``backbone.config_file``.
        ConnectionError, ValueError: see `config_of_weights`.
    """
    if config.backbone.config_file or not config.backbone.pretrained_weights:
        return load_config(config.backbone.config_file or None)
    return config_of_weights(config.backbone.pretrained_weights)


def build_task_model(task: Task, backbone_config: Config, *, num_outputs: int) -> TaskModel:
    """Builds backbone and head with random weights.

    Args:
        task: its options describe what is built on the backbone.
        backbone_config: its ``student`` section describes the backbone.
        num_outputs: channels of the head, see `TaskFacts`.

    Raises:
        ValueError: for blocks that the backbone does not have.
    """
    backbone = build_backbone(
        backbone_config.student,
        img_size=backbone_config.crops.global_crops_size,
        drop_path_rate=task.config.backbone.drop_path_rate,
    )
    return task.build_model(backbone, num_outputs)


def begin_task_model(task: Task, backbone_config: Config, *, num_outputs: int, log: bool) -> TaskModel:
    """The network at the start of training: a pretrained backbone where the options name one, and a random head.

    Head and random backbone depend on ``train.seed`` alone.

    Raises:
        FileNotFoundError, ValueError: when the weights are missing, damaged or of another architecture.
    """
    seed, weights = task.config.train.seed, task.config.backbone.pretrained_weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "task model"))
        model = build_task_model(task, backbone_config, num_outputs=num_outputs)
    if weights:
        load_pretrained_backbone(model.backbone, weights, log=log)
    elif log:
        logger.warning("backbone.pretrained_weights is empty: the backbone is random (seed %d)", seed)
    return model


FORMAT_VERSION = 1
MAX_SHOWN = 300  # characters of what does not fit
_KEYS = ("format_version", "task", "classes", "depth_unit", "light", "config", "backbone_config", "model", "figures")
# What a file may also say; one that says nothing means 8-bit values, no thresholds, no image to compare with, and no
# steps of preprocessing.
_RESERVED = ("value_range", "thresholds", "reference", "preprocessing")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How images become what a network sees.

    Attributes:
        image_size: pixels (height, width) that images are resized to, or the window that goes over large ones.
        resize: ``stretch``, ``shorter_side`` or ``original``; see `dinov2.data.task_transforms.make_eval_transform`.
        light: ``original`` or ``standardized``, as in dataset strings.
        value_range: which values become black and white, where they are more than levels of 8 bits; None where every
            image says so itself.
        chain: steps that images go through after that, and before the light.
    """

    image_size: tuple[int, int]
    resize: str
    light: str = "original"
    value_range: ValueRange | None = None
    chain: Chain = field(default_factory=Chain)

    @property
    def reader(self) -> ImageReader:
        """Makes the pictures that are resized then."""
        return ImageReader(self.value_range, self.chain, self.light)


@dataclass(frozen=True, kw_only=True)
class TaskPackage:
    """A task model ready for images.

    Attributes:
        model: in evaluation mode, on its device; low-rank additions are merged.
        task: knows what its outputs mean.
        preprocessing: of images.
        thresholds: of scores, by name; empty where the file says nothing.
        settings: ``figures`` on val when it was written, ``config``, and other plain values.
    """

    model: nn.Module
    task: Task
    preprocessing: Preprocessing
    thresholds: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Of the model; one without parameters is computed by another runtime, which takes images of the processor."""
        parameter = next(self.model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device


def make_package(
    model: nn.Module,
    task: Task,
    *,
    light: str,
    value_range: ValueRange | None = None,
    chain: Chain = Chain(),
    **more: Any,
) -> TaskPackage:
    """Describes a model by the options it was trained with."""
    data = task.config.data
    preprocessing = Preprocessing(
        image_size=as_pair(data.image_size), resize=data.resize, light=light, value_range=value_range, chain=chain
    )
    return TaskPackage(model=model, task=task, preprocessing=preprocessing, **more)


def save_task_package(
    path: str | Path,
    state: dict[str, Tensor],
    task: Task,
    backbone_config: Config,
    *,
    light: str,
    figures: Mapping[str, float],
    value_range: ValueRange | None = None,
    chain: Chain = Chain(),
    thresholds: Mapping[str, float] | None = None,
) -> None:
    """Writes a model under its name when it is whole, with its SHA-256 beside it.

    Args:
        path: file to write, such as ``OUT/best.pth``.
        state: of a `TaskModel` without low-rank additions: ``backbone.…`` and ``head.…``, on the processor.
        task: with the options of the run, the classes and the unit.
        backbone_config: its ``student`` section describes the backbone.
        light: how images were prepared.
        figures: metrics on val.
        value_range: with which images were read.
        chain: steps that they went through; kept under ``preprocessing``.
        thresholds: of scores, by class; None for none.

    A model that compares has the key ``reference``: every image needs one.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "task": task.name,
        "classes": list(task.classes),
        "depth_unit": task.unit,
        "light": light,
        "config": render_config(task.config),
        "backbone_config": render_config(backbone_config),
        "figures": dict(figures),
        "model": state,
    }
    if value_range is not None:
        content["value_range"] = value_range.ends
    if chain.steps:
        content["preprocessing"] = chain.to_values()
    if thresholds:
        content["thresholds"] = dict(thresholds)
    if task.config.data.reference:
        content["reference"] = True
    write_with_checksum(path, lambda file: torch.save(content, file))


def rewrite_task_package(
    source: str | Path,
    path: str | Path,
    *,
    thresholds: Mapping[str, float],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a model's file with other thresholds, all else as it was.

    Args:
        source: the file so far.
        path: to write; may be the same.
        thresholds: of scores, by name.
        state: other weights, on the processor; None for the same.

    Raises:
        FileNotFoundError, ValueError: see `load_task_package`.
    """
    content = {**read_checkpoint(Path(source)), "thresholds": dict(thresholds)}
    if state is not None:
        content["model"] = dict(state)
    write_with_checksum(path, lambda file: torch.save(content, file))


def load_task_package(
    path: str | Path, device: torch.device | str = "cpu", tasks: Mapping[str, type[Task]] = TASKS
) -> TaskPackage:
    """Reads what `save_task_package` wrote; nothing in it can run code.

    Args:
        path: such as ``OUT/best.pth``.
        device: where the model goes.
        tasks: by name.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, no task model, of another version, or of a task that is not among ``tasks``.
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
    if content["task"] not in tasks:
        raise ValueError(f"{path} is of task={content['task']}; known are {', '.join(tasks)}")
    config = parse_task_config(content["config"], f"{path}: config", tasks)
    backbone_config = parse_config(content["backbone_config"], f"{path}: backbone_config")
    facts = TaskFacts(classes=tuple(content["classes"]), unit=content["depth_unit"])
    task = tasks[content["task"]](config, facts)
    names = task.threshold_names(facts.classes)
    strangers = sorted(
        name for name in content.get("thresholds") or {} if name not in names and name.partition(".")[0] not in names
    )
    if strangers:
        logger.warning("%s holds thresholds of %s, and its classes are %s", path, strangers, list(content["classes"]))
    model = build_task_model(task, backbone_config, num_outputs=facts.num_outputs)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        shown = " ".join(str(error)[:MAX_SHOWN].split())
        raise ValueError(f"{path}: the weights do not fit the options beside them: {shown} …") from error
    return make_package(
        model.requires_grad_(False).eval().to(device),
        task,
        light=content["light"],
        value_range=ValueRange.of(content.get("value_range")),
        chain=Chain.parse(content.get("preprocessing") or [], f"{path}: preprocessing"),
        thresholds=content.get("thresholds") or {},
        settings={key: content[key] for key in ("figures", "config", *_RESERVED) if key in content},
    )
