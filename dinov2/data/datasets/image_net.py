"""ImageNet-1k and ImageNet-22k in their usual folders and archives."""

import csv
import logging
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import MISSING_TARGET, ListedImages, Split, Transforms
from dinov2.data.datasets.scan import (
    CompactStrings,
    LeftOut,
    find_folders,
    find_images,
    require_images,
)
from dinov2.data.reading import UnreadableImageError
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


def load_or_make_index(
    extra: str | Path | None, name: str, classes: tuple[str, ...], make: Callable[[], ImageIndex]
) -> ImageIndex:
    """Loads an index from the folder ``extra``, or makes it and keeps it there, as plain arrays.

    Args:
        extra: folder for index files; made when missing. None keeps nothing.
        name: name of the index file, without its ending.
        classes: the set's classes; a kept index with others is made again.
        make: lists the images.

    Raises:
        ValueError: when the kept index is damaged, or something else.
    """
    if extra is None:
        return make()
    path = Path(extra) / f"{name}.npz"
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                paths = CompactStrings.from_arrays(file["path_bytes"], file["path_ends"])
                arrays = [file[key] for key in ("targets", "offsets", "sizes")]
                index = ImageIndex(tuple(file["classes"].tolist()), paths, *arrays)
            if any(len(array) != len(paths) for array in arrays):
                raise ValueError("lengths differ")
        except (ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not an image index ({error}); delete it to have it made again") from None
        if index.classes == classes:
            return index
        logger.warning("%s lists other classes than the set has; it is made again", path)
    index = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(
            path,
            lambda file: np.savez(
                file,
                classes=np.array(index.classes, dtype=np.str_),
                path_bytes=index.paths.bytes,
                path_ends=index.paths.ends,
                targets=index.targets,
                offsets=index.offsets,
                sizes=index.sizes,
            ),
        )
    except OSError as error:
        logger.warning("the image index could not be kept as %s: %s", path, error)
    return index


class ImageNet22k(ListedImages):
    """ImageNet-22k: ``root/<wnid>/*.JPEG``, or archives ``root/<wnid>.tar`` that are read in place.

    Classes are numbered by sorted WordNet id. Where a class has both a folder and an archive, the folder is used.
    """

    def __init__(self, *, root: str | Path, extra: str | Path | None = None, **transforms: Unpack[Transforms]) -> None:
        """Lists the images.

        Args:
            root: folder of the set.
            extra: folder where the list is kept for the next time (listing archives takes long); delete the file there
                when images have changed.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when the folder is missing.
            ValueError: when it holds no class, no image, or a damaged archive.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"root {str(self.root)!r} is not a folder")
        kept = Path(extra).resolve() if extra is not None else None  # may lie among the classes
        self._folders = frozenset(name for name in find_folders(self.root) if (self.root / name).resolve() != kept)
        archives = {path.stem for path in self.root.glob("*.tar") if not path.name.startswith(".")}
        self.classes = tuple(sorted(self._folders | archives))
        if not self.classes:
            raise ValueError(f"{self.root} holds neither class folders nor archives <wnid>.tar")
        self._index = load_or_make_index(extra, "index-22k", self.classes, self._list_images)
        super().__init__(self.root, self._index.paths, self._index.targets, **transforms)

    def get_image_bytes(self, index: int) -> bytes:
        """The encoded image, from its file or from its place in the archive."""
        offset, size = int(self._index.offsets[index]), int(self._index.sizes[index])
        if offset < 0:
            return super().get_image_bytes(index)
        archive = self.root / f"{self.classes[self._targets[index]]}.tar"

        def read(path: str | Path) -> bytes:
            try:
                with archive.open("rb") as file:
                    file.seek(offset)
                    data = file.read(size)
            except OSError as error:
                raise UnreadableImageError(path, f"the archive cannot be read: {error}") from error
            if len(data) < size:
                raise UnreadableImageError(path, f"the archive {archive} ends within the image")
            return data

        path = self.get_image_path(index)
        return read(path) if self.cache is None else self.cache.read(path, read)

    def _list_images(self) -> ImageIndex:
        paths: list[str] = []
        targets: list[int] = []
        places: list[tuple[int, int]] = []
        left_out = LeftOut()
        for number, class_id in enumerate(self.classes):
            if class_id in self._folders:
                names = find_images(self.root / class_id, left_out)
                places += [(-1, -1)] * len(names)
                paths += [f"{class_id}/{name}" for name in names]
            else:
                path = self.root / f"{class_id}.tar"
                try:
                    with tarfile.open(path, "r:") as archive:
                        files = [m for m in archive if m.isfile() and not m.issparse()]
                except tarfile.TarError as error:
                    raise ValueError(f"{path} is not an uncompressed tar archive, or is damaged: {error}") from None
                members = [m for m in files if left_out.takes(m.name)]
                members.sort(key=lambda member: member.name)
                names = [member.name for member in members]
                places += [(member.offset_data, member.size) for member in members]
                paths += [f"{class_id}.tar/{name}" for name in names]
            targets += [number] * len(names)
        if not paths:
            raise ValueError(f"{self.root} holds no image")
        left_out.log(self.root)
        offsets, sizes = np.array(places, dtype=np.int64).T.copy()
        return ImageIndex(self.classes, CompactStrings(paths), np.array(targets, dtype=np.int64), offsets, sizes)


class ImageNet(ListedImages):
    """ImageNet-1k: ``root/train/<wnid>/*.JPEG``, ``root/val/<wnid>/*.JPEG``, ``root/test/*.JPEG``.

    Classes are numbered by sorted WordNet id and named by ``root/labels.txt`` (``wnid,name`` per line) where there is
    one. Upstream's prepared ``extra`` files are not needed: the folders are listed when the dataset is opened.
    """

    def __init__(
        self, *, split: str, root: str | Path, extra: str | Path | None = None, **transforms: Unpack[Transforms]
    ) -> None:
        """Lists the images.

        Args:
            split: ``TRAIN``, ``VAL`` or ``TEST`` (without labels), in any case.
            root: folder of the set.
            extra: folder where the list is kept for the next time; delete the file there when images have changed.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when a folder is missing.
            ValueError: for an unknown split, or folders that do not fit the layout.
        """
        self.root = Path(root)
        self.split = Split.parse(split)
        self.image_folder = self.root / self.split
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"{self.image_folder} is not a folder; {self.root} must hold train/, val/ or test/")
        names = _read_class_names(self.root / "labels.txt")
        train = self.root / Split.TRAIN
        ids = sorted(names) if names else find_folders(train if train.is_dir() else self.image_folder)
        self.class_ids = tuple(ids)
        self.classes = tuple(names.get(class_id, class_id) for class_id in ids)
        index = load_or_make_index(extra, f"index-{self.split.name}", self.class_ids, self._list_images)
        super().__init__(self.image_folder, index.paths, index.targets, **transforms)

    def _list_images(self) -> ImageIndex:
        paths = require_images(self.image_folder)
        numbers = {class_id: number for number, class_id in enumerate(self.class_ids)}
        targets = np.full(len(paths), MISSING_TARGET, dtype=np.int64)
        for position, path in enumerate(() if self.split is Split.TEST else paths):
            class_id, slash, _ = path.partition("/")
            if not slash:
                raise ValueError(
                    f"{self.image_folder / path} lies in no class folder; images belong in {self.split}/<wnid>/"
                )
            if class_id not in numbers:
                raise ValueError(f"{self.image_folder / class_id} is no known class: not in labels.txt, nor in train/")
            targets[position] = numbers[class_id]
        no_archive = np.full(len(paths), -1, dtype=np.int64)
        return ImageIndex(self.class_ids, CompactStrings(paths), targets, no_archive, no_archive)


def _read_class_names(path: Path) -> dict[str, str]:
    """Class names by WordNet id; empty without a file."""
    if not path.is_file():
        return {}
    names: dict[str, str] = {}
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            if len(row) < 2 or not row[0].strip():
                raise ValueError(f"{path}, line {line}: must read 'wnid,name', found {','.join(row)!r}")
            if row[0].strip() in names:
                raise ValueError(f"{path}, line {line}: {row[0].strip()!r} is already named in a line above")
            names[row[0].strip()] = ",".join(row[1:]).strip()
    return names
