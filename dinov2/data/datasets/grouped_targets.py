"""Masks and depth maps of a grouped set: which rows have one, and what the others count as."""

import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.annotation_file import AnnotationTable
from dinov2.data.datasets.compact import CompactStrings
from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.datasets.target_files import BINARY_CLASSES, DepthReader, read_binary_mask, read_class_mask

logger = logging.getLogger("dinov2")

BACKGROUND_LABEL = 0  # photos of this class need no mask: all of it is background


class GroupedMasks:
    """The masks of one annotation file."""

    def __init__(self, root: Path, annotation_path: Path, table: AnnotationTable) -> None:
        """Keeps where masks are listed and stored."""
        self._root = root
        self._annotation_path = annotation_path
        self._table = table

    def prepare(self) -> tuple[str, ...]:
        """Names of the classes; logs how many rows have no mask.

        Raises:
            ValueError: when every pixel of the set would be ignored.
        """
        table = self._table
        missing = _is_missing(table.columns.mask_paths, len(table.paths))
        background = int((missing & (table.targets == BACKGROUND_LABEL)).sum())
        total = int(missing.sum())
        ignored = total - background
        if ignored == len(table.paths):
            raise ValueError(
                f"{self._annotation_path}: no row has 'mask_path' and none has gt_label {BACKGROUND_LABEL}: nothing is "
                "known about any pixel"
            )
        if total:
            name = f" ({table.classes[BACKGROUND_LABEL]})" if background else ""
            logger.log(
                logging.WARNING if ignored or total == len(table.paths) else logging.INFO,
                "%s: %d of %d rows have no mask_path; %d of them have gt_label %d%s and count as background, the other "
                "%d are ignored",
                self._annotation_path, total, len(table.paths), background, BACKGROUND_LABEL, name, ignored,
            )  # fmt: skip
        return table.columns.mask_classes or BINARY_CLASSES

    def read(self, index: int, size: tuple[int, int], num_classes: int) -> npt.NDArray[np.uint8]:
        """Mask of a row ``[H, W]``; ``size`` is that of its photo."""
        columns = self._table.columns
        path = "" if columns.mask_paths is None else columns.mask_paths[index]
        if not path:
            is_background = self._table.targets[index] == BACKGROUND_LABEL
            return np.full(size, BACKGROUND_LABEL if is_background else IGNORED, dtype=np.uint8)
        if columns.mask_classes:
            return read_class_mask(self._root / path, size, num_classes)
        return read_binary_mask(self._root / path, size)


class GroupedDepths:
    """The depth or height maps of one annotation file."""

    def __init__(self, root: Path, annotation_path: Path, table: AnnotationTable) -> None:
        """Keeps where maps are listed and stored, and how to read them."""
        self._root = root
        self._annotation_path = annotation_path
        self._column = table.columns.depth
        if self._column is not None:
            self._reader = DepthReader(
                scale=self._column.scale, invalid=self._column.invalid, allow_zero=self._column.key == "height_path"
            )

    def prepare(self) -> str:
        """Unit of the depths; logs how many rows have no map.

        Raises:
            ValueError: when no row has one.
        """
        if self._column is None:
            raise ValueError(f"{self._annotation_path}: no row has 'depth_path' or 'height_path'")
        missing = int(_is_missing(self._column.paths, len(self._column.paths)).sum())
        if missing:
            logger.warning(
                "%s: %d of %d rows have no %s; their depth is unknown throughout",
                self._annotation_path, missing, len(self._column.paths), self._column.key,
            )  # fmt: skip
        return self._column.unit

    def read(self, index: int, size: tuple[int, int]) -> npt.NDArray[np.float32]:
        """Depths of a row ``[H, W]``; ``size`` is that of its photo."""
        assert self._column is not None  # `prepare` has refused
        path = self._column.paths[index]
        return self._reader.read(self._root / path, size) if path else np.full(size, np.nan, dtype=np.float32)


def _is_missing(paths: CompactStrings | None, num_rows: int) -> npt.NDArray[np.bool_]:
    """Which rows have no path ``[N]``."""
    return np.ones(num_rows, dtype=np.bool_) if paths is None else np.diff(paths.ends) == 0
