"""A folder of photos beside a folder of masks."""

import json
import logging
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.compact import CompactStrings
from dinov2.data.datasets.dense_targets import IGNORED, MaskSource
from dinov2.data.datasets.json_values import check_names
from dinov2.data.datasets.scan import find_folders, find_images, require_images
from dinov2.data.datasets.target_files import BINARY_CLASSES, read_binary_mask, read_class_mask
from dinov2.data.datasets.text_list import read_text_list

logger = logging.getLogger("dinov2")

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
        self.image_folder = _find_split(self.root / "images", split)
        self.mask_folder = _find_split(self.root / "masks", split)
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


def _find_split(folder: Path, split: str) -> Path:
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
