"""Options that are set and that nothing in this run looks at."""

import logging
from collections.abc import Iterator
from typing import Any

from dinov2.config import TaskConfig
from dinov2.config.task_checks import head_kind
from dinov2.models.heads.build import HEAD_OPTIONS

logger = logging.getLogger("dinov2")

_LOSSES = {
    "classification": {"class_weights", "label_smoothing"},
    "segmentation": {"class_weights", "cross_entropy", "dice", "focal", "focal_gamma"},
    "depth": {"silog", "gradient", "mse", "l1", "depth_alignment"},
}


def warn_of_idle_options(config: TaskConfig) -> None:
    """Warns of options that differ from their defaults and have no effect beside the others."""
    for names, reason in _idle(config):
        if names:
            logger.warning("%s: no effect %s", ", ".join(names), reason)


def _idle(config: TaskConfig) -> Iterator[tuple[list[str], str]]:
    task, mode, kind = config.task, config.backbone.mode, head_kind(config)
    yield (
        _set(config, "head", set(vars(config.head)) - HEAD_OPTIONS[task][kind] - {"kind"}),
        f"on a {kind} head for {task}",
    )
    yield _set(config, "loss", set(vars(config.loss)) - _LOSSES[task]), f"on task={task}"
    if task == "segmentation" and not config.loss.focal:
        yield _set(config, "loss", {"focal_gamma"}), "with loss.focal=0"
    lora = {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
    unused = {"frozen": lora | {"last_blocks", "drop_path_rate"}, "lora": {"last_blocks"}, "last_blocks": lora}
    yield _set(config, "backbone", unused.get(mode, lora | {"last_blocks"})), f"with backbone.mode={mode}"
    if mode == "frozen":
        yield _set(config, "optim", {"backbone_lr_mult", "layerwise_decay"}), "on a frozen backbone"
    if config.optim.schedule == "constant":
        yield _set(config, "optim", {"min_lr"}), "with optim.schedule=constant"
    if not config.head.per_part:
        yield _set(config, "data", {"max_photos"}), "without head.per_part"
    judged = {"boundary_tolerance": "segmentation", "part_aggregate": "classification", "depth_crop": "depth"}
    others = {name for name, judge in judged.items() if judge != task}
    yield _set(config, "evaluation", others), f"on task={task}"
    if config.head.per_part:
        yield _set(config, "evaluation", {"part_aggregate", "flips"}), "with head.per_part"
    if config.data.multi_label:
        yield _set(config, "evaluation", {"part_aggregate"}), "with data.multi_label"


def _set(config: TaskConfig, section: str, names: set[str]) -> list[str]:
    """Of these options, in their order, those that differ from their defaults."""
    options: Any = getattr(config, section)
    defaults = type(options)()
    return [
        f"{section}.{name}"
        for name, value in vars(options).items()
        if name in names and value != getattr(defaults, name)
    ]
