"""Options of a run: defaults <- the YAML file <- ``key=value`` pairs, checked before anything is built.

The same for every class of options; `load_config` is for pretraining. OmegaConf merges the layers and resolves
``${…}``; types, ranges and words are checked against the schema, with the origin of a wrong value in the message.
"""

import copy
import difflib
import functools
import logging
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

logger = logging.getLogger("dinov2")

_MAX_NODES = 100_000  # of a YAML text, with every repetition written out
_MAX_DEPTH = 64
_MAX_TEXT = 100_000  # characters of an option, with every reference to others written out
_MAX_REFERENCES = 16  # of all options together, where some are not plain names: then nothing tells what they unfold to
_REFERENCE = re.compile(r"\$\{(\w[\w.\[\]]*)\}")
_MAX_SHOWN = 300  # characters of a value or a name in a message
_FILES_SHOWN = 5
# Sections that only one kind of run has, and what starts it.
_KINDS = {
    "pretraining": (
        ("MODEL", "compute_precision", "dino", "ibot", "student", "teacher", "crops"),
        "dinov2 train, run/train/train.py or dinov2.pretrain",
    ),
    "fine-tuning": (
        ("task", "backbone", "head", "loss", "augmentation"),
        "dinov2 finetune, run/train/finetune.py or dinov2.finetune",
    ),
}
_UNIONS = (types.UnionType, typing.Union)
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
        raise FileNotFoundError(_no_file(path))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not valid YAML: it is no text in UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"
        ) from error
    if not text.strip():
        logger.warning("%s is empty: every option has its default", path)
    return _read_text(kind, text, str(path))


