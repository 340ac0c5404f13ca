"""Boxes of objects from every position of a pyramid of maps."""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from dinov2.models.heads.features import ConvNormAct, Features, PixelHead
from dinov2.models.heads.pyramid import FeaturePyramid, PyramidOptions

_RARITY = 0.01  # first probability of every class: nearly all positions show none
_FIRST_DISTANCE = 3.0  # strides after which a distance is e times less probable at first
_MIN_DISTANCE = 0.01  # strides: boxes of no width have no aspect ratio, and no slope of one


class DenseDetectionHead(PixelHead):
    """A class and a box for every position of the maps of a `FeaturePyramid`, without anchors.

    Each position says how probable each class is, and how far the four sides of the object's box are from it: a
    distribution over whole numbers of strides, whose mean is the distance. Classes and distances come from branches of
    their own, which all strides share: a distance in strides means the same on every map, and few images suffice.

    A box holds the point that predicts it and reaches at most ``distance_bins - 1`` strides to each side. So objects
    that are smaller than the finest stride are boxed too largely, unless a point happens to lie in them.

    Args:
        embed_dim: width ``D`` of the backbone.
        num_outputs: classes ``C``.
        distance_bins: numbers of strides, from 0, that a distance is spread over.
        **pyramid: options of the `FeaturePyramid`; both branches are as wide as its maps.

    Raises:
        ValueError: for fewer than 2 bins, or options that the pyramid does not allow.

    Reference:
        Tian et al., "FCOS" (2019), section 3, on points and shared branches; Li et al., "Generalized Focal Loss"
        (2020), section 3, on distributions of distances; Lin et al., "Focal Loss" (2017), section 4.1, on rarity.
    """

    def __init__(
        self, embed_dim: int, num_outputs: int, *, distance_bins: int = 16, **pyramid: Unpack[PyramidOptions]
    ) -> None:
        super().__init__()
        if distance_bins < 2:
            raise ValueError(f"distance_bins must be 2 or more, got {distance_bins}")
        self.pyramid = FeaturePyramid(embed_dim, **pyramid)
        channels = self.pyramid.channels
        self.distance_bins = distance_bins
        self.classes = _branch(channels, torch.full((num_outputs,), math.log(_RARITY / (1 - _RARITY))))
        # Boxes begin some 5 strides wide: small objects overlap those of fine maps most, and large ones of coarse.
        self.distances = _branch(channels, (-torch.arange(distance_bins) / _FIRST_DISTANCE).repeat(4))

    def forward(self, features: Features, images: Tensor) -> dict[str, Tensor]:
        """Predicts from features and the images they are of, ``[B, image_channels, H, W]``.

        Returns:
            For ``N`` positions, those of the finest map first, each map row by row:

            - ``boxes`` float32 ``[B, N, 4]``: left, top, right, bottom in pixels of ``images``, possibly beyond them;
            - ``scores`` ``[B, N, C]``: logits, each class by itself;
            - ``distances`` ``[B, N, 4 * distance_bins]``: logits of the distances to the same sides;
            - ``points`` float32 ``[N, 2]``: the position (x, y) in pixels;
            - ``strides`` float32 ``[N]``: pixels that a distance of 1 stands for.
        """
        maps = self.pyramid(features, images)
        scores = torch.cat([self.classes(entry).flatten(2) for entry in maps], dim=2).transpose(1, 2)
        distances = torch.cat([self.distances(entry).flatten(2) for entry in maps], dim=2).transpose(1, 2)
        points = torch.cat([_centres(entry, images) for entry in maps])
        strides = torch.cat(
            [
                points.new_full((entry.shape[-2] * entry.shape[-1],), stride)
                for entry, stride in zip(maps, self.pyramid.strides, strict=True)
            ]
        )
        probabilities = distances.float().unflatten(2, (4, self.distance_bins)).softmax(dim=3)
        numbers = torch.arange(self.distance_bins, dtype=torch.float32, device=images.device)
        # Not a matrix product, which autocast would round.
        sides = (probabilities * numbers).sum(dim=3).clamp_min(_MIN_DISTANCE) * strides[:, None]  # [B, N, 4]
        boxes = torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=2)
        return {"boxes": boxes, "scores": scores, "distances": distances, "points": points, "strides": strides}


def _branch(channels: int, bias: Tensor) -> nn.Sequential:
    """Convolutions to as many outputs as the last one has biases."""
    last = nn.Conv2d(channels, len(bias), kernel_size=1)
    last.bias = nn.Parameter(bias)
    return nn.Sequential(ConvNormAct(channels, channels), ConvNormAct(channels, channels), last)


def _centres(maps: Tensor, images: Tensor) -> Tensor:
    """Points (x, y), float32 ``[h * w, 2]``, of the images that maps ``[B, C, h, w]`` show, row by row.

    Maps cover the image evenly, as tokens are resized, even where the stride does not divide its sides.
    """
    rows, columns = (
        (torch.arange(number, dtype=torch.float32, device=images.device) + 0.5) * (pixels / number)
        for number, pixels in zip(maps.shape[-2:], images.shape[-2:], strict=True)
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
