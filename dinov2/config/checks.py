"""Is a value what its option allows? One value at a time, then values that must agree with one another."""

import math
import types
import typing
from dataclasses import Field
from typing import Any

from dinov2.config.fields import ConfigError
from dinov2.config.schema import Config, Size

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
