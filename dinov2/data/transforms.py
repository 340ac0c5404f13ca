"""Image transforms shared by evaluation and supervised training: sizes and normalisation."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What Pillow holds images in: of two and four channels, modes whose bands it resizes each by itself.
_MODES = {1: "L", 2: "La", 3: "RGB", 4: "RGBX"}
MAX_CHANNELS = max(_MODES)


def channel_statistics(num_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel by which images are normalised, of values in 0..1.

    Those of ImageNet for RGB; their means over the three colours for every channel of other images.
    """
    if num_channels == len(IMAGENET_MEAN):
        return IMAGENET_MEAN, IMAGENET_STD
    mean, std = (round(sum(values) / len(values), 3) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (mean,) * num_channels, (std,) * num_channels


def mode_of(num_channels: int) -> str:
    """Pillow's name for images of so many channels."""
    return _MODES[num_channels]


def to_pillow(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """Pixels ``[H, W]`` or ``[H, W, C]``, C from 1 to `MAX_CHANNELS`, as an image whose arrays are those again."""
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    return Image.frombytes(mode_of(channels), pixels.shape[1::-1], np.ascontiguousarray(pixels).tobytes())


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any channels as people, and measures of brightness, are shown it: the first three, or the first."""
    if image.mode == "RGB":
        return image
    return (image.getchannel(0) if image.mode == _MODES[2] else image).convert("RGB")


def make_normalize_transform(
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> transforms.Normalize:
    """Normalisation of a float tensor ``[C, H, W]`` in 0..1, by default by `channel_statistics`."""
    if (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD):
        return _NormalizeChannels(mean=mean, std=std)
    return transforms.Normalize(mean=mean, std=std)


class _NormalizeChannels(transforms.Normalize):  # type: ignore[misc]  # torchvision ships no types
    """By the statistics of as many channels as there are."""

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        normalized: torch.Tensor = functional.normalize(tensor, *channel_statistics(tensor.shape[-3]), self.inplace)
        return normalized


def make_classification_eval_transform(
    resize_size: int = 256,
    crop_size: int = 224,
    *,
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> transforms.Compose:
    """Evaluation transform: shorter side to ``resize_size``, centre crop, float tensor ``[3, crop, crop]``, normalised.

    Args:
        resize_size: Length of the shorter side after resizing, in pixels.
        crop_size: Side of the square crop in pixels.
        interpolation: Filter used for resizing.
        mean: Mean per channel, for values in 0..1.
        std: Standard deviation per channel.
    """
    if crop_size > resize_size:
        raise ValueError(
            f"crop_size {crop_size} exceeds resize_size {resize_size}: the crop would be padded with black"
        )
    return transforms.Compose(
        [
            transforms.Resize(resize_size, interpolation=interpolation),
            transforms.CenterCrop(crop_size),
            _ToFloatTensor(),
            make_normalize_transform(mean, std),
        ]
    )


def make_classification_train_transform(
    crop_size: int = 224,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    interpolation: InterpolationMode = InterpolationMode.BICUBIC,
    hflip_prob: float = 0.5,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> transforms.Compose:
    """Training transform of linear probes: random resized crop, horizontal flip, float tensor, normalised.

    Args:
        crop_size: Side of the square crop in pixels.
        scale: Smallest and largest share of the image's area that a crop covers.
        interpolation: Filter used for resizing.
        hflip_prob: Probability of a horizontal flip.
        mean: Mean per channel, for values in 0..1.
        std: Standard deviation per channel.
    """
    steps: list[torch.nn.Module] = [
        _RandomResizedCrop(crop_size, scale=scale, interpolation=interpolation),
    ]
    if hflip_prob > 0:
        steps.append(transforms.RandomHorizontalFlip(hflip_prob))
    return transforms.Compose([*steps, _ToFloatTensor(), make_normalize_transform(mean, std)])


def reach_of_tilted(size: tuple[int, int], angle: float) -> tuple[float, float]:
    """Half of the width and height of the upright rectangle around a tilted one of ``size`` (width, height)."""
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    return (cos * size[0] + sin * size[1]) / 2, (sin * size[0] + cos * size[1]) / 2


def cut_tilted(image: Image.Image, centre: tuple[float, float], size: tuple[int, int], angle: float) -> Image.Image:
    """What a tilted rectangle of an image shows, upright; past the image's border, pixels are mirrored.

    Args:
        image: of any mode that NumPy holds as bytes.
        centre: of the rectangle, from the left and from the top, in pixels.
        size: its width and height in pixels.
        angle: degrees by which what it shows is turned anticlockwise.
    """
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    sides = [
        (max(math.ceil(reach - place), 0), max(math.ceil(place + reach - extent), 0))
        for place, reach, extent in zip(centre, reach_of_tilted(size, angle), image.size, strict=True)
    ]
    pixels = np.asarray(image)
    pixels = np.pad(pixels, [*reversed(sides), *[(0, 0)] * (pixels.ndim - 2)], mode="symmetric")
    x, y = (place + before for place, (before, _) in zip(centre, sides, strict=True))
    middle = (size[0] / 2, size[1] / 2)
    # From a place in the cut to one in the image, y pointing down.
    turn = (cos, -sin, x - cos * middle[0] + sin * middle[1], sin, cos, y - sin * middle[0] - cos * middle[1])
    return to_pillow(pixels).transform(size, Image.Transform.AFFINE, turn, Image.Resampling.BICUBIC)


class _RandomResizedCrop(transforms.RandomResizedCrop):  # type: ignore[misc]  # torchvision ships no types
    """Torchvision's, but a box that is made to fit lies at a random place: the ends of long images are seen too."""

    @staticmethod
    def get_params(img: Any, scale: list[float], ratio: list[float]) -> tuple[int, int, int, int]:
        """Top, left, height and width of the box."""
        box: tuple[int, int, int, int] = transforms.RandomResizedCrop.get_params(img, scale, ratio)
        top, left, height, width = box
        _, image_height, image_width = functional.get_dimensions(img)
        slack = image_height - height, image_width - width
        is_long = not ratio[0] <= image_width / image_height <= ratio[1]
        # A whole side of a long image, and the exact middle of the other, is torchvision's fallback.
        if is_long and min(slack) == 0 and (top, left) == (slack[0] // 2, slack[1] // 2):
            top, left = (int(torch.randint(0, free + 1, ())) for free in slack)
        return top, left, height, width


class _ToFloatTensor(transforms.ToTensor):  # type: ignore[misc]  # torchvision ships no types
    """A PIL image becomes a float tensor in 0..1; a tensor passes through."""

    def __call__(self, picture: object) -> torch.Tensor:
        if isinstance(picture, torch.Tensor):
            return picture
        tensor: torch.Tensor = super().__call__(picture)
        return tensor
