"""The revisited Oxford and Paris benchmarks: their ground truth, three protocols, and images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from torchvision import transforms

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.transforms import make_normalize_transform
from dinov2.eval.features import name_some
from dinov2.eval.metrics.classification import IntArray
from dinov2.eval.retrieval.ranking import IGNORED, RELEVANT, round_to_patches
from dinov2.utils.safe_pickle import load_safe_pickle

GROUND_TRUTH_FILES = ("gnd_roxford5k.pkl", "gnd_rparis6k.pkl")
IMAGE_FOLDER = "jpg"
KINDS = ("easy", "hard", "junk")  # how a gallery image shows what a query shows; all others do not show it
PROTOCOLS: Mapping[str, Mapping[str, int]] = {
    "easy": {"easy": RELEVANT, "hard": IGNORED, "junk": IGNORED},
    "medium": {"easy": RELEVANT, "hard": RELEVANT, "junk": IGNORED},
    "hard": {"easy": IGNORED, "hard": RELEVANT, "junk": IGNORED},
}
MAX_OUTSIDE = 1.0  # pixels that a box may reach outside its image, for rounding

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class RevisitedBenchmark:
    """A benchmark whose files have been found.

    Attributes:
        name: such as ``roxford5k``.
        gallery: the images that are ranked.
        queries: the images whose boxes are looked for.
        boxes: left, top, right and bottom of what each query is about, in pixels.
        kinds: for each query the gallery positions of each of `KINDS`.
    """

    name: str
    gallery: tuple[Path, ...]
    queries: tuple[Path, ...]
    boxes: tuple[Box, ...]
    kinds: tuple[Mapping[str, IntArray], ...]

    def relevance(self, protocol: str) -> Callable[[IntArray], npt.NDArray[np.int8]]:
        """Relevance of each gallery image to queries ``[q]`` under a protocol, ``[q, N]``; see `measure_retrieval`."""

        def of_queries(rows: IntArray) -> npt.NDArray[np.int8]:
            values = np.zeros((len(rows), len(self.gallery)), dtype=np.int8)
            for row, query in enumerate(rows):
                for kind, value in PROTOCOLS[protocol].items():
                    values[row, self.kinds[query][kind]] = value
            return values

        return of_queries


def read_revisited(path: str | Path) -> RevisitedBenchmark:
    """Reads the ground truth of a benchmark and finds its images.

    Args:
        path: a folder with ``gnd_roxford5k.pkl`` or ``gnd_rparis6k.pkl``, or such a file; the images are in the folder
            ``jpg`` beside it.

    Raises:
        FileNotFoundError: when the file, the folder or an image is missing.
        ValueError: when the file is no ground truth of this kind, naming query and key.

    Reference: Radenović et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking", section 3.
    """
    file = Path(path)
    if not file.is_file():
        found = [file / name for name in GROUND_TRUTH_FILES if (file / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} holds neither {' nor '.join(GROUND_TRUTH_FILES)}")
        if len(found) > 1:
            raise ValueError(f"{path} holds {' and '.join(GROUND_TRUTH_FILES)}: name one of the files")
        file = found[0]
    content = load_safe_pickle(file)
    if not isinstance(content, dict) or not {"imlist", "qimlist", "gnd"} <= content.keys():
        raise ValueError(f"{file} must hold a dict with imlist, qimlist and gnd")
    gallery, queries = (_names(content[key], f"{file}: {key}") for key in ("imlist", "qimlist"))
    entries = content["gnd"]
    if not isinstance(entries, list | tuple) or len(entries) != len(queries):
        raise ValueError(f"{file}: gnd must have one entry for each of the {len(queries)} queries")
    folder = file.parent / IMAGE_FOLDER
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} with the images")
    there = {path.name for path in folder.iterdir()}
    missing = [f"{name}.jpg" for name in (*gallery, *queries) if f"{name}.jpg" not in there]
    if missing:
        num_images = len(gallery) + len(queries)
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of {num_images} images: {name_some(missing)}")
    boxes, kinds = [], []
    for name, entry in zip(queries, entries, strict=True):
        where = f"{file}: query {name}"
        if not isinstance(entry, dict) or not {"bbx", *KINDS} <= entry.keys():
            raise ValueError(f"{where} must have the keys bbx, {', '.join(KINDS)}")
        boxes.append(_box(entry["bbx"], where))
        kinds.append(_kinds(entry, len(gallery), where))
    return RevisitedBenchmark(
        name=file.stem.removeprefix("gnd_"),
        gallery=tuple(folder / f"{name}.jpg" for name in gallery),
        queries=tuple(folder / f"{name}.jpg" for name in queries),
        boxes=tuple(boxes),
        kinds=tuple(kinds),
    )


class ResizeLongerSide:
    """Maps a PIL image to a normalised tensor ``[3, H, W]`` whose longer side has about a given length.

    Both sides come to the nearest number of whole patches. That changes each by half a patch at most, while padding
    would add patches that show nothing to the means over patches.

    Args:
        longer_side: pixels.
        patch_size: height and width of a patch in pixels.
    """

    def __init__(self, longer_side: int, patch_size: tuple[int, int]) -> None:
        if longer_side < max(patch_size):
            raise ValueError(f"the longer side must have at least the {max(patch_size)} pixels of a patch")
        self.longer_side = longer_side
        self.patch_size = patch_size
        self.finish = transforms.Compose([transforms.ToTensor(), make_normalize_transform()])

    def __call__(self, image: Image.Image, full_size: tuple[int, int] | None = None) -> Tensor:
        """Returns the tensor; ``full_size`` (width, height) is that of the image which ``image`` was cut from."""
        scale = self.longer_side / max(full_size or image.size)
        height, width = round_to_patches((image.height * scale, image.width * scale), self.patch_size)
        tensor: Tensor = self.finish(image.resize((width, height), Image.Resampling.BICUBIC))
        return tensor


class RevisitedImages(ImageDataset):
    """Images of a benchmark, of different sizes; queries are cut to their boxes.

    A query is scaled like the whole image it was cut from, so that a building has the size that it has in the gallery.

    Args:
        paths: the files.
        transform: makes tensors.
        boxes: of queries; None for images that stay whole.

    Raises:
        ValueError: for a box that reaches outside its image; all are checked at once.
        UnreadableImageError: for a query that cannot be read.
    """

    def __init__(self, paths: Sequence[Path], transform: ResizeLongerSide, boxes: Sequence[Box] | None = None) -> None:
        super().__init__(transform=transform)
        self.paths = tuple(paths)
        self.resize = transform
        self.boxes = None if boxes is None else tuple(boxes)
        if self.boxes is not None:
            for index in range(len(self)):
                _cut_box(self.boxes[index], self.get_image(index).size, self.paths[index])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def get_image_path(self, index: int) -> Path:
        """The file."""
        return self.paths[index]

    def get_target(self, index: int) -> int | None:
        """None: landmarks have no classes."""
        return None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The tensor ``[3, H, W]`` and -1."""
        image = self.get_image(index)
        size = image.size
        if self.boxes is not None:
            image = image.crop(_cut_box(self.boxes[index], size, self.paths[index]))
        if self.transform is not None and self.transform is not self.resize:  # what needs no size, such as statistics
            return self.transform(image), -1
        return self.resize(image, size), -1


