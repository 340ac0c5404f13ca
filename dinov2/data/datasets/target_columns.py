"""The columns of an annotation file that task heads learn from: masks, depth maps, and several labels at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.compact import CompactStrings
from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.datasets.json_values import Fail, check_names, describe_kind, is_number
from dinov2.data.datasets.relative_paths import shorten_paths

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
