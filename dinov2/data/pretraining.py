"""The dataset of pretraining: crops whose randomness depends on the run's seed and their place in its stream only."""

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinov2.data.augmentations import Crops
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.reading import Deadline
from dinov2.utils.errors import RunError
from dinov2.utils.seeds import derive_seed, isolated_random_state

logger = logging.getLogger("dinov2")

MAX_SUBSTITUTES = 16


@dataclass(frozen=True, slots=True)
class SampleKey:
    """What the pretraining sampler yields.

    Attributes:
        position: Place of the sample in the run's global stream, counted over all processes from 0.
        index: Index of the image in the dataset.
    """

    position: int
    index: int


@dataclass(frozen=True, kw_only=True)
class CropSample:
    """The crops of one image.

    Attributes:
        global_crops: Tensors ``[3, H, W]``.
        local_crops: Tensors ``[3, h, w]``; may be empty.
        name: Path of the image the crops were cut from.
        position: Place of the sample in the run's global stream.
        unreadable: Paths of images that came first but could not be read.
    """

    global_crops: tuple[Tensor, ...]
    local_crops: tuple[Tensor, ...]
    name: str
    position: int
    unreadable: tuple[str, ...]


class Parts:
    """Which images show the same part, in two integers per image.

    Args:
        group_ids: The part of every image.
    """

    def __init__(self, group_ids: Sequence[str]) -> None:
        numbers = {name: number for number, name in enumerate(dict.fromkeys(group_ids))}
        self._part = np.fromiter((numbers[name] for name in group_ids), dtype=np.int64, count=len(group_ids))
        self._by_part = self._part.argsort(kind="stable")
        self._start = np.concatenate([[0], np.cumsum(np.bincount(self._part))])
        self.count = len(numbers)

    def draw_other(self, index: int, rng: random.Random) -> int | None:
        """Another image of the part of image ``index``, each with the same chance; None where it is the only one."""
        start, end = self._start[self._part[index] : self._part[index] + 2]
        members = self._by_part[start:end]  # rising, as the sort is stable
        if len(members) == 1:
            return None
        place = rng.randrange(len(members) - 1)
        return int(members[place + (place >= np.searchsorted(members, index))])