def _no_file(path: Path) -> str:
    """What is there instead of a config file."""
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        found = f"it holds {', '.join(files[:_FILES_SHOWN])}{', …' if len(files) > _FILES_SHOWN else ''}"
        return f"{path} is a folder, not a config file; {found if files else 'it holds no .yaml file either'}"
    missing = f"no config file at {path}" + ("" if path.is_absolute() else f" (looked for in {Path.cwd()})")
    if not path.parent.is_dir():
        return f"{missing}; there is no folder {path.parent} either"
    names = [file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml")]
    near = difflib.get_close_matches(path.name, names, n=2, cutoff=0.6)
    return f"{missing}; did you mean {' or '.join(str(path.with_name(name)) for name in near)}?" if near else missing


def _read_text(kind: type, text: str, source: str) -> Iterator[_Given]:
    content = read_yaml(text, source)
    if content is not None and not isinstance(content, dict):
        found = "a list" if isinstance(content, list) else "text" if isinstance(content, str) else "a value"
        raise ConfigError(
            f"{source}: expected sections with options, such as train: {{seed: 1}}, found {found}: {_shown(content)}"
        )
    given = list(_flatten(kind, content or {}, f"in {source}"))
    for name, count in Counter(entry.name for entry in given).items():
        if count > 1:  # as train.seed, and as seed below train
            raise ConfigError(f"{source}: {name} is given {count} times, with and without dots; keep one")
    return iter(given)


class _OptionsLoader(yaml.SafeLoader):
    """Reads YAML safely, and refuses what is not meant for options.

    That is a mapping with a key twice, of which only one would count; sections within themselves, or nested without
    end; and repetitions (``*name``) that make a short text unfold into more than any computer holds.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._nodes = 0  # with every repetition written out
        self._sizes: dict[str, int] = {}  # of what an anchor names

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        is_alias = isinstance(event, yaml.AliasEvent)
        if is_alias and event.anchor in self.anchors and event.anchor not in self._sizes:
            raise self._refuse(event, f"*{event.anchor} contains itself")
        before = self._nodes
        self._nodes += self._sizes.get(event.anchor, 1) if is_alias else 1
        if self._nodes > _MAX_NODES:
            what = f"the repetitions of *{event.anchor} unfold" if is_alias else "this unfolds"
            raise self._refuse(event, f"{what} into more than {_MAX_NODES:,} values")
        if self._depth >= _MAX_DEPTH:
            raise self._refuse(event, f"nested more than {_MAX_DEPTH} levels deep")
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None and not is_alias:
            self._sizes[event.anchor] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Now, as merging (`<<`) puts keys of other mappings before its own.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Mark] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                mark = first.setdefault((key.tag, key.value), key.start_mark)
                if mark is not key.start_mark:
                    problem = f"the key {_shown(key.value)} is already in line {mark.line + 1} of the same section"
                    raise self._refuse(key, f"{problem}; keep one")
        return node

    @staticmethod
    def _refuse(event: Any, problem: str) -> yaml.MarkedYAMLError:
        return yaml.composer.ComposerError(None, None, problem, event.start_mark)


def read_yaml(text: str, source: str) -> Any:
    """The content of YAML text, which ``source`` names in errors.

    Raises:
        ConfigError: the text is no YAML, or such as `_OptionsLoader` refuses.
    """
    try:
        return yaml.load(text, _OptionsLoader)  # derived from the safe loader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(error, "problem", None) or str(error)
        if "'\\t'" in problem:
            problem += "; indent with spaces, not with tabs"
        raise ConfigError(f"{source}{place}: not valid YAML: {_cut(problem)}") from error
    except ValueError as error:  # a number of thousands of digits, the 32nd of a month
        raise ConfigError(f"{source}: not valid YAML: {_cut(str(error))}") from error


def _shown(value: Any) -> str:
    """A value as errors show it: not the whole of a file that was given for a number."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}… ({len(text):,} characters)"


def _flatten(kind: Any, content: Mapping[Any, Any], source: str, prefix: str = "") -> Iterator[_Given]:
    hints = typing.get_type_hints(kind) if is_dataclass(kind) else {}
    if prefix.count(".") > _MAX_DEPTH:
        raise ConfigError(f"{_cut(prefix)} ({source}): contains itself, or is nested too deeply")
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flatten(hints.get(key), value, source, f"{name}.")
        elif not is_dataclass(hints.get(key)):
            yield _Given(name, value, source)
        elif value is not None:
            raise ConfigError(f"{_cut(name)} ({source}): expected options below it, found {_shown(value)}")


def _read_pair(kind: Any, pair: str) -> _Given:
    name, equals, text = pair.partition("=")
    if not equals or not name:
        hint = f"; a file with options is named by --config {pair}" if pair.endswith((".yaml", ".yml")) else ""
        raise ConfigError(f"expected key=value, found {_shown(pair)}{hint}")
    name, source = name.strip().removeprefix("--"), f"in {_shown(pair)}"
    for part in name.split("."):
        kind = typing.get_type_hints(kind).get(part) if is_dataclass(kind) else None
    # A text is not YAML: it may hold colons, braces, numbers.
    return _Given(name, text if kind is str else read_yaml(text, _shown(pair)), source)


def _assemble(kind: type[Options], given: Iterator[_Given] | Sequence[_Given]) -> Options:
    known, sources = set(leaf_names(kind)), {}
    tree = copy.deepcopy(_default_tree(kind))  # type: ignore[arg-type]  # a class is hashable
    try:
        for entry in given:
            name = entry.name.partition("[")[0]
            sources[name] = entry.source
            if name not in known:
                hint = _other_kind(name, known) or _near(name, known, kind.overview)
                raise ConfigError(f"unknown option {_cut(entry.name)} ({entry.source}){hint}")
            index = entry.name.removeprefix(name)
            if index and not (re.fullmatch(r"(\[\d+\])+", index) and OmegaConf.is_list(OmegaConf.select(tree, name))):
                raise ConfigError(f"{entry.name} ({entry.source}): only entries of a list are named so, by number")
            OmegaConf.update(tree, entry.name, entry.value, merge=False)
        _check_references(OmegaConf.to_container(tree, resolve=False), sources)
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


def _check_references(values: Any, sources: Mapping[str, str]) -> None:
    """Refuses texts whose references to one another unfold without measure, before they are unfolded.

    Raises:
        ConfigError: naming the option whose text would be too long, or, where references are not plain names of
            options, one with many of them.
    """
    texts: dict[str, str] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, str) and "${" in value:
            texts[name] = value
        elif isinstance(value, dict | list):
            for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
                collect(entry, f"{name}[{key}]" if isinstance(value, list) else f"{name}.{key}" if name else str(key))

    collect(values, "")
    references = {name: _REFERENCE.findall(text) for name, text in texts.items()}
    counts = {name: text.count("${") for name, text in texts.items()}
    named = {reference for found in references.values() for reference in found}
    is_plain = all(len(references[name]) == count for name, count in counts.items())
    is_plain &= not any(name.startswith((f"{whole}.", f"{whole}[")) for whole in named for name in texts)
    lengths: dict[str, int] = {}

    def length(name: str) -> int:
        if name in texts and name not in lengths:
            lengths[name] = 0  # a text that refers to itself is told of when it is resolved
            lengths[name] = len(texts[name]) + sum(map(length, references[name]))
        return lengths.get(name, 1)

    for name in texts:
        if length(name) > _MAX_TEXT or (not is_plain and sum(counts.values()) > _MAX_REFERENCES):
            raise ConfigError(
                f"{_where(name.partition('[')[0], sources)}: its references ${{…}} to other options unfold into too "
                f"much; write them out"
            )


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
            arguments[field.name] = check_value(value, hint, field, _where(name, sources))
    return kind(**arguments)


