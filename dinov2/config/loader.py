"""Options of a run: defaults <- the YAML file <- ``key=value`` pairs, checked before anything is built.

The same for every class of options; `load_config` is for pretraining. OmegaConf merges the layers and resolves
``${…}``; types, ranges and words are checked against the schema, with the origin of a wrong value in the message.
"""

import copy
import difflib
import functools
import math
import re
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from dinov2.config.schema import Config, ConfigError, RunOptions

Options = TypeVar("Options", bound=RunOptions)

_INTERPOLATION_ERRORS = (GrammarParseError, InterpolationResolutionError)


@dataclass(frozen=True)
class _Given:
    """A value, which option it is for, and where it came from."""

    name: str
    value: Any
    source: str


def load_config(
    config: str | Path | Mapping[str, Any] | Config | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Config:
    """Reads the options of a pretraining run; see `load_options`."""
    return load_options(Config, config, overrides)


def parse_config(text: str, source: str) -> Config:
    """Reads the options of a pretraining run from YAML text; ``source`` names it in errors."""
    return parse_options(Config, text, source)


def load_options(
    kind: type[Options],
    config: str | Path | Mapping[str, Any] | Options | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Options:
    """Reads options: the defaults of ``kind`` <- ``config`` <- ``overrides``.

    A text may refer to other options, ``train.output_dir=out/${student.arch}``, wherever they are given; ``\\${`` is a
    dollar sign and a brace as they are.

    Args:
        kind: frozen dataclass of sections and options, made with `dinov2.config.schema.leaf` and ``section``.
        config: YAML file, a mapping as such a file holds it (sections, or dotted names), or options that were read
            before; ``None`` for the defaults alone.
        overrides: pairs such as ``train.batch_size_per_gpu=16``, ``crops.global_crops_scale=[0.4,1.0]`` or
            ``crops.global_crops_scale[0]=0.4``; or a mapping.

    Raises:
        FileNotFoundError: when the file does not exist.
        ConfigError: on an unknown option (with near names), a wrong type, a value out of range, or options that
            contradict one another; the message names the file or the pair.
    """
    given: list[_Given] = []
    if isinstance(config, RunOptions):
        given += (_Given(name, _plain(value), "in the options given") for name, value in leaf_values(config))
    elif isinstance(config, Mapping):
        given += _flatten(kind, config, "in the options given")
    elif config is not None:
        given += _read_file(kind, Path(config))
    if isinstance(overrides, Mapping):
        given += _flatten(kind, overrides, "in the arguments")
    else:
        given += (_read_pair(kind, pair) for pair in overrides)
    return _assemble(kind, given)


def parse_options(kind: type[Options], text: str, source: str) -> Options:
    """Reads options from YAML text, which ``source`` names in errors; see `load_options`."""
    return _assemble(kind, _read_text(kind, text, source))


def leaf_names(kind: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted names of all options, in the order of the schema."""
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from leaf_names(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def leaf_values(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names of all options with their values, in the order of the schema."""
    for name, value in _items(options):
        if is_dataclass(value):
            yield from leaf_values(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def render_config(config: RunOptions, *, comments: bool = False) -> str:
    """Writes all options as YAML, in the order of the schema; reading it back gives an equal object.

    Args:
        config: the options, such as a `Config`.
        comments: whether each option is preceded by its one-line meaning.
    """
    return "\n".join(_lines(config, "", comments)).lstrip("\n") + "\n"


def options_without_effect(config: RunOptions) -> list[str]:
    """Sentences that name options which differ from their defaults and do nothing, and why."""
    values, defaults = dict(leaf_values(config)), dict(leaf_values(type(config)()))
    told = {name for name, value in values.items() if value == defaults[name]}
    sentences = []
    for reason, idle in config.idle(values):
        names = [name for name in idle if name not in told]
        told.update(names)
        if names:
            sentences.append(f"{', '.join(names)} {'have' if len(names) > 1 else 'has'} no effect {reason}")
    return sentences


def _read_file(kind: type, path: Path) -> Iterator[_Given]:
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return _read_text(kind, text, str(path))


def _read_text(kind: type, text: str, source: str) -> Iterator[_Given]:
    try:
        content = _read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{source}{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"{source}: expected sections with options, found {type(content).__name__}")
    given = list(_flatten(kind, content or {}, f"in {source}"))
    for name, count in Counter(entry.name for entry in given).items():
        if count > 1:  # as train.seed, and as seed below train
            raise ConfigError(f"{source}: {name} is given {count} times, with and without dots; keep one")
    return iter(given)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Reads YAML safely, and refuses a mapping that has a key twice: of the two, only one would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[tuple[str, str], yaml.Mark] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                mark = first.setdefault((key.tag, key.value), key.start_mark)
                if mark is not key.start_mark:
                    problem = f"the key {key.value!r} is already in line {mark.line + 1} of the same section; keep one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _UniqueKeyLoader)  # derived from the safe loader


def _flatten(kind: Any, content: Mapping[Any, Any], source: str, prefix: str = "") -> Iterator[_Given]:
    hints = typing.get_type_hints(kind) if is_dataclass(kind) else {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(hints.get(key), value, source, f"{name}.")
        elif not is_dataclass(hints.get(key)):
            yield _Given(name, value, source)
        elif value is not None:
            raise ConfigError(f"{name} ({source}): expected options below it, found {value!r}")


def _read_pair(kind: Any, pair: str) -> _Given:
    name, equals, text = pair.partition("=")
    if not equals or not name:
        raise ConfigError(f"expected key=value, found {pair!r}")
    name = name.strip().removeprefix("--")
    for part in name.split("."):
        kind = typing.get_type_hints(kind).get(part) if is_dataclass(kind) else None
    if kind is str:  # not YAML: it may hold colons, braces, numbers
        return _Given(name, text, f"in {pair!r}")
    try:
        return _Given(name, yaml.safe_load(text), f"in {pair!r}")
    except yaml.YAMLError as error:
        raise ConfigError(f"{pair!r}: the value is not valid YAML") from error


def _assemble(kind: type[Options], given: Iterator[_Given] | Sequence[_Given]) -> Options:
    known, sources = set(leaf_names(kind)), {}
    tree = copy.deepcopy(_default_tree(kind))  # type: ignore[arg-type]  # a class is hashable
    try:
        for entry in given:
            name = entry.name.partition("[")[0]
            sources[name] = entry.source
            if name not in known:
                raise ConfigError(f"unknown option {entry.name} ({entry.source}){_near(name, known, kind.overview)}")
            index = entry.name.removeprefix(name)
            if index and not (re.fullmatch(r"(\[\d+\])+", index) and OmegaConf.is_list(OmegaConf.select(tree, name))):
                raise ConfigError(f"{entry.name} ({entry.source}): only entries of a list are named so, by number")
            OmegaConf.update(tree, entry.name, entry.value, merge=False)
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        place = _where((error.full_key or name).partition("[")[0], sources)
        hint = r"; a plain ${ is written \${" if isinstance(error, _INTERPOLATION_ERRORS) else ""
        raise ConfigError(f"{place}: {str(error).splitlines()[0]}{hint}") from error
    except RecursionError:
        raise ConfigError(f"{_where(name, sources)}: contains itself, or is nested too deeply") from None
    options: Options = _build(kind, "", values, sources)
    options.check()
    return options


@functools.cache  # making it takes longer than all else
def _default_tree(kind: type[RunOptions]) -> DictConfig:
    def nested(options: Any) -> dict[str, Any]:
        return {name: nested(value) if is_dataclass(value) else _plain(value) for name, value in _items(options)}

    # Values of types that no option has are told with their place, when they are converted.
    return OmegaConf.create(nested(kind()), flags={"allow_objects": True})


def _build(kind: Any, prefix: str, values: Any, sources: Mapping[str, str]) -> Any:
    hints = typing.get_type_hints(kind)
    arguments = {}
    for field in fields(kind):
        name, hint, value = prefix + field.name, hints[field.name], values[field.name]
        if is_dataclass(hint):
            arguments[field.name] = _build(hint, f"{name}.", value, sources)
        else:
            arguments[field.name] = _check_value(value, hint, field, _where(name, sources))
    return kind(**arguments)


def _where(name: str, sources: Mapping[str, str]) -> str:
    return f"{name} ({sources[name]})" if name in sources else name


def _near(name: str, known: set[str], overview: str) -> str:
    """Suggests options whose dotted name is similar, or whose last word is the same or similar."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    last = name.rpartition(".")[2]
    last_words = {option.rpartition(".")[2] for option in known}
    words = difflib.get_close_matches(last, last_words, n=2, cutoff=0.75)
    words += [word for word in sorted(last_words) if last and word.startswith(last)]
    close += [option for option in sorted(known) if option.rpartition(".")[2] in words and option not in close]
    return f"; did you mean {' or '.join(close[:3])}?" if close else f"; {overview} lists all options"


def _check_value(value: Any, hint: Any, field: "Field[Any]", where: str) -> Any:
    """The value in the option's type; ConfigError on a wrong type, range or word."""
    try:
        converted = _convert(value, hint)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: expected {_describe(hint)}, found {value!r}") from None
    limits = field.metadata
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, int | float) and not isinstance(number, bool):
            if not math.isfinite(number):
                raise ConfigError(f"{where}: must be finite, found {number}")
            if limits["minimum"] is not None and number < limits["minimum"]:
                raise ConfigError(f"{where}: must be at least {limits['minimum']}, found {number}")
            if limits["maximum"] is not None and number > limits["maximum"]:
                raise ConfigError(f"{where}: must be at most {limits['maximum']}, found {number}")
            if limits["above"] is not None and number <= limits["above"]:
                raise ConfigError(f"{where}: must be greater than {limits['above']}, found {number}")
    if limits["choices"] is not None and converted not in limits["choices"]:
        raise ConfigError(f"{where}: {converted!r} is not one of {', '.join(limits['choices'])}")
    return converted


def _convert(value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        for kind in kinds:
            try:
                return _convert(value, kind)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not value:
            raise TypeError
        several = kinds[1:] == (Ellipsis,)
        return tuple(
            _convert(entry, kind)
            for entry, kind in zip(value, kinds[:1] * len(value) if several else kinds, strict=True)
        )
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-06 as a word
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, PurePath):
        return str(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    kinds = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(kind) for kind in kinds)
    return f"a list{'' if kinds[-1] is Ellipsis else f' of {len(kinds)}'}, each entry {_describe(kinds[0])}"


def _items(options: Any) -> Iterator[tuple[str, Any]]:
    # ``vars`` and not attributes: writing an option down does not count as using it.
    values = vars(options)
    return ((field.name, values[field.name]) for field in fields(options))


def _lines(options: Any, indent: str, comments: bool) -> Iterator[str]:
    helps = {field.name: field.metadata["help"] for field in fields(options)}
    for name, value in _items(options):
        if is_dataclass(value) and not indent:
            yield ""
        if comments:
            yield f"{indent}# {helps[name]}"
        if is_dataclass(value):
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ", comments)
        else:
            text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10_000).strip()
            yield f"{indent}{name}: {text.removesuffix('...').strip()}"


def _plain(value: Any) -> Any:
    """What a YAML file would hold: lists, and texts that OmegaConf reads as they are."""
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