class PretrainingDataset(Dataset[CropSample]):
    """Cuts crops from images; the same (seed, position, index) gives the same crops in any process of any run.

    Torch's, NumPy's and Python's global generators are seeded for every sample, since augmentations draw from them, and
    put back afterwards. An image that cannot be read is replaced by another one, chosen by seed and position, and
    reported in ``CropSample.unreadable``; each such path is logged once per process.

    With ``part_positives``, the crops of a sample come from two images of one part: what differs between them (light,
    exposure, pose) is then no clue any more, as the two views must agree. It is part of what such images are taken for,
    and no augmentation of one image imitates it fully.

    Args:
        dataset: Where the images come from.
        augmentation: Turns an RGB image, and another image of the same part if there is one, into crops.
        seed: The run's seed.
        part_positives: Chance, in 0..1, that a sample takes a partner from the other images of its part.
        read_timeout: Seconds after which an image counts as unreadable; 0 for no limit.

    Reference: positives from several images of one case: Azizi et al., "Big Self-Supervised Models Advance Medical
    Image Classification" (2021), section 3.2.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        augmentation: Callable[..., Crops],
        seed: int = 0,
        *,
        part_positives: float = 0.0,
        read_timeout: float = 0.0,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("the pretraining dataset has no images")
        if not 0 <= part_positives <= 1:
            raise ValueError(f"part_positives must lie in 0..1, got {part_positives}")
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self.part_positives = part_positives
        self._parts = Parts(dataset.get_group_ids()) if part_positives > 0 else None
        if self._parts is not None and self._parts.count == len(dataset):
            logger.warning("part_positives=%g has no effect: every image is a part of its own", part_positives)
        self._in_time = Deadline(read_timeout)
        self._log = UnreadableLog()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> CropSample:
        """Cuts the crops of one sample.

        Raises:
            RunError: Neither the image nor any of its substitutes can be read.
        """
        unreadable: list[str] = []
        image, index = self._read(key.position, key.index, unreadable)
        partner = self._read_partner(key.position, index, unreadable)
        with isolated_random_state(derive_seed(self.seed, "augment", key.position)):
            crops = self.augmentation(image) if partner is None else self.augmentation(image, partner)
        return CropSample(
            global_crops=tuple(crops["global_crops"]),
            local_crops=tuple(crops["local_crops"]),
            name=str(self.dataset.get_image_path(index)),
            position=key.position,
            unreadable=tuple(dict.fromkeys(unreadable)),
        )

    def _read(self, position: int, index: int, unreadable: list[str]) -> tuple[Image.Image, int]:
        """An image, or the first of its substitutes that can be read, and its index."""
        for candidate in candidates(index, position, self.seed, range(len(self.dataset))):
            try:
                return self._in_time(self.dataset.get_image, candidate), candidate
            except OSError as error:
                unreadable.append(self._log(self.dataset.get_image_path(candidate), error))
        raise RunError(f"no readable image after {MAX_SUBSTITUTES} substitutes: {', '.join(dict.fromkeys(unreadable))}")

    def _read_partner(self, position: int, index: int, unreadable: list[str]) -> Image.Image | None:
        """Another image of the part, or None where there is none, none was drawn, or the one drawn is unreadable."""
        rng = random.Random(derive_seed(self.seed, "partner", position))
        if self._parts is None or rng.random() >= self.part_positives:
            return None
        partner = self._parts.draw_other(index, rng)
        try:
            return None if partner is None else self._in_time(self.dataset.get_image, partner)
        except OSError as error:
            assert partner is not None
            unreadable.append(self._log(self.dataset.get_image_path(partner), error))
            return None


def candidates(index: int, position: int, seed: int, spares: Sequence[int]) -> Iterator[int]:
    """An index, then those among the spares to try in its place, chosen by seed and position."""
    yield index
    for attempt in range(MAX_SUBSTITUTES):
        yield spares[derive_seed(seed, "substitute", position, attempt) % len(spares)]


class UnreadableLog:
    """Logs every image that cannot be read, once per process."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def __call__(self, path: Path, error: OSError) -> str:
        """Logs an image and returns its name."""
        name = str(path)
        if name not in self._logged:
            self._logged.add(name)
            logger.warning("image %s cannot be read and is replaced by another: %s", name, error)
        return name


_PATHS_SHOWN = 5


class TooManyUnreadableImages(RunError):
    """More of the dataset's images are missing or corrupt than the run allows."""


class UnreadableTally:
    """Counts distinct unreadable images; the process that trains feeds it the names that every batch carries.

    Args:
        dataset_size: Number of images in the dataset, at least 1.
        max_fraction: Largest tolerated share of unreadable images, 0..1.
    """

    def __init__(self, dataset_size: int, max_fraction: float) -> None:
        if dataset_size < 1:
            raise ValueError(f"dataset_size must be at least 1, got {dataset_size}")
        if not 0 <= max_fraction <= 1:
            raise ValueError(f"max_fraction must lie in 0..1, got {max_fraction}")
        self.dataset_size = dataset_size
        self.max_fraction = max_fraction
        self._names: set[str] = set()

    @property
    def count(self) -> int:
        """Number of distinct unreadable images so far."""
        return len(self._names)

    def add(self, names: Iterable[str]) -> None:
        """Adds the unreadable images of one batch; a name counts once however often it comes."""
        self._names.update(names)

    @property
    def exceeded(self) -> bool:
        """Whether more images cannot be read than are tolerated."""
        return self.count > self.max_fraction * self.dataset_size

    def check(self) -> None:
        """Stops a run that has lost too many images.

        Raises:
            TooManyUnreadableImages: The tolerated share is exceeded.
        """
        if self.exceeded:
            shown = ", ".join(sorted(self._names)[:_PATHS_SHOWN])
            more = f" and {self.count - _PATHS_SHOWN} more" if self.count > _PATHS_SHOWN else ""
            raise TooManyUnreadableImages(
                f"{self.count} of {self.dataset_size} images cannot be read, more than data.max_bad_fraction "
                f"({self.max_fraction:.2%}) tolerates: {shown}{more}"
            )

    def summary(self) -> str:
        """One line for the log."""
        return f"{self.count} of {self.dataset_size} images unreadable ({self.count / self.dataset_size:.2%})"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the names, sorted."""
        return {"names": sorted(self._names)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the names of a checkpoint."""
        self._names = set(state["names"])
