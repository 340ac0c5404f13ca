"""Steps that change brightness: windows, contrast, background, gamma, calibration and noise.

All take uint8 or uint16, grey or with channels, and give the same shape; the dtype stays where nothing else is said.
Numbers for brightness are shares of the full range, so that one chain means the same at 8 and at 16 bits.
"""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage import exposure, restoration

from dinov2.config import ConfigError
from dinov2.config.schema import leaf
from dinov2.data.decoding import decode_levels
from dinov2.data.preprocessing.step import Pixels, Step, as_levels, as_unit, top_of
from dinov2.data.reading import read_image_bytes

_MAX_DEAD = 0.01  # of the pixels of a calibration image; more of them are a wrong image


@dataclass(frozen=True)
class Window(Step):
    """Spreads the values between two ends over the full range and cuts off what lies outside.

    The ends are percentiles of this image, or values that all images share. An image without contrast between two
    percentiles becomes black. All channels share the ends. With ``bits`` the result has that dtype.
    """

    name: ClassVar[str] = "window"
    changes_dtype: ClassVar[bool] = True

    low: float = leaf(0.5, "Becomes black.", minimum=0)
    high: float = leaf(99.5, "Becomes white.", above=0)
    by: str = leaf("percent", "What low and high are.", choices=("percent", "value"))
    bits: Literal[0, 8, 16] = leaf(0, "Bits of the result; 0 keeps those of the image.")

    def check(self) -> None:
        if self.low >= self.high:
            raise ConfigError(f"window.low must lie below window.high, found {self.low} and {self.high}")
        if self.by == "percent" and self.high > 100:
            raise ConfigError(f"window.high must be at most 100 per cent, found {self.high}; for values: by: value")

    def apply(self, image: Pixels) -> Pixels:
        dtype = {0: image.dtype, 8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}[self.bits]
        ends = (self.low, self.high)
        low, high = ends if self.by == "value" else tuple(float(end) for end in np.percentile(image, ends))
        if low >= high:
            return np.zeros(image.shape, dtype)
        # Of float64: scikit-image would cut fractions off where it gives integers.
        return as_levels(exposure.rescale_intensity(image.astype(np.float64), (low, high), (0.0, 1.0)), dtype)


@dataclass(frozen=True)
class Clahe(Step):
    """Contrast-limited adaptive histogram equalisation (OpenCV's ``CLAHE``).

    Of three channels the luminance (Y of YCrCb) is equalised and colours stay; of other numbers each by itself.

    Reference: Zuiderveld, "Contrast Limited Adaptive Histogram Equalization", Graphics Gems IV, 1994.
    """

    name: ClassVar[str] = "clahe"

    clip_limit: float = leaf(2.0, "Most that contrast grows by, as OpenCV counts it.", above=0)
    tiles: int = leaf(8, "Tiles along each side.", minimum=1)

    def apply(self, image: Pixels) -> Pixels:
        equalise = cv2.createCLAHE(self.clip_limit, (self.tiles, self.tiles)).apply
        if image.ndim == 3 and image.shape[2] == 3:
            luma = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2YCrCb)
            luma[..., 0] = equalise(np.ascontiguousarray(luma[..., 0]))
            colours: Pixels = cv2.cvtColor(luma, cv2.COLOR_YCrCb2RGB)
            return colours
        return _per_channel(image, equalise)


@dataclass(frozen=True)
class FlattenBackground(Step):
    """Takes away what changes slowly, such as uneven light: a Gaussian blur of the image.

    The mean brightness stays, but for what is cut off at the ends of the range.
    """

    name: ClassVar[str] = "flatten_background"

    sigma: float = leaf(50.0, "Width of the blur in pixels; well above the size of defects.", above=0)
    mode: str = leaf(
        "subtract", "For light that adds (subtract) or multiplies (divide).", choices=("subtract", "divide")
    )

    def apply(self, image: Pixels) -> Pixels:
        values = as_unit(image)
        background = cv2.GaussianBlur(values, (0, 0), self.sigma, borderType=cv2.BORDER_REFLECT).reshape(values.shape)
        mean = background.mean(axis=(0, 1))
        if self.mode == "subtract":
            return as_levels(values - background + mean, image.dtype)
        return as_levels(values * (mean / np.maximum(background, 1 / top_of(image))), image.dtype)


@dataclass(frozen=True)
class Gamma(Step):
    """Raises brightness (0 to 1) to a power: below 1 dark parts become lighter, above 1 darker."""

    name: ClassVar[str] = "gamma"

    gamma: float = leaf(1.0, "The power.", above=0)

    def apply(self, image: Pixels) -> Pixels:
        return as_levels(exposure.adjust_gamma(as_unit(image), self.gamma), image.dtype)


@dataclass(frozen=True)
class FlatField(Step):
    """Corrects each pixel's offset and gain by calibration images: ``(image - dark) / (flat - dark) * mean gain``.

    Pixels whose flat value is not above their dark value are dead, and take the corrected value of the nearest pixel
    that is not. The calibration belongs to the camera: a chain names its files, and holds no copy of them. They must
    have the image's size and bits; grey ones serve all channels. Each process reads them once.
    """

    name: ClassVar[str] = "flat_field"

    flat: str = leaf("", "Image of an even, bright scene.")
    dark: str = leaf("", "Image without light; empty for 0.")

    def check(self) -> None:
        if not self.flat:
            raise ConfigError("flat_field.flat must name the calibration image of an even, bright scene")

    @property
    def files(self) -> tuple[str, ...]:
        return (self.flat, self.dark) if self.dark else (self.flat,)

    def apply(self, image: Pixels) -> Pixels:
        dark, gain, nearest = _calibration(self.flat, self.dark, str(image.dtype))
        for name, found in (("flat", gain), ("dark", dark)):
            fits = found.ndim == 0 or found.shape == image.shape[: found.ndim]
            if not fits:
                raise ValueError(
                    f"the {name} image {getattr(self, name)} has the shape {list(found.shape)}, the image has "
                    f"{list(image.shape)}; calibrate with the camera's setting of these images"
                )
        dark, gain = (found[..., None] if found.ndim == 2 < image.ndim else found for found in (dark, gain))
        corrected = as_levels((image - dark) * gain / top_of(image), image.dtype)
        return corrected if nearest is None else corrected[tuple(nearest)]


