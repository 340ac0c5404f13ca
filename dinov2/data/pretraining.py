"""The dataset of pretraining: crops whose randomness depends on the run's seed and their place in its stream only."""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from dinov2.data.augmentations import Crops
from dinov2.utils.errors import RunError
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")

_MAX_SUBSTITUTES = 16


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


class ImageSource(Protocol):
    """The part of ``ImageDataset`` that pretraining needs."""

    def __len__(self) -> int: ...

    def get_image_path(self, index: int) -> Path: ...

    def get_image(self, index: int) -> Image.Image: ...


class PretrainingDataset(Dataset[CropSample]):
    """Cuts crops from images; the same (seed, position, index) gives the same crops in any process of any run.

    Torch's, NumPy's and Python's global generators are seeded for every sample, since augmentations draw from them, and
    put back afterwards. An image that cannot be read is replaced by another one, chosen by seed and position, and
    reported in ``CropSample.unreadable``; each such path is logged once per process.

    Args:
        dataset: Where the images come from.
        augmentation: Turns an RGB image into crops.
        seed: The run's seed.
    """

    def __init__(self, dataset: ImageSource, augmentation: Callable[[Image.Image], Crops], seed: int = 0) -> None:
        if len(dataset) == 0:
            raise ValueError("the pretraining dataset has no images")
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self._logged: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> CropSample:
        """Cuts the crops of one sample.

        Raises:
            RunError: Neither the image nor any of its substitutes can be read.
        """
        image, name, unreadable = self._read(key.position, key.index)
        with isolated_random_state(derive_seed(self.seed, "augment", key.position)):
            crops = self.augmentation(image)
        return CropSample(
            global_crops=tuple(crops["global_crops"]),
            local_crops=tuple(crops["local_crops"]),
            name=name,
            position=key.position,
            unreadable=unreadable,
        )

    def _read(self, position: int, index: int) -> tuple[Image.Image, str, tuple[str, ...]]:
        unreadable: list[str] = []
        for attempt in range(_MAX_SUBSTITUTES + 1):
            name = str(self.dataset.get_image_path(index))
            try:
                return self.dataset.get_image(index), name, tuple(dict.fromkeys(unreadable))
            except OSError as error:
                unreadable.append(name)
                self._log_once(name, error)
            index = derive_seed(self.seed, "substitute", position, attempt) % len(self.dataset)
        raise RunError(
            f"no readable image after {_MAX_SUBSTITUTES} substitutes: {', '.join(dict.fromkeys(unreadable))}"
        )

    def _log_once(self, name: str, error: OSError) -> None:
        if name not in self._logged:
            self._logged.add(name)
            logger.warning("image %s cannot be read and is replaced by another: %s", name, error)


@contextmanager
def isolated_random_state(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator, NumPy and Python inside the block, and restores their states after it."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - augmentations may draw from the global generator
    with torch.random.fork_rng(devices=[]):
        # The CPU generator alone: torch.manual_seed would queue work for every device in every worker.
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
