"""What a head gets from the backbone, and the steps that dense heads share."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BlockFeatures: TypeAlias = tuple[Tensor, Tensor]
"""Of one block: patch tokens as a map ``[B, D, h, w]`` and the class token ``[B, D]``."""

Features: TypeAlias = Sequence[BlockFeatures]
"""One entry per block, in the order of the blocks."""


class PixelHead(nn.Module):
    """A head whose ``forward`` takes the (padded, normalised) images beside the features of them.

    They are ``[B, C, H, W]``, or ``[B, 2 C, H, W]`` in a model that compares, see `ComparingTaskModel`.
    """


def check_num_blocks(features: Features, num_blocks: int, head: str) -> None:
    """Raises a ValueError when a head gets another number of blocks than it was built for."""
    if len(features) != num_blocks:
        raise ValueError(f"{head} was built for the features of {num_blocks} blocks, got those of {len(features)}")


def block_maps(features: Features, *, class_token: bool) -> list[Tensor]:
    """The map of every block, ``[B, D, h, w]``; with ``class_token`` ``[B, 2D, h, w]``, patches before class token."""
    if not class_token:
        return [patches for patches, _ in features]
    return [
        torch.cat([patches, cls[:, :, None, None].expand(-1, -1, *patches.shape[-2:])], dim=1)
        for patches, cls in features
    ]


def map_width(embed_dim: int, *, class_token: bool) -> int:
    """Channels of one map of `block_maps`."""
    return 2 * embed_dim if class_token else embed_dim


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes ``[B, C, h, w]`` bilinearly (corners not aligned) to ``(height, width)``; as it is when it fits."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class ConvNormAct(nn.Sequential):
    """Convolution (of ``stride`` 1: that keeps the size), group norm, GELU on ``[B, C, h, w]``.

    Group norm behaves alike in training and evaluation and for any batch size, which the few images of a part need.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, *, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
            nn.GroupNorm(num_groups(out_channels), out_channels),
            nn.GELU(),
        )


def num_groups(channels: int) -> int:
    """Groups of a group norm: at most 32, each of at least 8 channels, dividing ``channels``."""
    return next(groups for groups in range(max(min(32, channels // 8), 1), 0, -1) if channels % groups == 0)
