"""Reading and checking one annotation file of a grouped set."""

import gc
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import MISSING_TARGET
from dinov2.data.datasets.boxes import BoxTable, four_numbers
from dinov2.data.datasets.dense_targets import IGNORED, MaskValues
from dinov2.data.datasets.scan import CompactStrings, shorten_paths

Fail = Callable[[str], NoReturn]  # raises a ValueError that names the file

# What the keys of a row may hold, and how that is said; a key that may be null may be missing too. A further kind of
# target has its line here, a reader in `read_annotation_file` and a place in `AnnotationTable`.
_KEYS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "img_path": ((str,), "text"),
    "group_id": ((str, int), "text or a whole number"),
    "gt_label": ((int, NoneType), "a whole number"),
    "gt_labels": ((list, NoneType), "a list of whole numbers"),
    "mask_path": ((str, NoneType), "text"),
    "height_path": ((str, NoneType), "text"),
    "depth_path": ((str, NoneType), "text"),
}
ROW_KEYS = tuple(_KEYS)
_HEIGHT_UNIT = "um"
_ABSENT = object()
# A key of an object, another text, or the bounds of an object.
_JSON_TOKEN = re.compile(r'(?P<key>"(?:[^"\\]|\\.)*")\s*:|"(?:[^"\\]|\\.)*"|[{}]')
_GROUP_ID = re.compile(r'"group_id"\s*:\s*("(?:[^"\\]|\\.)*"|-?\d+)')


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
class AnnotationTable:
    """The checked rows of an annotation file, one array per column; targets that no row has are None.

    Attributes:
        metainfo: the file's ``metainfo``, with all its keys.
        classes: class names; empty where the file names none.
        paths: image paths relative to the set's root, in their shortest form.
        targets: class indices ``[N]``, -1 where missing.
        group_names: the distinct groups in order of appearance.
        group_codes: position of each row's group in ``group_names``, ``[N]``.
        label_sets: ``gt_labels`` as JSON, empty text where a row has none.
        mask_paths: relative to the set's root; empty text where a row has none.
        mask_classes: ``metainfo.mask_classes``; empty where the file names none.
        mask_values: ``metainfo.mask_values``; None where the file has none.
        depth: depth or height maps.
        extras: further keys of each row as JSON, empty text where a row has none; None where no row has any.
    """

    metainfo: dict[str, Any]
    classes: tuple[str, ...]
    paths: CompactStrings
    targets: npt.NDArray[np.int64]
    group_names: CompactStrings
    group_codes: npt.NDArray[np.int32]
    label_sets: CompactStrings | None
    mask_paths: CompactStrings | None
    mask_classes: tuple[str, ...]
    mask_values: MaskValues | None
    depth: DepthColumn | None
    extras: CompactStrings | None

    def get_labels(self, index: int) -> list[int] | None:
        """``gt_labels`` of a row; None where it has none."""
        text = "" if self.label_sets is None else self.label_sets[index]
        return json.loads(text) if text else None

    def get_row(self, index: int) -> dict[str, Any]:
        """One row of the file with all its keys, without those that are missing."""
        row: dict[str, Any] = {"img_path": self.paths[index]}
        if self.targets[index] != MISSING_TARGET:
            row["gt_label"] = int(self.targets[index])
        row["group_id"] = self.group_names[int(self.group_codes[index])]
        if self.mask_paths is not None and (path := self.mask_paths[index]):
            row["mask_path"] = path
        if self.depth is not None and (path := self.depth.paths[index]):
            row[self.depth.key] = path
        if (labels := self.get_labels(index)) is not None:
            row["gt_labels"] = labels
        if self.extras is not None and (extra := self.extras[index]):
            row |= json.loads(extra)
        return row


def read_annotation_file(path: Path) -> AnnotationTable:
    """Reads and checks an annotation file: whole columns first, single rows only where something is wrong.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file, the row and the key of the first thing that is wrong.
    """

    def fail(text: str) -> NoReturn:
        raise ValueError(f"{path}: {text}")

    was_enabled = gc.isenabled()
    gc.disable()  # collecting while millions of objects are made, none of them garbage, takes as long as all the rest
    try:
        return _check(read_json(path), fail)
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, eq=False)
class BoxColumn:
    """The boxes of a file.

    Attributes:
        classes: names by label.
        table: boxes of all rows.
        known: which rows say what they show ``[N]``: by ``boxes``, or by a ``gt_label`` of the background.
    """

    classes: tuple[str, ...]
    table: BoxTable
    known: npt.NDArray[np.bool_]


