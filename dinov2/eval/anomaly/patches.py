"""Images as grids of described patches: features of a backbone's blocks, or statistics of brightness."""

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.filters import threshold_otsu
from torch import Tensor, nn

from dinov2.data.transforms import to_pillow
from dinov2.models.description import fingerprint
from dinov2.models.heads.anomaly import SMOOTHING, anomaly_map
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger("dinov2")

__all__ = [
    "SMOOTHING",
    "PatchFeatures",
    "PatchStatistics",
    "Turned",
    "anomaly_map",
    "find_foreground",
    "fingerprint",
    "grid_of",
]
_FEWEST_PATCHES = 3  # along a side of an image with a middle
_ROWS_AT_A_TIME = 2**16
_CLEAR = 0.2  # difference between shares of a kind of patches that tells part from background
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


def find_foreground(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Divides patches of good images into the part and what lies around it, by their first principal component.

    Along it they fall into two kinds (Otsu's threshold); the one that borders show more than middles is background. The
    line is drawn a third of the way from the mean of the background to that of the part, to which edges so belong.

    Args:
        patches: ``[N, D]`` of whole images, row after row of patches.
        grid: patches of an image from top to bottom and from left to right.

    Returns:
        ``[D + 1]`` float32, see `is_foreground`.

    Raises:
        ValueError: images are of so few patches that nothing lies within their borders, or all patches are equal.

    Reference:
        Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2", WACV 2025, section 3.2;
        Otsu, "A Threshold Selection Method from Gray-Level Histograms", IEEE Trans. SMC 1979.
    """
    if min(grid) < _FEWEST_PATCHES:
        raise ValueError(f"a foreground needs images of {_FEWEST_PATCHES} patches a side at least, found {list(grid)}")
    width, pieces = patches.shape[1], patches.split(_ROWS_AT_A_TIME)
    mean = torch.stack([rows.double().sum(dim=0) for rows in pieces]).sum(dim=0) / len(patches)
    covariance = torch.zeros(width, width, dtype=torch.float64, device=patches.device)
    for rows in pieces:
        centred = rows.double() - mean
        covariance += centred.T @ centred
    direction = torch.linalg.eigh(covariance).eigenvectors[:, -1].float()
    places = (patches.float() @ direction).cpu()
    if not places.max() > places.min():
        raise ValueError("all patches of the good images are equal: there is no foreground to find")
    limit = float(threshold_otsu(places.numpy()))
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    above, is_inside = places > limit, inside.flatten().repeat(len(places) // inside.numel())
    in_middles, at_borders = (float(above[chosen].float().mean()) for chosen in (is_inside, ~is_inside))
    sign = 1.0 if in_middles >= at_borders else -1.0
    if abs(in_middles - at_borders) < _CLEAR:
        logger.warning(
            "the foreground is a guess: borders and middles of good images show both kinds of patches alike (%.0f and "
            "%.0f %% of one of them); look at maps, or leave it out",
            *(100 * at_borders, 100 * in_middles),
        )
    part, background = (float(places[above == side].mean()) for side in (sign > 0, sign < 0))
    return torch.cat([sign * direction.cpu(), torch.tensor([sign * (background + (part - background) / 3)])])


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
    return to_pillow(np.asarray(turned, dtype=np.uint8))
