"""What every image dataset of this project offers, whatever its layout on disk."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Dataset

from dinov2.data.datasets.scan import CompactStrings
from dinov2.data.decoding import read_image_size, sample_values
from dinov2.data.image_reader import ImageReader, PlacedImage
from dinov2.data.preprocessing import Chain
from dinov2.data.reading import ByteCache, Deadline, read_image_bytes
from dinov2.data.value_range import ValueRange, robust_range
from dinov2.utils.seeds import derive_seed

# Where errors send people whose labels and parts are in a table.
PREPARE_CSV = (
    "; from a table of labels, dinov2 prepare_csv labels.csv --image COLUMN --part COLUMN --label COLUMN "
    "--output FOLDER makes such a set"
)
TABLE_ENDINGS = (".csv", ".tsv", ".xlsx", ".xls", ".ods")
_Result = TypeVar("_Result")
_Number = TypeVar("_Number", bound=np.generic)

READ_TIMEOUT = 60.0  # seconds for one of the images that are looked at when a set is opened
_RANGE_IMAGES = 32  # spread over the set, that tell the range of its values
_LIGHT_IMAGES = 8  # that tell whether it is nearly black
_DARK, _BRIGHT, _FEW = 32, 223, 1e-4  # levels of 8 bits, and the share of pixels that may lie beyond
_BITS = (8, 10, 12, 14)  # that files of 16 bits may hold

MISSING_TARGET = -1  # what `__getitem__` and `get_targets` give where an image has no label


class ImageDataset(Dataset[tuple[Any, Any]], ABC):
    """Images with an optional class index and an optional group (the part that they show).

    Attributes:
        classes: class names by index; empty where the set has no labels.
        cache: keeps encoded files in memory when set (option ``train.cache_dataset``).
        light: one of ``LIGHTS``; with ``standardized``, `standardize_light` prepares every image for whoever asks (key
            ``light`` of dataset strings).
        value_range: which values of files become black and white, where they are more than levels of 8 bits (keys
            ``range`` and ``bits`` of dataset strings); None where every file says so itself.
        preprocessing: steps that every image goes through, after the range of values and before the light.
    """

    classes: tuple[str, ...] = ()
    cache: ByteCache | None = None
    light: str = "original"
    value_range: ValueRange | None = None
    preprocessing: Chain = Chain()

    def __init__(
        self,
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Keeps the transforms.

        Args:
            transform: maps the RGB image to what the dataset returns.
            target_transform: maps the class index, -1 where it is missing.
        """
        self.transform = transform
        self.target_transform = target_transform

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def get_image_path(self, index: int) -> Path:
        """Path that names the image in logs and, where images are plain files, opens it."""

    @abstractmethod
    def get_target(self, index: int) -> int | None:
        """Class index, or None where the image has no label."""

    def get_image_bytes(self, index: int) -> bytes:
        """The encoded image, from the cache when there is one.

        Raises:
            UnreadableImageError: when the file cannot be read.
        """
        path = self.get_image_path(index)
        return read_image_bytes(path) if self.cache is None else self.cache.read(path)

    def get_image(self, index: int) -> Image.Image:
        """The image in RGB, as a person would see it; where there is preprocessing, what it makes of the image.

        Raises:
            UnreadableImageError: when the file is missing, truncated or no image, or a step fails on it.
        """
        return self.get_placed_image(index).image

    def get_placed_image(self, index: int) -> PlacedImage:
        """The same, with its place in the image where a step has cut something out.

        Raises:
            UnreadableImageError: see `get_image`.
        """
        if type(self).get_image is not ImageDataset.get_image:  # of a set that shows its images in its own way
            return PlacedImage(self.get_image(index))
        return self.image_reader.decode(self.get_image_bytes(index), str(self.get_image_path(index)))

    def read_image(self, path: Path) -> Image.Image:
        """An image beside those of the set, such as a template, prepared as they are; black where a step cuts.

        Raises:
            UnreadableImageError: see `get_image`.
        """
        data = read_image_bytes(path) if self.cache is None else self.cache.read(path)
        return self.image_reader.decode(data, str(path)).whole

    @property
    def image_reader(self) -> ImageReader:
        """How files become the images of the set."""
        return ImageReader(self.value_range, self.preprocessing, self.light)

    def counted_region(self, index: int) -> npt.NDArray[np.bool_] | None:
        """Which pixels of an image count ``[H, W]``; None where all do (preprocessing names no region of interest)."""
        if not self.preprocessing.has_region:  # and no header is read for the size
            return None
        return self.preprocessing.region(str(self.get_image_path(index)), self.get_image_size(index))

    def fill_uncounted(self, index: int, values: npt.NDArray[_Number], fill: float) -> npt.NDArray[_Number]:
        """Values of all pixels ``[H, W]`` of an image, and ``fill`` where these do not count."""
        region = self.counted_region(index)
        return values if region is None else np.where(region, values, fill).astype(values.dtype)

    def get_image_size(self, index: int) -> tuple[int, int]:
        """Height and width of the image, from the header of its file, before preprocessing.

        Raises:
            UnreadableImageError: when the file is missing or no image.
        """
        return read_image_size(self.get_image_bytes(index), str(self.get_image_path(index)))

    def estimate_value_range(self, read_timeout: float = READ_TIMEOUT) -> ValueRange | None:
        """The range of values of some images, see `robust_range`; None where the files say themselves what is white.

        Images that cannot be read do not count, and after one that takes too long no more are read.
        """

        def sample(name: str, data: bytes) -> npt.NDArray[Any] | None:
            found = sample_values(data, name, unnamed_only=True)
            return found[0].ravel() if found is not None and found[1] is None else None

        values = [found for found in self._look_at(_RANGE_IMAGES, sample, read_timeout) if found is not None]
        return robust_range(np.concatenate(values)) if values else None

    def _look_at(self, count: int, look: Callable[[str, bytes], _Result], read_timeout: float) -> Iterator[_Result]:
        """What a function finds in the files of some images, evenly spread over the set from the first on."""
        in_time = Deadline(read_timeout)
        count = min(count, len(self))
        for index in (number * len(self) // count for number in range(count)):
            try:
                yield in_time(lambda index=index: look(str(self.get_image_path(index)), self.get_image_bytes(index)))
            except TimeoutError:
                return
            except OSError:
                continue

    def describe_light(self, read_timeout: float = READ_TIMEOUT) -> str:
        """What is wrong with the brightness of some images, as a sentence with advice; empty where nothing is."""

        def measure(name: str, data: bytes) -> tuple[npt.NDArray[np.int64], float]:
            placed = ImageReader(self.value_range, self.preprocessing).decode(data, name)
            counts = np.asarray(placed.image.histogram()).reshape(-1, 256).sum(axis=0)
            found = None if self.preprocessing.steps else sample_values(data, name)
            has_16_bits = found is not None and found[1] == ValueRange.of_bits(16)
            return counts, float(found[0].max()) if found is not None and has_16_bits else 0.0

        counts, deep = np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)  # of all, of those of 16 bits
        highest, images, deep_images = 0.0, 0, 0
        for some, value in self._look_at(_LIGHT_IMAGES, measure, read_timeout):
            counts, images = counts + some, images + 1
            if value:
                deep, deep_images, highest = deep + some, deep_images + 1, max(highest, value)
        if not counts.any():
            return ""

        def level_at(counts: npt.NDArray[np.int64], share: float, side: Literal["left", "right"] = "left") -> int:
            return int(np.searchsorted(counts.cumsum() / counts.sum(), share, side=side))

        bits = next((bits for bits in _BITS if highest < 2**bits), 16)
        if self.value_range is None and highest > 0 and bits < 16:
            dark = level_at(deep, 1 - _FEW)
            which = "images" if deep_images == images else f"{deep_images} of the {images} images looked at"
            return (
                f"{which} are {'nearly black' if dark <= _DARK else 'dark'}: the highest level found is "
                f"{dark} of 255, as their files of 16 bits hold values up to {highest:g}, which "
                f"takes {bits} bits. If they come from a camera of {bits} bits, add bits={bits} to the dataset string"
            )
        dark, bright = level_at(counts, 1 - _FEW), level_at(counts, _FEW, "right")
        if dark > _DARK and bright < _BRIGHT:
            return ""
        cause = "" if self.value_range is None else f" (values of {self.value_range} become black and white: range=)"
        if dark <= _DARK:
            return f"images are nearly black: the highest level found is {dark} of 255{cause}"
        return f"images are nearly white: the lowest level found is {bright} of 255{cause}"

    def get_targets(self) -> npt.NDArray[np.int64]:
        """Class indices of all images ``[N]``, -1 where missing."""
        targets = (self.get_target(index) for index in range(len(self)))
        return np.fromiter((MISSING_TARGET if t is None else t for t in targets), dtype=np.int64, count=len(self))

    def get_image_paths(self) -> list[str]:
        """Absolute paths of all images."""
        return [os.path.abspath(self.get_image_path(index)) for index in range(len(self))]

    def get_group_ids(self) -> list[str]:
        """Group of every image; by default each image is its own group, named by its path."""
        return [str(self.get_image_path(index)) for index in range(len(self))]

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The transformed image and target (-1 where missing)."""
        image: Any = self.get_image(index)
        if self.transform is not None:
            image = self.transform(image)
        label = self.get_target(index)
        target: Any = MISSING_TARGET if label is None else label
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


class Transforms(TypedDict, total=False):
    """What the constructor of every dataset takes; see `ImageDataset`."""

    transform: Callable[[Image.Image], Any] | None
    target_transform: Callable[[int], Any] | None


class ListedImages(ImageDataset):
    """Images below one folder, listed when the set is opened; no image is touched then.

    Attributes:
        image_folder: what the images' paths are relative to.
    """

    def __init__(
        self,
        image_folder: Path,
        paths: Sequence[str],
        targets: npt.ArrayLike | None = None,
        **transforms: Unpack[Transforms],
    ) -> None:
        """Keeps the lists.

        Args:
            image_folder: what paths are relative to.
            paths: of the images ``[N]``, with ``/`` between folders.
            targets: class indices ``[N]``, -1 where missing; None where all are.
            **transforms: see `ImageDataset`.
        """
        super().__init__(**transforms)
        self.image_folder = image_folder
        self._paths = paths if isinstance(paths, CompactStrings) else CompactStrings(paths)
        missing = np.full(len(paths), MISSING_TARGET, dtype=np.int64)
        self._targets = missing if targets is None else np.asarray(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._paths)

    def get_image_path(self, index: int) -> Path:
        return self.image_folder / self._paths[index]

    def get_target(self, index: int) -> int | None:
        target = int(self._targets[index])
        return None if target == MISSING_TARGET else target

    def get_targets(self) -> npt.NDArray[np.int64]:
        return self._targets.copy()

    def get_image_paths(self) -> list[str]:
        folder = os.path.abspath(self.image_folder)
        return [f"{folder}/{path}" for path in self._paths]


class ImageSelection(ImageDataset):
    """The images at some positions of a dataset, as a dataset with the same transforms.

    Args:
        dataset: where the images come from.
        positions: of the images, in the order wanted.
    """

    def __init__(self, dataset: ImageDataset, positions: Sequence[int]) -> None:
        super().__init__(transform=dataset.transform, target_transform=dataset.target_transform)
        self.dataset = dataset
        self.positions = list(positions)
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.positions)

    def get_image_path(self, index: int) -> Path:
        return self.dataset.get_image_path(self.positions[index])

    def get_target(self, index: int) -> int | None:
        return self.dataset.get_target(self.positions[index])

    def get_placed_image(self, index: int) -> PlacedImage:
        return self.dataset.get_placed_image(self.positions[index])

    def get_group_ids(self) -> list[str]:
        """Group of every image, as the dataset names it."""
        groups = self.dataset.get_group_ids()
        return [groups[position] for position in self.positions]


def spread_positions(dataset: ImageDataset, num_images: int) -> list[int]:
    """Positions of images spread evenly over a dataset, as many of each class as of the others where there are enough.

    Raises:
        ValueError: when ``num_images`` is below 1 or the dataset is empty.
    """
    _check_choice(dataset, num_images)
    targets = dataset.get_targets()
    members = [np.flatnonzero(targets == target) for target in np.unique(targets)]
    shares = [len(share) for share in np.array_split(np.arange(num_images), len(members))]
    return [
        int(member[position])
        for member, share in zip(members, shares, strict=True)
        for position in np.linspace(0, len(member) - 1, min(share, len(member))).round().astype(int)
    ]


def whole_parts(dataset: ImageDataset, max_images: int) -> list[int]:
    """Positions of all images of evenly chosen parts, in the dataset's order; of all parts where ``max_images`` allows.

    A first part with more images than allowed is taken nevertheless.

    Raises:
        ValueError: when ``max_images`` is below 1 or the dataset is empty.
    """
    _check_choice(dataset, max_images)
    if len(dataset) <= max_images:
        return list(range(len(dataset)))
    members: dict[str, list[int]] = {}
    for position, group in enumerate(dataset.get_group_ids()):
        members.setdefault(group, []).append(position)
    parts = list(members.values())
    # Steps of the golden ratio: every beginning of this order is spread evenly.
    order = (np.arange(len(parts)) * 0.6180339887498949 % 1.0).argsort(kind="stable").argsort(kind="stable")
    chosen: list[int] = []
    for number in order:
        if not chosen or len(chosen) + len(parts[number]) <= max_images:
            chosen += parts[number]
    return sorted(chosen)


def _check_choice(dataset: ImageDataset, count: int) -> None:
    if count < 1 or len(dataset) == 0:
        raise ValueError(f"cannot choose {count} images from a dataset of {len(dataset)}")


class Split(StrEnum):
    """The three splits; the value is the folder's and the annotation file's name."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"

    @classmethod
    def parse(cls, name: str, *, found: str = "") -> "Split":
        """Finds a split by name, in any case.

        Args:
            name: ``TRAIN``, ``VAL`` or ``TEST``.
            found: what exists on disk, added to the error.

        Raises:
            ValueError: for another name.
        """
        try:
            return cls(name.strip().lower())
        except ValueError:
            allowed = ", ".join(split.name for split in cls)
            raise ValueError(f"unknown split {name!r}; allowed are {allowed}{found and f' ({found})'}") from None


