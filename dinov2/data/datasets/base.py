"""What every image dataset of this project offers, whatever its layout on disk."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch.utils.data import Dataset

from dinov2.data.decoding import ByteCache, decode_image, read_image_bytes, read_image_size
from dinov2.data.lighting import standardize_light

MISSING_TARGET = -1  # what `__getitem__` and `get_targets` give where an image has no label


class ImageDataset(Dataset[tuple[Any, Any]], ABC):
    """Images with an optional class index and an optional group (the photographed part).

    Attributes:
        classes: class names by index; empty where the set has no labels.
        cache: keeps encoded files in memory when set (option ``train.cache_dataset``).
        light: one of ``LIGHTS``; with ``standardized``, `standardize_light` prepares every image for whoever asks (key
            ``light`` of dataset strings).
    """

    classes: tuple[str, ...] = ()
    cache: ByteCache | None = None
    light: str = "original"

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
        """The image in RGB, as a person would see it.

        Raises:
            UnreadableImageError: when the file is missing, truncated or no image.
        """
        image = decode_image(self.get_image_bytes(index), str(self.get_image_path(index)))
        return standardize_light(image) if self.light == "standardized" else image

    def get_image_size(self, index: int) -> tuple[int, int]:
        """Height and width of the image, from the header of its file.

        Raises:
            UnreadableImageError: when the file is missing or no image.
        """
        return read_image_size(self.get_image_bytes(index), str(self.get_image_path(index)))

    def get_targets(self) -> npt.NDArray[np.int64]:
        """Class indices of all images ``[N]``, -1 where missing."""
        targets = (self.get_target(index) for index in range(len(self)))
        return np.fromiter((MISSING_TARGET if t is None else t for t in targets), dtype=np.int64, count=len(self))

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
