"""Options of a run: defaults <- the YAML file <- ``key=value`` pairs, checked before anything is built."""

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from dinov2.config.checks import check_consistency, check_value
from dinov2.config.fields import ConfigError
from dinov2.config.schema import Config


@dataclass(frozen=True)
class _Given:
    """A value and where it came from."""

    value: Any
    source: str


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's options.

    Args:
        path: YAML file; ``None`` for the defaults alone.
        overrides: pairs such as ``train.batch_size_per_gpu=16`` or ``crops.global_crops_scale=[0.4,1.0]``.

    Raises:
        FileNotFoundError: when the file does not exist.
        ConfigError: on an unknown option (with near names), a wrong type, a value out of range, or options that
            contradict one another; the message names the file or the pair.
    """
    given: dict[str, _Given] = {}
    if path is not None:
        given.update(_read_file(Path(path)))
    for pair in overrides:
        given.update(_read_pair(pair))
    return config_from_values({name: entry.value for name, entry in given.items()}, given)


def config_from_values(values: Mapping[str, Any], sources: Mapping[str, _Given] | None = None) -> Config:
    """Builds the options from dotted names and values; everything else keeps its default."""
    known = set(leaf_names())
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown option {_where(name, sources)}{_near(name, known)}")
    config: Config = _build(Config, "", values, sources)
    check_consistency(config)
    return config


def leaf_names(kind: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options, in the order of the schema."""
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from leaf_names(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _build(kind: Any, prefix: str, values: Mapping[str, Any], sources: Mapping[str, _Given] | None) -> Any:
    hints = typing.get_type_hints(kind)
    arguments = {}
    for field in fields(kind):
        name = prefix + field.name
        if is_dataclass(hints[field.name]):
            arguments[field.name] = _build(hints[field.name], f"{name}.", values, sources)
        elif name in values:
            arguments[field.name] = check_value(values[name], hints[field.name], field, _where(name, sources))
    return kind(**arguments)


def _where(name: str, sources: Mapping[str, _Given] | None) -> str:
    return f"{name} ({sources[name].source})" if sources and name in sources else name


def _near(name: str, known: set[str]) -> str:
    """Suggests options whose dotted name is similar, or whose last word is the same or similar."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    last = name.rpartition(".")[2]
    last_words = {option.rpartition(".")[2] for option in known}
    words = difflib.get_close_matches(last, last_words, n=2, cutoff=0.75)
    words += [word for word in sorted(last_words) if last and word.startswith(last)]
    close += [option for option in sorted(known) if option.rpartition(".")[2] in words and option not in close]
    return (
        f"; did you mean {' or '.join(close[:3])}?" if close else "; configs/ssl_default_config.yaml lists all options"
    )


def _read_file(path: Path) -> dict[str, _Given]:
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections with options, found {type(content).__name__}")
    return {name: _Given(value, f"in {path}") for name, value in _flatten(content, "", path)}


def _flatten(content: Mapping[Any, Any], prefix: str, path: Path) -> Iterator[tuple[str, Any]]:
    sections = {name.rpartition(".")[0] for name in leaf_names()}
    sections |= {part.rpartition(".")[0] for part in sections}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}.", path)
        elif name in sections:
            if value is not None:
                raise ConfigError(f"{name} (in {path}): expected options below it, found {value!r}")
        else:
            yield name, value


def _read_pair(pair: str) -> dict[str, _Given]:
    name, equals, text = pair.partition("=")
    if not equals or not name:
        raise ConfigError(f"expected key=value, found {pair!r}")
    name = name.strip().removeprefix("--")
    if _is_text(name):
        return {name: _Given(text, f"in {pair!r}")}
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{pair!r}: the value is not valid YAML") from error
    return {name: _Given(value, f"in {pair!r}")}


def _is_text(name: str) -> bool:
    """Whether an option takes text, which must not be read as YAML (colons, braces, numbers)."""
    kind: Any = Config
    for part in name.split("."):
        hints = typing.get_type_hints(kind) if is_dataclass(kind) else {}
        if part not in hints:
            return False
        kind = hints[part]
    return kind is str
