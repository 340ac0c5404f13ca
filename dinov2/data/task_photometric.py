"""Random light, colour, blur and noise, which move no pixel."""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dinov2.data import photometric
from dinov2.data.photometric import UInt8Array

_BLUR_SIGMA = (0.1, 2.0)  # pixels
_LEVELS = np.arange(256, dtype=np.float64) / 255


class PhotometricOptions(Protocol):
    """Strengths of random changes; 0 leaves one out."""

    @property
    def brightness(self) -> float:
        """Factors 1 - s .. 1 + s, not below 0."""

    @property
    def contrast(self) -> float:
        """Factors 1 - s .. 1 + s, not below 0."""

    @property
    def saturation(self) -> float:
        """Factors 1 - s .. 1 + s, not below 0."""

    @property
    def hue(self) -> float:
        """Turns -s .. s of the colour circle, up to 0.5."""

    @property
    def gamma(self) -> float:
        """Exponents 1 / (1 + s) .. 1 + s, as likely above 1 as below."""

    @property
    def blur(self) -> float:
        """Probability of a Gaussian blur of 0.1 .. 2 pixels."""

    @property
    def noise(self) -> float:
        """Largest standard deviation of added Gaussian noise, over the range of values; drawn from 0 .. s."""


class PhotometricJitter:
    """Changes a photo at random: brightness, contrast, saturation, hue and gamma in any order, then blur, then noise.

    Draws from torch's global generator alone.

    Args:
        options: strengths.

    Raises:
        ValueError: for a strength out of range.
    """

    def __init__(self, options: PhotometricOptions) -> None:
        for name in ("brightness", "contrast", "saturation", "gamma", "noise"):
            if getattr(options, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(options, name)}")
        if not 0 <= options.hue <= 0.5:
            raise ValueError(f"hue must lie in 0..0.5, got {options.hue}")
        if not 0 <= options.blur <= 1:
            raise ValueError(f"blur is a probability and must lie in 0..1, got {options.blur}")
        low_gamma = -math.log1p(options.gamma)
        self.blur, self.noise = options.blur, options.noise
        self._operations = [
            (change, low, high)
            for change, low, high in (
                (photometric.adjust_brightness, max(0.0, 1 - options.brightness), 1 + options.brightness),
                (photometric.adjust_contrast, max(0.0, 1 - options.contrast), 1 + options.contrast),
                (photometric.adjust_saturation, max(0.0, 1 - options.saturation), 1 + options.saturation),
                (photometric.adjust_hue, -options.hue, options.hue),
                (_adjust_log_gamma, low_gamma, -low_gamma),
            )
            if low < high
        ]

    def __call__(self, image: Tensor) -> Tensor:
        """Maps uint8 ``[3, H, W]`` to the same kind."""
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        for number in torch.randperm(len(self._operations)).tolist():
            change, low, high = self._operations[number]
            pixels = change(pixels, uniform(low, high))
        if self.blur > uniform(0, 1):
            pixels = photometric.gaussian_blur(pixels, uniform(*_BLUR_SIGMA))
        changed = torch.from_numpy(pixels).permute(2, 0, 1)
        if self.noise > 0:
            deviation = 255 * uniform(0, self.noise)
            changed = (changed + deviation * torch.randn(changed.shape)).round().clamp(0, 255).to(torch.uint8)
        return changed


def uniform(low: float, high: float) -> float:
    """A number between ``low`` and ``high`` from torch's global generator."""
    return low + (high - low) * float(torch.rand((), dtype=torch.float64))


def _adjust_log_gamma(pixels: UInt8Array, log_gamma: float) -> UInt8Array:
    table: UInt8Array = np.rint(255 * _LEVELS ** math.exp(log_gamma)).astype(np.uint8)
    return table[pixels]
