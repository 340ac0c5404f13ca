"""A dataset in memory and a backbone of one layer, for tests of evaluators."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset

SIZE = 4


class MemoryDataset(ImageDataset):
    """Colours as images; the transform gives them back as ``[3, SIZE, SIZE]`` in [0, 1]."""

    def __init__(
        self,
        colours: Sequence[tuple[int, int, int]],
        labels: Sequence[int | None],
        groups: Sequence[str] | None = None,
        classes: tuple[str, ...] = (),
        unreadable: frozenset[int] = frozenset(),
        name: str = "set",
    ) -> None:
        super().__init__(transform=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
        self.colours = colours
        self.labels = labels
        self.groups = groups
        self.classes = classes
        self.unreadable = unreadable
        self.name = name

    def __len__(self) -> int:
        return len(self.colours)

    def get_image_path(self, index: int) -> Path:
        return Path(f"{self.name}/{index}.png")

    def get_target(self, index: int) -> int | None:
        return self.labels[index]

    def get_group_ids(self) -> list[str]:
        return super().get_group_ids() if self.groups is None else list(self.groups)

    def get_image(self, index: int) -> Image.Image:
        if index in self.unreadable:
            raise OSError("truncated")
        return Image.new("RGB", (SIZE, SIZE), self.colours[index])


class Backbone(nn.Module):
    """A linear map of the mean colour ``[B, 3]`` to features ``[B, D]``."""

    def __init__(self, embed_dim: int = 8, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(3, embed_dim, bias=False)
        with torch.no_grad():
            self.linear.weight.normal_(generator=torch.Generator().manual_seed(seed))

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.mean(dim=(2, 3)))


def random_set(
    num_images: int, num_classes: int, seed: int, photos_per_part: int = 1, name: str = "set"
) -> MemoryDataset:
    """Noisy colours around one per class; the photos of a part follow one another and share its label."""
    generator = np.random.default_rng(seed)
    parts = np.arange(num_images) // photos_per_part
    labels = (parts % num_classes).astype(int)
    centres = np.random.default_rng(1234).integers(0, 256, (num_classes, 3))
    colours = np.clip(centres[labels] + generator.integers(-60, 61, (num_images, 3)), 0, 255)
    return MemoryDataset(
        [tuple(int(value) for value in colour) for colour in colours],
        labels.tolist(),
        [f"{name}-{part}" for part in parts],
        tuple(f"class {index}" for index in range(num_classes)),
        name=name,
    )
