"""A backbone and a task head as one network from images to classes, masks or depth, for images of any size."""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.heads.features import BlockFeatures, resize_maps
from dinov2.models.heads.part_pool import PartClassifier
from dinov2.models.vision_transformer import DinoVisionTransformer


class TaskModel(nn.Module):
    """Features of some blocks of a backbone, and a head on top.

    Images whose sides are no multiples of the patch are padded with zeros, half on each side (the odd pixel below or to
    the right), and what is predicted for the padding is cut off again.

    Args:
        backbone: its parameters may be frozen or not; nothing here stops gradients.
        head: takes one pair (map ``[B, D, h, w]``, class token ``[B, D]``) per block and gives ``[B, C]`` or a dense
            ``[B, C, h', w']``.
        blocks: numbers of the blocks, from 0, in the order in which the head expects them.
        norm: whether the backbone's final norm is applied to the features of each block. The released classifiers and
            segmentation heads need it, the released depth heads must not have it.

    Raises:
        ValueError: when ``blocks`` is empty or names a block that does not exist.
    """

    def __init__(
        self, backbone: DinoVisionTransformer, head: nn.Module, *, blocks: Sequence[int], norm: bool = True
    ) -> None:
        super().__init__()
        if not blocks or min(blocks) < 0 or max(blocks) >= backbone.n_blocks:
            raise ValueError(f"blocks must be numbers from 0 to {backbone.n_blocks - 1}, got {list(blocks)}")
        self.backbone = backbone
        self.head = head
        self.blocks = tuple(blocks)
        self.norm = norm
        self.patch_size = backbone.patch_size

    def forward(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """Predicts for photos, or for parts of several photos.

        Args:
            images: normalised photos ``[B, 3, H, W]``; for a head over parts also ``[parts, photos, 3, H, W]``.
            valid: bool ``[parts, photos]``, false for places without a photo, whose images are not looked at; None
                when all are photos.

        Returns:
            Logits ``[B, C]`` (one row per part for parts), or a dense prediction ``[B, C, H, W]``, enlarged bilinearly
            (corners not aligned): logits, or depth with C = 1.

        Raises:
            ValueError: for images of another shape or without pixels, for parts when the head takes single photos, or
                for a part without a photo.
        """
        if images.ndim == 5:
            return self._forward_parts(images, valid)
        if valid is not None:
            raise ValueError(f"a mask of valid photos needs images [parts, photos, 3, H, W], got {list(images.shape)}")
        height, width = _image_size(images)
        output: Tensor = self.head(self.features(images))
        if output.ndim == 2:
            return output
        left, right, top, bottom = centre_padding(height, width, self.patch_size)
        dense = resize_maps(output, (top + height + bottom, left + width + right))
        return dense[..., top : top + height, left : left + width]

    def features(self, images: Tensor) -> tuple[BlockFeatures, ...]:
        """Features of the padded images ``[B, 3, H, W]``: per block a map ``[B, D, h, w]`` and class tokens ``[B, D]``.

        Raises:
            ValueError: for images of another shape or without pixels.
        """
        padded = F.pad(images, centre_padding(*_image_size(images), self.patch_size))
        features = self.backbone.get_intermediate_layers(
            padded, n=self.blocks, reshape=True, return_class_token=True, norm=self.norm
        )
        return cast(tuple[BlockFeatures, ...], features)

    def _forward_parts(self, images: Tensor, valid: Tensor | None) -> Tensor:
        if not isinstance(self.head, PartClassifier):
            raise ValueError(
                f"images of parts ({list(images.shape)}) need a head over parts; {type(self.head).__name__} takes "
                f"single photos [B, 3, H, W]"
            )
        if valid is None:
            valid = images.new_ones(images.shape[:2]).bool()
        if valid.shape != images.shape[:2]:
            raise ValueError(
                f"images {list(images.shape)} need a mask {list(images.shape[:2])} of valid photos, "
                f"got {list(valid.shape)}"
            )
        logits: Tensor = self.head(self.features(images[valid]), valid)
        return logits


def centre_padding(height: int, width: int, patch_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Pixels to add on the left, right, top and bottom to reach multiples of ``patch_size`` (height, width)."""
    vertical, horizontal = -height % patch_size[0], -width % patch_size[1]
    left, top = horizontal // 2, vertical // 2
    return left, horizontal - left, top, vertical - top


def _image_size(images: Tensor) -> tuple[int, int]:
    if images.ndim != 4:
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    height, width = images.shape[-2:]
    if height == 0 or width == 0:
        raise ValueError(f"images of {height} x {width} pixels (height x width) have no pixels")
    return height, width
