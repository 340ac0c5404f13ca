"""A folder of images, with or without classes."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.data.datasets.compact import CompactStrings
from dinov2.data.datasets.scan import find_folders, require_images
from dinov2.data.datasets.splits import Split

logger = logging.getLogger("dinov2")

_LABELS = ("auto", "folders", "none")
_SPLIT_FOLDERS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))


class ImageFolder(ImageDataset):
    """All images below a folder.

    With labels from folders, ``root[/split]/<class>/...`` names the class, and classes are numbered over all splits
    together. Images in a folder of their own (below the class folder, or below the root where there are no labels)
    form a group named by that folder; other images are each their own group.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        labels: str = "auto",
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Lists the images.

        Args:
            root: folder of the set.
            split: name of a folder inside ``root`` to use, in any case; by default ``root`` itself.
            labels: ``folders`` takes the first folder below the root as class, ``none`` leaves labels missing, and
                ``auto`` takes folders unless an image lies right in the root.
            transform: maps the RGB image.
            target_transform: maps the class index, -1 where it is missing.

        Raises:
            FileNotFoundError: when the folder is missing.
            ValueError: when it holds no image, or its folders cannot be classes.
        """
        super().__init__(transform=transform, target_transform=target_transform)
        if labels not in _LABELS:
            raise ValueError(f"labels={labels!r} is unknown; allowed are {', '.join(_LABELS)}")
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"root {str(root)!r} is not a folder")
        self.root = root if split is None else _find_split(root, split)
        paths = require_images(self.root)
        loose = next((path for path in paths if "/" not in path), None)
        if labels == "folders" and loose is not None:
            raise ValueError(f"{self.root}: image {loose!r} lies in no class folder; move it, or use labels=none")
        self.has_labels = labels == "folders" or (labels == "auto" and loose is None)
        self._paths = CompactStrings(paths)
        self._targets = np.full(len(paths), MISSING_TARGET, dtype=np.int64)
        if self.has_labels:
            self.classes = self._find_classes(root, split, labels)
            numbers = {name: number for number, name in enumerate(self.classes)}
            self._targets = np.array([numbers[path.partition("/")[0]] for path in paths], dtype=np.int64)
        logger.info("%s: %d images, %s", self.root, len(paths), _describe(self.classes))

    def __len__(self) -> int:
        return len(self._paths)

    def get_image_path(self, index: int) -> Path:
        return self.root / self._paths[index]

    def get_target(self, index: int) -> int | None:
        target = int(self._targets[index])
        return None if target == MISSING_TARGET else target

    def get_targets(self) -> npt.NDArray[np.int64]:
        return self._targets.copy()

    def get_group_ids(self) -> list[str]:
        """The folder of each image, or its own path where it shares the root or a class folder with others."""
        shared_depth = 1 if self.has_labels else 0  # folders above an image that do not make a group
        return [path.rpartition("/")[0] if path.count("/") > shared_depth else path for path in self._paths]

    def _find_classes(self, root: Path, split: str | None, labels: str) -> tuple[str, ...]:
        folders = set(find_folders(self.root))
        if split is None:
            if labels == "auto" and folders <= _SPLIT_FOLDERS:
                raise ValueError(
                    f"{root} holds the splits {', '.join(sorted(folders))}, not classes; add split=..., or labels=none"
                    " to take all images without labels"
                )
            return tuple(sorted(folders))
        siblings = [name for name in find_folders(root) if name.lower() in _SPLIT_FOLDERS]
        return tuple(sorted(folders.union(*(find_folders(root / name) for name in siblings))))


def _find_split(root: Path, split: str) -> Path:
    folders = find_folders(root)
    match = next((name for name in folders if name.lower() == str(split).strip().lower()), None)
    if match is None:
        usual = ", ".join(name.name for name in Split)
        found = ", ".join(folders[:10]) or "no folder"
        raise ValueError(f"{root} has no folder for split {split!r} (such as {usual}); it has {found}")
    return root / match


def _describe(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes from folders" if classes else "no labels"
