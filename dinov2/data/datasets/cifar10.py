"""CIFAR-10, from the archives as they are published or from their extracted folders."""

import gzip
import tarfile
import zlib
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import ListedImages, Split, Transforms
from dinov2.utils.safe_pickle import read_safe_pickle

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE
_CHUNK = 1 << 20
_BATCHES = {
    Split.TRAIN: tuple(f"data_batch_{number}" for number in range(1, 6)),
    Split.TEST: ("test_batch",),
}
# Folder (also inside the archive), archive, and the ending of batches, in the order of preference.
_PYTHON = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "")
_BINARY = ("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin")

Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]  # pixels [N, 3072] (red, green, blue planes), labels [N]


class CIFAR10(ListedImages):
    """60,000 images of 32×32 pixels in ten classes: 50,000 to train, 10,000 to test.

    Images are kept in memory. The published pickles are read without running what they say.

    Reference:
        Krizhevsky, Learning multiple layers of features from tiny images, 2009.
    """

    classes = CLASSES

    def __init__(self, root: str | Path, split: str, **transforms: Unpack[Transforms]) -> None:
        """Reads the batches of a split.

        Args:
            root: folder that holds ``cifar-10-batches-py``, ``cifar-10-batches-bin``, ``cifar-10-python.tar.gz`` or
                ``cifar-10-binary.tar.gz`` (the first of them that is there is read); or one of these itself.
            split: ``TRAIN`` (five batches) or ``TEST``, in any case.
            **transforms: see `ImageDataset`.

        Raises:
            FileNotFoundError: when none of them or not every batch is there.
            ValueError: for another split, and for a damaged file, naming it.
        """
        self.split = Split.parse(split)
        if self.split not in _BATCHES:
            raise ValueError(f"CIFAR-10 has no split {self.split.name}; it has TRAIN and TEST")
        self.source, ending = _find_source(Path(root))
        names = [name + ending for name in _BATCHES[self.split]]
        read = _read_binary_batch if ending else _read_python_batch
        contents = zip(names, _read_batches(self.source, names), strict=True)
        batches = [read(content, f"{self.source}/{name}") for name, content in contents]
        self._pixels = np.concatenate([pixels for pixels, _ in batches])
        targets = [labels for _, labels in batches]
        # Images are named by batch and row within it, such as data_batch_1:17.
        places = [f"{name}:{row}" for name, rows in zip(names, targets, strict=True) for row in range(len(rows))]
        super().__init__(self.source, places, np.concatenate(targets), **transforms)

    def get_image_bytes(self, index: int) -> bytes:
        """The image as a PPM file, from memory."""
        pixels: bytes = self._pixels[index].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0).tobytes()
        return b"P6 %d %d 255\n" % (_SIDE, _SIDE) + pixels


def _find_source(root: Path) -> tuple[Path, str]:
    """The folder or archive to read, and the ending of its batches."""
    layouts = (_PYTHON, _BINARY)
    for folder, archive, ending in layouts:
        if root.name in (folder, archive) and root.exists():
            return root, ending
    for position in (0, 1):  # folders before archives
        for layout in layouts:
            if (root / layout[position]).exists():
                return root / layout[position], layout[2]
    names = ", ".join(layout[position] for position in (0, 1) for layout in layouts)
    raise FileNotFoundError(f"root {str(root)!r} holds none of {names}")


def _read_batches(source: Path, names: list[str]) -> list[bytes]:
    """The content of each batch, from the folder or in one pass through the archive."""
    contents: dict[str, bytes] = {}
    if source.is_dir():
        contents = {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    else:
        try:
            with gzip.open(source) as stream:
                with tarfile.open(fileobj=stream, mode="r|") as archive:
                    for member in archive:
                        name = member.name.rpartition("/")[2]
                        if name in names and (file := archive.extractfile(member)) is not None:
                            contents[name] = file.read()
                while stream.read(_CHUNK):  # the checksum of all that was read stands at the very end
                    pass
        except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{source} is not a gzipped tar archive, or is damaged: {error}") from None
    missing = [name for name in names if name not in contents]
    if missing:
        raise FileNotFoundError(f"{source} has no file {missing[0]}")
    return [contents[name] for name in names]


def _read_python_batch(data: bytes, name: str) -> Batch:
    content = read_safe_pickle(data, name)
    if not isinstance(content, dict) or not {"data", "labels"} <= content.keys():
        raise ValueError(f"{name} must hold a dict with data and labels")
    pixels, labels = content["data"], content["labels"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXEL_BYTES,):
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"{name}: data must be bytes [N, {_PIXEL_BYTES}], found {found}")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise ValueError(f"{name}: labels must be a list of {len(pixels)} numbers")
    return pixels, _check_labels(labels, name)


def _read_binary_batch(data: bytes, name: str) -> Batch:
    size = 1 + _PIXEL_BYTES
    if not data or len(data) % size:
        raise ValueError(f"{name} has {len(data)} bytes, which is not a multiple of the {size} of an image")
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
    return rows[:, 1:], _check_labels(rows[:, 0].tolist(), name)


def _check_labels(labels: list[Any], name: str) -> npt.NDArray[np.int64]:
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < len(CLASSES):
            raise ValueError(f"{name}, row {row}: label {label!r:.80} is outside 0 to {len(CLASSES) - 1}")
    return np.array(labels, dtype=np.int64)
