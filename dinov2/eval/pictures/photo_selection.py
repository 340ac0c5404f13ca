"""Some photos of a dataset, chosen evenly: for pictures, which can show few of many."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2.data.datasets.base import ImageDataset


class PhotoSelection(ImageDataset):
    """The photos at some positions of a dataset, as a dataset with the same transforms.

    Args:
        dataset: where the photos come from.
        positions: of the photos, in the order wanted.
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

    def get_image(self, index: int) -> Image.Image:
        return self.dataset.get_image(self.positions[index])

    def get_group_ids(self) -> list[str]:
        """Group of every photo, as the dataset names it."""
        groups = self.dataset.get_group_ids()
        return [groups[position] for position in self.positions]


def spread_positions(dataset: ImageDataset, num_images: int) -> list[int]:
    """Positions of photos spread evenly over a dataset, as many of each class as of the others where there are enough.

    Raises:
        ValueError: when ``num_images`` is below 1 or the dataset is empty.
    """
    if num_images < 1 or len(dataset) == 0:
        raise ValueError(f"cannot choose {num_images} photos from a dataset of {len(dataset)}")
    targets = dataset.get_targets()
    members = [np.flatnonzero(targets == target) for target in np.unique(targets)]
    shares = [len(share) for share in np.array_split(np.arange(num_images), len(members))]
    return [
        int(member[position])
        for member, share in zip(members, shares, strict=True)
        for position in np.linspace(0, len(member) - 1, min(share, len(member))).round().astype(int)
    ]


def whole_parts(dataset: ImageDataset, most_photos: int) -> list[int]:
    """Positions of all photos of evenly chosen parts, in the dataset's order; of all parts where ``most_photos`` allow.

    A first part with more photos than allowed is taken nevertheless.

    Raises:
        ValueError: when ``most_photos`` is below 1 or the dataset is empty.
    """
    if most_photos < 1 or len(dataset) == 0:
        raise ValueError(f"cannot choose {most_photos} photos from a dataset of {len(dataset)}")
    if len(dataset) <= most_photos:
        return list(range(len(dataset)))
    members: dict[str, list[int]] = {}
    for position, group in enumerate(dataset.get_group_ids()):
        members.setdefault(group, []).append(position)
    parts = list(members.values())
    chosen: list[int] = []
    for number in _scattered(len(parts)):
        if chosen and len(chosen) + len(parts[number]) > most_photos:
            continue
        chosen += parts[number]
    return sorted(chosen)


def _scattered(count: int) -> list[int]:
    """The numbers below ``count`` in an order of which every beginning is spread evenly (steps of the golden ratio)."""
    places = np.arange(count) * 0.6180339887498949 % 1.0
    ranks: list[int] = places.argsort(kind="stable").argsort(kind="stable").tolist()
    return ranks
