"""Datasets by the name that dataset strings use."""

import difflib
import inspect
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.cifar10 import CIFAR10
from dinov2.data.datasets.depth import KITTIDepth, NYUDepthV2
from dinov2.data.datasets.elpv import ELPV
from dinov2.data.datasets.grouped_json import GroupedJSON
from dinov2.data.datasets.image_folder import ImageFolder, ImageMaskFolder
from dinov2.data.datasets.image_net import ImageNet, ImageNet22k
from dinov2.data.datasets.voc_segmentation import VOCSegmentation
from dinov2.data.photometric import LIGHTS

_ALL: tuple[type[ImageDataset], ...] = (
    CIFAR10,
    ELPV,
    GroupedJSON,
    ImageFolder,
    ImageMaskFolder,
    ImageNet,
    ImageNet22k,
    KITTIDepth,
    NYUDepthV2,
    VOCSegmentation,
)
DATASETS: Mapping[str, type[ImageDataset]] = MappingProxyType({dataset.__name__: dataset for dataset in _ALL})


_PIECE = re.compile(r"(?:[^:\\]|\\.|\\$)*", re.DOTALL)
_ESCAPE = re.compile(r"\\([:\\])")
_TRANSFORMS = ("transform", "target_transform")
# Keys that every dataset has, beside those of its constructor.
_LIGHT = inspect.Parameter("light", inspect.Parameter.KEYWORD_ONLY, default="original", annotation=str)


def parse_dataset_string(text: str) -> tuple[type[ImageDataset], dict[str, Any]]:
    r"""Splits a dataset string into the dataset's class and the arguments of its constructor.

    ``\:`` stands for a colon inside a value and ``\\`` for a backslash; any other backslash is kept as it is. The keys
    are those of the dataset's constructor and ``light``, which `make_dataset` takes; values are converted where the
    constructor asks for a number or a flag.

    Args:
        text: such as ``GroupedJSON:split=TRAIN:root=/data/parts``.

    Raises:
        ValueError: for an unknown dataset, key or light, a key that is missing, given twice or without a value.
    """
    name, *pieces = (_ESCAPE.sub(r"\1", piece) for piece in _split(text.strip()))
    dataset_class = _find_class(name, text)
    parameters = _parameters(dataset_class)
    allowed = ", ".join(_describe(parameter) for parameter in parameters.values())
    arguments: dict[str, Any] = {}
    for piece in pieces:
        key, equals, value = piece.partition("=")
        if not equals or not key:
            hint = r" (write \: for a colon inside a value)" if arguments else ""
            raise ValueError(f"dataset string {text!r}: {piece!r} is not of the form key=value{hint}")
        if key not in parameters:
            near = _near(key, list(parameters))
            raise ValueError(f"dataset string {text!r}: {name} has no key {key!r}{near}; its keys are {allowed}")
        if key in arguments:
            raise ValueError(f"dataset string {text!r}: key {key!r} is given twice")
        if not value:
            raise ValueError(f"dataset string {text!r}: key {key!r} has no value")
        if key == _LIGHT.name and value not in LIGHTS:
            raise ValueError(f"dataset string {text!r}: light must be one of {', '.join(LIGHTS)}, found {value!r}")
        arguments[key] = _convert(value, parameters[key], text)
    required = [key for key, p in parameters.items() if p.default is p.empty]
    missing = [key for key in required if key not in arguments]
    if missing:
        example = ":".join([name, *(f"{key}=..." for key in required)])
        raise ValueError(f"dataset string {text!r}: missing {', '.join(map(repr, missing))}; write {example}")
    return dataset_class, arguments


def _split(text: str) -> list[str]:
    """Splits at the colons that no backslash escapes."""
    pieces, start = [], 0
    while True:
        match = _PIECE.match(text, start)
        assert match is not None  # the pattern also matches nothing
        pieces.append(match.group())
        if match.end() == len(text):
            return pieces
        start = match.end() + 1


def _find_class(name: str, text: str) -> type[ImageDataset]:
    if name not in DATASETS:
        known = ", ".join(sorted(DATASETS))
        raise ValueError(
            f"dataset string {text!r}: unknown dataset {name!r}{_near(name, list(DATASETS))}; known: {known}"
        )
    return DATASETS[name]


def _parameters(dataset_class: type[ImageDataset]) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(dataset_class, eval_str=True)
    own = {name: p for name, p in signature.parameters.items() if name not in _TRANSFORMS}
    return own | {_LIGHT.name: _LIGHT}


def _describe(parameter: inspect.Parameter) -> str:
    return f"{parameter.name} (required)" if parameter.default is parameter.empty else parameter.name


def _near(name: str, known: list[str]) -> str:
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), list(by_lower), n=2)
    return f" (did you mean {' or '.join(by_lower[match] for match in matches)}?)" if matches else ""


def _convert(value: str, parameter: inspect.Parameter, text: str) -> str | int | float | bool:
    """Converts to the parameter's plain type; anything that is not a number or a flag stays text."""
    kind = parameter.annotation
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if kind is int or kind is float:
            number: int | float = kind(value)
            return number
    except (KeyError, ValueError):
        raise ValueError(
            f"dataset string {text!r}: {parameter.name}={value!r} is not of type {kind.__name__}"
        ) from None
    return value
