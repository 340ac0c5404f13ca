"""DPT depth head: four blocks reassembled at four resolutions and fused from coarse to fine.

Reference: Ranftl et al., Vision Transformers for Dense Prediction (2021), section 3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.heads.depth_output import DepthOutput
from dinov2.models.heads.features import Features, check_num_blocks, resize_maps

NUM_LEVELS = 4


class DPTHead(nn.Module):
    """Reassembles the tokens of four blocks into a pyramid and fuses it to depth at 16 times the grid of patches.

    Parameter names are those of the released heads.

    Args:
        embed_dim: width ``D`` of the backbone.
        output: reads one score per position; released heads use `ReluDepth`.
        channels: width of the fusion.
        level_channels: width of the four levels, finest first; by default D/8, D/4, D/2, D as in the released heads.

    Raises:
        ValueError: when the output needs more than one score, or there are not four levels.
    """

    def __init__(
        self,
        embed_dim: int,
        output: DepthOutput,
        *,
        channels: int = 256,
        level_channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if output.num_scores != 1:
            raise ValueError(f"DPTHead gives one score per position; {type(output).__name__} needs {output.num_scores}")
        levels = [embed_dim // 2 ** (NUM_LEVELS - 1 - i) for i in range(NUM_LEVELS)]
        if level_channels is not None:
            levels = list(level_channels)
        if len(levels) != NUM_LEVELS or min(levels) < 1:
            raise ValueError(f"level_channels needs {NUM_LEVELS} positive widths, finest level first; got {levels}")
        self.reassemble_blocks = _Reassemble(embed_dim, levels)
        self.convs = nn.ModuleList(_ConvLayer(width, channels, 3, bias=False) for width in levels)
        # The coarsest level comes first and has nothing to be added to.
        self.fusion_blocks = nn.ModuleList(_Fusion(channels, adds=index > 0) for index in range(NUM_LEVELS))
        self.project = _ConvLayer(channels, channels, 3)
        self.conv_depth = _ScoreLayers(channels)
        self.output = output

    def forward(self, features: Features) -> Tensor:
        """Maps the features of four blocks, shallow to deep, to depth ``[B, 1, h', w']``.

        h' is 32 times the coarsest level, which has half the grid of patches rounded up: 16 h for an even h.
        """
        check_num_blocks(features, NUM_LEVELS, type(self).__name__)
        levels = [conv(level) for conv, level in zip(self.convs, self.reassemble_blocks(features), strict=True)]
        fused: Tensor | None = None
        for fusion, level in zip(self.fusion_blocks, reversed(levels), strict=True):
            fused = fusion(fused, level)
        depth: Tensor = self.output(self.conv_depth(self.project(fused).relu()))
        return depth


class _ConvLayer(nn.Module):
    """A convolution under the name ``conv``, which keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, maps: Tensor) -> Tensor:
        output: Tensor = self.conv(maps)
        return output


class _Reassemble(nn.Module):
    """Joins the class token into the patches of every block and gives each block a resolution: 4, 2, 1 and 1/2."""

    def __init__(self, embed_dim: int, levels: Sequence[int]) -> None:
        super().__init__()
        self.readout_projects = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * embed_dim, embed_dim), nn.GELU()) for _ in levels
        )
        self.projects = nn.ModuleList(_ConvLayer(embed_dim, width, 1) for width in levels)
        self.resize_layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(levels[0], levels[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(levels[1], levels[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(levels[3], levels[3], kernel_size=3, stride=2, padding=1),
            ]
        )

    def forward(self, features: Features) -> list[Tensor]:
        layers = zip(self.readout_projects, self.projects, self.resize_layers, features, strict=True)
        levels = []
        for readout, project, resize, (patches, cls) in layers:
            tokens = patches.permute(0, 2, 3, 1)  # [B, h, w, D]
            tokens = readout(torch.cat([tokens, cls[:, None, None].expand_as(tokens)], dim=-1))
            levels.append(resize(project(tokens.permute(0, 3, 1, 2))))
        return levels


class _ResidualUnit(nn.Module):
    """Two convolutions, each after a ReLU, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _ConvLayer(channels, channels, 3, bias=False)
        self.conv2 = _ConvLayer(channels, channels, 3, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        change: Tensor = self.conv2(self.conv1(maps.relu()).relu())
        return maps + change


class _Fusion(nn.Module):
    """Adds the next finer level to what was fused so far, refines it and doubles the grid."""

    def __init__(self, channels: int, *, adds: bool) -> None:
        super().__init__()
        self.project = _ConvLayer(channels, channels, 1)
        self.res_conv_unit1 = _ResidualUnit(channels) if adds else None
        self.res_conv_unit2 = _ResidualUnit(channels)

    def forward(self, fused: Tensor | None, level: Tensor) -> Tensor:
        if self.res_conv_unit1 is not None and fused is not None:
            # On odd grids the doubled coarse level is larger than the finer one.
            level = fused + self.res_conv_unit1(resize_maps(level, (fused.shape[-2], fused.shape[-1])))
        doubled = F.interpolate(self.res_conv_unit2(level), scale_factor=2, mode="bilinear", align_corners=True)
        output: Tensor = self.project(doubled)
        return output


class _ScoreLayers(nn.Module):
    """From fused maps to one score per position, at twice the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, kernel_size=1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        scores: Tensor = self.head(maps)
        return scores
