"""Reading and checking one annotation file of a grouped set."""

import gc
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.compact import CompactStrings
from dinov2.data.datasets.json_values import check_names, describe_kind
from dinov2.data.datasets.relative_paths import shorten_paths
from dinov2.data.datasets.target_columns import TARGET_KEYS, TargetColumns, read_target_columns

_KNOWN_KEYS = frozenset(("img_path", "gt_label", "group_id", *TARGET_KEYS))
_ABSENT = object()
_GROUP_ID = re.compile(r'"group_id"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)')


@dataclass(frozen=True)
class AnnotationTable:
    """The checked rows of an annotation file, one array per column.

    Attributes:
        metainfo: the file's ``metainfo``, with all its keys.
        classes: class names; empty where the file names none.
        paths: image paths relative to the set's root, in their shortest form.
        targets: class indices ``[N]``, -1 where missing.
        group_names: the distinct groups in order of appearance.
        group_codes: position of each row's group in ``group_names``, ``[N]``.
        columns: masks, depth maps and sets of labels.
        extras: further keys of each row as JSON, empty text where a row has none; None where no row has any.
    """

    metainfo: dict[str, Any]
    classes: tuple[str, ...]
    paths: CompactStrings
    targets: npt.NDArray[np.int64]
    group_names: CompactStrings
    group_codes: npt.NDArray[np.int32]
    columns: TargetColumns
    extras: CompactStrings | None


def read_annotation_file(path: Path) -> AnnotationTable:
    """Reads and checks an annotation file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, the row and the key of the first thing that is wrong.
    """
    was_enabled = gc.isenabled()
    gc.disable()  # collecting while millions of objects are made, none of them garbage, takes as long as all the rest
    try:
        return _Checker(path).check(_parse(path))
    finally:
        if was_enabled:
            gc.enable()


def scan_group_ids(path: Path) -> frozenset[str]:
    """Collects the group ids of an annotation file without parsing it; a broken file gives what can be found."""
    try:
        text = _decode(path)
    except (OSError, ValueError):
        return frozenset()
    found = set()
    for literal in set(_GROUP_ID.findall(text)):
        try:
            found.add(str(json.loads(literal)))
        except ValueError:
            continue
    return frozenset(found)


def _decode(path: Path) -> str:
    data = path.read_bytes()
    encoding = json.detect_encoding(data)  # also knows byte-order marks and UTF-16
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {data[error.start]:#04x} at position {error.start} is not {encoding.upper()}; "
            f"save the file as UTF-8"
        ) from None


