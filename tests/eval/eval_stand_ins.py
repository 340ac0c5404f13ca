"""Datasets in memory and on disk, features, and backbones of one layer, for tests of evaluators."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.features import Features
from dinov2.models.vision_transformer import DinoVisionTransformer

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
    """Noisy colours around one per class; the images of a part follow one another and share its label."""
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


def tiny_transformer() -> DinoVisionTransformer:
    """Of 2 blocks, width 24 and patches of 14 pixels; its features depend on the image."""
    torch.manual_seed(0)
    model = DinoVisionTransformer(img_size=28, patch_size=14, embed_dim=24, depth=2, num_heads=2, init_values=1.0)
    return model.requires_grad_(False).eval()


def noisy(image: Any) -> Tensor:
    """An "augmentation" that draws from every generator that augmentations draw from."""
    colours = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return colours + 0.1 * torch.randn(colours.shape) + 0.1 * float(np.random.normal())  # noqa: NPY002


def two_sets(num_classes: int = 2, num_train: int = 30) -> tuple[MemoryDataset, MemoryDataset]:
    """Training and validation set with two images per part."""
    train = random_set(num_train, num_classes, seed=0, photos_per_part=2, name="train")
    return train, random_set(20, num_classes, seed=1, photos_per_part=2, name="val")


def make_features(labels: list[int], groups: list[str] | None = None, *, seed: int = 0, gap: float = 2.0) -> Features:
    """Noise around one centre per class; by default every image is a part of its own."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(77).normal(size=(10, 12)) * gap
    embeddings = centres[labels] + generator.normal(size=(len(labels), 12))
    return Features(
        embeddings=torch.from_numpy(embeddings).float(),
        labels=torch.tensor(labels),
        group_ids=[f"set {seed} part {row}" for row in range(len(labels))] if groups is None else groups,
        paths=[f"set {seed}/{row}.png" for row in range(len(labels))],
    )


TINY = (
    "student.arch=vit_tiny",
    "student.patch_size=14",
    "student.layerscale=1.0",  # at the default of 1e-5, a random backbone's class token hardly sees the image
    "crops.global_crops_size=28",
    "crops.local_crops_size=14",
    "train.device=cpu",
)


def make_parts(root: Path, *, images: int = 16, splits: Sequence[str] = ("train", "val", "test")) -> Path:
    """A set on disk: two images of each part; defective parts are red, good ones blue."""
    (root / "annotations").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split in splits:
        (root / split).mkdir()
        rows = []
        for number in range(images):
            part, label = number // 2, number // 2 % 2
            pixels = generator.integers(0, 60, (40, 50, 3), dtype=np.uint8)
            pixels[..., 0 if label else 2] += 180
            pixels[..., 1] += 20 * part
            name = f"{split}/{number}.png"
            Image.fromarray(pixels).save(root / name)
            rows.append({"img_path": name, "gt_label": label, "group_id": f"{split} {part}"})
        content = {"metainfo": {"classes": ["good", "defect"]}, "data_list": rows}
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root


def read_csv(text: str) -> list[dict[str, str]]:
    """Of a file of predictions."""
    return list(csv.DictReader(text.splitlines()))


def dataset_string(root: Path, split: str) -> str:
    """Of a set on disk."""
    return f"GroupedJSON:split={split.upper()}:root=" + str(root).replace(":", "\\:")


def dataset_flags(root: Path) -> list[str]:
    """Training and validation set of a command."""
    return [f"--{split}-dataset={dataset_string(root, split)}" for split in ("train", "val")]
