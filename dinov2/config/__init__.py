"""Typed options and the project's only command-line parser."""

from dinov2.config.loader import (
    as_pair,
    leaf_names,
    load_config,
    load_task_config,
    options_without_effect,
    parse_config,
    parse_task_config,
    render_config,
)
from dinov2.config.schema import Config, ConfigError
from dinov2.config.task_schema import TaskConfig

__all__ = [
    "Config",
    "ConfigError",
    "TaskConfig",
    "as_pair",
    "leaf_names",
    "load_config",
    "load_task_config",
    "options_without_effect",
    "parse_config",
    "parse_task_config",
    "render_config",
]
