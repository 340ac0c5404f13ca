"""ImageNet-22k: one folder or one tar archive per class."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.compact import CompactStrings
from dinov2.data.datasets.image_index import ImageIndex, load_or_make_index
from dinov2.data.datasets.scan import find_folders, find_images, is_image_name
from dinov2.data.decoding import UnreadableImageError


class ImageNet22k(ImageDataset):
    """ImageNet-22k: ``root/<wnid>/*.JPEG``, or archives ``root/<wnid>.tar`` that are read in place.

    Classes are numbered by sorted WordNet id. Where a class has both a folder and an archive, the folder is used.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        extra: str | Path | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Lists the images.

        Args:
            root: folder of the set.
            extra: folder where the list is kept for the next time (listing archives takes long); delete the file there
                when images have changed.
            transform: maps the RGB image.
            target_transform: maps the class index.

        Raises:
            FileNotFoundError: when the folder is missing.
            ValueError: when it holds no class, no image, or a damaged archive.
        """
        super().__init__(transform=transform, target_transform=target_transform)
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

    def __len__(self) -> int:
        return len(self._index.paths)

    def get_image_path(self, index: int) -> Path:
        """Path of the file; for an image in an archive, the archive's path followed by the member's name."""
        return self.root / self._index.paths[index]

    def get_target(self, index: int) -> int:
        return int(self._index.targets[index])

    def get_targets(self) -> npt.NDArray[np.int64]:
        return self._index.targets.copy()

    def get_image_bytes(self, index: int) -> bytes:
        """The encoded image, from its file or from its place in the archive."""
        offset, size = int(self._index.offsets[index]), int(self._index.sizes[index])
        if offset < 0:
            return super().get_image_bytes(index)
        archive = self.root / f"{self.classes[self.get_target(index)]}.tar"

        def read(path: str | Path) -> bytes:
            return _read_part(archive, offset, size, str(path))

        path = self.get_image_path(index)
        return read(path) if self.cache is None else self.cache.read(path, read)

    def _list_images(self) -> ImageIndex:
        paths: list[str] = []
        targets: list[int] = []
        places: list[tuple[int, int]] = []
        for number, class_id in enumerate(self.classes):
            if class_id in self._folders:
                names = find_images(self.root / class_id)
                places += [(-1, -1)] * len(names)
                paths += [f"{class_id}/{name}" for name in names]
            else:
                members = _list_archive(self.root / f"{class_id}.tar")
                names = [member.name for member in members]
                places += [(member.offset_data, member.size) for member in members]
                paths += [f"{class_id}.tar/{name}" for name in names]
            targets += [number] * len(names)
        if not paths:
            raise ValueError(f"{self.root} holds no image")
        offsets, sizes = np.array(places, dtype=np.int64).T.copy()
        return ImageIndex(self.classes, CompactStrings(paths), np.array(targets, dtype=np.int64), offsets, sizes)


def _list_archive(path: Path) -> list[tarfile.TarInfo]:
    """Image members of an uncompressed archive, by name."""
    try:
        with tarfile.open(path, "r:") as archive:
            members = [m for m in archive if m.isfile() and not m.issparse() and is_image_name(Path(m.name).name)]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not an uncompressed tar archive, or is damaged: {error}") from None
    return sorted(members, key=lambda member: member.name)


def _read_part(path: Path, offset: int, size: int, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise UnreadableImageError(name, f"the archive cannot be read: {error}") from error
    if len(data) < size:
        raise UnreadableImageError(name, f"the archive {path} ends within the image")
    return data