def _parse(path: Path) -> Any:
    text = _decode(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: nested too deeply") from None


class _Checker:
    """Checks a parsed file column by column; whole columns first, single rows only where something is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, content: Any) -> AnnotationTable:
        if not isinstance(content, dict):
            self.fail(f"the top level must be an object with metainfo and data_list, found {describe_kind(content)}")
        for key, kind in (("metainfo", dict), ("data_list", list)):
            if key not in content:
                self.fail(f"key {key!r} is missing; found {_listing(content)}")
            if not isinstance(content[key], kind):
                expected = "an object" if kind is dict else "a list"
                self.fail(f"{key!r} must be {expected}, found {describe_kind(content[key])}")
        metainfo, rows = content["metainfo"], content["data_list"]
        classes = self.classes(metainfo)
        if not rows:
            self.fail("'data_list' has no rows")
        if set(map(type, rows)) != {dict}:
            row, value = next((i, r) for i, r in enumerate(rows) if type(r) is not dict)
            self.fail(f"data_list[{row}]: a row must be an object, found {describe_kind(value)}")
        paths = self.paths(self.column(rows, "img_path", (str,)))
        targets = self.targets(self.column(rows, "gt_label", (int, NoneType), required=False), classes)
        groups = self.groups(self.column(rows, "group_id", (str, int)))
        numbers: dict[str, int] = {}
        codes = np.fromiter((numbers.setdefault(g, len(numbers)) for g in groups), dtype=np.int32, count=len(rows))
        return AnnotationTable(
            metainfo=metainfo,
            classes=classes,
            paths=CompactStrings(paths),
            targets=targets,
            group_names=CompactStrings(list(numbers)),
            group_codes=codes,
            columns=read_target_columns(rows, metainfo, len(classes), self.fail),
            extras=_pack_extras(rows),
        )

    def classes(self, metainfo: dict[str, Any]) -> tuple[str, ...]:
        names = metainfo.get("classes")
        return () if names is None else check_names(names, "metainfo.classes", self.fail)

    def column(
        self, rows: list[dict[str, Any]], key: str, kinds: tuple[type, ...], *, required: bool = True
    ) -> list[Any]:
        default = _ABSENT if required else None
        values = [row.get(key, default) for row in rows]
        if not set(map(type, values)) <= set(kinds):
            self.fail_column(rows, key, values, kinds)
        return values

    def fail_column(self, rows: list[dict[str, Any]], key: str, values: list[Any], kinds: tuple[type, ...]) -> NoReturn:
        def is_wrong(value: Any) -> bool:
            return type(value) not in kinds

        row, value = self.first(values, is_wrong)
        if value is _ABSENT:
            self.fail(f"data_list[{row}]: key {key!r} is missing; the row has {_listing(rows[row])}", values, is_wrong)
        expected = {"img_path": "text", "gt_label": "a whole number", "group_id": "text or a whole number"}[key]
        found = f"{describe_kind(value)} {value!r:.80}"
        self.fail(f"data_list[{row}]: {key!r} must be {expected}, found {found}", values, is_wrong)

    def paths(self, paths: list[str]) -> list[str]:
        for row, reason in shorten_paths(paths):
            self.fail(f"data_list[{row}]: 'img_path' {paths[row]!r} {reason}")
        if len(set(paths)) < len(paths):
            first: dict[str, int] = {}
            for row, path in enumerate(paths):
                if first.setdefault(path, row) != row:
                    repeats = len(paths) - len(set(paths))
                    all_repeats = f" ({repeats} such rows in all)" if repeats > 1 else ""
                    self.fail(
                        f"data_list[{row}]: 'img_path' {path!r} is already in data_list[{first[path]}]{all_repeats}"
                    )
        return paths

    def targets(self, labels: list[int | None], classes: tuple[str, ...]) -> npt.NDArray[np.int64]:
        def is_wrong(label: int | None) -> bool:
            return label is not None and not 0 <= label < len(classes)

        present = set(labels) - {None}
        if any(map(is_wrong, present)):
            row, label = self.first(labels, is_wrong)
            allowed = f"0 to {len(classes) - 1} (metainfo.classes has {len(classes)})" if classes else "none"
            hint = "" if classes else ": metainfo.classes is missing or empty"
            text = f"data_list[{row}]: 'gt_label' {label} is outside the classes; allowed are {allowed}{hint}"
            self.fail(text, labels, is_wrong)
        return np.fromiter((-1 if label is None else label for label in labels), dtype=np.int64, count=len(labels))

    def groups(self, groups: list[str | int]) -> list[str]:
        names = list(map(str, groups))
        if "" in names:
            self.fail(f"data_list[{names.index('')}]: 'group_id' is empty")
        return names

    @staticmethod
    def first(values: list[Any], is_wrong: Callable[[Any], bool]) -> tuple[int, Any]:
        return next((row, value) for row, value in enumerate(values) if is_wrong(value))

    def fail(self, text: str, values: Iterable[Any] = (), is_wrong: Callable[[Any], bool] = bool) -> NoReturn:
        count = sum(map(is_wrong, values))
        raise ValueError(f"{self.path}: {text}{f' ({count} such rows in all)' if count > 1 else ''}")


def _pack_extras(rows: list[dict[str, Any]]) -> CompactStrings | None:
    if all(row.keys() <= _KNOWN_KEYS for row in rows):
        return None
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    return CompactStrings(
        [
            encode({key: value for key, value in row.items() if key not in _KNOWN_KEYS})
            if row.keys() - _KNOWN_KEYS
            else ""
            for row in rows
        ]
    )


def _listing(mapping: dict[str, Any]) -> str:
    return ", ".join(map(repr, list(mapping)[:10])) or "no keys"
