"""From a file, or an image in memory, to what networks see: range of values, preprocessing, 8 bits, light."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dinov2.data.decoding import AnyImage, decode_image, decode_levels, to_levels, to_upright_rgb
from dinov2.data.photometric import standardize_light
from dinov2.data.preprocessing import Chain, Frame, Placement, PreprocessingError
from dinov2.data.reading import UnreadableImageError, read_image_bytes
from dinov2.data.transforms import as_rgb, to_pillow
from dinov2.data.value_range import ValueRange

_SHORT = 257  # levels of 16 bits to one of 8


@dataclass(frozen=True)
class PlacedImage:
    """An image as networks see it, and where it lies in the image that it was made of.

    Attributes:
        image: 8 bits, RGB or of the channels that preprocessing ends with, see `to_pillow`.
        placement: of a part that a step has cut out, and which pixels count; None where it is the whole image.
    """

    image: Image.Image
    placement: Placement | None = None

    @property
    def full_size(self) -> tuple[int, int]:
        """Height and width of the image that it was made of."""
        return (self.image.height, self.image.width) if self.placement is None else self.placement.full_size

    @property
    def whole(self) -> Image.Image:
        """In the size of the image that it was made of, black where it was cut."""
        if self.placement is None:
            return self.image
        canvas = Image.new(self.image.mode, self.placement.full_size[::-1])
        canvas.paste(self.image, self.placement.origin[::-1])
        return canvas

    @property
    def shown(self) -> Image.Image:
        """The whole, as people are shown it."""
        return as_rgb(self.whole)

    def cut_alike(self, reference: "PlacedImage") -> "PlacedImage":
        """A reference of this image, cut out where this one was.

        Raises:
            ValueError: the two images are not of one size.
        """
        if reference.full_size != self.full_size:
            found, own = (f"{height} x {width}" for height, width in (reference.full_size, self.full_size))
            raise ValueError(
                f"its reference has {found} pixels (height x width), the image {own}: both must show the same in the "
                "same place"
            )
        if self.placement is None:
            return PlacedImage(reference.whole)
        (top, left), (rows, columns) = self.placement.origin, self.placement.size
        return PlacedImage(reference.whole.crop((left, top, left + columns, top + rows)), self.placement)


@dataclass(frozen=True)
class ImageReader:
    """Makes images as networks see them, always in one order: range of values, steps of preprocessing, 8 bits, light.

    Attributes:
        value_range: which values become black and white, where they are more than levels of 8 bits; None where every
            image says so itself.
        chain: of preprocessing; it is given all bits.
        light: ``original`` or ``standardized``, see `standardize_light`.
    """

    value_range: ValueRange | None = None
    chain: Chain = field(default_factory=Chain)
    light: str = "original"

    def read(self, path: str | Path) -> PlacedImage:
        """Reads a file.

        Raises:
            UnreadableImageError: it is missing, truncated or no image, or a step fails on it.
        """
        return self.decode(read_image_bytes(path), str(path))

    def decode(self, data: bytes, name: str) -> PlacedImage:
        """Decodes the content of a file, which ``name`` names in errors.

        Raises:
            UnreadableImageError: see `read`.
        """
        if not self.chain.steps:
            return PlacedImage(self._lit(decode_image(data, name, self.value_range)))
        levels = decode_levels(data, name, self.value_range)
        try:
            return self._placed(self.chain(levels, name))
        except PreprocessingError as error:
            raise UnreadableImageError(name, str(error).removeprefix(f"{name}: ")) from error

    def convert(self, image: AnyImage) -> PlacedImage:
        """Converts an image in memory, see `dinov2.data.decoding.to_upright_rgb`, as it would a file.

        Raises:
            ValueError: it is no image, or a step fails on it.
        """
        if not self.chain.steps:
            return PlacedImage(self._lit(to_upright_rgb(image, self.value_range)))
        return self._placed(self.chain(to_levels(image, self.value_range)))

    def _placed(self, frame: Frame) -> PlacedImage:
        return PlacedImage(self._lit(to_pillow(_eight_bits(frame.stacked, self.chain.num_channels))), frame.placement)

    def _lit(self, image: Image.Image) -> Image.Image:
        return standardize_light(image) if self.light == "standardized" else image


def _eight_bits(levels: npt.NDArray[Any], num_channels: int) -> npt.NDArray[np.uint8]:
    """Levels ``[H, W]`` or ``[H, W, C]`` as uint8 ``[H, W, num_channels]``; a single channel is repeated.

    Raises:
        PreprocessingError: there are others.
    """
    if levels.ndim == 2:
        levels = levels[..., None]
    if levels.shape[2] not in (1, num_channels):
        raise PreprocessingError(
            f"preprocessing gives {levels.shape[2]} channels where the network takes 1 (grey) or {num_channels}; "
            "choose output: replace for steps that append, append so many that there are 3, or end with channels for "
            "a network of others (student.in_channels)"
        )
    if levels.dtype == np.uint16:
        levels = np.rint(levels / np.float32(_SHORT)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels, (*levels.shape[:2], num_channels)))
