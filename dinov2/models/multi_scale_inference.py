"""Averaging what a segmentation model says about an image at several scales and mirrored.

Reference: Oquab et al., DINOv2 (2023), section 7.4 ("+ms": multi-scale test-time augmentation).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.heads.features import resize_maps
from dinov2.models.task_model import TaskModel

# Of the published evaluations.
PUBLISHED_SCALES = (1.0, 1.32, 1.73, 2.28, 3.0)


class MultiScaleInference(nn.Module):
    """Mean class probabilities over scaled and mirrored copies of each image.

    Args:
        model: gives logits ``[B, C, H, W]``.
        scales: factors on height and width.
        flip: whether each scale is also seen mirrored left to right.

    Raises:
        ValueError: when ``scales`` is empty or holds one that is not positive.
    """

    def __init__(self, model: TaskModel, *, scales: Sequence[float] = PUBLISHED_SCALES, flip: bool = True) -> None:
        super().__init__()
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales must be one or more positive numbers, got {scales}")
        self.model = model
        self.scales = tuple(scales)
        self.flip = flip

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to log-probabilities ``[B, C, H, W]``, whose softmax is the mean."""
        size = (images.shape[-2], images.shape[-1])
        seen = []
        for scale in self.scales:
            scaled = _scaled_images(images, scale)
            seen.append(resize_maps(self.model(scaled), size).softmax(dim=1))
            if self.flip:
                mirrored = self.model(scaled.flip(-1)).flip(-1)
                seen.append(resize_maps(mirrored, size).softmax(dim=1))
        mean = torch.stack(seen).mean(dim=0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()


def _scaled_images(images: Tensor, scale: float) -> Tensor:
    if scale == 1:
        return images
    size = [max(round(side * scale), 1) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)