def _where(name: str, sources: Mapping[str, str]) -> str:
    return f"{name} ({sources[name]})" if name in sources else name


def _other_kind(name: str, known: set[str]) -> str:
    """Says so where an option is one of the other kind of run, whose file was given by mistake."""
    for kind, (sections, doors) in _KINDS.items():
        if name.partition(".")[0] in sections and not any(option.partition(".")[0] in sections for option in known):
            return f": it belongs to {kind}, which is started by {doors}; options of another kind are expected here"
    return ""


def _near(name: str, known: set[str], overview: str) -> str:
    """Suggests options whose dotted name is similar, or whose last word is the same or similar."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    last = name.rpartition(".")[2]
    last_words = {option.rpartition(".")[2] for option in known}
    words = difflib.get_close_matches(last, last_words, n=2, cutoff=0.75)
    words += [word for word in sorted(last_words) if last and word.startswith(last)]
    close += [option for option in sorted(known) if option.rpartition(".")[2] in words and option not in close]
    return f"; did you mean {' or '.join(close[:3])}?" if close else f"; {overview} lists all options"


def check_value(value: Any, hint: Any, field: "Field[Any]", where: str) -> Any:
    """The value in the option's type.

    Args:
        value: as YAML gives it.
        hint: type of the option.
        field: declares its limits, made with `dinov2.config.schema.leaf`.
        where: names the option in errors.

    Raises:
        ConfigError: on a wrong type, range or word.
    """
    try:
        converted = _convert(value, hint)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: expected {_describe(hint)}, found {_shown(value)}") from None
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
        raise ConfigError(f"{where}: {_shown(converted)} is not one of {', '.join(limits['choices'])}")
    return converted


def _convert(value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) in _UNIONS:
        for kind in kinds:
            try:
                return _convert(value, kind)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if typing.get_origin(hint) is typing.Literal:
        if value not in kinds:
            raise TypeError
        return value
    if typing.get_origin(hint) is Mapping:
        found = {value: {}} if isinstance(value, str) else value  # a step's name alone
        if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
            raise TypeError
        return dict(found)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not (value or typing.get_origin(kinds[0]) is not None):
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
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, kinds))
    if typing.get_origin(hint) in _UNIONS:
        return " or ".join(_describe(kind) for kind in kinds if not (kind is int and float in kinds))
    if typing.get_origin(hint) is Mapping:
        return "a name with parameters, such as {gamma: {gamma: 0.8}}"
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
    """What a YAML file would hold: lists, mappings, and texts that OmegaConf reads as they are."""
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
