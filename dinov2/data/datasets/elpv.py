"""ELPV: electroluminescence images of solar cells, from the package ``elpv-dataset``."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import DEFAULT_FRACTIONS, ListedImages, Split, Transforms, split_groups
from dinov2.data.decoding import load_image

CLASSES = ("functional", "defective")
_ALL = "ALL"


@dataclass(frozen=True)
class Cells:
    """The cells of the set, in the order of ``labels.csv``.

    Attributes:
        root: folder that holds ``labels.csv``.
        paths: image paths relative to ``root``.
        probabilities: how likely the cell is defective, in {0, 1/3, 2/3, 1}, ``[N]``.
        types: ``mono`` or ``poly``.
        groups: a hash of the pixels, so that the same picture under two names is one group.
    """

    root: Path
    paths: tuple[str, ...]
    probabilities: npt.NDArray[np.float64]
    types: tuple[str, ...]
    groups: tuple[str, ...]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """1 where a cell is more likely defective than not (probability >= 0.5), else 0, ``[N]``."""
        return (self.probabilities >= 0.5).astype(np.int64)

    def split(self, seed: int, fractions: Sequence[float] = DEFAULT_FRACTIONS) -> npt.NDArray[np.int64]:
        """Split index of each cell ``[N]``: random by content, with equal shares of each label and cell type."""
        strata = [f"{kind} {label}" for kind, label in zip(self.types, self.labels, strict=True)]
        return split_groups(self.groups, strata, fractions, seed)


class ELPV(ListedImages):
    """2,624 images of solar cells, 300×300 grey, labelled functional (0) or defective (1).

    The set has no official splits; here they are drawn by a seed, 60 : 20 : 20, and the same picture never lies in two.

    Reference:
        Deitsch et al., Automatic classification of defective photovoltaic module cells in electroluminescence images,
        Solar Energy 185 (2019). CC BY-NC-SA 4.0.
    """

    classes = CLASSES

    def __init__(
        self, split: str, root: str | Path | None = None, seed: int = 0, **transforms: Unpack[Transforms]
    ) -> None:
        """Reads the labels and divides the cells.

        Args:
            split: ``TRAIN``, ``VAL``, ``TEST`` or ``ALL``, in any case.
            root: folder with ``labels.csv`` and ``images/``; by default that of the installed package.
            seed: draws the splits.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when the set is not there.
            ValueError: for an unknown split or a broken ``labels.csv``.
        """
        allowed = [name.name for name in Split] + [_ALL]
        name = split.strip().upper()
        if name not in allowed:
            raise ValueError(f"unknown split {split!r}; allowed are {', '.join(allowed)}")
        self.cells = read_cells(root)
        if name == _ALL:
            rows = np.arange(len(self.cells.paths))
        else:
            rows = np.flatnonzero(self.cells.split(seed) == list(Split).index(Split.parse(name)))
        self._groups = [self.cells.groups[row] for row in rows]
        paths = [self.cells.paths[row] for row in rows]
        super().__init__(self.cells.root, paths, self.cells.labels[rows], **transforms)

    def get_group_ids(self) -> list[str]:
        """A hash of each image's pixels."""
        return self._groups.copy()


def read_cells(root: str | Path | None = None) -> Cells:
    """Reads ``labels.csv`` and hashes the images.

    Args:
        root: folder with ``labels.csv`` and ``images/``, or a checkout of the package's repository; by default the
            installed package's data.

    Raises:
        FileNotFoundError: when the set is not there.
        UnreadableImageError: when an image is damaged.
        ValueError: when ``labels.csv`` is broken, naming the line.
    """
    folder = _find_data(root)
    paths, probabilities, types = [], [], []
    file = folder / "labels.csv"
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            path, probability, kind = line.split()
            probabilities.append(float(probability))
        except ValueError:
            raise ValueError(f"{file}, line {number}: must read 'path probability type', found {line!r}") from None
        if not 0 <= probabilities[-1] <= 1:
            raise ValueError(f"{file}, line {number}: probability {probability} is outside 0 to 1")
        paths.append(path)
        types.append(kind)
    if not paths:
        raise ValueError(f"{file} lists no cell")
    with ThreadPoolExecutor() as threads:
        groups = tuple(threads.map(_hash_pixels, [folder / path for path in paths]))
    return Cells(folder, tuple(paths), np.array(probabilities), tuple(types), groups)


def _find_data(root: str | Path | None) -> Path:
    if root is not None:
        for folder in (Path(root), Path(root) / "src" / "elpv_dataset" / "data", Path(root) / "data"):
            if (folder / "labels.csv").is_file():
                return folder
        raise FileNotFoundError(f"root {str(root)!r} holds no labels.csv of the ELPV set")
    package = find_spec("elpv_dataset")
    if package is None or not package.submodule_search_locations:
        raise FileNotFoundError("the ELPV set is not installed; run pip install elpv-dataset, or give root=...")
    return Path(package.submodule_search_locations[0]) / "data"


def _hash_pixels(path: Path) -> str:
    image = load_image(path)
    return hashlib.blake2b(image.tobytes(), digest_size=8, salt=f"{image.width}x{image.height}".encode()).hexdigest()
