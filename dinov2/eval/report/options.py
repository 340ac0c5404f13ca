"""The options of a run for the reader: first those that were changed from their defaults."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from dinov2.config import Config, ConfigError, load_config

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Option:
    """One option: dotted name, value and default as text, and its one-line meaning."""

    name: str
    value: str
    default: str
    meaning: str

    @property
    def changed(self) -> bool:
        """Whether the run had another value than the default."""
        return self.value != self.default


@dataclass(frozen=True)
class RunOptions:
    """What is known of a run's options.

    Attributes:
        config: None where there is no file, or it is of another version.
        options: all, in the order of the schema; empty without a config.
        raw: the file's text where it could not be understood.
        problem: why not; empty where all is well.
    """

    config: Config | None = None
    options: tuple[Option, ...] = ()
    raw: str = ""
    problem: str = ""

    @property
    def num_iterations(self) -> int | None:
        """How long the run was to be; None where that is not known."""
        return None if self.config is None else self.config.optim.epochs * self.config.train.OFFICIAL_EPOCH_LENGTH


def read_options(run_dir: Path) -> RunOptions:
    """Reads ``config.yaml`` of a run's folder; what is wrong with it is told in the result and not raised."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return RunOptions(problem=f"There is no {CONFIG_FILE} in the folder.")
    try:
        config = load_config(path)
    except (ConfigError, OSError) as error:
        raw = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
        return RunOptions(raw=raw, problem=f"The file could not be understood by this version: {error}")
    defaults = {name: value for name, value, _ in _leaves(Config(), "")}
    options = (Option(name, _show(value), _show(defaults[name]), help) for name, value, help in _leaves(config, ""))
    return RunOptions(config=config, options=tuple(options))


def _leaves(options: Any, prefix: str) -> Iterator[tuple[str, Any, str]]:
    """Dotted name, value and meaning of every option."""
    for field in fields(options):
        # `vars` and not attributes: showing an option does not count as using it.
        value = vars(options)[field.name]
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value, field.metadata["help"]


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else "(empty)"
