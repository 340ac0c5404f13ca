"""Colour and blur operations on uint8 arrays, as fast as one core allows.

Every function takes ``[H, W, 3]`` RGB or ``[H, W]`` grey uint8 pixels, or ``[H, W, C]`` of other channels, which have
no colours, and returns the same kind. Results equal Pillow's
to one level, but for three pixels in a thousand after a change of hue.
"""

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.transforms import to_pillow

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

BLUR_KERNEL_SIZE = 9

# ITU-R 601 luma in the 16-bit fixed point that Pillow uses.
_LUMA_WEIGHTS = np.array([[19595, 38470, 7471]], dtype=np.float32) / 65536
_HSV_CODES = np.array([255 / 360, 255, 1, 0])  # codes to a degree, to a whole of saturation, to a level of value
_LEVELS = np.arange(256, dtype=np.float32)


def to_grayscale(pixels: UInt8Array) -> UInt8Array:
    """Luma ``[H, W]`` of an RGB image; one without colours is returned as it is."""
    if not _has_colours(pixels):
        return pixels
    return np.asarray(cv2.transform(pixels, _LUMA_WEIGHTS), dtype=np.uint8)


def adjust_brightness(pixels: UInt8Array, factor: float) -> UInt8Array:
    """Blends with black; ``factor`` 1 changes nothing, 0 is black."""
    return _apply_table(pixels, _blend_table(0, factor))


def adjust_contrast(pixels: UInt8Array, factor: float) -> UInt8Array:
    """Blends with the mean luma of the image (or of its first channel); ``factor`` 1 changes nothing, 0 is uniform."""
    mean = int(cv2.mean(to_grayscale(pixels))[0] + 0.5)
    return _apply_table(pixels, _blend_table(mean, factor))


def adjust_saturation(pixels: UInt8Array, factor: float) -> UInt8Array:
    """Blends with the grey version of the image; ``factor`` 1 changes nothing, 0 is grey. The identity on grey."""
    if not _has_colours(pixels):
        return pixels
    gray = cv2.cvtColor(to_grayscale(pixels), cv2.COLOR_GRAY2RGB)
    # Pillow cuts the fraction off where OpenCV rounds; exact integers must stay what they are.
    return np.asarray(cv2.addWeighted(pixels, factor, gray, 1 - factor, -0.499), dtype=np.uint8)


def adjust_hue(pixels: UInt8Array, shift: float) -> UInt8Array:
    """Rotates the hue by ``shift`` turns, in -0.5..0.5. The identity on grey.

    Hue and saturation are cut to 8 bits on the way, as Pillow does: on smooth images that adds a noise which the
    published networks have seen, and which an exact rotation would lack.
    """
    if not _has_colours(pixels):
        return pixels
    hsv = cv2.cvtColor(pixels.astype(np.float32), cv2.COLOR_RGB2HSV)
    codes = np.asarray(cv2.multiply(hsv, _HSV_CODES), dtype=np.uint8)
    degrees = (_LEVELS + int(shift * 255)) % 256 * (360 / 255) % 360
    table = np.stack([degrees, _LEVELS / 255, _LEVELS], axis=-1)[:, None].astype(np.float32)  # [256, 1, 3]
    turned = cv2.LUT(codes, table)
    return _round(np.asarray(cv2.cvtColor(turned, cv2.COLOR_HSV2RGB), dtype=np.float32))


def gaussian_blur(pixels: UInt8Array, sigma: float, kernel_size: int = BLUR_KERNEL_SIZE) -> UInt8Array:
    """Gaussian blur with standard deviation ``sigma`` pixels, reflecting at the borders."""
    radius = (kernel_size - 1) / 2
    kernel = np.exp(-0.5 * (np.linspace(-radius, radius, kernel_size) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    blurred = cv2.sepFilter2D(pixels, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)
    return _round(np.asarray(blurred, dtype=np.float32))


def solarize(pixels: UInt8Array, threshold: int = 128) -> UInt8Array:
    """Inverts every value that is at least ``threshold``."""
    levels = np.arange(256)
    return _apply_table(pixels, np.where(levels < threshold, levels, 255 - levels).astype(np.uint8))


def _has_colours(pixels: UInt8Array) -> bool:
    return pixels.ndim == 3 and pixels.shape[2] == 3


def _blend_table(base: int, factor: float) -> UInt8Array:
    blended = np.float32(base) + np.float32(factor) * (_LEVELS - np.float32(base))
    table: UInt8Array = np.clip(blended, 0, 255).astype(np.uint8)
    return table


def _apply_table(pixels: UInt8Array, table: UInt8Array) -> UInt8Array:
    return np.asarray(cv2.LUT(pixels, table), dtype=np.uint8)


def _round(pixels: Float32Array) -> UInt8Array:
    rounded: UInt8Array = np.rint(pixels, out=pixels).astype(np.uint8)
    return rounded


LIGHTS = ("original", "standardized")

_MEAN, _DEVIATION = 120.0, 48.0  # levels of 8 bits; close to the statistics that the networks' normalisation assumes
_MIN_DEVIATION = 4.0  # levels: below it there is nothing but noise, which should not be blown up further


def standardize_light(image: Image.Image) -> Image.Image:
    """Shifts and stretches an image so that its grey values have mean 120 and standard deviation 48.

    Colours go through the same line, so they keep their differences; channels that are none are changed each by itself.
    What leaves 0..255 is clipped. Images of a part at several exposures become nearly equal, and a random or trained
    network then describes the part instead of the exposure. Do not use it where brightness itself tells good from bad.
    """
    if len(image.getbands()) not in (1, 3):
        return to_pillow(np.dstack([np.asarray(standardize_light(channel)) for channel in image.split()]))
    counts = np.asarray(image.convert("L").histogram(), dtype=np.float64)
    levels = np.arange(256)
    mean = float(counts @ levels / counts.sum())
    deviation = float(np.sqrt(counts @ (levels - mean) ** 2 / counts.sum()))
    line = (levels - mean) * (_DEVIATION / max(deviation, _MIN_DEVIATION)) + _MEAN
    table = line.clip(0, 255).round().astype(int).tolist()
    return image.point(table * len(image.getbands()))
