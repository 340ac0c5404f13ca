"""The part of an image that counts, given by a mask or a polygon for a camera or a part."""

import dataclasses
import fnmatch
import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from skimage.draw import polygon2mask

from dinov2.config import ConfigError
from dinov2.config.schema import leaf
from dinov2.data.decoding import decode_levels
from dinov2.data.preprocessing.step import Frame, Step
from dinov2.data.reading import read_image_bytes

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RegionOfInterest(Step):
    """Says which pixels count: no target outside is learnt from, all there is predicted as background, and not scored.

    A chain may have several, each for the images whose path fits its pattern (``*`` also stands for folders), such as
    one per camera; where several fit an image, a pixel counts that all of them keep. Images that none fits count
    whole. Coordinates are those of the image that the chain is given: the step comes before those that crop.
    """

    name: ClassVar[str] = "region_of_interest"

    images: str = leaf("*", "Pattern of the paths of the images that it is for, such as '*/camera_2/*'.")
    mask: str = leaf("", "Image of their size, black outside.")
    polygon: tuple[tuple[float, float], ...] = leaf((), "Its corners [[x, y], ...] in pixels, in place of a mask.")
    keep: str = leaf("inside", "Whether what lies inside or outside counts.", choices=("inside", "outside"))
    blacken: bool = leaf(True, "Whether the network sees black where pixels do not count.")

    def check(self) -> None:
        if bool(self.mask) == bool(self.polygon):
            found = "both" if self.mask else "neither"
            raise ConfigError(f"region_of_interest takes either a mask or a polygon, found {found}")
        if self.polygon and (len(self.polygon) < 3 or not np.isfinite(self.polygon).all()):
            raise ConfigError(
                f"region_of_interest.polygon must have at least 3 corners [x, y], found {list(self.polygon)}"
            )

    @property
    def files(self) -> tuple[str, ...]:
        return (self.mask,) if self.mask else ()

    def region(self, name: str, size: tuple[int, int]) -> Mask | None:
        """Which pixels count.

        Args:
            name: path of the image; empty where it is not known.
            size: its height and width.

        Returns:
            bool ``[H, W]``; None where the step is for other images.

        Raises:
            ValueError: the region is of another size, or empty; the image has no name to compare with the pattern.
        """
        if self.images != "*":
            if not name:
                raise ValueError(f"it is for images {self.images!r}, and this one has no name: give it as a file")
            if not fnmatch.fnmatchcase(name, self.images):
                return None
        inside = _read_mask(self.mask) if self.mask else _draw(self.polygon, size)
        if inside.shape != size:
            raise ValueError(f"the mask {self.mask} has {list(inside.shape)} pixels, the image {list(size)}")
        kept = inside if self.keep == "inside" else ~inside
        if not kept.any():
            raise ValueError(f"no pixel of {self.mask or 'the polygon'} counts (keep: {self.keep})")
        return kept

    def run(self, frame: Frame) -> Frame:
        if frame.image.shape[:2] != frame.full_size:
            raise ValueError("it must come before steps that crop, as it is drawn on the whole image")
        kept = self.region(frame.name, frame.full_size)
        if kept is None:
            return frame
        image = frame.image
        if self.blacken:
            image = np.where(kept if image.ndim == 2 else kept[..., None], image, 0).astype(image.dtype)
        valid = kept if frame.valid is None else frame.valid & kept
        return dataclasses.replace(frame, image=image, valid=valid)


@functools.lru_cache(maxsize=16)  # cameras of a line
def _read_mask(path: str) -> Mask:
    levels = decode_levels(read_image_bytes(path), path)
    mask: Mask = np.asarray(levels if levels.ndim == 2 else levels.max(axis=2)) > 0
    mask.setflags(write=False)
    return mask


@functools.lru_cache(maxsize=16)
def _draw(polygon: tuple[tuple[float, float], ...], size: tuple[int, int]) -> Mask:
    """The pixels whose centre lies in a polygon."""
    corners = np.array(polygon)
    right, bottom = (math.ceil(float(end)) for end in corners.max(axis=0))
    if corners.min() < 0 or right > size[1] or bottom > size[0]:
        raise ValueError(
            f"the polygon {list(polygon)} does not lie in an image of {size[1]} x {size[0]} pixels (width x height)"
        )
    mask: Mask = polygon2mask(size, corners[:, ::-1] - 0.5)
    mask.setflags(write=False)
    return mask
