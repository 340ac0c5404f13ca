"""Options of a run: defaults <- the YAML file <- ``key=value`` pairs, checked before anything is built.

The same for every class of options; `load_config` is for pretraining.
"""

import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml

from dinov2.config.schema import Config, ConfigError, Size

_LARGEST_HUE = 0.5


def check_value(value: Any, hint: Any, field: "Field[Any]", where: str) -> Any:
    """Returns ``value`` converted to the option's type.

    Args:
        value: what a YAML file or a ``key=value`` pair holds.
        hint: the option's annotation.
        field: the option's declaration, with its limits.
        where: how to name the value in an error, such as ``train.seed (in my.yaml)``.

    Raises:
        ConfigError: on a wrong type, a number out of range or a word that is not allowed.
    """
    try:
        converted = _convert(value, hint)
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: expected {_describe(hint)}, found {value!r}") from None
    limits = field.metadata
    for number in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(number, int | float) and not isinstance(number, bool):
            _check_range(number, limits, where)
    if limits.get("choices") is not None and converted not in limits["choices"]:
        raise ConfigError(f"{where}: {converted!r} is not one of {', '.join(limits['choices'])}")
    return converted


def _check_range(number: float, limits: typing.Mapping[str, Any], where: str) -> None:
    if not math.isfinite(number):
        raise ConfigError(f"{where}: must be finite, found {number}")
    if limits["minimum"] is not None and number < limits["minimum"]:
        raise ConfigError(f"{where}: must be at least {limits['minimum']}, found {number}")
    if limits["maximum"] is not None and number > limits["maximum"]:
        raise ConfigError(f"{where}: must be at most {limits['maximum']}, found {number}")
    if limits["above"] is not None and number <= limits["above"]:
        raise ConfigError(f"{where}: must be greater than {limits['above']}, found {number}")


def _convert(value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        for part in typing.get_args(hint):
            try:
                return _convert(value, part)
            except (TypeError, ValueError):
                continue
        raise TypeError
    if typing.get_origin(hint) is tuple:
        return _convert_tuple(value, typing.get_args(hint))
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)  # YAML reads 1e-06 as a word
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not hint:
        raise TypeError
    return value


def _convert_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        if not value:
            raise ValueError
        return tuple(_convert(entry, kinds[0]) for entry in value)
    if len(value) != len(kinds):
        raise ValueError
    return tuple(_convert(entry, kind) for entry, kind in zip(value, kinds, strict=True))


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    kinds = typing.get_args(hint)
    if kinds[-1] is Ellipsis:
        return f"a list, each entry {_describe(kinds[0])}"
    return f"a list of {len(kinds)}, each entry {_describe(kinds[0])}"


def check_consistency(config: Config) -> None:
    """Checks options that must agree with one another.

    Raises:
        ConfigError: naming the options involved and their values.
    """
    patch = as_pair(config.student.patch_size)
    for name in ("global_crops_size", "local_crops_size"):
        if name == "local_crops_size" and config.crops.local_crops_number == 0:
            continue
        size = as_pair(getattr(config.crops, name))
        if size[0] % patch[0] or size[1] % patch[1]:
            below, above = (_size(_round(size, patch, how)) for how in (math.floor, math.ceil))
            raise ConfigError(
                f"crops.{name}={_size(size)} is not divisible by student.patch_size={_size(patch)}; "
                f"the nearest sizes are {below} and {above}"
            )
    image_size = config.evaluation.image_size
    if image_size % patch[0] or image_size % patch[1]:
        raise ConfigError(f"evaluation.image_size={image_size} is not divisible by student.patch_size={_size(patch)}")
    for part in ("backbone", "dino_head", "ibot_head"):
        student = getattr(config.compute_precision.student, part).sharding_strategy
        teacher = getattr(config.compute_precision.teacher, part).sharding_strategy
        if (student == "NO_SHARD") != (teacher == "NO_SHARD"):
            raise ConfigError(
                f"compute_precision.student.{part}.sharding_strategy={student} and compute_precision.teacher.{part}."
                f"sharding_strategy={teacher}: each process moves the teacher's rows by the student's, so both must be "
                f"sharded, or both replicated"
            )
    for name, (low, high) in {
        "crops.global_crops_scale": config.crops.global_crops_scale,
        "crops.local_crops_scale": config.crops.local_crops_scale,
        "ibot.mask_ratio_min_max": config.ibot.mask_ratio_min_max,
    }.items():
        if low > high:
            raise ConfigError(f"{name}=[{low}, {high}]: the first number must not exceed the second")
    hue = config.crops.color_jitter[3]
    if hue > _LARGEST_HUE:
        raise ConfigError(
            f"crops.color_jitter={list(config.crops.color_jitter)}: hue, the last, must be at most {_LARGEST_HUE} turns"
        )
    optim = config.optim
    if optim.warmup_epochs > optim.epochs:
        raise ConfigError(f"optim.warmup_epochs={optim.warmup_epochs} exceeds optim.epochs={optim.epochs}")
    if config.dino.loss_weight == 0 and config.ibot.loss_weight == 0:
        raise ConfigError("dino.loss_weight and ibot.loss_weight are both 0: nothing is left to learn from")
    if bool(config.evaluation.train_dataset_path) != bool(config.evaluation.val_dataset_path):
        raise ConfigError("evaluation.train_dataset_path and evaluation.val_dataset_path must be given together")


