"""Folders of images: with classes from folders or without, or beside folders of masks."""

import logging
import unicodedata
from pathlib import Path
from typing import NoReturn, Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.annotation_file import check_mask_classes, read_json
from dinov2.data.datasets.base import PREPARE_CSV, ListedImages, Transforms
from dinov2.data.datasets.dense_targets import BINARY_CLASSES, IGNORED, MaskReader, MaskSource, MaskValues
from dinov2.data.datasets.scan import (
    CompactStrings,
    find_folders,
    find_split_folder,
    index_by_stem,
    read_text_list,
    require_images,
    stem_of,
)
from dinov2.data.reading import find_file

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
        root = find_file(Path(root))
        if not root.is_dir():
            raise FileNotFoundError(f"root {str(root)!r} is not a folder")
        self.root = root if split is None else find_split_folder(root, split)
        paths = require_images(self.root)
        beside = [path for path in paths if "/" not in path]
        loose = beside[0] if beside else None
        if labels == "folders" and loose is not None:
            raise ValueError(
                f"{self.root}: image {loose!r} lies in no class folder; move it, or use labels=none{PREPARE_CSV}"
            )
        self.has_labels = labels == "folders" or (labels == "auto" and loose is None)
        if labels == "auto" and len(beside) * 10 < len(paths) and beside:
            logger.warning(
                "%s: %d of %d images lie beside the folders, such as %s, so no folder counts as a class: move them "
                "away for labels, or say labels=none",
                self.root, len(beside), len(paths), loose,
            )  # fmt: skip
        targets = None
        if self.has_labels:
            self.classes = self._find_classes(root, split, labels, paths)
            numbers = {name: number for number, name in enumerate(self.classes)}
            targets = [numbers[_composed(path.partition("/")[0])] for path in paths]
        super().__init__(self.root, paths, targets, **transforms)
        described = f"{len(self.classes)} classes from folders" if self.classes else "no labels"
        logger.info("%s: %d images, %s", self.root, len(paths), described)

    def get_group_ids(self) -> list[str]:
        """The folder of each image, or its own path where it shares the root or a class folder with others."""
        shared_depth = 1 if self.has_labels else 0  # folders above an image that do not make a group
        return [path.rpartition("/")[0] if path.count("/") > shared_depth else path for path in self._paths]

    def _find_classes(self, root: Path, split: str | None, labels: str, paths: list[str]) -> tuple[str, ...]:
        folders = {_composed(name) for name in find_folders(self.root)}
        splits = sorted(name for name in folders if name.lower() in _SPLIT_FOLDERS)
        if split is None and labels == "auto" and (len(splits) > 1 or len(splits) == len(folders)):
            raise ValueError(
                f"{root} holds the splits {', '.join(splits)}, not classes; add split=..., or labels=none to take all "
                "images without labels (labels=folders if these are classes)"
            )
        if empty := sorted(folders - {_composed(path.partition("/")[0]) for path in paths}):
            logger.warning(
                "%s: %d folders hold no image and count as classes all the same: %s; delete those that are none",
                self.root, len(empty), ", ".join(empty[:10]),
            )  # fmt: skip
        if split is not None:
            siblings = [name for name in find_folders(root) if name.lower() in _SPLIT_FOLDERS]
            folders = folders.union(*(map(_composed, find_folders(root / name)) for name in siblings))
        alike: dict[str, str] = {}
        for name in sorted(folders):
            if (other := alike.setdefault(name.casefold(), name)) != name:
                logger.warning("%s: the classes %s and %s differ in capitals only, and count as two", root, other, name)
        return tuple(sorted(folders))


def _composed(name: str) -> str:
    """A name with accents as single characters, whatever system wrote it: two forms of one name are one class."""
    return unicodedata.normalize("NFC", name)


class ImageMaskFolder(ListedImages, MaskSource):
    """Images ``root/images/<split>/a.jpg`` with masks of the same name, ``root/masks/<split>/a.png`` (``.bmp``, …).

    ``root/classes.txt`` names one class per line, or ``root/classes.json`` lists the names: masks then hold class
    indices (line 1 is value 0), and 255 for ignored pixels. Without either, masks hold 0 and 255 (or 0 and 1):
    background and defect. Images in folders of their own (``images/<split>/part_1/...``) form groups named by them;
    their masks lie in folders of the same names.
    """

    def __init__(
        self, root: str | Path, split: str, mask_values: str | None = None, **transforms: Unpack[Transforms]
    ) -> None:
        """Lists images and masks; no file of either is opened.

        Args:
            root: folder that holds ``images`` and ``masks``.
            split: name of a folder inside both, in any case.
            mask_values: what values in masks mean, where they are not the classes; see `MaskValues`.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when a folder is missing.
            ValueError: when there is no image, one without a mask, two with one mask, two masks of one image, a
                broken list of classes, or ``mask_values`` that do not fit it.
        """
        self.root = find_file(Path(root))
        folders = self.root / "images", self.root / "masks"
        for folder in folders:
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder} is not a folder; the root must hold images/<split>/ and masks/<split>/"
                )
        image_folder, self.mask_folder = (find_split_folder(folder, split) for folder in folders)
        names = _read_class_names(self.root)
        self.mask_classes = names or BINARY_CLASSES
        values = None if mask_values is None else MaskValues(mask_values)
        self.mask_values = mask_values or ""
        self._reader = MaskReader(len(self.mask_classes), named=bool(names), values=values)
        super().__init__(image_folder, require_images(image_folder), **transforms)
        self._masks = CompactStrings(self._find_masks())

    def get_group_ids(self) -> list[str]:
        """The folder of each image, or its own path where it lies right in the split's folder."""
        return [path.rpartition("/")[0] or path for path in self._paths]

    def get_mask_path(self, index: int) -> Path:
        """Path of the mask."""
        return self.mask_folder / self._masks[index]

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        others = (self.mask_folder / path for path in self._masks)
        mask = self._reader.read(self.get_mask_path(index), self.get_image_size(index), others)
        return self.fill_uncounted(index, mask, IGNORED)

    def _find_masks(self) -> list[str]:
        """The mask of every image, relative to the folder of masks."""
        first: dict[str, str] = {}
        for path in self._paths:
            stem = stem_of(path)
            if first.setdefault(stem, path) != path:
                raise ValueError(
                    f"{self.image_folder}: {first[stem]} and {path} share the mask {stem}.png; each image needs a name "
                    "of its own"
                )
        masks = index_by_stem(self.mask_folder)
        lacking = [path for stem, path in first.items() if stem not in masks]
        unused = sorted(path for stem, paths in masks.items() if stem not in first for path in paths)
        if lacking:
            there = f"; {self.mask_folder} has {', '.join(unused[:3]) if unused else 'no further image'}"
            raise ValueError(
                f"{self.image_folder / lacking[0]} has no mask {self.mask_folder / stem_of(lacking[0])}.png "
                f"({len(lacking)} of {len(self)} images lack one), nor one with another ending{there}"
            )
        for stem, image in first.items():
            if len(masks[stem]) > 1:
                raise ValueError(f"{self.mask_folder}: {image} has the masks {', '.join(masks[stem])}; keep one")
        if unused:
            logger.warning("%s: %d masks have no image, such as %s", self.mask_folder, len(unused), unused[0])
        return [masks[stem][0] for stem in first]


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
