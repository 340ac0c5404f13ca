"""DAGM 2007: drawn surface textures, a class of texture per folder, with ellipses around defects as masks."""

import math
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import ListedImages, Transforms
from dinov2.data.datasets.dense_targets import IGNORED, MaskReader, MaskSource
from dinov2.data.datasets.scan import find_images, stem_of

_SPLITS = {"TRAIN": "Train", "TEST": "Test"}
_LABELS = "Label"
_DEFECTIVE = "_def"  # ending of folders in the older layout

Ellipse = tuple[float, float, float, float, float]  # semi-axes, angle, x and y


class DAGM2007(ListedImages, MaskSource):
    """Textures of the folders ``Class1`` to ``Class10``, good (0) or defective (1).

    An image ``Class1/Train/0576.PNG`` is defective where ``Class1/Train/Label/0576_label.PNG`` lies beside it: an
    ellipse around the defect, which is its mask. Images without one are good, and background throughout. The set has a
    train and a test half, and no val.

    In the older layout good images lie in ``Class1`` and defective ones in ``Class1_def``, whose ``labels.txt`` has a
    line per image: its number, both semi-axes of the ellipse, its angle (radians, from the x to the y axis) and x and y
    of its centre, in pixels. It has no halves: images of odd numbers are TRAIN here, those of even ones TEST.

    Reference: Wieler and Hahn, Weakly supervised learning for industrial optical inspection, DAGM 2007.
    """

    classes = ("good", "defective")
    mask_classes = ("background", "defect")

    def __init__(self, root: str | Path, split: str, category: int = 0, **transforms: Unpack[Transforms]) -> None:
        """Lists the images; none is opened.

        Args:
            root: folder that holds ``Class1`` and others.
            split: ``TRAIN`` or ``TEST``, in any case.
            category: number of one class of textures; 0 for all that are there.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: the folders are not there, or hold no image.
            ValueError: an unknown split; a mask without its image; a line of ``labels.txt`` that is none, or missing.
        """
        root, name = Path(root), split.strip().upper()
        if name not in _SPLITS:
            raise ValueError(f"unknown split {split!r}; DAGM2007 has {' and '.join(_SPLITS)}")
        folders = [root / f"Class{category}"] if category else sorted(root.glob("Class*"), key=_number)
        folders = [folder for folder in folders if not folder.name.endswith(_DEFECTIVE)]
        paths: list[str] = []
        self._masks: list[Path | Ellipse | None] = []
        for folder in folders:
            older = folder.with_name(f"{folder.name}{_DEFECTIVE}")
            found = _halves(folder, _SPLITS[name]) if not older.is_dir() else _numbered(folder, older, name == "TRAIN")
            paths += (path.relative_to(root).as_posix() for path in found)
            self._masks += found.values()
        self._reader = MaskReader(len(self.mask_classes), named=False)
        super().__init__(
            root, paths, np.array([mask is not None for mask in self._masks], dtype=np.int64), **transforms
        )

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        size, source = self.get_image_size(index), self._masks[index]
        mask = np.zeros(size, dtype=np.uint8)
        if isinstance(source, Path):
            mask = self._reader.read(source, size, ())
        elif source is not None:
            half_length, half_width, angle, x, y = source
            right, down = np.arange(size[1]) - x, np.arange(size[0])[:, None] - y
            along = right * math.cos(angle) + down * math.sin(angle)
            across = down * math.cos(angle) - right * math.sin(angle)
            mask = ((along / half_length) ** 2 + (across / half_width) ** 2 <= 1).astype(np.uint8)
        return self.fill_uncounted(index, mask, IGNORED)


def _halves(folder: Path, half: str) -> "dict[Path, Path | Ellipse | None]":
    """Images of ``Class1/Train`` with their masks; None for good ones."""
    folder /= half
    listed = find_images(folder) if folder.is_dir() else []
    by_stem = {stem_of(path): folder / path for path in listed if not path.startswith(f"{_LABELS}/")}
    if not by_stem:
        raise FileNotFoundError(f"{folder} is no folder with images, such as Class1/Train/0576.PNG")
    found: dict[Path, Path | Ellipse | None] = dict.fromkeys(by_stem.values())
    for path in listed:
        stem = stem_of(path).removeprefix(f"{_LABELS}/")
        if path.startswith(f"{_LABELS}/"):
            if not stem.endswith("_label") or stem.removesuffix("_label") not in by_stem:
                raise ValueError(f"{folder / path} is a mask of no image in {folder}")
            found[by_stem[stem.removesuffix("_label")]] = folder / path
    return found


def _numbered(good: Path, defective: Path, odd: bool) -> "dict[Path, Path | Ellipse | None]":
    """Images of ``Class1`` and ``Class1_def``, of odd or even numbers, with their ellipses; None for good ones."""
    table = defective / "labels.txt"
    if not table.is_file():
        raise FileNotFoundError(f"there is no {table}, the ellipses of the images in that folder")
    ellipses: dict[str, Ellipse] = {}
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            image, values = str(int(float(fields[0]))), tuple(map(float, fields[1:]))
            half_length, half_width, angle, x, y = values
        except ValueError:
            raise ValueError(
                f"{table}, line {number}: expected an image's number and five of its ellipse, found {line!r:.200}"
            ) from None
        ellipses[image] = half_length, half_width, angle, x, y
    found: dict[Path, Path | Ellipse | None] = {}
    for folder in (good, defective):
        for path in sorted(find_images(folder), key=lambda path: (len(stem_of(path)), path)):
            stem = stem_of(path)
            if not stem.isdecimal():
                raise ValueError(f"{folder / path} is called by no number, as images of this layout are")
            if folder == defective and str(int(stem)) not in ellipses:
                raise ValueError(f"{table} has no line for image {stem}")
            if int(stem) % 2 == odd:
                found[folder / path] = ellipses[str(int(stem))] if folder == defective else None
    return found


def _number(folder: Path) -> tuple[int, str]:
    digits = folder.name.removeprefix("Class")
    return (int(digits) if digits.isdecimal() else 0, folder.name)
