"""Small stand-ins shared by the tests of the data path: images whose pixels say where they are, options, datasets."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors

from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.collate import PretrainingCollate
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import DepthSource, MaskSource
from dinov2.data.masking import MaskingGenerator
from dinov2.data.pretraining import PretrainingDataset
from dinov2.data.reading import UnreadableImageError
from dinov2.data.task_dataset import Depth, TaskSample
from dinov2.data.task_transforms import AugmentationOptions

ROWS_PER_DEPTH = 1000.0


# No change at all, unless told otherwise.
Options = functools.partial(AugmentationOptions, hflip=0.0, brightness=0.0, contrast=0.0)
MOVES = Options(hflip=0.5, vflip=0.5, rotate90=0.75, rotation=30, scale_jitter=(0.5, 2.0), foreground_crop_prob=0.5)
EVERYTHING = dataclasses.replace(
    MOVES, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, gamma=0.3, blur=0.5, noise=0.1
)


def coded_sample(height=90, width=120, box=(70, 20, 100, 45)) -> TaskSample:
    """Red is twice the column, green twice the row, depth is 1000 row + column; a rectangle has class 3 and a box."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    left, top, right, bottom = box
    mask = torch.zeros(height, width, dtype=torch.uint8)
    mask[top:bottom, left:right] = 3
    return {
        "image": tv_tensors.Image(torch.stack([2 * columns, 2 * rows, torch.full_like(rows, 7)]).to(torch.uint8)),
        "mask": tv_tensors.Mask(mask),
        "depth": Depth((ROWS_PER_DEPTH * rows + columns).float()),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor([box]), format="XYXY", canvas_size=(height, width)),
        "box_labels": torch.tensor([3]),
        "index": 5,
    }


def decode_depth(depth):
    """Rows and columns that pixels come from."""
    return (depth / ROWS_PER_DEPTH).floor(), depth % ROWS_PER_DEPTH


class MemoryTargets(ImageDataset, MaskSource, DepthSource):
    """Images in memory with every kind of target; those in ``broken`` cannot be read."""

    mask_classes = ("background", "scratch", "dent")
    depth_unit = "um"

    def __init__(self, labels, *, group_ids=None, label_sets=None, broken=(), sizes=((20, 24),)):
        super().__init__()
        self.labels, self.group_ids, self.label_sets = labels, group_ids, label_sets
        self.broken, self.sizes = set(broken), sizes

    def __len__(self):
        return len(self.labels)

    def size(self, index):
        return self.sizes[index % len(self.sizes)]

    def get_image_path(self, index):
        return Path(f"image_{index}.png")

    def get_image(self, index):
        if index in self.broken:
            raise UnreadableImageError(f"image_{index}.png", "it is truncated")
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, (*self.size(index), 3), dtype=np.uint8))

    def get_target(self, index):
        return self.labels[index]

    def get_labels(self, index):
        return self.label_sets[index]

    def get_group_ids(self):
        return [f"part_{index}" for index in range(len(self))] if self.group_ids is None else list(self.group_ids)

    def get_mask(self, index):
        return np.random.default_rng(index).integers(0, 3, self.size(index), dtype=np.uint8)

    def get_depth(self, index):
        return np.random.default_rng(index).random(self.size(index), dtype=np.float32)


class MemoryLabels(ImageDataset):
    """Images of one class each, and nothing else."""

    classes = ("good", "bad")

    def __len__(self):
        return 2

    def get_image_path(self, index):
        return Path(f"image_{index}.png")

    def get_target(self, index):
        return index


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
        MemoryTargets([0] * size, broken=broken), DataAugmentationDINO((0.32, 1.0), (0.05, 0.32), 2, 16, 9), seed=seed
    )


def make_collate(seed=0):
    return PretrainingCollate(mask_generator=MaskingGenerator(4, max_num_patches=8), seed=seed)
