"""Reading and checking one annotation file of a grouped set."""

import gc
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.datasets.scan import CompactStrings, shorten_paths

Fail = Callable[[str], NoReturn]  # raises a ValueError that names the file


def describe_kind(value: object) -> str:
    """What kind of JSON value something is."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", NoneType: "null"}
    return names.get(type(value), "a number")


def is_number(value: object) -> bool:
    """Whether something is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_names(names: object, key: str, fail: Fail) -> tuple[str, ...]:
    """Checks a list of distinct names.

    Args:
        names: what the file holds.
        key: where it holds it.
        fail: is called with what is wrong.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        fail(f"{key} must be a list of names, found {names!r:.200}")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            fail(f"{key} names {name!r} twice")
        seen.add(name)
    return tuple(names)


TARGET_KEYS = ("mask_path", "height_path", "depth_path", "gt_labels")
_DEPTH_KEYS = ("height_path", "depth_path")
_HEIGHT_UNIT = "um"


@dataclass(frozen=True)
class LabelSets:
    """Any number of class indices per row, in two arrays.

    Attributes:
        labels: the labels of all rows, one after another, ``[M]``.
        ends: 0 and then the end of each row in ``labels``, ``[N + 1]``.
        given: whether a row has labels at all, if only an empty list, ``[N]``.
    """

    labels: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    given: npt.NDArray[np.bool_]

    def get(self, row: int) -> tuple[int, ...] | None:
        """The labels of a row as the file lists them; None where it has none."""
        if not self.given[row]:
            return None
        row %= len(self.given)
        return tuple(self.labels[self.ends[row] : self.ends[row + 1]].tolist())


@dataclass(frozen=True)
class DepthColumn:
    """Depth or height maps and how to read them.

    Attributes:
        key: ``height_path`` or ``depth_path``.
        paths: relative to the set's root; empty text where a row has none.
        unit: unit of the values.
        scale: value = raw value x scale.
        invalid: raw value that means nothing was measured; None where all values count.
    """

    key: str
    paths: CompactStrings
    unit: str
    scale: float
    invalid: float | None


@dataclass(frozen=True)
class TargetColumns:
    """What rows say beside their class; None where no row says it.

    Attributes:
        mask_paths: relative to the set's root; empty text where a row has none.
        mask_classes: ``metainfo.mask_classes``; empty where the file names none.
        depth: depth or height maps.
        label_sets: ``gt_labels``.
    """

    mask_paths: CompactStrings | None
    mask_classes: tuple[str, ...]
    depth: DepthColumn | None
    label_sets: LabelSets | None

    def as_row(self, index: int) -> dict[str, Any]:
        """The keys of one row, without those that are missing."""
        row: dict[str, Any] = {}
        if self.mask_paths is not None and (path := self.mask_paths[index]):
            row["mask_path"] = path
        if self.depth is not None and (path := self.depth.paths[index]):
            row[self.depth.key] = path
        if self.label_sets is not None and (labels := self.label_sets.get(index)) is not None:
            row["gt_labels"] = list(labels)
        return row


def read_target_columns(
    rows: Sequence[Mapping[str, Any]], metainfo: Mapping[str, Any], num_classes: int, fail: Fail
) -> TargetColumns:
    """Checks and collects the columns, each as a whole first and row by row only where something is wrong.

    Args:
        rows: the rows of ``data_list``.
        metainfo: of the same file.
        num_classes: length of ``metainfo.classes``.
        fail: is called with what is wrong first.
    """
    columns = {key: [row.get(key) for row in rows] for key in TARGET_KEYS}
    present = [key for key in TARGET_KEYS if set(map(type, columns[key])) != {NoneType}]
    paths = {key: _paths(key, columns[key], fail) for key in present if key != "gt_labels"}
    if all(key in present for key in _DEPTH_KEYS):
        fail("data_list has both 'height_path' and 'depth_path'; use one of them for all rows")
    key = next((key for key in _DEPTH_KEYS if key in present), None)
    return TargetColumns(
        mask_paths=paths.get("mask_path"),
        mask_classes=_mask_classes(metainfo, fail),
        depth=None if key is None else _depth(key, paths[key], metainfo, fail),
        label_sets=_label_sets(columns["gt_labels"], num_classes, fail) if "gt_labels" in present else None,
    )


def _mask_classes(metainfo: Mapping[str, Any], fail: Fail) -> tuple[str, ...]:
    names = metainfo.get("mask_classes")
    if names is None:
        return ()
    classes = check_names(names, "metainfo.mask_classes", fail)
    if not 2 <= len(classes) <= IGNORED:
        fail(f"metainfo.mask_classes must have 2 to {IGNORED} names, found {len(classes)}")
    return classes


def _paths(key: str, values: list[str | None], fail: Fail) -> CompactStrings:
    if not set(map(type, values)) <= {str, NoneType}:
        row, value = next((i, v) for i, v in enumerate(values) if not isinstance(v, str | None))
        fail(f"data_list[{row}]: {key!r} must be text, found {describe_kind(value)} {value!r:.80}")
    places = [row for row, value in enumerate(values) if value is not None]
    paths = [value for value in values if value is not None]
    for position, reason in shorten_paths(paths):
        fail(f"data_list[{places[position]}]: {key!r} {paths[position]!r} {reason}")
    shortened = [""] * len(values)
    for row, path in zip(places, paths, strict=True):
        shortened[row] = path
    return CompactStrings(shortened)


def _depth(key: str, paths: CompactStrings, metainfo: Mapping[str, Any], fail: Fail) -> DepthColumn:
    is_height = key == "height_path"
    unit = metainfo.get("depth_unit", _HEIGHT_UNIT if is_height else None)
    if not isinstance(unit, str) or not unit:
        fail(f"metainfo.depth_unit must name the unit of the depth maps, such as 'mm' or 'm', found {unit!r:.80}")
    scale = metainfo.get("depth_scale", 1)
    if not is_number(scale) or scale <= 0:
        fail(f"metainfo.depth_scale must be a number above 0 (value = raw x scale), found {scale!r:.80}")
    invalid = metainfo.get("depth_invalid", None if is_height else 0)
    if invalid is not None and not is_number(invalid):
        fail(f"metainfo.depth_invalid must be a number, or null where all values count, found {invalid!r:.80}")
    return DepthColumn(key, paths, unit, float(scale), None if invalid is None else float(invalid))


def _label_sets(values: list[list[int] | None], num_classes: int, fail: Fail) -> LabelSets:
    if not set(map(type, values)) <= {list, NoneType}:
        row, value = next((i, v) for i, v in enumerate(values) if not isinstance(v, list | None))
        fail(f"data_list[{row}]: 'gt_labels' must be a list of whole numbers, found {describe_kind(value)}")
    labels = [label for row in values if row for label in row]
    # A set of the distinct values and their types is soon made; single rows are looked at where it shows a wrong one.
    if not set(map(type, labels)) <= {int} or any(not 0 <= label < num_classes for label in set(labels)):
        _fail_label(values, num_classes, fail)
    for row, found in enumerate(values):
        if found is not None and len(found) > 1 and len(set(found)) < len(found):
            fail(f"data_list[{row}]: 'gt_labels' {found!r:.80} names a class twice")
    counts = np.fromiter((len(row) if row else 0 for row in values), dtype=np.int64, count=len(values))
    return LabelSets(
        labels=np.array(labels, dtype=np.int64),
        ends=np.concatenate([np.zeros(1, np.int64), counts.cumsum()]),
        given=np.fromiter((row is not None for row in values), dtype=np.bool_, count=len(values)),
    )


def _fail_label(values: list[list[int] | None], num_classes: int, fail: Fail) -> NoReturn:
    for row, labels in enumerate(values):
        for label in labels or ():
            if type(label) is not int:
                fail(
                    f"data_list[{row}]: 'gt_labels' must hold whole numbers, found {describe_kind(label)} {label!r:.80}"
                )
            if not 0 <= label < num_classes:
                allowed = f"0 to {num_classes - 1} (metainfo.classes has {num_classes})" if num_classes else "none"
                fail(f"data_list[{row}]: 'gt_labels' has {label}, outside the classes; allowed are {allowed}")
    raise AssertionError("called without a wrong label")


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
