"""Images as grids of described patches: features of a backbone's blocks, or statistics of brightness."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from dinov2.models.description import fingerprint
from dinov2.models.heads.anomaly import SMOOTHING, anomaly_map
from dinov2.models.vision_transformer import DinoVisionTransformer

__all__ = ["SMOOTHING", "PatchFeatures", "PatchStatistics", "Turned", "anomaly_map", "fingerprint", "grid_of"]
STATISTICS = ("mean", "standard_deviation", "minimum", "maximum", "mean_gradient", "largest_gradient")


class PatchFeatures(nn.Module):
    """Features of every patch after several blocks of a backbone, each of unit length, one behind the other.

    Args:
        backbone: frozen.
        blocks: numbers of the blocks, from 0; empty for `default_blocks`.

    Raises:
        ValueError: for a block that does not exist.
    """

    def __init__(self, backbone: DinoVisionTransformer, blocks: Sequence[int] = ()) -> None:
        super().__init__()
        self.backbone = backbone
        self.blocks = tuple(blocks) or default_blocks(backbone.n_blocks)
        self.patch_size = backbone.patch_size
        if min(self.blocks) < 0 or max(self.blocks) >= backbone.n_blocks:
            raise ValueError(f"blocks must be from 0 to {backbone.n_blocks - 1}, found {list(self.blocks)}")

    def forward(self, images: Tensor) -> Tensor:
        """Maps normalised images ``[B, 3, H, W]`` to the patches' features ``[B, N * D]``, row after row of patches.

        Every patch has unit length, so that distances lie in [0, 2].
        """
        maps = cast(tuple[Tensor, ...], self.backbone.get_intermediate_layers(images, n=self.blocks))
        joined: Tensor = torch.cat([F.normalize(rows.float(), dim=2) for rows in maps], dim=2) / len(self.blocks) ** 0.5
        return joined.flatten(1)


class PatchStatistics(nn.Module):
    """Six numbers of the brightness of every patch (`STATISTICS`), as a yardstick.

    Args:
        patch_size: height and width in pixels.
    """

    def __init__(self, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to ``[B, N * 6]``, row after row of patches."""
        grey = images.float().mean(dim=1, keepdim=True)
        down, right = torch.gradient(grey, dim=(2, 3))
        gradient = torch.hypot(down, right)
        height, width = self.patch_size

        def cells(values: Tensor) -> Tensor:
            """``[B, N, pixels]``."""
            return F.unfold(values, (height, width), stride=(height, width)).transpose(1, 2)

        own, slopes = cells(grey), cells(gradient)
        numbers = [own.mean(dim=2), own.std(dim=2, correction=0), own.amin(dim=2), own.amax(dim=2)]
        return torch.stack([*numbers, slopes.mean(dim=2), slopes.amax(dim=2)], dim=2).flatten(1)


def default_blocks(num_blocks: int) -> tuple[int, ...]:
    """The block after three quarters of all, where details are still told apart, and the last one."""
    return tuple(sorted({max(num_blocks * 3 // 4 - 1, 0), num_blocks - 1}))


def grid_of(image_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """How many patches an image has from top to bottom and from left to right.

    Raises:
        ValueError: the image is no whole number of patches.
    """
    if image_size[0] % patch_size[0] or image_size[1] % patch_size[1]:
        raise ValueError(
            f"the image size {list(image_size)} must be a multiple of the patch size {list(patch_size)} (height, width)"
        )
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


class Turned:
    """A transform of images that are turned before; what lies outside is mirrored in.

    Args:
        transform: from an RGB image to a tensor.
        degrees: against the clock.
    """

    def __init__(self, transform: Callable[[Image.Image], Any], degrees: float) -> None:
        self.transform = transform
        self.degrees = degrees

    def __call__(self, image: Image.Image) -> Any:
        """The transformed image."""
        return self.transform(turn(image, self.degrees))


def turn(image: Image.Image, degrees: float) -> Image.Image:
    """The image, of the same size, turned against the clock; what lies outside is mirrored in."""
    pixels = np.asarray(image)
    middle = ((pixels.shape[1] - 1) / 2, (pixels.shape[0] - 1) / 2)
    matrix = cv2.getRotationMatrix2D(middle, degrees, 1.0)
    turned = cv2.warpAffine(
        pixels, matrix, pixels.shape[1::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )
    return Image.fromarray(turned)
