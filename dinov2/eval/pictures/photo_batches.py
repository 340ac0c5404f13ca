"""Whole photos of one size as the batches that a frozen backbone takes, for pictures of its tokens."""

from collections.abc import Iterator, Sequence

import torch
import torchvision.transforms.v2.functional as TF
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from dinov2.eval.frozen import device_of
from dinov2.eval.transforms import make_eval_transform

BATCH_SIZE = 8


def resize_photos(images: Sequence[Image], image_size: int | tuple[int, int]) -> list[Image]:
    """Stretches photos of any size and mode to RGB of one size: height and width, or one number for both."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return [TF.resize(image.convert("RGB"), [height, width], InterpolationMode.BICUBIC) for image in images]


def patch_grid(model: nn.Module, photo: Image) -> tuple[int, int]:
    """Rows and columns of patches ``(h, w)`` that a photo has for a model with ``patch_size``.

    Raises:
        ValueError: when the photo does not divide into patches.
    """
    width, height = photo.size
    patch_height, patch_width = _patch_size(model)
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"image_size {height}x{width} must be a multiple of the patch size {patch_height}x{patch_width} "
            "(height x width)"
        )
    return height // patch_height, width // patch_width


def photo_batches(model: nn.Module, photos: Sequence[Image]) -> Iterator[Tensor]:
    """Yields photos of one size as normalised batches ``[b, 3, H, W]`` of the model's dtype, where the model lies."""
    width, height = photos[0].size
    preprocess = make_eval_transform((height, width), whole_image=True)
    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    for start in range(0, len(photos), BATCH_SIZE):
        batch = torch.stack([preprocess(photo) for photo in photos[start : start + BATCH_SIZE]])
        yield batch.to(device_of(model), dtype)


def _patch_size(model: nn.Module) -> tuple[int, int]:
    size = model.patch_size
    if isinstance(size, int):
        return size, size
    assert isinstance(size, tuple)
    height, width = size
    return int(height), int(width)
