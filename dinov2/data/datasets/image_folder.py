"""A folder of images, with or without classes."""

import json
import logging
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.annotation_file import check_names
from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset, Split
from dinov2.data.datasets.dense_targets import BINARY_CLASSES, IGNORED, MaskSource, read_binary_mask, read_class_mask
from dinov2.data.datasets.scan import CompactStrings, find_folders, find_images, read_text_list, require_images

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


_NAME_FILES = ("classes.txt", "classes.json")
_MASK_ENDING = ".png"


class ImageMaskFolder(ImageDataset, MaskSource):
    """Photos ``root/images/<split>/a.jpg`` with masks of the same name, ``root/masks/<split>/a.png``.

    ``root/classes.txt`` names one class per line, or ``root/classes.json`` lists the names: masks then hold class
    indices (line 1 is value 0), and 255 for ignored pixels. Without either, masks hold 0 and 255 (or 0 and 1):
    background and defect. Photos in folders of their own (``images/<split>/part_1/...``) form groups named by them;
    their masks lie in folders of the same names.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Lists photos and masks; no file of either is opened.

        Args:
            root: folder that holds ``images`` and ``masks``.
            split: name of a folder inside both, in any case.
            transform: maps the RGB image.
            target_transform: maps the class index of the photo, which is always missing (-1).

        Raises:
            FileNotFoundError: when a folder is missing.
            ValueError: when there is no photo, one without a mask, two with one mask, or a broken list of classes.
        """
        super().__init__(transform=transform, target_transform=target_transform)
        self.root = Path(root)
        self.image_folder = _image_mask_folder_find_split(self.root / "images", split)
        self.mask_folder = _image_mask_folder_find_split(self.root / "masks", split)
        names = _read_class_names(self.root)
        self.mask_classes = names or BINARY_CLASSES
        self._named = bool(names)
        paths = require_images(self.image_folder)
        self._check_pairs(paths)
        self._paths = CompactStrings(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def get_image_path(self, index: int) -> Path:
        return self.image_folder / self._paths[index]

    def get_target(self, index: int) -> int | None:
        """Always None: only pixels have classes here."""
        return None

    def get_group_ids(self) -> list[str]:
        """The folder of each photo, or its own path where it lies right in the split's folder."""
        return [path.rpartition("/")[0] or path for path in self._paths]

    def get_mask_path(self, index: int) -> Path:
        """Path of the mask."""
        return self.mask_folder / _mask_of(self._paths[index])

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        path, size = self.get_mask_path(index), self.get_image_size(index)
        return read_class_mask(path, size, len(self.mask_classes)) if self._named else read_binary_mask(path, size)

    def _check_pairs(self, paths: list[str]) -> None:
        first: dict[str, str] = {}
        for path in paths:
            if first.setdefault(_mask_of(path), path) != path:
                raise ValueError(
                    f"{self.image_folder}: {first[_mask_of(path)]} and {path} share the mask {_mask_of(path)}"
                )
        masks = set(find_images(self.mask_folder))
        lacking = [path for mask, path in first.items() if mask not in masks]
        if lacking:
            photo, mask = self.image_folder / lacking[0], self.mask_folder / _mask_of(lacking[0])
            raise ValueError(f"{photo} has no mask {mask} ({len(lacking)} of {len(paths)} photos lack one)")
        unused = sorted(masks - first.keys())
        if unused:
            logger.warning("%s: %d masks have no photo, such as %s", self.mask_folder, len(unused), unused[0])


def _mask_of(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(_MASK_ENDING))


def _image_mask_folder_find_split(folder: Path, split: str) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; the root must hold images/<split>/ and masks/<split>/")
    folders = find_folders(folder)
    match = next((name for name in folders if name.lower() == split.strip().lower()), None)
    if match is None:
        found = ", ".join(folders[:10]) or "no folder"
        raise FileNotFoundError(f"{folder} has no folder for split {split!r}; it has {found}")
    return folder / match


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
    try:
        names = json.loads(path.read_bytes()) if path.suffix == ".json" else read_text_list(path)[0]
    except json.JSONDecodeError as error:
        fail(f"line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}")
    except UnicodeDecodeError:
        fail("is not UTF-8; save it as UTF-8")
    classes = check_names(names, "the file", fail)
    if not 2 <= len(classes) <= IGNORED:
        fail(f"must name 2 to {IGNORED} classes, found {len(classes)}")
    return classes
