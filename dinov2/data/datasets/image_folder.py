"""Folders of images: with classes from folders or without, or beside folders of masks."""

import logging
from pathlib import Path, PurePosixPath
from typing import NoReturn, Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.annotation_file import check_mask_classes, read_json
from dinov2.data.datasets.base import ListedImages, Transforms
from dinov2.data.datasets.dense_targets import BINARY_CLASSES, MaskSource, read_binary_mask, read_class_mask
from dinov2.data.datasets.scan import find_folders, find_images, find_split_folder, read_text_list, require_images

logger = logging.getLogger("dinov2")

_LABELS = ("auto", "folders", "none")
_SPLIT_FOLDERS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
_NAME_FILES = ("classes.txt", "classes.json")


class ImageFolder(ListedImages):
    """All images below a folder.

    With labels from folders, ``root[/split]/<class>/...`` names the class, and classes are numbered over all splits
    together. Images in a folder of their own (below the class folder, or below the root where there are no labels)
    form a group named by that folder; other images are each their own group.
    """

    def __init__(
        self, root: str | Path, split: str | None = None, labels: str = "auto", **transforms: Unpack[Transforms]
    ) -> None:
        """Lists the images.

        Args:
            root: folder of the set.
            split: name of a folder inside ``root`` to use, in any case; by default ``root`` itself.
            labels: ``folders`` takes the first folder below the root as class, ``none`` leaves labels missing, and
                ``auto`` takes folders unless an image lies right in the root.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when the folder is missing.
            ValueError: when it holds no image, or its folders cannot be classes.
        """
        if labels not in _LABELS:
            raise ValueError(f"labels={labels!r} is unknown; allowed are {', '.join(_LABELS)}")
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"root {str(root)!r} is not a folder")
        self.root = root if split is None else find_split_folder(root, split)
        paths = require_images(self.root)
        loose = next((path for path in paths if "/" not in path), None)
        if labels == "folders" and loose is not None:
            raise ValueError(f"{self.root}: image {loose!r} lies in no class folder; move it, or use labels=none")
        self.has_labels = labels == "folders" or (labels == "auto" and loose is None)
        targets = None
        if self.has_labels:
            self.classes = self._find_classes(root, split, labels)
            numbers = {name: number for number, name in enumerate(self.classes)}
            targets = [numbers[path.partition("/")[0]] for path in paths]
        super().__init__(self.root, paths, targets, **transforms)
        described = f"{len(self.classes)} classes from folders" if self.classes else "no labels"
        logger.info("%s: %d images, %s", self.root, len(paths), described)

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


class ImageMaskFolder(ListedImages, MaskSource):
    """Images ``root/images/<split>/a.jpg`` with masks of the same name, ``root/masks/<split>/a.png``.

    ``root/classes.txt`` names one class per line, or ``root/classes.json`` lists the names: masks then hold class
    indices (line 1 is value 0), and 255 for ignored pixels. Without either, masks hold 0 and 255 (or 0 and 1):
    background and defect. Images in folders of their own (``images/<split>/part_1/...``) form groups named by them;
    their masks lie in folders of the same names.
    """

    def __init__(self, root: str | Path, split: str, **transforms: Unpack[Transforms]) -> None:
        """Lists images and masks; no file of either is opened.

        Args:
            root: folder that holds ``images`` and ``masks``.
            split: name of a folder inside both, in any case.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when a folder is missing.
            ValueError: when there is no image, one without a mask, two with one mask, or a broken list of classes.
        """
        self.root = Path(root)
        folders = self.root / "images", self.root / "masks"
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder} is not a folder; the root must hold images/<split>/ and masks/<split>/"
                )
        image_folder, self.mask_folder = (find_split_folder(folder, split) for folder in folders)
        names = _read_class_names(self.root)
        self.mask_classes = names or BINARY_CLASSES
        self._named = bool(names)
        super().__init__(image_folder, require_images(image_folder), **transforms)
        self._check_pairs()

    def get_group_ids(self) -> list[str]:
        """The folder of each image, or its own path where it lies right in the split's folder."""
        return [path.rpartition("/")[0] or path for path in self._paths]

    def get_mask_path(self, index: int) -> Path:
        """Path of the mask."""
        return self.mask_folder / _mask_of(self._paths[index])

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        path, size = self.get_mask_path(index), self.get_image_size(index)
        return read_class_mask(path, size, len(self.mask_classes)) if self._named else read_binary_mask(path, size)

    def _check_pairs(self) -> None:
        first: dict[str, str] = {}
        for path in self._paths:
            if first.setdefault(_mask_of(path), path) != path:
                raise ValueError(
                    f"{self.image_folder}: {first[_mask_of(path)]} and {path} share the mask {_mask_of(path)}"
                )
        masks = set(find_images(self.mask_folder))
        lacking = [path for mask, path in first.items() if mask not in masks]
        if lacking:
            image, mask = self.image_folder / lacking[0], self.mask_folder / _mask_of(lacking[0])
            raise ValueError(f"{image} has no mask {mask} ({len(lacking)} of {len(self)} images lack one)")
        unused = sorted(masks - first.keys())
        if unused:
            logger.warning("%s: %d masks have no image, such as %s", self.mask_folder, len(unused), unused[0])


def _mask_of(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(".png"))


def _read_class_names(root: Path) -> tuple[str, ...]:
    """Names of the classes by value; empty where no file names them."""
    found = [root / name for name in _NAME_FILES if (root / name).is_file()]
    if not found:
        return ()
    path = found[0]

    def fail(text: str) -> NoReturn:
        raise ValueError(f"{path}: {text}")

    if len(found) > 1:
        fail(f"{found[1].name} lies beside it; keep one of them")
    names = read_json(path) if path.suffix == ".json" else read_text_list(path)[0]
    return check_mask_classes(names, "the file", fail)
