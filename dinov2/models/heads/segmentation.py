"""Segmentation heads: linear on batch-normed patch tokens, fused at several scales, and a convolutional decoder."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.layers.patch_embed import Size, as_pair
from dinov2.models.heads.features import ConvNormAct, Features, block_maps, check_num_blocks, map_width, resize_maps

INITIAL_STD = 0.01
NARROWEST = 32  # channels of the decoder's maps


class BNHead(nn.Module):
    """Batch norm over the concatenated maps of all blocks, then a linear layer per position.

    The released heads (``bn.…``, ``conv_seg.…``) see the last block ("linear") or the last four ("ms"), patches only.
    Statistics are those of one process, unlike upstream, which synchronises them and so needs a process group.

    Args:
        embed_dim: width ``D`` of the backbone.
        num_classes: classes ``C``.
        num_blocks: blocks whose maps are concatenated.
        class_token: whether the class token of a block stands beside each of its patches.
        dropout: share of the channels set to zero in training, in [0, 1).
        resize_factors: per block, what its map is scaled by first (bilinear, or area average when below 1). All maps
            are then brought to the size of the first. None scales none.

    Raises:
        ValueError: when there is not one factor per block, or one is not positive.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        num_blocks: int = 1,
        class_token: bool = False,
        dropout: float = 0.0,
        resize_factors: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if resize_factors is not None and (len(resize_factors) != num_blocks or min(resize_factors) <= 0):
            raise ValueError(f"resize_factors needs {num_blocks} positive numbers, one per block; got {resize_factors}")
        self.num_blocks = num_blocks
        self.class_token = class_token
        self.resize_factors = None if resize_factors is None else tuple(resize_factors)
        channels = num_blocks * map_width(embed_dim, class_token=class_token)
        self.bn = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.conv_seg.weight, std=INITIAL_STD)
        assert self.conv_seg.bias is not None
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, features: Features) -> Tensor:
        """Maps features to logits ``[B, C, h, w]`` on the grid of the first block's (scaled) map."""
        check_num_blocks(features, self.num_blocks, type(self).__name__)
        maps = block_maps(features, class_token=self.class_token)
        if self.resize_factors is not None:
            # The factor itself, not the size it leads to, defines the sampling grid, as in the published heads.
            maps = [
                F.interpolate(entry, scale_factor=factor, mode="bilinear" if factor >= 1 else "area")
                for entry, factor in zip(maps, self.resize_factors, strict=True)
            ]
        size = (maps[0].shape[-2], maps[0].shape[-1])
        joined = torch.cat([resize_maps(entry, size) for entry in maps], dim=1)
        logits: Tensor = self.conv_seg(self.dropout(self.bn(joined)))
        return logits


