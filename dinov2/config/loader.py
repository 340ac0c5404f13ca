"""Options of a run: defaults <- the YAML file <- ``key=value`` pairs, checked before anything is built.

The same for every schema: pretraining (`load_config`) and supervised training (`load_task_config`).
"""

import difflib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from dinov2.config.checks import check_consistency, check_value
from dinov2.config.fields import ConfigError
from dinov2.config.schema import Config
from dinov2.config.task_checks import check_task_consistency
from dinov2.config.task_schema import TaskConfig

Options = TypeVar("Options")


@dataclass(frozen=True)
class _Given:
    """A value and where it came from."""

    value: Any
    source: str


@dataclass(frozen=True)
class _Schema(Generic[Options]):
    """What options there are: their class, what checks that they agree, and the file that shows them all."""

    kind: type[Options]
    check: Callable[[Options], None]
    overview: str

    def names(self) -> set[str]:
        return set(leaf_names(self.kind))


_PRETRAINING = _Schema(Config, check_consistency, "configs/ssl_default_config.yaml")
_TASK = _Schema(TaskConfig, check_task_consistency, "configs/task_default_config.yaml")


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads the options of a pretraining run.

    Args:
        path: YAML file; ``None`` for the defaults alone.
        overrides: pairs such as ``train.batch_size_per_gpu=16`` or ``crops.global_crops_scale=[0.4,1.0]``.

    Raises:
        FileNotFoundError: when the file does not exist.
        ConfigError: on an unknown option (with near names), a wrong type, a value out of range, or options that
            contradict one another; the message names the file or the pair.
    """
    return _load(_PRETRAINING, path, overrides)


def load_task_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> TaskConfig:
    """Reads the options of a supervised run; see `load_config`."""
    return _load(_TASK, path, overrides)


def parse_config(text: str, source: str) -> Config:
    """Reads the options of a pretraining run from YAML text; ``source`` names it in errors."""
    return _assemble_given(_PRETRAINING, _read_text(_PRETRAINING, text, source))


def parse_task_config(text: str, source: str) -> TaskConfig:
    """Reads the options of a supervised run from YAML text; ``source`` names it in errors."""
    return _assemble_given(_TASK, _read_text(_TASK, text, source))


def config_from_values(values: Mapping[str, Any]) -> Config:
    """Builds the options of a pretraining run from dotted names and values; everything else keeps its default."""
    return _assemble(_PRETRAINING, values, {})


def _load(schema: _Schema[Options], path: str | Path | None, overrides: Sequence[str]) -> Options:
    given: dict[str, _Given] = {}
    if path is not None:
        given.update(_read_file(schema, Path(path)))
    for pair in overrides:
        given.update(_read_pair(schema, pair))
    return _assemble_given(schema, given)


def _assemble_given(schema: _Schema[Options], given: Mapping[str, _Given]) -> Options:
    return _assemble(schema, {name: entry.value for name, entry in given.items()}, given)


def _assemble(schema: _Schema[Options], values: Mapping[str, Any], sources: Mapping[str, _Given]) -> Options:
    known = schema.names()
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown option {_where(name, sources)}{_near(name, known, schema.overview)}")
    config: Options = _build(schema.kind, "", values, sources)
    schema.check(config)
    return config


def leaf_names(kind: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options, in the order of the schema."""
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from leaf_names(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _build(kind: Any, prefix: str, values: Mapping[str, Any], sources: Mapping[str, _Given]) -> Any:
    hints = typing.get_type_hints(kind)
    arguments = {}
    for field in fields(kind):
        name = prefix + field.name
        if is_dataclass(hints[field.name]):
            arguments[field.name] = _build(hints[field.name], f"{name}.", values, sources)
        elif name in values:
            arguments[field.name] = check_value(values[name], hints[field.name], field, _where(name, sources))
    return kind(**arguments)


def _where(name: str, sources: Mapping[str, _Given]) -> str:
    return f"{name} ({sources[name].source})" if name in sources else name


def _near(name: str, known: set[str], overview: str) -> str:
    """Suggests options whose dotted name is similar, or whose last word is the same or similar."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    last = name.rpartition(".")[2]
    last_words = {option.rpartition(".")[2] for option in known}
    words = difflib.get_close_matches(last, last_words, n=2, cutoff=0.75)
    words += [word for word in sorted(last_words) if last and word.startswith(last)]
    close += [option for option in sorted(known) if option.rpartition(".")[2] in words and option not in close]
    return f"; did you mean {' or '.join(close[:3])}?" if close else f"; {overview} lists all options"


def _read_file(schema: _Schema[Any], path: Path) -> dict[str, _Given]:
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return _read_text(schema, text, str(path))


def _read_text(schema: _Schema[Any], text: str, source: str) -> dict[str, _Given]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}{_place(error)}: not valid YAML: {_problem(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: expected sections with options, found {type(content).__name__}")
    return {name: _Given(value, f"in {source}") for name, value in _flatten(content, "", source, schema.names())}


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error)


def _flatten(content: Mapping[Any, Any], prefix: str, source: str, known: set[str]) -> Iterator[tuple[str, Any]]:
    sections = {name.rpartition(".")[0] for name in known}
    sections |= {part.rpartition(".")[0] for part in sections}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.", source, known)
        elif name in sections:
            if value is not None:
                raise ConfigError(f"{name} (in {source}): expected options below it, found {value!r}")
        else:
            yield name, value


def _read_pair(schema: _Schema[Any], pair: str) -> dict[str, _Given]:
    name, equals, text = pair.partition("=")
    if not equals or not name:
        raise ConfigError(f"expected key=value, found {pair!r}")
    name = name.strip().removeprefix("--")
    if _is_text(schema.kind, name):
        return {name: _Given(text, f"in {pair!r}")}
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{pair!r}: the value is not valid YAML") from error
    return {name: _Given(value, f"in {pair!r}")}


def _is_text(kind: Any, name: str) -> bool:
    """Whether an option takes text, which must not be read as YAML (colons, braces, numbers)."""
    for part in name.split("."):
        hints = typing.get_type_hints(kind) if is_dataclass(kind) else {}
        if part not in hints:
            return False
        kind = hints[part]
    return kind is str
