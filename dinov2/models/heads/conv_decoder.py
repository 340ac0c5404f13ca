"""Convolutional decoder that doubles the resolution step by step; for masks, and with a depth output for depth.

Reference: Zheng et al., Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with Transformers
(2021), section 3.3 (progressive upsampling).
"""

import itertools

import torch
from torch import Tensor, nn

from dinov2.layers.patch_embed import as_pair
from dinov2.models.heads.features import ConvNormAct, Features, block_maps, check_num_blocks, map_width, resize_maps

NARROWEST = 32


def num_doublings(patch_size: int | tuple[int, int], output_stride: int) -> int:
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

    No step is skipped: a map is never enlarged by more than 2 without a convolution after it. The width halves with
    every doubling, but not below 32 channels.

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
    """

    def __init__(
        self,
        embed_dim: int,
        num_outputs: int,
        *,
        num_blocks: int = 4,
        patch_size: int | tuple[int, int] = 14,
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
