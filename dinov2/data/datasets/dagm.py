"""DAGM 2007: drawn surface textures, a class of texture per folder, with ellipses around defects as masks."""

from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import ListedImages, Transforms
from dinov2.data.datasets.dense_targets import IGNORED, MaskReader, MaskSource
from dinov2.data.datasets.scan import find_images, stem_of

_SPLITS = {"TRAIN": "Train", "TEST": "Test"}
_LABELS = "Label"


class DAGM2007(ListedImages, MaskSource):
    """Textures of the folders ``Class1`` to ``Class10``, good (0) or defective (1).

    An image ``Class1/Train/0576.PNG`` is defective where ``Class1/Train/Label/0576_label.PNG`` lies beside it: an
    ellipse around the defect, which is its mask. Images without one are good, and background throughout. The set has a
    train and a test half, and no val.

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
            ValueError: an unknown split; a mask without its image; the older layout, whose ellipses are a table.
        """
        root, name = Path(root), split.strip().upper()
        if name not in _SPLITS:
            raise ValueError(f"unknown split {split!r}; DAGM2007 has {' and '.join(_SPLITS)}")
        folders = [root / f"Class{category}"] if category else sorted(root.glob("Class*"), key=_number)
        if any(folder.name.endswith("_def") or (root / f"{folder.name}_def").exists() for folder in folders):
            raise ValueError(
                f"{root} has the layout of the contest's first half (Class1 and Class1_def with labels.txt); the one "
                "with Class1/Train/Label/0576_label.PNG is read"
            )
        paths: list[str] = []
        masks: dict[str, Path] = {}
        for folder in (found / _SPLITS[name] for found in folders):
            listed = find_images(folder) if folder.is_dir() else []
            images = [path for path in listed if not path.startswith(f"{_LABELS}/")]
            if not images:
                raise FileNotFoundError(f"{folder} is no folder with images, such as Class1/Train/0576.PNG")
            by_stem = {stem_of(path): (folder / path).relative_to(root).as_posix() for path in images}
            for path in listed:
                stem = stem_of(path).removeprefix(f"{_LABELS}/")
                if path.startswith(f"{_LABELS}/"):
                    if not stem.endswith("_label") or stem.removesuffix("_label") not in by_stem:
                        raise ValueError(f"{folder / path} is a mask of no image in {folder}")
                    masks[by_stem[stem.removesuffix("_label")]] = folder / path
            paths += by_stem.values()
        self._masks = [masks.get(path) for path in paths]
        self._reader = MaskReader(len(self.mask_classes), named=False)
        super().__init__(
            root, paths, np.array([mask is not None for mask in self._masks], dtype=np.int64), **transforms
        )

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        size, path = self.get_image_size(index), self._masks[index]
        mask = np.zeros(size, dtype=np.uint8) if path is None else self._reader.read(path, size, ())
        return self.fill_uncounted(index, mask, IGNORED)


def _number(folder: Path) -> tuple[int, str]:
    digits = folder.name.removeprefix("Class")
    return (int(digits) if digits.isdecimal() else 0, folder.name)