DEFAULT_FRACTIONS = (0.6, 0.2, 0.2)


def check_fractions(fractions: Sequence[float]) -> list[float]:
    """Returns the shares of train, val and test as a list.

    Raises:
        ValueError: when they are not three non-negative numbers that sum to 1.
    """
    shares = [float(fraction) for fraction in fractions]
    if len(shares) != len(Split) or min(shares) < 0 or not np.isclose(sum(shares), 1):
        raise ValueError(f"fractions of train, val and test must be three shares that sum to 1, got {shares}")
    return shares


def split_groups(
    group_ids: Sequence[str], strata: Sequence[str], fractions: Sequence[float], seed: int
) -> npt.NDArray[np.int64]:
    """Divides images at random so that a group stays whole and every split gets its share of each stratum.

    The result depends on the sets of groups, not on the order of images. A group that holds several strata counts for
    the one that is rarest among all images, so that a part with one defective image counts as defective.

    Args:
        group_ids: group of each image, length N.
        strata: kind of each image, length N.
        fractions: share of images for each split; positive, sum 1.
        seed: draws the order of groups.

    Returns:
        Split index of each image ``[N]``.

    Raises:
        ValueError: when lengths differ, or the fractions are not positive shares of one whole.
    """
    if len(group_ids) != len(strata):
        raise ValueError(f"got {len(group_ids)} group ids and {len(strata)} strata")
    shares = np.asarray(fractions, dtype=np.float64)
    if shares.size == 0 or (shares < 0).any() or not np.isclose(shares.sum(), 1):
        raise ValueError(f"fractions must be non-negative and sum to 1, got {tuple(fractions)}")
    if not len(group_ids):
        return np.zeros(0, dtype=np.int64)
    _, groups = np.unique(np.asarray(group_ids), return_inverse=True)
    _, kinds, counts = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    sizes = np.bincount(groups)
    rarity = np.argsort(np.argsort(counts, kind="stable"), kind="stable")  # 0 is the rarest stratum
    group_kinds = np.full(len(sizes), len(counts))
    np.minimum.at(group_kinds, groups, rarity[kinds])

    bounds = shares.cumsum()[:-1]
    rng = np.random.default_rng(derive_seed(seed, "split groups"))
    result = np.zeros(len(sizes), dtype=np.int64)
    for kind in range(len(counts)):
        members = rng.permutation(np.flatnonzero(group_kinds == kind))
        if len(members):
            middle = sizes[members].cumsum() - sizes[members] / 2
            result[members] = np.searchsorted(bounds, middle / sizes[members].sum(), side="right")
    return result[groups]
