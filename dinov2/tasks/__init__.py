"""Supervised tasks: the table of those there are, and the options of a run of one of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dinov2.config import load_options, parse_options
from dinov2.tasks.anomaly import AnomalyTask
from dinov2.tasks.classification import ClassificationTask
from dinov2.tasks.depth import DepthTask
from dinov2.tasks.detection import DetectionTask
from dinov2.tasks.options import TaskConfig, task_config_class
from dinov2.tasks.segmentation import SegmentationTask
from dinov2.tasks.task import Task

Tasks = Mapping[str, type[Task]]

TASKS: Tasks = MappingProxyType(
    {
        "classification": ClassificationTask,
        "segmentation": SegmentationTask,
        "depth": DepthTask,
        "detection": DetectionTask,
        "anomaly": AnomalyTask,
    }
)


def load_task_config(
    config: str | Path | Mapping[str, Any] | TaskConfig | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    tasks: Tasks = TASKS,
) -> TaskConfig:
    """Reads the options of a supervised run: defaults <- ``config`` <- ``overrides``.

    Args:
        config: YAML file, mapping or options; see `dinov2.config.load_options`.
        overrides: pairs such as ``optim.epochs=5``, or a mapping.
        tasks: by name; `Task.options` becomes the section of that name.
    """
    return load_options(task_config_class(tasks), config, overrides)


def parse_task_config(text: str, source: str, tasks: Tasks = TASKS) -> TaskConfig:
    """Reads the options of a supervised run from YAML text; ``source`` names it in errors. See `load_task_config`."""
    return parse_options(task_config_class(tasks), text, source)