@functools.lru_cache(maxsize=4)
def _calibration(flat_path: str, dark_path: str, dtype: str) -> tuple[npt.NDArray[Any], npt.NDArray[Any], Any]:
    """Offset, gain (0 where a pixel is dead), and for every pixel the nearest that lives; None where all do."""
    read = {path: decode_levels(read_image_bytes(path), path) for path in (flat_path, dark_path) if path}
    for path, found in read.items():
        if found.dtype != dtype:
            raise ValueError(f"the calibration image {path} is {found.dtype}, the image {dtype}: they must agree")
    flat = read[flat_path].astype(np.float64)
    dark = read[dark_path].astype(np.float64) if dark_path else np.zeros(())
    if dark.ndim and dark.shape[:2] != flat.shape[:2]:
        raise ValueError(f"{flat_path} has the size {flat.shape[:2]}, {dark_path} has {dark.shape[:2]}")
    light = flat - (dark[..., None] if dark.ndim == 2 < flat.ndim else dark)
    is_dead = light <= 0
    share = float(is_dead.mean())
    if share > _MAX_DEAD:
        raise ValueError(
            f"{share:.1%} of the pixels of {flat_path} are no brighter than {dark_path or '0'}: no flat image"
        )
    mean = light[~is_dead].mean()
    gain = np.divide(mean, light, out=np.zeros_like(light), where=~is_dead)
    if not is_dead.any():
        return dark, gain, None
    dead_pixels = is_dead.any(axis=2) if is_dead.ndim == 3 else is_dead
    nearest = ndimage.distance_transform_edt(dead_pixels, return_distances=False, return_indices=True)
    return dark, gain, nearest


@dataclass(frozen=True)
class Median(Step):
    """Median of a square around each pixel, against single bright or dark pixels."""

    name: ClassVar[str] = "median"

    size: int = leaf(3, "Side of the square in pixels, odd.", minimum=3)

    def check(self) -> None:
        if self.size % 2 == 0:
            raise ConfigError(f"median.size must be odd, found {self.size}")

    def apply(self, image: Pixels) -> Pixels:
        if image.dtype == np.uint8 or self.size <= 5:  # OpenCV is many times faster, where it can
            return _per_channel(image, lambda channel: cv2.medianBlur(channel, self.size))
        return _per_channel(image, lambda channel: ndimage.median_filter(channel, self.size, mode="nearest"))


@dataclass(frozen=True)
class Bilateral(Step):
    """Smooths where brightness is alike and keeps edges (OpenCV's ``bilateralFilter``, in float32).

    Reference: Tomasi and Manduchi, "Bilateral Filtering for Gray and Color Images", ICCV 1998.
    """

    name: ClassVar[str] = "bilateral"

    sigma_color: float = leaf(0.05, "Difference that counts as alike, as a share of the full range.", above=0)
    sigma_space: float = leaf(3.0, "Width of the filter in pixels.", above=0)

    def apply(self, image: Pixels) -> Pixels:
        def smooth(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
            found = cv2.bilateralFilter(values, -1, self.sigma_color, self.sigma_space)
            return found.astype(np.float32, copy=False)

        values = as_unit(image)
        is_colour = values.ndim == 3 and values.shape[2] == 3
        return as_levels(smooth(values) if is_colour else _per_channel(values, smooth), image.dtype)


@dataclass(frozen=True)
class NonLocalMeans(Step):
    """Averages patches that look alike, the strongest of the three against noise, and the slowest.

    scikit-image's ``denoise_nl_means`` in its fast mode.

    Reference: Buades, Coll and Morel, "A Non-Local Algorithm for Image Denoising", CVPR 2005.
    """

    name: ClassVar[str] = "non_local_means"

    strength: float = leaf(0.05, "Cut-off of differences, as a share of the full range.", above=0)
    patch_size: int = leaf(5, "Side of the patches in pixels.", minimum=1)
    distance: int = leaf(6, "How far patches are looked for, in pixels.", minimum=1)

    def apply(self, image: Pixels) -> Pixels:
        denoise = functools.partial(
            restoration.denoise_nl_means,
            patch_size=self.patch_size,
            patch_distance=self.distance,
            h=self.strength,
            fast_mode=True,
        )
        values = as_unit(image)
        has_colours = values.ndim == 3 and values.shape[2] > 1
        denoised = denoise(values, channel_axis=2) if has_colours else _per_channel(values, denoise)
        return as_levels(denoised, image.dtype)


INTENSITY_STEPS = (Window, Clahe, FlattenBackground, Gamma, FlatField, Median, Bilateral, NonLocalMeans)


def _per_channel(image: npt.NDArray[Any], filtered: Any) -> npt.NDArray[Any]:
    if image.ndim == 2:
        result: npt.NDArray[Any] = filtered(np.ascontiguousarray(image))
        return result
    return np.dstack([filtered(np.ascontiguousarray(image[..., index])) for index in range(image.shape[2])])
