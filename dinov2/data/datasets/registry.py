"""Dataset strings, and the names of datasets in them."""

import difflib
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dinov2.data.datasets import (
    CIFAR10,
    DAGM2007,
    ELPV,
    MURA,
    CocoDetection,
    GDXray,
    GroupedJSON,
    ImageDataset,
    ImageFolder,
    ImageMaskFolder,
    ImageNet,
    ImageNet22k,
    KITTIDepth,
    MVTecAD,
    NYUDepthV2,
    VisA,
    VOCDetection,
    VOCSegmentation,
    YOLODetection,
)
from dinov2.data.datasets.base import PREPARE_CSV, TABLE_ENDINGS
from dinov2.data.photometric import LIGHTS
from dinov2.data.value_range import ValueRange

_ALL: tuple[type[ImageDataset], ...] = (
    CIFAR10, CocoDetection, DAGM2007, ELPV, GDXray, GroupedJSON, ImageFolder, ImageMaskFolder, ImageNet, ImageNet22k,
    KITTIDepth, MURA, MVTecAD, NYUDepthV2, VisA, VOCDetection, VOCSegmentation, YOLODetection,
)  # fmt: skip
DATASETS: Mapping[str, type[ImageDataset]] = MappingProxyType({dataset.__name__: dataset for dataset in _ALL})

_TABLE_KEYS = ("csv", "group", "part", "annot", "label_file", "labels_file")  # what comes from a table
_PIECE = re.compile(r"(?:[^:\\]|\\.|\\$)*", re.DOTALL)
_ESCAPE = re.compile(r"\\([:\\])")
_TRANSFORMS = ("transform", "target_transform")
# Keys that every dataset has, beside those of its constructor.
_COMMON = {
    name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
    for name, kind in (("light", str), ("range", str), ("bits", int))
}


def parse_dataset_string(text: str) -> tuple[type[ImageDataset], dict[str, Any]]:
    r"""Splits a dataset string into the dataset's class and the arguments of its constructor.

    ``\:`` stands for a colon inside a value and ``\\`` for a backslash; any other backslash is kept as it is. The keys
    are those of the dataset's constructor, and ``light`` and ``range`` or ``bits``, which `make_dataset` takes, the
    latter as ``value_range``; values are converted where the constructor asks for a number or a flag.

    Args:
        text: such as ``GroupedJSON:split=TRAIN:root=/data/parts``.

    Raises:
        ValueError: for an unknown dataset, key or light, a key that is missing, given twice or without a value, or what
            is no range of values.
    """
    name, *pieces = (_ESCAPE.sub(r"\1", piece) for piece in _split(text.strip()))
    if name not in DATASETS:
        hint = PREPARE_CSV if name.lower().endswith(TABLE_ENDINGS) or "csv" in name.lower() else ""
        if advice := _advise_path(name if Path(name).is_dir() else text.strip()):
            raise ValueError(advice + hint)
        known = ", ".join(sorted(DATASETS))
        near = _near(name, DATASETS)
        raise ValueError(f"dataset string {text!r}: unknown dataset {name!r}{near}; known: {known}{hint}")
    dataset_class = DATASETS[name]
    signature = inspect.signature(dataset_class, eval_str=True)
    parameters = {
        key: parameter
        for key, parameter in signature.parameters.items()
        if key not in _TRANSFORMS and parameter.kind is not parameter.VAR_KEYWORD
    } | _COMMON
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    arguments: dict[str, Any] = {}
    for piece in pieces:
        key, equals, value = piece.partition("=")
        if not equals or not key:
            hint = r" (write \: for a colon inside a value)" if arguments else ""
            raise ValueError(f"dataset string {text!r}: {piece!r} is not of the form key=value{hint}")
        if key not in parameters:
            keys = ", ".join(f"{known} (required)" if known in required else known for known in parameters)
            near = _near(key, parameters)
            hint = PREPARE_CSV if key.lower().startswith(_TABLE_KEYS) else ""
            raise ValueError(f"dataset string {text!r}: {name} has no key {key!r}{near}; its keys are {keys}{hint}")
        if key in arguments:
            raise ValueError(f"dataset string {text!r}: key {key!r} is given twice")
        if not value:
            raise ValueError(f"dataset string {text!r}: key {key!r} has no value")
        if key == "light" and value not in LIGHTS:
            raise ValueError(f"dataset string {text!r}: light must be one of {', '.join(LIGHTS)}, found {value!r}")
        arguments[key] = _convert(value, parameters[key], text)
    missing = [key for key in required if key not in arguments]
    if missing:
        example = ":".join([name, *(f"{key}=..." for key in required)])
        raise ValueError(f"dataset string {text!r}: missing {', '.join(map(repr, missing))}; write {example}")
    given = [key for key in ("range", "bits") if key in arguments]
    if len(given) == 2:
        raise ValueError(f"dataset string {text!r}: range and bits exclude each other: bits=12 means range=0,4095")
    try:
        named = named_value_range(text)
    except ValueError as error:
        raise ValueError(f"dataset string {text!r}: {error}") from None
    for key in given:
        del arguments[key]
        arguments["value_range"] = named
    return dataset_class, arguments


def _advise_path(text: str) -> str:
    """What to write in place of a path; empty for a text that is none."""
    path = Path(text).expanduser()
    if not text or not path.exists():
        is_path = text.startswith((".", "~", "/")) or "/" in text.partition(":")[0]
        return f"dataset string {text!r} names no dataset, and there is no folder {path}" if is_path else ""
    if path.is_file() and path.parent.name != "annotations":
        return (
            f"dataset string {text!r} is a file and names no dataset: a set is a folder with its images unpacked in it"
        )
    root = path if path.is_dir() else path.parent.parent
    escaped = str(root).replace("\\", "\\\\").replace(":", "\\:")
    choices = {
        f"GroupedJSON:split=TRAIN:root={escaped}, which reads annotations/train.json": root / "annotations",
        f"ImageFolder:root={escaped}:split=TRAIN, where the folders in train are the classes": root / "train",
    }
    found = [choice for choice, folder in choices.items() if folder.is_dir()]
    found.append(f"ImageFolder:root={escaped}:labels=none for all images below it, without labels")
    return f"dataset string {text!r} is a path and names no dataset: write {'; or '.join(found)}"


def named_value_range(text: str) -> ValueRange | None:
    """The range of values that a dataset string names; None for none.

    Raises:
        ValueError: for what is no range.
    """
    for piece in _split(text)[1:]:
        key, _, value = piece.partition("=")
        if key in ("range", "bits"):
            return ValueRange.parse(value) if key == "range" else ValueRange.of_bits(int(value))
    return None


def named_light(text: str) -> str:
    """The preparation of light that a dataset string names; ``original`` where it names none."""
    pairs = (piece.partition("=") for piece in _split(text)[1:])
    return next((value for key, _, value in pairs if key == "light"), ImageDataset.light)


def with_value_range(text: str, value_range: ValueRange | None) -> str:
    """A dataset string that names a range of values, unless it names one already or there is none to name."""
    if not text or value_range is None or named_value_range(text) is not None:
        return text
    text = text.strip()
    is_open = (len(text) - len(text.rstrip("\\"))) % 2  # a last backslash would take the colon for a part of the value
    return f"{text}{chr(92) * is_open}:range={value_range}"


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


def _near(name: str, known: Iterable[str]) -> str:
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
