"""Mean and deviation of the channels of a set's images, as normalisation takes them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.decoding import decode_levels
from dinov2.data.preprocessing.step import top_of


@dataclass(frozen=True)
class ChannelStatistics:
    """What the pixels of some images are like; brightness from 0 to 1.

    Attributes:
        mean: of each channel.
        std: of each channel, over all pixels together.
        num_images: that were looked at.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_images: int


def estimate_normalization(dataset: ImageDataset, num_images: int = 500) -> ChannelStatistics:
    """Mean and deviation per channel after preprocessing, with all channels and bits that it gives.

    Args:
        dataset: its range of values and its preprocessing count, ``light`` does not.
        num_images: evenly spread over the set; each counts by its pixels.

    Raises:
        UnreadableImageError: an image cannot be read.
        ValueError: images have different numbers of channels, or none is looked at.
    """
    count = min(num_images, len(dataset))
    if count < 1:
        raise ValueError(f"at least one image is needed, found {count}")
    sums: Sequence[np.ndarray] | None = None
    for index in (number * len(dataset) // count for number in range(count)):
        name = str(dataset.get_image_path(index))
        levels = decode_levels(dataset.get_image_bytes(index), name, dataset.value_range)
        levels = dataset.preprocessing(levels, name).stacked
        unit = levels.reshape(levels.shape[0] * levels.shape[1], -1) / float(top_of(levels))  # [pixels, channels]
        found = [np.array([float(len(unit))]), unit.sum(axis=0), np.square(unit).sum(axis=0)]
        if sums is not None and len(sums[1]) != len(found[1]):
            raise ValueError(f"{name} has {len(found[1])} channels, those before {len(sums[1])}")
        sums = found if sums is None else [before + more for before, more in zip(sums, found, strict=True)]
    assert sums is not None
    mean = sums[1] / sums[0]
    std = np.sqrt(np.maximum(sums[2] / sums[0] - np.square(mean), 0))
    return ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()), count)
