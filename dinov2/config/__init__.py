"""Typed options and the project's only command-line parser."""

from dinov2.config.loader import (
    as_pair,
    leaf_names,
    load_config,
    load_options,
    options_without_effect,
    parse_config,
    parse_options,
    render_config,
)
from dinov2.config.schema import Config, ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "as_pair",
    "leaf_names",
    "load_config",
    "load_options",
    "options_without_effect",
    "parse_config",
    "parse_options",
    "render_config",
]
