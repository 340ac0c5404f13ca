"""Some images of a dataset, chosen so that they stand for all of it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.pictures import Picture


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

    def get_picture(self, index: int) -> Picture:
        return self.dataset.get_picture(self.positions[index])

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
