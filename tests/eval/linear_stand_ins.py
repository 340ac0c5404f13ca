"""A backbone of several blocks without any block, for tests of linear classifiers."""

from typing import Any

import numpy as np
import torch
from eval_stand_ins import MemoryDataset, random_set
from torch import Tensor, nn


class TokenBackbone(nn.Module):
    """Every "block" maps colours: its class token that of the image, its patch tokens those of the quarters."""

    def __init__(self, embed_dim: int = 6, n_blocks: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.n_blocks = n_blocks
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(n_blocks, 3, embed_dim, generator=generator), requires_grad=False)
        self.forwards: list[int] = []

    def get_intermediate_layers(self, images: Tensor, n: int, return_class_token: bool) -> tuple[Any, ...]:
        assert return_class_token
        assert not self.training
        self.forwards.append(len(images))
        quarters = nn.functional.avg_pool2d(images, 2).flatten(2).transpose(1, 2) - 0.5  # [B, 4, 3]
        return tuple((quarters.square() @ weight, (quarters @ weight).mean(dim=1)) for weight in self.weight[-n:])


def noisy(image: Any) -> Tensor:
    """An "augmentation" that draws from every generator that augmentations draw from."""
    colours = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return colours + 0.1 * torch.randn(colours.shape) + 0.1 * float(np.random.normal())  # noqa: NPY002


def two_sets(num_classes: int = 2, num_train: int = 30) -> tuple[MemoryDataset, MemoryDataset]:
    """Training and validation set with two photos per part."""
    train = random_set(num_train, num_classes, seed=0, photos_per_part=2, name="train")
    return train, random_set(20, num_classes, seed=1, photos_per_part=2, name="val")