def read_boxes(table: AnnotationTable, path: Path, background: int) -> BoxColumn | None:
    """Checks ``boxes`` of all rows; None where no row has any.

    A row's ``boxes`` are ``{"bbox": [x1, y1, x2, y2], "label": i}``, or the corners alone, whose labels are in
    ``box_labels``. Labels are positions in ``metainfo.box_classes``, or where there is none in ``metainfo.classes``.

    Args:
        table: the file's rows.
        path: the file, for messages.
        background: class of images that need no boxes.

    Raises:
        ValueError: naming the file, the row and what is wrong.
    """

    def fail(text: str) -> NoReturn:
        raise ValueError(f"{path}: {text}")

    names = table.metainfo.get("box_classes")
    key = "metainfo.classes" if names is None else "metainfo.box_classes"
    classes = table.classes if names is None else _check_names(names, key, fail)
    known = table.targets == background
    boxes, labels, rows, places = [], [], [], []
    has_boxes = False
    for row in range(len(table.paths)):
        extra = "" if table.extras is None else table.extras[row]
        entry = json.loads(extra) if '"boxes"' in extra else {}
        if entry.get("boxes") is None:
            continue
        has_boxes = known[row] = True
        for place, (box, label) in enumerate(_boxes_of_row(entry, row, fail)):
            where = f"data_list[{row}]: 'boxes'[{place}]"
            if not four_numbers(box):
                fail(f"{where} must be the numbers [x1, y1, x2, y2], found {box!r:.80}")
            if type(label) is not int or not 0 <= label < len(classes):
                fail(f"{where} has the label {label!r:.80}; {key} has {len(classes)} names")
            boxes.append(box)
            labels.append(label)
            rows.append(row)
            places.append(place)
    if not has_boxes:
        return None
    if not classes:
        fail(f"rows have 'boxes', and {key} names no class")
    checked = BoxTable.build(
        boxes,
        labels,
        rows,
        len(table.paths),
        source=path,
        where=lambda position: f"data_list[{rows[position]}]: 'boxes'[{places[position]}]",
    )
    return BoxColumn(classes, checked, known)


def _boxes_of_row(entry: Mapping[str, Any], row: int, fail: Fail) -> list[tuple[Any, Any]]:
    """Corners and label of every box of a row."""
    boxes, labels = entry["boxes"], entry.get("box_labels")
    if not isinstance(boxes, list) or not (labels is None or isinstance(labels, list)):
        fail(f"data_list[{row}]: 'boxes' and 'box_labels' must be lists, found {boxes!r:.40} and {labels!r:.40}")
    if labels is not None:
        if len(labels) != len(boxes):
            fail(f"data_list[{row}]: has {len(boxes)} 'boxes' and {len(labels)} 'box_labels'")
        return list(zip(boxes, labels, strict=True))
    for place, box in enumerate(boxes):
        if not isinstance(box, dict) or "bbox" not in box or "label" not in box:
            fail(
                f"data_list[{row}]: 'boxes'[{place}] must be {{'bbox': [x1, y1, x2, y2], 'label': i}}, or 'box_labels' "
                f"must name the labels; found {box!r:.80}"
            )
    return [(box["bbox"], box["label"]) for box in boxes]


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


