"""Depth heads: how scores become depth, a linear head, and DPT."""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.heads.features import Features, block_maps, check_num_blocks, map_width, resize_maps

BIN_SPACINGS = ("UD", "SID", "SID_upstream")
BIN_NORMS = ("linear", "softmax", "sigmoid")
# What the linear norm adds to every bin, so that bins without evidence keep a gradient and no sum is 0.
LINEAR_NORM_FLOOR = 0.1
# What is added to the slope of sigmoid and softplus in training: scores that overshoot in the first steps, as those of
# DPT do with a learning rate of 1e-3, would lie where the slope is exactly 0 and never come back.
LEAST_SLOPE = 0.02


class DepthOutput(nn.Module, ABC):
    """Reads scores as depth; it has no parameters.

    Args:
        min_depth: smallest depth given, above 0, in the unit of the targets.
        max_depth: largest depth given.
        num_scores: channels ``K`` of scores that are read.

    Raises:
        ValueError: unless 0 < min_depth < max_depth < infinity.
    """

    def __init__(self, min_depth: float, max_depth: float, num_scores: int = 1) -> None:
        super().__init__()
        if not 0 < min_depth < max_depth < math.inf:
            raise ValueError(f"depths must satisfy 0 < min_depth < max_depth, got {min_depth} and {max_depth}")
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.num_scores = num_scores

    @abstractmethod
    def read(self, scores: Tensor) -> Tensor:
        """Maps scores ``[B, K, h, w]``, at least float32, to depth ``[B, 1, h, w]`` that may leave the range."""

    def forward(self, scores: Tensor) -> Tensor:
        """Maps scores ``[B, K, h, w]`` to depth ``[B, 1, h, w]`` in float32 or better."""
        # Half precision has three digits: too few for a sum over hundreds of bins.
        depth = self.read(scores if scores.dtype == torch.float64 else scores.float())
        return depth if self.training else depth.clamp(self.min_depth, self.max_depth)

    def _never_flat(self, values: Tensor, scores: Tensor) -> Tensor:
        """The same values; in training with `LEAST_SLOPE` more slope over the scores."""
        return values + LEAST_SLOPE * (scores - scores.detach()) if self.training else values


