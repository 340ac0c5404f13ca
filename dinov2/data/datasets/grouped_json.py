"""Images grouped by part, described by one JSON file per split."""

import json
import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.annotation_file import BoxColumn, read_annotation_file, read_boxes, scan_group_ids
from dinov2.data.datasets.base import PREPARE_CSV, TABLE_ENDINGS, ListedImages, Split, Transforms
from dinov2.data.datasets.boxes import Boxes, BoxSource, Labels, boxes_of_mask, boxes_that_count
from dinov2.data.datasets.dense_targets import (
    BINARY_CLASSES,
    IGNORED,
    DepthReader,
    DepthSource,
    MaskReader,
    MaskSource,
    MaskValues,
)
from dinov2.data.datasets.references import ReferenceSource
from dinov2.data.datasets.scan import CompactStrings, shorten_paths
from dinov2.data.reading import find_file
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")

BACKGROUND_LABEL = 0  # images of this class need no mask: all of it is background


class GroupedJSON(ListedImages, MaskSource, DepthSource, BoxSource, ReferenceSource):
    """Images listed in ``root/annotations/{train,val,test}.json``.

    A file reads ``{"metainfo": {"classes": [...]}, "data_list": [{"img_path", "gt_label", "group_id"}, ...]}`` with
    paths relative to ``root``. ``gt_label`` and, where nothing is labelled, ``classes`` may be missing. Rows may also
    have ``mask_path`` (see `get_mask`), ``height_path`` or ``depth_path`` (see `get_depth`), and ``gt_labels``, a list
    of classes (see `get_labels`), ``boxes`` (see `get_boxes`) and ``reference``, the path of an image to compare with;
    other keys are kept (see `get_annotation`). The file is checked once, when the set is
    opened; images, masks and depth maps are not touched then.
    """

    def __init__(
        self, root: str | Path, split: str, mask_values: str | None = None, **transforms: Unpack[Transforms]
    ) -> None:
        """Reads and checks the annotation file; warns about groups that other splits hold too.

        Args:
            root: folder of the set.
            split: ``TRAIN``, ``VAL`` or ``TEST``, in any case.
            mask_values: what values in masks mean, where they are not the classes (see `MaskValues`); by default
                ``metainfo.mask_values``.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when the folder or the annotation file is missing.
            ValueError: for an unknown split, and for what is wrong in the file, naming file, row and key.
        """
        self.root = find_file(Path(root))
        if not self.root.is_dir():
            hint = PREPARE_CSV if self.root.suffix.lower() in TABLE_ENDINGS else ""
            raise FileNotFoundError(
                f"root {str(root)!r} is not a folder; give the folder that holds annotations/{hint}"
            )
        folder = self.root / "annotations"
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{root} has no folder annotations/ with train.json, val.json or test.json{PREPARE_CSV}"
            )
        files = {name: path for name in Split if (path := folder / f"{name}.json").is_file()}
        found = f"{folder} has {', '.join(path.name for path in files.values()) or 'none of them'}"
        self.split = Split.parse(split, found=found)
        if self.split not in files:
            raise FileNotFoundError(f"{folder / self.split}.json does not exist; {found}")
        self.annotation_path = files[self.split]
        self._table = read_annotation_file(self.annotation_path)
        self.metainfo = self._table.metainfo
        self.classes = self._table.classes
        super().__init__(self.root, self._table.paths, self._table.targets, **transforms)
        values = self._table.mask_values if mask_values is None else MaskValues(mask_values)
        self.mask_values = "" if values is None else values.text
        names = self._table.mask_classes
        try:
            self._mask_reader = MaskReader(len(names or BINARY_CLASSES), named=bool(names), values=values)
        except ValueError as error:
            raise ValueError(f"{self.annotation_path}: {error}") from None
        depth = self._table.depth
        if depth is not None:
            allow_zero = depth.key == "height_path"
            self._depth_reader = DepthReader(scale=depth.scale, invalid=depth.invalid, allow_zero=allow_zero)
        groups = set(self._table.group_names)
        for other in (path for split, path in files.items() if split != self.split):
            shared = sorted(groups & scan_group_ids(other))
            if shared:
                logger.warning(
                    "%s and %s share %d of %d groups (such as %s): images of one part in both make scores look better "
                    "than they are",
                    self.annotation_path, other.name, len(shared), len(groups), ", ".join(map(repr, shared[:3])),
                )  # fmt: skip

    def get_group_ids(self) -> list[str]:
        """Group of every image, as the file names it."""
        names = list(self._table.group_names)
        return [names[code] for code in self._table.group_codes.tolist()]

    @property
    def multi_label(self) -> bool:
        """Whether any row has ``gt_labels``."""
        return self._table.label_sets is not None

    def get_labels(self, index: int) -> tuple[int, ...]:
        """All classes of an image: its ``gt_labels``, or its ``gt_label`` alone; empty where it is of no class.

        Raises:
            ValueError: for a row with neither, as "unlabelled" is not "of no class".
        """
        labels = self._table.get_labels(index)
        if labels is not None:
            return tuple(labels)
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
        table = self._table
        missing = _is_missing(table.mask_paths, len(self))
        background = int((missing & (table.targets == BACKGROUND_LABEL)).sum())
        total = int(missing.sum())
        ignored = total - background
        if ignored == len(self):
            raise ValueError(
                f"{self.annotation_path}: no row has 'mask_path' and none has gt_label {BACKGROUND_LABEL}: nothing is "
                "known about any pixel"
            )
        if total:
            name = f" ({table.classes[BACKGROUND_LABEL]})" if background else ""
            logger.log(
                logging.WARNING if ignored or total == len(self) else logging.INFO,
                "%s: %d of %d rows have no mask_path; %s of them have gt_label %d%s and count as background%s",
                self.annotation_path, total, len(self), background if ignored else "all", BACKGROUND_LABEL, name,
                f", the other {ignored} are ignored" if ignored else "",
            )  # fmt: skip
        return table.mask_classes or BINARY_CLASSES

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        """Class of every pixel ``[H, W]`` from the file that ``mask_path`` names.

        With ``metainfo.mask_classes`` the file holds class indices, and 255 for ignored pixels. Without, it holds 0 and
        255 (or 0 and 1): background and defect. ``mask_values`` gives values another meaning. A row without
        ``mask_path`` is background throughout when its ``gt_label`` is 0, and ignored throughout otherwise.

        Raises:
            BadTargetError: when the file is missing, damaged, of another size than the image, or holds other values.
            ValueError: see `mask_classes`.
        """
        _ = self.mask_classes  # refuses a set without any, and tells once of rows without
        size = self.get_image_size(index)
        path = "" if self._table.mask_paths is None else self._table.mask_paths[index]
        if not path:
            is_background = self._table.targets[index] == BACKGROUND_LABEL
            mask = np.full(size, BACKGROUND_LABEL if is_background else IGNORED, dtype=np.uint8)
            return self.fill_uncounted(index, mask, IGNORED)
        mask = self._mask_reader.read(self.root / path, size, self._mask_files())
        return self.fill_uncounted(index, mask, IGNORED)

    def _mask_files(self) -> Iterator[Path]:
        return (self.root / path for path in self._table.mask_paths or () if path)

    @cached_property
    def depth_unit(self) -> str:  # type: ignore[override]  # a cached property can be set
        """``metainfo.depth_unit``; by default ``um`` for ``height_path``.

        The first use tells, in the log, how many rows have no depth map.

        Raises:
            ValueError: when no row has one.
        """
        depth = self._table.depth
        if depth is None:
            raise ValueError(f"{self.annotation_path}: no row has 'depth_path' or 'height_path'")
        if depth.key == "depth_path" and depth.unit in ("m", "metre", "meter") and "depth_scale" not in self.metainfo:
            logger.warning(
                "%s: metainfo.depth_scale is not given, so values of depth maps are taken as metres; in files of whole "
                "numbers they are mostly millimetres (depth_scale 0.001), and 1 says that they are metres",
                self.annotation_path,
            )
        missing = int(_is_missing(depth.paths, len(self)).sum())
        if missing:
            logger.warning(
                "%s: %d of %d rows have no %s; their depth is unknown throughout",
                self.annotation_path, missing, len(self), depth.key,
            )  # fmt: skip
        return depth.unit

    def get_depth(self, index: int) -> npt.NDArray[np.float32]:
        """Depth or height of every pixel ``[H, W]``: raw value x ``metainfo.depth_scale``, NaN where it is unknown.

        The file that ``depth_path`` or ``height_path`` names is an image of one channel or an ``.npy`` array. Unknown
        are pixels of the raw value ``metainfo.depth_invalid`` (by default 0 for ``depth_path``, none for
        ``height_path``), and everything in a row without a file. All else must be above 0; a height may be 0.

        Raises:
            BadTargetError: when the file is missing, damaged, of another size than the image, or holds other values.
            ValueError: see `depth_unit`.
        """
        _ = self.depth_unit  # refuses a set without depth, and tells once of rows without
        assert self._table.depth is not None
        path, size = self._table.depth.paths[index], self.get_image_size(index)
        depth = self._depth_reader.read(self.root / path, size) if path else np.full(size, np.nan, dtype=np.float32)
        return self.fill_uncounted(index, depth, np.nan)

    @cached_property
    def _boxes(self) -> BoxColumn | None:
        return read_boxes(self._table, self.annotation_path, BACKGROUND_LABEL)

    @property
    def has_boxes(self) -> bool:
        return self._boxes is not None or self._table.mask_paths is not None

    @property
    def box_classes(self) -> tuple[str, ...]:  # type: ignore[override]  # read when it is needed
        """``metainfo.box_classes``, or ``metainfo.classes``; of sets with masks only, their classes but the background.

        Raises:
            ValueError: when no row has ``boxes`` or a mask, or for what is wrong in ``boxes``, naming file and row.
        """
        if not self.has_boxes:
            raise ValueError(f"{self.annotation_path}: no row has 'boxes', nor 'mask_path' to find boxes in")
        return self.mask_classes[1:] if self._boxes is None else self._boxes.classes

    def get_boxes(self, index: int) -> tuple[Boxes, Labels]:
        """The ``boxes`` of a row; in a set without, one around all connected pixels of a class of its mask.

        Raises:
            UnreadableImageError: when the size of the image cannot be read.
            BadTargetError: see `get_mask`.
            ValueError: see `box_classes`.
        """
        _ = self.box_classes  # refuses a set without any
        if self._boxes is None:
            return boxes_of_mask(self.get_mask(index))
        found = self._boxes.table.read(index, self.get_image_size(index), self.get_image_path(index))
        return boxes_that_count(self.counted_region(index), *found)[:2]

    def get_objects(self, index: int) -> tuple[Boxes, Labels]:
        return self.get_boxes(index)  # there are no crowds

    def get_box_labels(self, index: int) -> Labels:
        table = None if self._boxes is None else self._boxes.table
        if table is None or self.preprocessing.has_region:
            return self.get_boxes(index)[1]
        return table.labels[table.rows(index)]

    def knows_boxes(self, index: int) -> bool:
        """Whether a row has ``boxes`` (a mask, where those tell the boxes), or is of class 0."""
        if self._boxes is not None:
            return bool(self._boxes.known[index])
        paths = self._table.mask_paths
        return self._table.targets[index] == BACKGROUND_LABEL or (paths is not None and bool(paths[index]))

    def get_reference_path(self, index: int) -> Path | None:
        """Path that ``reference`` of a row names; None where it names none.

        Raises:
            ValueError: it is no path below the root; file and row are named.
        """
        extra = "" if self._table.extras is None else self._table.extras[index]
        path = json.loads(extra).get("reference") if '"reference"' in extra else None
        if path is None:
            return None
        where = f"{self.annotation_path}: data_list[{index}]: 'reference' {path!r:.80}"
        if not isinstance(path, str):
            raise ValueError(f"{where} must be text")
        paths = [path]
        for _, reason in shorten_paths(paths):
            raise ValueError(f"{where} {reason}")
        return find_file(self.root / paths[0])

    def get_annotation(self, index: int) -> dict[str, Any]:
        """One row of the file with all its keys; ``gt_label`` is left out where it is missing."""
        return self._table.get_row(index)

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
        return [path for row in rows.tolist() if not find_file(path := self.get_image_path(row)).is_file()]


def _is_missing(paths: CompactStrings | None, num_rows: int) -> npt.NDArray[np.bool_]:
    """Which rows have no path ``[N]``."""
    return np.ones(num_rows, dtype=np.bool_) if paths is None else np.diff(paths.ends) == 0
