"""How an option is declared in the schema: its default, what it means, and which values are allowed."""

from collections.abc import Sequence
from dataclasses import MISSING, field
from typing import Any


class ConfigError(ValueError):
    """A user's options are wrong: the message names the file or the pair, what was found, and what is allowed."""


def leaf(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Declares an option.

    Args:
        default: value when neither the file nor the command line gives one.
        help: one line; it is the comment in ``configs/ssl_default_config.yaml``.
        minimum: smallest allowed number, for each entry of a list.
        maximum: largest allowed number, for each entry of a list.
        above: the number, or each entry, must be greater than this.
        choices: the words allowed.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    return field(default=default, metadata=metadata)


def section(kind: type, help: str, default: Any = MISSING) -> Any:
    """Declares a group of options; ``default`` replaces the group's own defaults."""
    metadata = {"help": help}
    if default is MISSING:
        return field(default_factory=kind, metadata=metadata)
    return field(default_factory=lambda: default, metadata=metadata)
