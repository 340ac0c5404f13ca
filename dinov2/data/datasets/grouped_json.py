"""Photos grouped by part, described by one JSON file per split."""

import json
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.annotation_file import AnnotationTable, read_annotation_file, scan_group_ids
from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset, Split
from dinov2.data.datasets.dense_targets import (
    BINARY_CLASSES,
    IGNORED,
    DepthReader,
    DepthSource,
    MaskSource,
    read_binary_mask,
    read_class_mask,
)
from dinov2.data.datasets.scan import CompactStrings
from dinov2.utils.seeds import derive_seed

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


class GroupedJSON(ImageDataset, MaskSource, DepthSource):
    """Images listed in ``root/annotations/{train,val,test}.json``.

    A file reads ``{"metainfo": {"classes": [...]}, "data_list": [{"img_path", "gt_label", "group_id"}, ...]}`` with
    paths relative to ``root``. ``gt_label`` and, where nothing is labelled, ``classes`` may be missing. Rows may also
    have ``mask_path`` (see `get_mask`), ``height_path`` or ``depth_path`` (see `get_depth`), and ``gt_labels``, a list
    of classes (see `get_labels`); other keys are kept (see `get_annotation`). The file is checked once, when the set is
    opened; images, masks and depth maps are not touched then.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Reads and checks the annotation file; warns about groups that other splits hold too.

        Args:
            root: folder of the set.
            split: ``TRAIN``, ``VAL`` or ``TEST``, in any case.
            transform: maps the RGB image.
            target_transform: maps the class index, -1 where it is missing.

        Raises:
            FileNotFoundError: when the folder or the annotation file is missing.
            ValueError: for an unknown split, and for what is wrong in the file, naming file, row and key.
        """
        super().__init__(transform=transform, target_transform=target_transform)
        self.root = Path(root)
        files = _annotation_files(self.root)
        found = f"{self.root / 'annotations'} has {', '.join(path.name for path in files.values()) or 'none of them'}"
        self.split = Split.parse(split, found=found)
        if self.split not in files:
            raise FileNotFoundError(f"{self.root / 'annotations' / self.split}.json does not exist; {found}")
        self.annotation_path = files[self.split]
        self._table = read_annotation_file(self.annotation_path)
        self.metainfo = self._table.metainfo
        self.classes = self._table.classes
        self._masks = GroupedMasks(self.root, self.annotation_path, self._table)
        self._depths = GroupedDepths(self.root, self.annotation_path, self._table)
        self._warn_of_shared_groups([path for split, path in files.items() if split != self.split])

    def __len__(self) -> int:
        return len(self._table.paths)

    def get_image_path(self, index: int) -> Path:
        return self.root / self._table.paths[index]

    def get_target(self, index: int) -> int | None:
        target = int(self._table.targets[index])
        return None if target == MISSING_TARGET else target

    def get_targets(self) -> npt.NDArray[np.int64]:
        return self._table.targets.copy()

    def get_group_ids(self) -> list[str]:
        """Group of every image, as the file names it."""
        names = list(self._table.group_names)
        return [names[code] for code in self._table.group_codes.tolist()]

    @property
    def multi_label(self) -> bool:
        """Whether any row has ``gt_labels``."""
        return self._table.columns.label_sets is not None

    def get_labels(self, index: int) -> tuple[int, ...]:
        """All classes of an image: its ``gt_labels``, or its ``gt_label`` alone; empty where it is of no class.

        Raises:
            ValueError: for a row with neither, as "unlabelled" is not "of no class".
        """
        sets = self._table.columns.label_sets
        labels = None if sets is None else sets.get(index)
        if labels is not None:
            return labels
        label = self.get_target(index)
        if label is None:
            raise ValueError(f"{self.annotation_path}: data_list[{index}]: neither 'gt_labels' nor 'gt_label' is given")
        return (label,)

    @cached_property
    def mask_classes(self) -> tuple[str, ...]:  # type: ignore[override]  # a cached property can be set
        """``metainfo.mask_classes``, or background and defect where the file names none.

        The first use tells, in the log, how many rows have no mask.

        Raises:
            ValueError: when every pixel of the set would be ignored.
        """
        return self._masks.prepare()

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        """Class of every pixel ``[H, W]`` from the file that ``mask_path`` names.

        With ``metainfo.mask_classes`` the file holds class indices, and 255 for ignored pixels. Without, it holds 0 and
        255 (or 0 and 1): background and defect. A row without ``mask_path`` is background throughout when its
        ``gt_label`` is 0, and ignored throughout otherwise.

        Raises:
            BadTargetError: when the file is missing, damaged, of another size than the photo, or holds other values.
            ValueError: see `mask_classes`.
        """
        return self._masks.read(index, self.get_image_size(index), len(self.mask_classes))

    @cached_property
    def depth_unit(self) -> str:  # type: ignore[override]  # a cached property can be set
        """``metainfo.depth_unit``; by default ``um`` for ``height_path``.

        The first use tells, in the log, how many rows have no depth map.

        Raises:
            ValueError: when no row has one.
        """
        return self._depths.prepare()

    def get_depth(self, index: int) -> npt.NDArray[np.float32]:
        """Depth or height of every pixel ``[H, W]``: raw value x ``metainfo.depth_scale``, NaN where it is unknown.

        The file that ``depth_path`` or ``height_path`` names is an image of one channel or an ``.npy`` array. Unknown
        are pixels of the raw value ``metainfo.depth_invalid`` (by default 0 for ``depth_path``, none for
        ``height_path``), and everything in a row without a file. All else must be above 0; a height may be 0.

        Raises:
            BadTargetError: when the file is missing, damaged, of another size than the photo, or holds other values.
            ValueError: see `depth_unit`.
        """
        _ = self.depth_unit  # refuses a set without depth, and tells once of rows without
        return self._depths.read(index, self.get_image_size(index))

    def get_annotation(self, index: int) -> dict[str, Any]:
        """One row of the file with all its keys; ``gt_label`` is left out where it is missing."""
        table = self._table
        row: dict[str, Any] = {"img_path": table.paths[index]}
        label = self.get_target(index)
        if label is not None:
            row["gt_label"] = label
        row["group_id"] = table.group_names[int(table.group_codes[index])]
        row |= table.columns.as_row(index)
        if table.extras is not None and (extra := table.extras[index]):
            row |= json.loads(extra)
        return row

    def missing_files(self, sample: int | None = 100, seed: int = 0) -> list[Path]:
        """Looks for image files that do not exist.

        Args:
            sample: how many images to look for, drawn at random; None looks for all, which may take long on a network.
            seed: draws the sample.
        """
        rows = np.arange(len(self))
        if sample is not None and sample < len(self):
            rng = np.random.default_rng(derive_seed(seed, "missing files"))
            rows = np.sort(rng.choice(len(self), size=sample, replace=False))
        return [path for row in rows.tolist() if not (path := self.get_image_path(row)).is_file()]

    def _warn_of_shared_groups(self, others: list[Path]) -> None:
        groups = set(self._table.group_names)
        for other in others:
            shared = sorted(groups & scan_group_ids(other))
            if shared:
                logger.warning(
                    "%s and %s share %d of %d groups (such as %s): images of one part in both make scores look better "
                    "than they are",
                    self.annotation_path,
                    other.name,
                    len(shared),
                    len(groups),
                    ", ".join(map(repr, shared[:3])),
                )


def _annotation_files(root: Path) -> dict[Split, Path]:
    """The annotation files that exist."""
    if not root.is_dir():
        raise FileNotFoundError(f"root {str(root)!r} is not a folder; give the folder that holds annotations/")
    folder = root / "annotations"
    if not folder.is_dir():
        raise FileNotFoundError(f"{root} has no folder annotations/ with train.json, val.json or test.json")
    return {split: path for split in Split if (path := folder / f"{split}.json").is_file()}
