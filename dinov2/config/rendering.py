"""Options as YAML text: the file that documents the defaults, and the resolved options of a run."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from dinov2.config.schema import Config
from dinov2.config.task_schema import TaskConfig


def render_config(config: Config | TaskConfig, *, comments: bool = False) -> str:
    """Writes all options as YAML, in the order of the schema; reading it back gives an equal object.

    Args:
        config: the options.
        comments: whether each option is preceded by its one-line meaning.
    """
    return "\n".join(_lines(config, "", comments)).lstrip("\n") + "\n"


def leaf_values(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all options with their values, in the order of the schema."""
    for name, value in _items(options):
        if is_dataclass(value):
            yield from leaf_values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _items(options: Any) -> Iterator[tuple[str, Any]]:
    # ``vars`` and not attributes: writing an option down does not count as using it.
    values = vars(options)
    return ((field.name, values[field.name]) for field in fields(options))


def _lines(options: Any, indent: str, comments: bool) -> Iterator[str]:
    helps = {field.name: field.metadata["help"] for field in fields(options)}
    for name, value in _items(options):
        if is_dataclass(value):
            if not indent:
                yield ""
            if comments:
                yield f"{indent}# {helps[name]}"
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ", comments)
        else:
            if comments:
                yield f"{indent}# {helps[name]}"
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