def read_json(path: Path) -> Any:
    """The content of a JSON file in any encoding of Unicode.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is empty or no JSON, or an object in it has a key twice, naming file and line.
    """
    text = _decode(path)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    repeated = False

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal repeated
        made = dict(pairs)
        repeated = repeated or len(made) < len(pairs)
        return made

    try:
        content = json.loads(text, object_pairs_hook=make_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: nested too deeply") from None
    if repeated:
        key, first, line = _find_repeated_key(text)
        raise ValueError(
            f"{path}, line {line}: the key {key} is already in line {first} of the same object; only one of the two "
            "would count: keep one, or join their values"
        )
    return content


def _find_repeated_key(text: str) -> tuple[str, int, int]:
    """The first key that an object has twice, as the file writes it, and the lines of both."""
    open_objects: list[dict[str, tuple[str, int]]] = []  # keys of the objects around a place, with their positions
    for token in _JSON_TOKEN.finditer(text):
        if token.group() == "{":
            open_objects.append({})
        elif token.group() == "}":
            open_objects.pop()
        elif token["key"] is not None:
            known = open_objects[-1].setdefault(json.loads(token["key"]), (token["key"], token.start()))
            if known[1] != token.start():
                first, second = (text.count("\n", 0, place) + 1 for place in (known[1], token.start()))
                return token["key"], first, second
    raise AssertionError("no object of the text has a key twice")


def _check_names(names: object, key: str, fail: Fail) -> tuple[str, ...]:
    """Checks a list of distinct names that the file holds at a key."""
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        fail(f"{key} must be a list of names, found {names!r:.200}")
    if len(set(names)) < len(names):
        fail(f"{key} names {next(name for name in names if names.count(name) > 1)!r} twice")
    return tuple(names)


def check_mask_classes(names: object, key: str, fail: Fail) -> tuple[str, ...]:
    """Checks the names of the classes of masks; see `_check_names`."""
    classes = _check_names(names, key, fail)
    if not 2 <= len(classes) <= IGNORED:
        fail(f"{key} must have 2 to {IGNORED} names, found {len(classes)}")
    return classes


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


def _check(content: Any, fail: Fail) -> AnnotationTable:
    if not isinstance(content, dict):
        fail(f"the top level must be an object with metainfo and data_list, found {_kind_of(content)}")
    for key, kind, expected in (("metainfo", dict, "an object"), ("data_list", list, "a list")):
        if key not in content:
            fail(f"key {key!r} is missing; found {_keys_of(content)}")
        if not isinstance(content[key], kind):
            fail(f"{key!r} must be {expected}, found {_kind_of(content[key])}")
    metainfo, rows = content["metainfo"], content["data_list"]
    names = metainfo.get("classes")
    classes = () if names is None else _check_names(names, "metainfo.classes", fail)
    if not rows:
        fail("'data_list' has no rows")
    if set(map(type, rows)) != {dict}:
        row, value = next((row, value) for row, value in enumerate(rows) if type(value) is not dict)
        fail(f"data_list[{row}]: a row must be an object, found {_kind_of(value)}")
    columns = {key: _column(rows, key, fail) for key in _KEYS}
    groups = list(map(str, columns["group_id"]))
    if "" in groups:
        fail(f"data_list[{groups.index('')}]: 'group_id' is empty")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    mask_names = metainfo.get("mask_classes")
    return AnnotationTable(
        metainfo=metainfo,
        classes=classes,
        paths=_image_paths(columns["img_path"], fail),
        targets=_targets(columns["gt_label"], classes, fail),
        group_names=CompactStrings(list(numbers)),
        group_codes=np.fromiter((numbers[name] for name in groups), dtype=np.int32, count=len(rows)),
        label_sets=_label_sets(columns["gt_labels"], len(classes), fail),
        mask_paths=_target_paths("mask_path", columns["mask_path"], fail),
        mask_classes=() if mask_names is None else check_mask_classes(mask_names, "metainfo.mask_classes", fail),
        mask_values=_mask_values(metainfo.get("mask_values"), fail),
        depth=_depth(columns, metainfo, fail),
        extras=_pack_extras(rows),
    )


def _column(rows: Sequence[Mapping[str, Any]], key: str, fail: Fail) -> list[Any]:
    kinds, expected = _KEYS[key]
    default = None if NoneType in kinds else _ABSENT
    values = [row.get(key, default) for row in rows]
    if not set(map(type, values)) <= set(kinds):
        wrong = [row for row, value in enumerate(values) if type(value) not in kinds]
        value = values[wrong[0]]
        if value is _ABSENT:
            _fail_rows(wrong, f"key {key!r} is missing; the row has {_keys_of(rows[wrong[0]])}", fail)
        _fail_rows(wrong, f"{key!r} must be {expected}, found {_kind_of(value)} {value!r:.80}", fail)
    return values


def _fail_rows(wrong: Sequence[int], text: str, fail: Fail) -> NoReturn:
    """Fails with what is wrong with the first of some rows, and how many they are."""
    fail(f"data_list[{wrong[0]}]: {text}{f' ({len(wrong)} such rows in all)' if len(wrong) > 1 else ''}")


def _image_paths(values: list[str], fail: Fail) -> CompactStrings:
    paths = values.copy()
    for row, reason in shorten_paths(paths):
        fail(f"data_list[{row}]: 'img_path' {paths[row]!r} {reason}")
    if len(set(paths)) < len(paths):
        first: dict[str, int] = {}
        repeats = [row for row, path in enumerate(paths) if first.setdefault(path, row) != row]
        path = paths[repeats[0]]
        _fail_rows(repeats, f"'img_path' {path!r} is already in data_list[{first[path]}]", fail)
    return CompactStrings(paths)


def _target_paths(key: str, values: list[str | None], fail: Fail) -> CompactStrings | None:
    """Paths in their shortest form, empty text where a row has none; None where no row has one."""
    if set(map(type, values)) == {NoneType}:
        return None
    places = [row for row, value in enumerate(values) if value is not None]
    paths = [value for value in values if value is not None]
    for position, reason in shorten_paths(paths):
        fail(f"data_list[{places[position]}]: {key!r} {paths[position]!r} {reason}")
    shortened = [""] * len(values)
    for row, path in zip(places, paths, strict=True):
        shortened[row] = path
    return CompactStrings(shortened)


def _targets(labels: list[int | None], classes: tuple[str, ...], fail: Fail) -> npt.NDArray[np.int64]:
    # A set of the distinct values is soon made; single rows are looked at where it shows a wrong one.
    bad = {label for label in set(labels) if label is not None and not 0 <= label < len(classes)}
    if bad:
        wrong = [row for row, label in enumerate(labels) if label in bad]
        hint = "" if classes else ": metainfo.classes is missing or empty"
        text = f"'gt_label' {labels[wrong[0]]} is outside the classes; allowed are {_allowed(len(classes))}{hint}"
        _fail_rows(wrong, text, fail)
    targets = (MISSING_TARGET if label is None else label for label in labels)
    return np.fromiter(targets, dtype=np.int64, count=len(labels))


def _label_sets(values: list[list[int] | None], num_classes: int, fail: Fail) -> CompactStrings | None:
    if set(map(type, values)) == {NoneType}:
        return None
    labels = [label for row in values if row for label in row]
    clean = set(map(type, labels)) <= {int} and all(0 <= label < num_classes for label in set(labels))
    for row, found in enumerate(values):
        for label in () if clean or found is None else found:
            if type(label) is not int:
                fail(f"data_list[{row}]: 'gt_labels' must hold whole numbers, found {_kind_of(label)} {label!r:.80}")
            if not 0 <= label < num_classes:
                fail(
                    f"data_list[{row}]: 'gt_labels' has {label}, outside the classes; allowed are "
                    f"{_allowed(num_classes)}"
                )
        if found is not None and len(found) > 1 and len(set(found)) < len(found):
            fail(f"data_list[{row}]: 'gt_labels' {found!r:.80} names a class twice")
    return CompactStrings(["" if row is None else json.dumps(row) for row in values])


def _mask_values(values: object, fail: Fail) -> MaskValues | None:
    try:
        return None if values is None else MaskValues.from_json(values)
    except ValueError as error:
        fail(f"metainfo.mask_values: {error}")


def _depth(columns: Mapping[str, list[Any]], metainfo: Mapping[str, Any], fail: Fail) -> DepthColumn | None:
    heights, depths = (_target_paths(key, columns[key], fail) for key in ("height_path", "depth_path"))
    if heights is not None and depths is not None:
        fail("data_list has both 'height_path' and 'depth_path'; use one of them for all rows")
    paths = depths if heights is None else heights
    if paths is None:
        return None
    unit = metainfo.get("depth_unit", None if heights is None else _HEIGHT_UNIT)
    if not isinstance(unit, str) or not unit:
        fail(f"metainfo.depth_unit must name the unit of the depth maps, such as 'mm' or 'm', found {unit!r:.80}")
    scale = metainfo.get("depth_scale", 1)
    if not _is_number(scale) or scale <= 0:
        fail(f"metainfo.depth_scale must be a number above 0 (value = raw x scale), found {scale!r:.80}")
    invalid = metainfo.get("depth_invalid", 0 if heights is None else None)
    if invalid is not None and not _is_number(invalid):
        fail(f"metainfo.depth_invalid must be a number, or null where all values count, found {invalid!r:.80}")
    key = "depth_path" if heights is None else "height_path"
    return DepthColumn(key, paths, unit, float(scale), None if invalid is None else float(invalid))


def _pack_extras(rows: Sequence[Mapping[str, Any]]) -> CompactStrings | None:
    if all(row.keys() <= _KEYS.keys() for row in rows):
        return None
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    extras = ({key: value for key, value in row.items() if key not in _KEYS} for row in rows)
    return CompactStrings([encode(extra) if extra else "" for extra in extras])


def _allowed(num_classes: int) -> str:
    return f"0 to {num_classes - 1} (metainfo.classes has {num_classes})" if num_classes else "none"


def _is_number(value: object) -> bool:
    """Whether something is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _kind_of(value: object) -> str:
    """What kind of JSON value something is."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", NoneType: "null"}
    return names.get(type(value), "a number")


def _keys_of(mapping: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(mapping)[:10])) or "no keys"