class MultiScaleHead(nn.Module):
    """Mixes the blocks into one map, looks at it at several scales, and joins what was seen at the finest.

    A coarse scale has context (which part is it), a fine one gives an outline below the size of a patch.

    Args:
        embed_dim: width ``D`` of the backbone.
        num_classes: classes ``C``.
        num_blocks: blocks whose features come in.
        channels: width of the maps inside.
        scales: sizes relative to the grid of patches; the result has the size of the largest.
        class_token: whether the class token of a block stands beside each of its patches.
        dropout: share of the channels set to zero before the classes in training, in [0, 1).

    Raises:
        ValueError: when ``scales`` is empty or holds one that is not positive.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        num_blocks: int = 4,
        channels: int = 256,
        scales: Sequence[float] = (0.5, 1.0, 2.0),
        class_token: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales must be one or more positive numbers, got {scales}")
        self.num_blocks = num_blocks
        self.class_token = class_token
        self.scales = tuple(scales)
        self.mix_blocks = ConvNormAct(num_blocks * map_width(embed_dim, class_token=class_token), channels, 1)
        self.branches = nn.ModuleList(ConvNormAct(channels, channels) for _ in self.scales)
        self.mix_scales = ConvNormAct(len(self.scales) * channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, features: Features) -> Tensor:
        """Maps features to logits ``[B, C, s * h, s * w]``, where ``s`` is the largest scale."""
        check_num_blocks(features, self.num_blocks, type(self).__name__)
        mixed = self.mix_blocks(torch.cat(block_maps(features, class_token=self.class_token), dim=1))
        finest = _scaled_size(mixed, max(self.scales))
        seen = []
        for branch, scale in zip(self.branches, self.scales, strict=True):
            size = _scaled_size(mixed, scale)
            scaled = F.adaptive_avg_pool2d(mixed, size) if scale < 1 else resize_maps(mixed, size)
            seen.append(resize_maps(branch(scaled), finest))
        logits: Tensor = self.classify(self.dropout(self.mix_scales(torch.cat(seen, dim=1))))
        return logits


def _scaled_size(maps: Tensor, scale: float) -> tuple[int, int]:
    return max(round(maps.shape[-2] * scale), 1), max(round(maps.shape[-1] * scale), 1)


def num_doublings(patch_size: Size, output_stride: int) -> int:
    """Doublings that bring one value per patch to at least one per ``output_stride`` pixels.

    Raises:
        ValueError: when ``output_stride`` is below 1.
    """
    if output_stride < 1:
        raise ValueError(f"output_stride counts pixels and must be at least 1, got {output_stride}")
    doublings = 0
    while max(as_pair(patch_size)) > output_stride * 2**doublings:
        doublings += 1
    return doublings


class ConvDecoder(nn.Module):
    """Mixes the blocks, then doubles the grid and convolves until it is fine enough.

    For masks, and with a depth output for depth. No step is skipped: a map is never enlarged by more than 2 without a
    convolution after it. The width halves with every doubling, but not below 32 channels.

    Args:
        embed_dim: width ``D`` of the backbone.
        num_outputs: channels ``C`` of the result: classes, or what a depth output needs.
        num_blocks: blocks whose features come in.
        patch_size: pixels (height, width) of a patch.
        output_stride: pixels that one value of the result stands for at most; with patches of 14 pixels, 4 gives a
            value per 3.5 pixels.
        channels: width of the first map inside.
        class_token: whether the class token of a block stands beside each of its patches.
        dropout: share of the channels set to zero before the last layer in training, in [0, 1).

    Raises:
        ValueError: when ``output_stride`` is below 1.

    Reference:
        Zheng et al., "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers"
        (2021), section 3.3 (progressive upsampling).
    """

    def __init__(
        self,
        embed_dim: int,
        num_outputs: int,
        *,
        num_blocks: int = 4,
        patch_size: Size = 14,
        output_stride: int = 4,
        channels: int = 256,
        class_token: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.class_token = class_token
        narrowest = min(NARROWEST, channels)
        widths = [max(channels // 2**step, narrowest) for step in range(num_doublings(patch_size, output_stride) + 1)]
        self.mix_blocks = ConvNormAct(num_blocks * map_width(embed_dim, class_token=class_token), channels, 1)
        self.steps = nn.ModuleList(ConvNormAct(before, after) for before, after in itertools.pairwise(widths))
        self.dropout = nn.Dropout2d(dropout)
        self.predict = nn.Conv2d(widths[-1], num_outputs, kernel_size=1)

    def forward(self, features: Features) -> Tensor:
        """Maps features to ``[B, C, 2^n * h, 2^n * w]`` for ``n`` doublings."""
        check_num_blocks(features, self.num_blocks, type(self).__name__)
        maps: Tensor = self.mix_blocks(torch.cat(block_maps(features, class_token=self.class_token), dim=1))
        for step in self.steps:
            maps = step(resize_maps(maps, (2 * maps.shape[-2], 2 * maps.shape[-1])))
        output: Tensor = self.predict(self.dropout(maps))
        return output