def as_pair(size: Size) -> tuple[int, int]:
    """Height and width of a size option."""
    return (size, size) if isinstance(size, int) else size


def _round(size: tuple[int, int], patch: tuple[int, int], how: typing.Callable[[float], int]) -> tuple[int, int]:
    return (max(how(size[0] / patch[0]), 1) * patch[0], max(how(size[1] / patch[1]), 1) * patch[1])


def _size(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


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


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads the options of a pretraining run; see `load_options`."""
    return _load(_PRETRAINING, path, overrides)


def parse_config(text: str, source: str) -> Config:
    """Reads the options of a pretraining run from YAML text; ``source`` names it in errors."""
    return _assemble_given(_PRETRAINING, _read_text(_PRETRAINING, text, source))


def load_options(
    kind: type[Options],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    check: Callable[[Options], None],
    overview: str,
) -> Options:
    """Reads options: the defaults of ``kind`` <- the file <- the pairs.

    Args:
        kind: frozen dataclass of sections and options, made with `dinov2.config.schema.leaf` and ``section``.
        path: YAML file; ``None`` for the defaults alone.
        overrides: pairs such as ``train.batch_size_per_gpu=16`` or ``crops.global_crops_scale=[0.4,1.0]``.
        check: raises `ConfigError` when options contradict one another.
        overview: file that shows all options, for the error about an unknown one.

    Raises:
        FileNotFoundError: when the file does not exist.
        ConfigError: on an unknown option (with near names), a wrong type, a value out of range, or options that
            contradict one another; the message names the file or the pair.
    """
    return _load(_Schema(kind, check, overview), path, overrides)


def parse_options(
    kind: type[Options], text: str, source: str, *, check: Callable[[Options], None], overview: str
) -> Options:
    """Reads options from YAML text, which ``source`` names in errors; see `load_options`."""
    schema = _Schema(kind, check, overview)
    return _assemble_given(schema, _read_text(schema, text, source))


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


def render_config(config: Any, *, comments: bool = False) -> str:
    """Writes all options as YAML, in the order of the schema; reading it back gives an equal object.

    Args:
        config: the options, such as a `Config`.
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


_HEAD = ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim")
_DINO_HEAD, _IBOT_HEAD = (tuple(f"{section}.{name}" for name in _HEAD) for section in ("dino", "ibot"))
_MASKS = ("ibot.mask_ratio_min_max", "ibot.exact_mask_counts")
# While the first option is 0, false or empty, the others do nothing.
_IDLE_WITHOUT = (
    ("dino.koleo_loss_weight", ("dino.koleo_half_precision", "dino.koleo_all_ranks")),
    ("ibot.loss_weight", ("ibot.mask_sample_probability", *_MASKS, "ibot.separate_head", *_IBOT_HEAD)),
    ("ibot.separate_head", _IBOT_HEAD),
    ("ibot.mask_sample_probability", _MASKS),
    ("train.cache_dataset", ("data.cache_gib",)),
    ("crops.local_crops_number", ("crops.local_crops_size", "crops.local_crops_scale")),
    ("crops.color_jitter_probability", ("crops.color_jitter",)),
    (
        "evaluation.train_dataset_path",
        ("evaluation.nb_knn", "evaluation.temperature", "evaluation.features", "evaluation.best_metric"),
    ),
)


def options_without_effect(config: Config) -> list[str]:
    """Sentences that name options which differ from their defaults and do nothing, and why."""
    values, defaults = dict(leaf_values(config)), dict(leaf_values(Config()))
    changed = {name for name, value in values.items() if value != defaults[name]}
    told: set[str] = set()
    sentences = []
    for cause, idle in _causes(values):
        names = [name for name in idle if name in changed and name not in told]
        told.update(names)
        if names:
            verb = "have" if len(names) > 1 else "has"
            sentences.append(f"{', '.join(names)} {verb} no effect: {cause}")
    return sentences


def _causes(values: dict[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, idle in _IDLE_WITHOUT:
        if not values[name]:
            yield f"{name} is {'empty' if values[name] == '' else str(values[name]).lower()}", idle
    if values["optim.lr"] > 0:
        yield f"optim.lr is {values['optim.lr']:g} and not scaled", ("optim.base_lr", "optim.scaling_rule")
    if not values["dino.loss_weight"] and values["ibot.separate_head"]:
        yield "dino.loss_weight is 0.0 and patches have a head of their own", _DINO_HEAD
