"""Pascal VOC: semantic segmentation."""

import re
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import ListedImages, Transforms
from dinov2.data.datasets.dense_targets import IGNORED, MaskReader, MaskSource, MaskValues
from dinov2.data.datasets.scan import (
    CompactStrings,
    find_text_list,
    index_by_stem,
    read_text_list,
    shorten_paths,
    stem_of,
)

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_SPLITS = ("train", "val", "trainval", "test")


class VOCSegmentation(ListedImages, MaskSource):
    """Images with a class for every pixel: 20 classes and the background; contours (255) are ignored.

    Layout: ``ImageSets/Segmentation/<split>.txt`` lists names, ``JPEGImages/<name>.jpg`` are the images,
    ``SegmentationClass/<name>.png`` the masks, palette images whose indices are the classes. Where a file has another
    ending, it is found by its name.

    Reference:
        Everingham et al., The Pascal visual object classes (VOC) challenge, IJCV 88 (2010).
    """

    mask_classes = CLASSES

    def __init__(
        self,
        root: str | Path,
        split: str,
        year: int = 2012,
        mask_values: str | None = None,
        **transforms: Unpack[Transforms],
    ) -> None:
        """Reads the list of a split; images and masks are not touched.

        Args:
            root: folder that holds ``VOCdevkit``, ``VOCdevkit`` itself, or ``VOC2012`` in it.
            split: ``TRAIN``, ``VAL``, ``TRAINVAL`` or ``TEST`` (of years that publish it), in any case.
            year: of the challenge.
            mask_values: what values in masks mean, where they are not the classes; see `MaskValues`.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when the set or the list is not there.
            ValueError: for an unknown split, or a list that is empty or broken, naming its line.
        """
        self.split = split.strip().lower()
        if self.split not in _SPLITS:
            raise ValueError(f"unknown split {split!r}; allowed are {', '.join(map(str.upper, _SPLITS))}")
        self.root = find_year(Path(root), f"VOC{year}", "ImageSets/Segmentation")
        self.list_path = find_text_list(self.root / "ImageSets" / "Segmentation", f"{self.split}.txt")
        names, numbers = read_text_list(self.list_path)
        for position, reason in shorten_paths(names):
            raise ValueError(f"{self.list_path}, line {numbers[position]}: name {names[position]!r} {reason}")
        first: dict[str, int] = {}
        for name, number in zip(names, numbers, strict=True):
            if first.setdefault(name, number) != number:
                raise ValueError(f"{self.list_path}, line {number}: {name!r} is already in line {first[name]}")
        images, masks = (
            with_endings(self.root / folder, names, usual)
            for folder, usual in (("JPEGImages", ".jpg"), ("SegmentationClass", ".png"))
        )
        self._masks = CompactStrings(masks)
        values = None if mask_values is None else MaskValues(mask_values)
        self.mask_values = mask_values or ""
        self._reader = MaskReader(len(CLASSES), named=True, values=values)
        super().__init__(self.root / "JPEGImages", images, **transforms)

    def get_mask_path(self, index: int) -> Path:
        """Path of the mask."""
        return self.root / "SegmentationClass" / self._masks[index]

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        others = (self.root / "SegmentationClass" / path for path in self._masks)
        mask = self._reader.read(self.get_mask_path(index), self.get_image_size(index), others)
        return self.fill_uncounted(index, mask, IGNORED)


def with_endings(folder: Path, names: list[str], usual: str) -> list[str]:
    """Paths of the files of some names: with the usual ending where there are such, with that of the file where not."""
    if not folder.is_dir():
        return [name + usual for name in names]
    found = index_by_stem(folder)
    return [
        name + usual if name + usual in (paths := found.get(stem_of(name + usual), [])) or len(paths) != 1 else paths[0]
        for name in names
    ]


def find_year(root: Path, year: str, inside: str) -> Path:
    """The folder of a year, which holds another one, where ``root`` is that folder or one above it.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when ``root`` is the folder of another year.
    """
    if root.name != year and re.fullmatch(r"VOC\d{4}", root.name):
        raise ValueError(f"root {str(root)!r} is not of year {year.removeprefix('VOC')}; give year={root.name[3:]}")
    for folder in (root / "VOCdevkit" / year, root / year, root):
        if (folder / inside).is_dir():
            return folder
    raise FileNotFoundError(
        f"root {str(root)!r} holds no VOCdevkit/{year}/{inside}; give the folder that holds VOCdevkit"
    )
