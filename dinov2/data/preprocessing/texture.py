"""Steps that show texture and edges, in place of the image or as a channel beside it.

All look at the brightness of the image (see `luminance`), and give one map ``[H, W]`` of the image's dtype for each
kind of response. ``output: replace`` makes it the image, ``append`` puts it beside the image, which later steps go on
with.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage import feature, filters

from dinov2.config import ConfigError
from dinov2.config.schema import leaf
from dinov2.data.preprocessing.step import Frame, Step, as_levels, luminance

Map = npt.NDArray[Any]

_OUTPUTS = ("replace", "append")
_OUTPUT_HELP = "In place of the image, or a channel beside it."
_GAIN_HELP = "Factor of the response, for faint edges; what leaves the range is cut off."
_MAX_KERNEL = 501  # pixels along a side of a Gabor filter


@dataclass(frozen=True)
class TextureStep(Step):
    """A step that makes maps of the image's brightness.

    Attributes:
        output: where they go; steps of this kind declare it last.
    """

    changes_channels: ClassVar[bool] = True

    output: str = leaf("replace", _OUTPUT_HELP, choices=_OUTPUTS)

    def run(self, frame: Frame) -> Frame:
        maps = [as_levels(values, frame.image.dtype) for values in self.respond(luminance(frame.image))]
        if self.output == "append":
            return dataclasses.replace(frame, channels=(*frame.channels, *maps))
        return dataclasses.replace(frame, image=maps[0] if len(maps) == 1 else np.dstack(maps))

    def respond(self, grey: npt.NDArray[np.float32]) -> list[Map]:
        """Maps from 0 to 1 of a brightness from 0 to 1, ``[H, W]``."""
        raise NotImplementedError


@dataclass(frozen=True)
class LocalBinaryPattern(TextureStep):
    """Which points of a circle around each pixel are at least as bright as it, as a code that light does not change.

    scikit-image's ``local_binary_pattern``. Codes are spread over the full range: ``uniform`` has ``points + 2`` of
    them, the same for every rotation, ``nri_uniform`` ``points * (points - 1) + 3``, ``rotation_invariant`` (``ror``)
    and ``default`` ``2 ** points``. Brightness is compared at 16 bits; beyond the border it goes on as at the border.

    Reference: Ojala, Pietikäinen and Mäenpää, "Multiresolution Gray-Scale and Rotation Invariant Texture Classification
    with Local Binary Patterns", PAMI 2002.
    """

    name: ClassVar[str] = "lbp"

    points: int = leaf(8, "Points on the circle.", minimum=2, maximum=24)
    radius: float = leaf(1.0, "Of the circle in pixels.", above=0)
    method: str = leaf("uniform", "Kind of code.", choices=("uniform", "rotation_invariant", "nri_uniform", "default"))

    def respond(self, grey: npt.NDArray[np.float32]) -> list[Map]:
        num_codes = {"uniform": self.points + 2, "nri_uniform": self.points * (self.points - 1) + 3}
        border = int(np.ceil(self.radius)) + 1
        levels = np.pad(as_levels(grey, np.dtype(np.uint16)), border, mode="edge")  # the library takes black there
        method = {"rotation_invariant": "ror"}.get(self.method, self.method)
        codes = feature.local_binary_pattern(levels, self.points, self.radius, method)
        codes = codes[border:-border, border:-border]
        return [codes / (num_codes.get(self.method, 2**self.points) - 1)]


@dataclass(frozen=True)
class Canny(TextureStep):
    """Thin edges (scikit-image's ``canny``): white on black.

    Reference: Canny, "A Computational Approach to Edge Detection", PAMI 1986.
    """

    name: ClassVar[str] = "canny"

    sigma: float = leaf(1.0, "Width of the blur in pixels.", above=0)
    low: float = leaf(0.1, "Gradient at which edges go on, brightness from 0 to 1.", minimum=0)
    high: float = leaf(0.2, "Gradient at which edges begin.", minimum=0)

    def check(self) -> None:
        if self.low > self.high:
            raise ConfigError(f"canny.low must not exceed canny.high, found {self.low} and {self.high}")

    def respond(self, grey: npt.NDArray[np.float32]) -> list[Map]:
        return [feature.canny(grey, self.sigma, self.low, self.high).astype(np.float32)]


@dataclass(frozen=True)
class Sobel(TextureStep):
    """Size of the gradient by Sobel's filters (scikit-image): 1 for the largest possible edge along an axis."""

    name: ClassVar[str] = "sobel"

    gain: float = leaf(1.0, _GAIN_HELP, above=0)

    def respond(self, grey: npt.NDArray[np.float32]) -> list[Map]:
        return [filters.sobel(grey) * self.gain]


@dataclass(frozen=True)
class Scharr(TextureStep):
    """Size of the gradient by Scharr's filters (scikit-image), more alike in all directions than Sobel's."""

    name: ClassVar[str] = "scharr"

    gain: float = leaf(1.0, _GAIN_HELP, above=0)

    def respond(self, grey: npt.NDArray[np.float32]) -> list[Map]:
        return [filters.scharr(grey) * self.gain]


@dataclass(frozen=True)
class LaplacianOfGaussian(TextureStep):
    """Blobs of about ``sigma * sqrt(2)`` pixels radius: dark ones brighter than mid-grey, bright ones darker.

    SciPy's ``gaussian_laplace`` times ``sigma ** 2``, which makes sizes comparable; an even image is mid-grey.

    Reference: Lindeberg, "Feature Detection with Automatic Scale Selection", IJCV 1998.
    """

    name: ClassVar[str] = "laplacian_of_gaussian"

    sigma: float = leaf(2.0, "Width of the blur in pixels.", above=0)
    gain: float = leaf(1.0, _GAIN_HELP, above=0)

    def respond(self, grey: npt.NDArray[np.float32]) -> list[Map]:
        centred = grey.astype(np.float64) - grey.mean(dtype=np.float64)  # the weights do not add up to exactly 0
        response = ndimage.gaussian_laplace(centred, self.sigma) * self.sigma**2
        return [np.round(0.5 + self.gain * response / 2, 6)]  # an even image would flicker between two levels


@dataclass(frozen=True)
class Gabor(TextureStep):
    """Strength of waves of some frequencies and directions: a bank of Gabor filters.

    Filters are scikit-image's ``gabor_kernel``; a response is the length of its real and imaginary part, twice, which
    is the amplitude of a wave that fits. The image's mean is taken off before. With ``combine: max`` the bank gives one
    map, the strongest response; with ``channels`` one per filter, directions of the first frequency first.

    Reference: Jain and Farrokhnia, "Unsupervised Texture Segmentation Using Gabor Filters", Pattern Recognition 1991.
    """

    name: ClassVar[str] = "gabor"

    frequencies: tuple[float, ...] = leaf((0.1, 0.2), "Waves per pixel.", above=0, maximum=0.5)
    orientations: int = leaf(4, "Directions, spread evenly over half a turn.", minimum=1)
    bandwidth: float = leaf(1.0, "Of a filter in octaves.", above=0)
    gain: float = leaf(1.0, _GAIN_HELP, above=0)
    combine: str = leaf("max", "One map, or one per filter.", choices=("max", "channels"))

    def respond(self, grey: npt.NDArray[np.float32]) -> list[Map]:
        centred = grey.astype(np.float64) - grey.mean(dtype=np.float64)
        responses = []
        for frequency in self.frequencies:
            for index in range(self.orientations):
                theta = np.pi * index / self.orientations
                kernel = filters.gabor_kernel(frequency, theta, self.bandwidth)
                if max(kernel.shape) > _MAX_KERNEL:
                    raise ValueError(f"a filter of {kernel.shape} pixels is too large; take a higher frequency")
                real, imaginary = (
                    cv2.filter2D(centred, -1, part, borderType=cv2.BORDER_REFLECT)
                    for part in (np.ascontiguousarray(kernel.real), np.ascontiguousarray(kernel.imag))
                )
                responses.append(np.hypot(real, imaginary) * 2 * self.gain)
        return [np.max(responses, axis=0)] if self.combine == "max" else responses


@dataclass(frozen=True)
class Channels(Step):
    """The last step of a chain for a network of so many channels: the image, and behind it what was appended.

    The image gives what is missing: one channel, its brightness, or three, of which grey ones are equal.
    """

    name: ClassVar[str] = "channels"
    changes_channels: ClassVar[bool] = True

    count: int = leaf(1, "Of the network, its student.in_channels.", minimum=1, maximum=4)

    def run(self, frame: Frame) -> Frame:
        own, image = self.count - len(frame.channels), frame.image
        if own not in (1, 3):
            raise ValueError(
                f"{len(frame.channels)} channels were appended, so with the image there are {len(frame.channels) + 1} "
                f"(grey) or {len(frame.channels) + 3} (RGB), not {self.count}"
            )
        if own == 1 and image.ndim == 3:
            image = image[..., 0] if image.shape[2] == 1 else as_levels(luminance(image), image.dtype)
        elif own == 3 and (image.ndim == 2 or image.shape[2] == 1):
            image = np.dstack([image] * 3)
        return dataclasses.replace(frame, image=np.dstack([image, *frame.channels]), channels=())


TEXTURE_STEPS = (LocalBinaryPattern, Canny, Sobel, Scharr, LaplacianOfGaussian, Gabor, Channels)
