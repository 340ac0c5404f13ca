"""The list of a large set's images, which takes long to make and is therefore kept in a file."""

import logging
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.compact import CompactStrings
from dinov2.utils.files import write_atomically

logger = logging.getLogger("dinov2")


@dataclass(frozen=True)
class ImageIndex:
    """Where each image is and which class it has.

    Attributes:
        classes: class identifiers.
        paths: paths relative to the set's root; for a member of an archive, the archive's path and the member's name.
        targets: class indices ``[N]``, -1 where missing.
        offsets: first byte of the image within its archive ``[N]``, -1 for a plain file.
        sizes: bytes of the image within its archive ``[N]``, -1 for a plain file.
    """

    classes: tuple[str, ...]
    paths: CompactStrings
    targets: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    @classmethod
    def of_files(cls, classes: Sequence[str], paths: Sequence[str], targets: Sequence[int]) -> Self:
        """An index of plain files."""
        none = np.full(len(paths), -1, dtype=np.int64)
        return cls(tuple(classes), CompactStrings(paths), np.asarray(targets, dtype=np.int64), none, none)

    def save(self, path: Path) -> None:
        """Writes plain arrays, atomically."""

        def write(file: IO[bytes]) -> None:
            np.savez(
                file,
                classes=np.array(self.classes, dtype=np.str_),
                path_bytes=self.paths.bytes,
                path_ends=self.paths.ends,
                targets=self.targets,
                offsets=self.offsets,
                sizes=self.sizes,
            )

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: when the file is damaged or something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                paths = CompactStrings.from_arrays(file["path_bytes"], file["path_ends"])
                index = cls(tuple(file["classes"].tolist()), paths, file["targets"], file["offsets"], file["sizes"])
        except (ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not an image index ({error}); delete it to have it made again") from None
        if not len(index.paths) == len(index.targets) == len(index.offsets) == len(index.sizes):
            raise ValueError(f"{path} is not an image index (lengths differ); delete it to have it made again")
        return index


def load_or_make_index(
    extra: str | Path | None, name: str, classes: Sequence[str], make: Callable[[], ImageIndex]
) -> ImageIndex:
    """Loads an index from the folder ``extra``, or makes it and keeps it there.

    Args:
        extra: folder for index files; made when missing. None keeps nothing.
        name: name of the index file, without its ending.
        classes: the set's classes; a kept index with others is made again.
        make: lists the images.

    Raises:
        ValueError: when the kept index is damaged.
    """
    if extra is None:
        return make()
    path = Path(extra) / f"{name}.npz"
    if path.is_file():
        index = ImageIndex.load(path)
        if index.classes == tuple(classes):
            return index
        logger.warning("%s lists other classes than the set has; it is made again", path)
    index = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        index.save(path)
    except OSError as error:
        logger.warning("the image index could not be kept as %s: %s", path, error)
    return index
