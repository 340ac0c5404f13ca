"""Typed options and the project's only command-line parser."""

from dinov2.config.loader import (
    check_value,
    leaf_names,
    leaf_values,
    load_config,
    load_options,
    options_without_effect,
    parse_config,
    parse_options,
    read_yaml,
    render_config,
)
from dinov2.config.schema import Config, ConfigError, RunOptions, as_number, as_pair

__all__ = [
    "Config",
    "ConfigError",
    "RunOptions",
    "as_number",
    "as_pair",
    "check_value",
    "leaf_names",
    "leaf_values",
    "load_config",
    "load_options",
    "options_without_effect",
    "parse_config",
    "parse_options",
    "read_yaml",
    "render_config",
]