class DepthBins(DepthOutput):
    """Expected depth over bins whose probabilities are the scores.

    Args:
        min_depth: centre of the first bin.
        max_depth: centre of the last bin.
        num_bins: bins; 256 in the released heads.
        spacing: "UD" for equal steps, "SID" for equal ratios. "SID_upstream" is what the published code computes under
            the name SID: it takes 10 to the power of a depth that was never made a logarithm, so bins run from
            10^min_depth to 10^max_depth. No released head uses it.
        norm: "linear" (rectified scores plus 0.1, over their sum; the released heads), "softmax" or "sigmoid"
            (sigmoids over their sum).

    Raises:
        ValueError: for an unknown spacing or norm, fewer than 2 bins, or a range as in `DepthOutput`.
    """

    def __init__(
        self,
        min_depth: float,
        max_depth: float,
        *,
        num_bins: int = 256,
        spacing: str = "UD",
        norm: str = "linear",
    ) -> None:
        super().__init__(min_depth, max_depth, num_scores=num_bins)
        if spacing not in BIN_SPACINGS:
            raise ValueError(f"unknown spacing of bins {spacing!r}; allowed: {', '.join(BIN_SPACINGS)}")
        if norm not in BIN_NORMS:
            raise ValueError(f"unknown norm over bins {norm!r}; allowed: {', '.join(BIN_NORMS)}")
        if num_bins < 2:
            raise ValueError(f"depth needs at least 2 bins, got {num_bins}")
        self.spacing = spacing
        self.norm = norm

    def centres(self, like: Tensor) -> Tensor:
        """Depth of every bin ``[num_bins]``, rising, on the device and in the dtype of ``like``."""
        first, last = self.min_depth, self.max_depth
        if self.spacing == "UD":
            return torch.linspace(first, last, self.num_scores, device=like.device, dtype=like.dtype)
        if self.spacing == "SID":
            first, last = math.log10(first), math.log10(last)
        return torch.logspace(first, last, self.num_scores, device=like.device, dtype=like.dtype)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Probability of every bin ``[B, K, h, w]``; sums to 1 over the bins."""
        if self.norm == "softmax":
            return scores.softmax(dim=1)
        evidence = scores.relu() + LINEAR_NORM_FLOOR if self.norm == "linear" else scores.sigmoid()
        return evidence / evidence.sum(dim=1, keepdim=True)

    def read(self, scores: Tensor) -> Tensor:
        # Not a matrix product: autocast would run that in half precision.
        return (self.probabilities(scores) * self.centres(scores)[:, None, None]).sum(dim=1, keepdim=True)


class ReluDepth(DepthOutput):
    """Rectified score plus ``min_depth``, as in the released DPT heads. Scores that are all negative learn nothing."""

    def read(self, scores: Tensor) -> Tensor:
        return scores.relu() + self.min_depth


class SigmoidDepth(DepthOutput):
    """Sigmoid of the score times ``max_depth`` (upstream's ``scale_up``); in training it is never flat."""

    def read(self, scores: Tensor) -> Tensor:
        return self._never_flat(scores.sigmoid(), scores) * self.max_depth


class SoftplusDepth(DepthOutput):
    """``min_depth`` plus the softplus of the score in units of the range; in training it is never flat."""

    def read(self, scores: Tensor) -> Tensor:
        return self.min_depth + self._never_flat(F.softplus(scores), scores) * (self.max_depth - self.min_depth)


class DepthFromScores(nn.Module):
    """A dense head and the output that reads its scores as depth.

    Args:
        decoder: maps features to scores ``[B, K, h', w']``, ``K`` as the output needs it.
        output: reads them.
    """

    def __init__(self, decoder: nn.Module, output: DepthOutput) -> None:
        super().__init__()
        self.decoder = decoder
        self.output = output

    def forward(self, features: Features) -> Tensor:
        """Maps features to depth ``[B, 1, h', w']``."""
        depth: Tensor = self.output(self.decoder(features))
        return depth


class LinearDepthHead(nn.Module):
    """Scores per position by one linear layer, enlarged, and read as depth.

    Named BNHead upstream, after a batch norm that it no longer has; the parameter names (``conv_depth.…``) are those of
    the released heads. There the tokens are enlarged and then multiplied: the same, since both are linear and the
    weights of bilinear interpolation sum to 1, but at ``upsample``² times the memory and arithmetic.

    Args:
        embed_dim: width ``D`` of the backbone.
        output: reads the scores; released heads use `DepthBins` with 256 bins.
        num_blocks: blocks whose maps are concatenated; released heads use 1 or 4.
        class_token: whether the class token of a block stands beside each of its patches, as in the released heads.
        upsample: what the grid of patches is enlarged by, bilinearly; 4 in the released heads.

    Raises:
        ValueError: when ``upsample`` is below 1.
    """

    def __init__(
        self,
        embed_dim: int,
        output: DepthOutput,
        *,
        num_blocks: int = 1,
        class_token: bool = True,
        upsample: int = 4,
    ) -> None:
        super().__init__()
        if upsample < 1:
            raise ValueError(f"upsample must be at least 1, got {upsample}")
        self.num_blocks = num_blocks
        self.class_token = class_token
        self.upsample = upsample
        width = map_width(embed_dim, class_token=class_token)
        self.conv_depth = nn.Conv2d(num_blocks * width, output.num_scores, kernel_size=1)
        self.output = output

    def forward(self, features: Features) -> Tensor:
        """Maps features to depth ``[B, 1, upsample * h, upsample * w]``."""
        check_num_blocks(features, self.num_blocks, type(self).__name__)
        maps = block_maps(features, class_token=self.class_token)
        size = (maps[0].shape[-2], maps[0].shape[-1])
        scores = self.conv_depth(torch.cat([resize_maps(entry, size) for entry in maps], dim=1))
        depth: Tensor = self.output(resize_maps(scores, (self.upsample * size[0], self.upsample * size[1])))
        return depth


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
        self.convs = nn.ModuleList(_conv(width, channels, 3, bias=False) for width in levels)
        # The coarsest level comes first and has nothing to be added to.
        self.fusion_blocks = nn.ModuleList(_Fusion(channels, adds=index > 0) for index in range(NUM_LEVELS))
        self.project = _conv(channels, channels, 3)
        scores = nn.Sequential(
            nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 1, kernel_size=1),
        )
        self.conv_depth = nn.Sequential(OrderedDict(head=scores))
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


def _conv(in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = True) -> nn.Sequential:
    """A convolution under the name ``conv``, which keeps the size."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(OrderedDict(conv=conv))


class _Reassemble(nn.Module):
    """Joins the class token into the patches of every block and gives each block a resolution: 4, 2, 1 and 1/2."""

    def __init__(self, embed_dim: int, levels: Sequence[int]) -> None:
        super().__init__()
        self.readout_projects = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * embed_dim, embed_dim), nn.GELU()) for _ in levels
        )
        self.projects = nn.ModuleList(_conv(embed_dim, width, 1) for width in levels)
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
        self.conv1 = _conv(channels, channels, 3, bias=False)
        self.conv2 = _conv(channels, channels, 3, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        change: Tensor = self.conv2(self.conv1(maps.relu()).relu())
        return maps + change


class _Fusion(nn.Module):
    """Adds the next finer level to what was fused so far, refines it and doubles the grid."""

    def __init__(self, channels: int, *, adds: bool) -> None:
        super().__init__()
        self.project = _conv(channels, channels, 1)
        self.res_conv_unit1 = _ResidualUnit(channels) if adds else None
        self.res_conv_unit2 = _ResidualUnit(channels)

    def forward(self, fused: Tensor | None, level: Tensor) -> Tensor:
        if self.res_conv_unit1 is not None and fused is not None:
            # On odd grids the doubled coarse level is larger than the finer one.
            level = fused + self.res_conv_unit1(resize_maps(level, (fused.shape[-2], fused.shape[-1])))
        doubled = F.interpolate(self.res_conv_unit2(level), scale_factor=2, mode="bilinear", align_corners=True)
        output: Tensor = self.project(doubled)
        return output
