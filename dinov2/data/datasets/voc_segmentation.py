"""Pascal VOC: semantic segmentation."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import MaskSource, read_class_mask
from dinov2.data.datasets.scan import CompactStrings, find_text_list, read_text_list, shorten_paths

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_SPLITS = ("train", "val", "trainval", "test")


class VOCSegmentation(ImageDataset, MaskSource):
    """Photos with a class for every pixel: 20 classes and the background; contours (255) are ignored.

    Layout: ``ImageSets/Segmentation/<split>.txt`` lists names, ``JPEGImages/<name>.jpg`` are the photos,
    ``SegmentationClass/<name>.png`` the masks, palette images whose indices are the classes.

    Reference:
        Everingham et al., The Pascal visual object classes (VOC) challenge, IJCV 88 (2010).
    """

    mask_classes = CLASSES

    def __init__(
        self,
        root: str | Path,
        split: str,
        year: int = 2012,
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Reads the list of a split; images and masks are not touched.

        Args:
            root: folder that holds ``VOCdevkit``, ``VOCdevkit`` itself, or ``VOC2012`` in it.
            split: ``TRAIN``, ``VAL``, ``TRAINVAL`` or ``TEST`` (of years that publish it), in any case.
            year: of the challenge.
            transform: maps the RGB image.
            target_transform: maps the class index of the photo, which is always missing (-1).

        Raises:
            FileNotFoundError: when the set or the list is not there.
            ValueError: for an unknown split, or a list that is empty or broken, naming its line.
        """
        super().__init__(transform=transform, target_transform=target_transform)
        self.split = split.strip().lower()
        if self.split not in _SPLITS:
            raise ValueError(f"unknown split {split!r}; allowed are {', '.join(map(str.upper, _SPLITS))}")
        self.root = _find_year(Path(root), f"VOC{year}")
        self.list_path = find_text_list(self.root / "ImageSets" / "Segmentation", [f"{self.split}.txt"])
        self._names = CompactStrings(_read_names(self.list_path))

    def __len__(self) -> int:
        return len(self._names)

    def get_image_path(self, index: int) -> Path:
        return self.root / "JPEGImages" / f"{self._names[index]}.jpg"

    def get_target(self, index: int) -> int | None:
        """Always None: a photo shows things of several classes."""
        return None

    def get_mask_path(self, index: int) -> Path:
        """Path of the mask."""
        return self.root / "SegmentationClass" / f"{self._names[index]}.png"

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        return read_class_mask(self.get_mask_path(index), self.get_image_size(index), len(CLASSES))


def _find_year(root: Path, year: str) -> Path:
    if root.name != year and re.fullmatch(r"VOC\d{4}", root.name):
        raise ValueError(f"root {str(root)!r} is not of year {year.removeprefix('VOC')}; give year={root.name[3:]}")
    for folder in (root / "VOCdevkit" / year, root / year, root):
        if (folder / "ImageSets" / "Segmentation").is_dir():
            return folder
    raise FileNotFoundError(
        f"root {str(root)!r} holds no VOCdevkit/{year}/ImageSets/Segmentation; give the folder that holds VOCdevkit"
    )


def _read_names(path: Path) -> list[str]:
    names, numbers = read_text_list(path)
    for position, reason in shorten_paths(names):
        raise ValueError(f"{path}, line {numbers[position]}: name {names[position]!r} {reason}")
    first: dict[str, int] = {}
    for name, number in zip(names, numbers, strict=True):
        if first.setdefault(name, number) != number:
            raise ValueError(f"{path}, line {number}: {name!r} is already in line {first[name]}")
    return names
