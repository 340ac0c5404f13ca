"""Photos grouped by part, described by one JSON file per split."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.annotation_file import read_annotation_file, scan_group_ids
from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.data.datasets.splits import Split
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")


class GroupedJSON(ImageDataset):
    """Images listed in ``root/annotations/{train,val,test}.json``.

    A file reads ``{"metainfo": {"classes": [...]}, "data_list": [{"img_path", "gt_label", "group_id"}, ...]}`` with
    paths relative to ``root``. ``gt_label`` and, where nothing is labelled, ``classes`` may be missing; other keys are
    kept (see `get_annotation`). The file is checked once, when the dataset is opened; images are not touched then.
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

    def get_annotation(self, index: int) -> dict[str, Any]:
        """One row of the file with all its keys; ``gt_label`` is left out where it is missing."""
        table = self._table
        row: dict[str, Any] = {"img_path": table.paths[index]}
        label = self.get_target(index)
        if label is not None:
            row["gt_label"] = label
        row["group_id"] = table.group_names[int(table.group_codes[index])]
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
