"""MVTec AD and AD 2: objects and textures, good in training, with masks of the defects in the test set."""

from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import ListedImages, Transforms
from dinov2.data.datasets.dense_targets import IGNORED, MaskSource, read_binary_mask
from dinov2.data.datasets.scan import find_folders, find_images, stem_of

_FOLDERS = {"TRAIN": ("train",), "VAL": ("validation",), "TEST": ("test", "test_public")}
_GOOD, _MASKS = "good", "ground_truth"


class MVTecAD(ListedImages, MaskSource):
    """Images of one category or of all, good (0) or anomalous (1).

    Of AD an image is ``bottle/test/broken_large/000.png`` and its mask ``bottle/ground_truth/broken_large/
    000_mask.png``; there is no val. Of AD 2 it is ``can/test_public/bad/000_regular.png``, its mask
    ``can/test_public/ground_truth/bad/000_regular_mask.png``, and images of one number (in other light) are of a part.
    Images of the folder ``good`` are background throughout.

    Reference: Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021; Heckler-Kram et al., The MVTec AD 2
    Dataset, 2025.
    """

    classes = ("good", "anomalous")
    mask_classes = ("background", "defect")

    def __init__(self, root: str | Path, split: str, category: str = "", **transforms: Unpack[Transforms]) -> None:
        """Lists the images; none is opened.

        Args:
            root: folder that holds the categories.
            split: ``TRAIN``, ``VAL`` (AD 2) or ``TEST``, in any case.
            category: such as ``bottle``; empty for all that are there.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: the folders are not there, or hold no image.
            ValueError: an unknown split; an anomalous image without its mask.
        """
        root, name = Path(root), split.strip().upper()
        if name not in _FOLDERS:
            raise ValueError(f"unknown split {split!r}; MVTecAD has {', '.join(_FOLDERS)}")
        paths: list[str] = []
        self._masks: list[Path | None] = []
        categories = [category] if category else find_folders(root) if root.is_dir() else []
        for one in categories:
            folder = next((root / one / inner for inner in _FOLDERS[name] if (root / one / inner).is_dir()), None)
            if folder is None:
                continue
            for path in find_images(folder):
                kind, _, file = path.partition("/")
                if kind == _MASKS:
                    continue
                paths.append((folder / path).relative_to(root).as_posix())
                self._masks.append(None if kind == _GOOD else _mask_of(root / one, folder, kind, stem_of(file)))
        if not paths:
            there = " or ".join(f"{category or 'CATEGORY'}/{inner}/{_GOOD}" for inner in _FOLDERS[name])
            raise FileNotFoundError(f"{root} holds no image in {there}")
        labels = np.array([int(mask is not None) for mask in self._masks], dtype=np.int64)
        super().__init__(root, paths, labels, **transforms)

    def get_group_ids(self) -> list[str]:
        """Of AD 2 the number of the object in its folder; of AD every image is a part of its own."""
        return [
            f"{folder}/{name.partition('_')[0]}" if "_" in name else path
            for path in self._paths
            for folder, _, name in [path.rpartition("/")]
        ]

    def get_mask(self, index: int) -> npt.NDArray[np.uint8]:
        size, path = self.get_image_size(index), self._masks[index]
        mask = np.zeros(size, dtype=np.uint8) if path is None else read_binary_mask(path, size)
        return self.fill_uncounted(index, mask, IGNORED)


def _mask_of(category: Path, folder: Path, kind: str, stem: str) -> Path:
    """Where the mask of an anomalous image lies, in either layout."""
    for masks in (folder / _MASKS, category / _MASKS):
        path = masks / kind / f"{stem}_mask.png"
        if path.is_file():
            return path
    raise ValueError(f"{folder / kind / stem} is of no good part, and has no mask such as {path}")
