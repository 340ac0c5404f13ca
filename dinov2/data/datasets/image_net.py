"""ImageNet-1k in its usual folders."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.data.datasets.image_index import ImageIndex, load_or_make_index
from dinov2.data.datasets.image_net_22k import ImageNet22k
from dinov2.data.datasets.scan import find_folders, require_images
from dinov2.data.datasets.splits import Split

__all__ = ["ImageNet", "ImageNet22k"]


class ImageNet(ImageDataset):
    """ImageNet-1k: ``root/train/<wnid>/*.JPEG``, ``root/val/<wnid>/*.JPEG``, ``root/test/*.JPEG``.

    Classes are numbered by sorted WordNet id and named by ``root/labels.txt`` (``wnid,name`` per line) where there is
    one. Upstream's prepared ``extra`` files are not needed: the folders are listed when the dataset is opened.
    """

    def __init__(
        self,
        *,
        split: str,
        root: str | Path,
        extra: str | Path | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Lists the images.

        Args:
            split: ``TRAIN``, ``VAL`` or ``TEST`` (without labels), in any case.
            root: folder of the set.
            extra: folder where the list is kept for the next time; delete the file there when images have changed.
            transform: maps the RGB image.
            target_transform: maps the class index, -1 where it is missing.

        Raises:
            FileNotFoundError: when a folder is missing.
            ValueError: for an unknown split, or folders that do not fit the layout.
        """
        super().__init__(transform=transform, target_transform=target_transform)
        self.root = Path(root)
        self.split = Split.parse(split)
        self.folder = self.root / self.split
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is not a folder; {self.root} must hold train/, val/ or test/")
        names = _read_class_names(self.root / "labels.txt")
        train = self.root / Split.TRAIN
        ids = sorted(names) if names else find_folders(train if train.is_dir() else self.folder)
        self.class_ids = tuple(ids)
        self.classes = tuple(names.get(class_id, class_id) for class_id in ids)
        self._index = load_or_make_index(extra, f"index-{self.split.name}", ids, self._list_images)

    def __len__(self) -> int:
        return len(self._index.paths)

    def get_image_path(self, index: int) -> Path:
        return self.folder / self._index.paths[index]

    def get_target(self, index: int) -> int | None:
        target = int(self._index.targets[index])
        return None if target == MISSING_TARGET else target

    def get_targets(self) -> npt.NDArray[np.int64]:
        return self._index.targets.copy()

    def _list_images(self) -> ImageIndex:
        paths = require_images(self.folder)
        if self.split is Split.TEST:
            return ImageIndex.of_files(self.class_ids, paths, [MISSING_TARGET] * len(paths))
        numbers = {class_id: number for number, class_id in enumerate(self.class_ids)}
        targets = []
        for path in paths:
            class_id, slash, _ = path.partition("/")
            if not slash:
                raise ValueError(f"{self.folder / path} lies in no class folder; images belong in {self.split}/<wnid>/")
            if class_id not in numbers:
                raise ValueError(f"{self.folder / class_id} is no known class: not in labels.txt, nor in train/")
            targets.append(numbers[class_id])
        return ImageIndex.of_files(self.class_ids, paths, targets)


def _read_class_names(path: Path) -> dict[str, str]:
    """Class names by WordNet id; empty without a file."""
    if not path.is_file():
        return {}
    names: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            if len(row) < 2 or not row[0].strip():
                raise ValueError(f"{path}, line {line}: must read 'wnid,name', found {','.join(row)!r}")
            names[row[0].strip()] = ",".join(row[1:]).strip()
    return names
