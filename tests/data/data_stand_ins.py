"""Small stand-ins shared by the tests of the data path."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.collate import PretrainingCollate
from dinov2.data.masking import MaskingGenerator
from dinov2.data.pretraining import PretrainingDataset


class MemoryImages:
    """Random images kept in memory; those in ``broken`` cannot be read."""

    def __init__(self, size, broken=(), group_ids=None):
        self.size = size
        self.broken = set(broken)
        self.group_ids = group_ids

    def __len__(self):
        return self.size

    def get_image_path(self, index):
        return Path(f"image_{index}.png")

    def get_image(self, index):
        if index in self.broken:
            raise OSError(f"image_{index}.png is truncated")
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (24, 30, 3), dtype=np.uint8))

    def get_group_ids(self):
        return [f"part_{index}" for index in range(self.size)] if self.group_ids is None else list(self.group_ids)


class Numbers(torch.utils.data.Dataset):
    """Item i is i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index


def make_pretraining_dataset(size=13, seed=0, broken=()):
    return PretrainingDataset(
        MemoryImages(size, broken), DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 16, 9), seed=seed
    )


def make_collate(seed=0):
    return PretrainingCollate(mask_generator=MaskingGenerator(4, max_num_patches=8), seed=seed)
