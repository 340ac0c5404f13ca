"""What linear classifiers see of an image: class tokens of the last blocks, and the mean of the last patch tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.features import Features, extract_features
from dinov2.eval.frozen import evaluating

BlockTokens = Sequence[tuple[Tensor, Tensor]]  # per block: patch tokens [B, N, D] and class token [B, D]


@dataclass(frozen=True, order=True)
class FeatureKind:
    """Which part of an image's row (see `join_block_tokens`) a classifier sees.

    Attributes:
        blocks: how many of the last blocks give their class token.
        avgpool: whether the mean of the last block's patch tokens follows them.
    """

    blocks: int
    avgpool: bool

    def width(self, embed_dim: int) -> int:
        """Number of features of this kind."""
        return embed_dim * (self.blocks + self.avgpool)

    def select(self, rows: Tensor, embed_dim: int) -> Tensor:
        """The columns of this kind ``[B, width]`` of rows ``[B, (blocks + 1) * D]``, without a copy.

        Raises:
            ValueError: when the rows hold fewer blocks.
        """
        num_blocks = rows.shape[1] // embed_dim - 1
        if not 1 <= self.blocks <= num_blocks:
            raise ValueError(f"features of {self.blocks} blocks cannot be taken from rows of {num_blocks} blocks")
        start = (num_blocks - self.blocks) * embed_dim
        return rows[:, start : start + self.width(embed_dim)]


def join_block_tokens(tokens: BlockTokens) -> Tensor:
    """Joins what several blocks make of an image into one row, of which every `FeatureKind` is a stretch.

    Args:
        tokens: of the last blocks, the last one last.

    Returns:
        The class tokens in the order of the blocks, then the mean of the last block's patch tokens:
        ``[B, (blocks + 1) * D]``.
    """
    patches, _ = tokens[-1]
    return torch.cat([*(cls for _, cls in tokens), patches.mean(dim=1)], dim=1)


class LastBlocks(nn.Module):
    """A backbone whose output joins what its last blocks make of an image.

    Args:
        model: a vision transformer with ``get_intermediate_layers``.
        num_blocks: how many of its last blocks.

    Raises:
        ValueError: for a model that cannot give the tokens of several blocks, or no block at all.
    """

    def __init__(self, model: nn.Module, num_blocks: int) -> None:
        super().__init__()
        if not callable(getattr(model, "get_intermediate_layers", None)):
            raise ValueError(f"{type(model).__name__} has no get_intermediate_layers; give a vision transformer")
        depth = getattr(model, "n_blocks", num_blocks)
        if not 1 <= num_blocks <= depth:
            raise ValueError(f"cannot take the last {num_blocks} blocks of a model of {depth}")
        self.model = model
        self.num_blocks = num_blocks

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to rows ``[B, (num_blocks + 1) * D]`` in float32; see `join_block_tokens`."""
        layers = self.model.get_intermediate_layers(images, self.num_blocks, return_class_token=True)  # type: ignore[operator]
        tokens = cast(BlockTokens, layers)
        # A mean of many patches needs more digits than half precision has.
        return join_block_tokens([(patches.float(), cls.float()) for patches, cls in tokens])


@dataclass(frozen=True)
class Extraction:
    """How images become rows of features.

    Attributes:
        backbone: frozen.
        device: where images are sent.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run; 0 for this one.
        autocast_dtype: precision of the forward pass; by default that of the backbone.
    """

    backbone: LastBlocks
    device: torch.device
    batch_size: int
    num_workers: int
    autocast_dtype: torch.dtype | None = None

    def of_dataset(self, dataset: ImageDataset) -> Features:
        """Rows of all images of a dataset, by all processes together; see `extract_features`."""
        return extract_features(
            self.backbone,
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            device=self.device,
            autocast_dtype=self.autocast_dtype,
        )

    def of_batch(self, images: Tensor) -> Tensor:
        """Rows ``[B, (blocks + 1) * D]`` of images ``[B, 3, H, W]``, on the device."""
        autocast = torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)
        with evaluating(self.backbone), autocast:
            rows: Tensor = self.backbone(images.to(self.device, non_blocking=True))
        return rows