def _cut_box(box: Box, size: tuple[int, int], path: Path) -> tuple[int, int, int, int]:
    """The pixels of a box in an image of ``size`` (width, height): left, top, right and bottom."""
    left, top, right, bottom = (
        min(max(round(value), 0), limit) for value, limit in zip(box, (*size, *size), strict=True)
    )
    outside = max(-box[0], -box[1], box[2] - size[0], box[3] - size[1])
    if outside > MAX_OUTSIDE or left >= right or top >= bottom:
        raise ValueError(
            f"the box {[round(value, 1) for value in box]} of query {path} reaches outside the image of "
            f"{size[0]} x {size[1]} pixels (width x height): the benchmark needs the images at their original size"
        )
    return left, top, right, bottom


def _names(values: Any, where: str) -> list[str]:
    names = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} must be a list of image names")
    bad = [name for name in names if not name or Path(name).name != name or "\\" in name or "\0" in name]
    if bad:
        raise ValueError(f"{where} must hold names of files without folders, found {bad[0]!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{where} holds a name twice")
    return list(names)


def _array(values: Any) -> npt.NDArray[Any]:
    """The values as an array; of what is no flat array, one that fails the checks that follow."""
    nested = not isinstance(values, list | tuple | np.ndarray) or any(
        isinstance(value, list | tuple | np.ndarray) for value in values
    )
    return np.asarray(None if nested else values)


def _box(values: Any, where: str) -> Box:
    box = _array(values)
    if box.shape != (4,) or box.dtype.kind not in "iuf" or not np.isfinite(box).all():
        raise ValueError(f"{where}: bbx must be four numbers, found {values!r}")
    left, top, right, bottom = (float(value) for value in box)
    if round(right) <= round(left) or round(bottom) <= round(top):
        raise ValueError(f"{where}: bbx {box.tolist()} (left, top, right, bottom) holds no pixel")
    return left, top, right, bottom


def _kinds(entry: Mapping[str, Any], num_gallery: int, where: str) -> dict[str, IntArray]:
    kinds = {}
    for kind in KINDS:
        positions = _array(entry[kind])
        if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
            raise ValueError(f"{where}: {kind} must be a list of positions in imlist")
        if positions.size and not 0 <= positions.min() <= positions.max() < num_gallery:
            raise ValueError(f"{where}: {kind} must be positions in [0, {num_gallery}), found {positions.tolist()}")
        kinds[kind] = positions.astype(np.int64)
    together = np.concatenate(list(kinds.values()))
    if len(np.unique(together)) != len(together):
        raise ValueError(f"{where}: an image of the gallery is listed twice in {', '.join(KINDS)}")
    return kinds
