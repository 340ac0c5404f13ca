"""Maps at several strides from patch tokens and pixels, and a head that makes masks of them."""

from typing import TypedDict, Unpack

import torch
from torch import Tensor, nn

from dinov2.models.heads.features import (
    ConvNormAct,
    Features,
    PixelHead,
    block_maps,
    check_num_blocks,
    map_width,
    resize_maps,
)


def pyramid_strides(finest: int) -> tuple[int, ...]:
    """Strides of a pyramid, each twice the one before: from ``finest`` to 32 pixels.

    Raises:
        ValueError: when ``finest`` is no power of 2 from 2 to 32.
    """
    strides = [2**power for power in range(1, 6)]
    if finest not in strides:
        raise ValueError(f"the finest stride of a pyramid must be one of {strides} pixels, got {finest}")
    return tuple(strides[strides.index(finest) :])


class PyramidOptions(TypedDict, total=False):
    """Options of a `FeaturePyramid` that a head on one hands on to it, see there."""

    num_blocks: int
    channels: int
    output_stride: int
    class_token: bool
    detail: bool
    image_channels: int


class FeaturePyramid(nn.Module):
    """Joins the patch tokens of several blocks with a small convolutional branch on the pixels.

    Tokens know what is around them, and nothing of what is smaller than a patch; the branch sees every pixel and little
    around it. At each stride both are joined, from the coarsest down, so that every map has context and detail.
    Any patch size goes: token maps are resized to the grid of each stride.

    Args:
        embed_dim: width ``D`` of the backbone.
        num_blocks: blocks whose features come in.
        channels: width ``C`` of every map of the result.
        output_stride: pixels per value of the finest map, a power of 2 from 2 to 32; the coarsest has 32, each map in
            between twice as many as the one before.
        class_token: whether the class token of a block stands beside each of its patches.
        detail: whether there is a branch on the pixels; without it maps are of tokens alone.
        image_channels: of the images; where another image is compared with (`ComparingTaskModel`), of both together.

    Attributes:
        strides: pixels per value of each map, from fine to coarse.

    Raises:
        ValueError: for another ``output_stride``.

    Reference:
        Lin et al., "Feature Pyramid Networks for Object Detection" (2017), section 3; Chen et al., "Vision Transformer
        Adapter for Dense Predictions" (2023), section 3.2, on a convolutional branch beside a ViT.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_blocks: int = 4,
        channels: int = 128,
        output_stride: int = 8,
        class_token: bool = False,
        detail: bool = True,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.class_token = class_token
        self.strides = strides = pyramid_strides(output_stride)
        self.channels = channels
        halvings = strides[-1].bit_length() - 1 if detail else 0
        widths = [min(max(channels // 2 ** max(3 - step, 0), 8), channels) for step in range(halvings)]
        self.branch = nn.ModuleList(
            nn.Sequential(ConvNormAct(before, after, stride=2), ConvNormAct(after, after))
            for before, after in zip([image_channels, *widths], widths, strict=False)
        )
        self.mix_blocks = ConvNormAct(num_blocks * map_width(embed_dim, class_token=class_token), channels, 1)
        pixels = widths[-len(strides) :] if detail else [0] * len(strides)
        joined = [width + 2 * channels for width in pixels]  # pixels, tokens and the coarser map
        joined[-1] -= channels  # nothing is coarser
        self.join = nn.ModuleList(ConvNormAct(width, channels) for width in joined)

    def forward(self, features: Features, images: Tensor) -> list[Tensor]:
        """Maps features and their images ``[B, image_channels, H, W]`` to maps ``[B, C, ceil(H / s), ceil(W / s)]``."""
        check_num_blocks(features, self.num_blocks, type(self).__name__)
        detail = [images]
        for step in self.branch:
            detail.append(step(detail[-1]))
        tokens = self.mix_blocks(torch.cat(block_maps(features, class_token=self.class_token), dim=1))
        maps: list[Tensor] = []
        for join, stride in zip(reversed(self.join), reversed(self.strides), strict=True):
            size = (-(-images.shape[-2] // stride), -(-images.shape[-1] // stride))
            fine = [detail.pop()] if self.branch else []
            coarser = [resize_maps(maps[0], size)] if maps else []
            maps.insert(0, join(torch.cat([*fine, resize_maps(tokens, size), *coarser], dim=1)))
        return maps


class PyramidHead(PixelHead):
    """Classes of every position of the finest map of a `FeaturePyramid`.

    Args:
        embed_dim: width ``D`` of the backbone.
        num_outputs: channels of the result, such as classes.
        dropout: share of the channels set to zero before the last layer in training, in [0, 1).
        **pyramid: options of the `FeaturePyramid`.

    Raises:
        ValueError: see `FeaturePyramid`.
    """

    def __init__(
        self, embed_dim: int, num_outputs: int, *, dropout: float = 0.0, **pyramid: Unpack[PyramidOptions]
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(embed_dim, **pyramid)
        self.dropout = nn.Dropout2d(dropout)
        self.predict = nn.Conv2d(self.pyramid.channels, num_outputs, kernel_size=1)

    def forward(self, features: Features, images: Tensor) -> Tensor:
        """Maps features and images to ``[B, num_outputs, ceil(H / s), ceil(W / s)]``, ``s`` the finest stride."""
        output: Tensor = self.predict(self.dropout(self.pyramid(features, images)[0]))
        return output
