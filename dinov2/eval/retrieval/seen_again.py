"""Images seen again: turned, cropped and relit, so that a set without labels or parts can be asked to find its own."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.image_reader import PlacedImage
from dinov2.data.photometric import standardize_light
from dinov2.data.transforms import cut_tilted, reach_of_tilted
from dinov2.utils.seeds import derive_seed

QUARTERS = (90, 180, 270)  # degrees, anticlockwise
MAX_TILT = 10.0  # degrees beside one of them
AREAS = (0.6, 0.8)  # shares of the image that are seen
LIGHTS = (0.7, 1.3)  # factors of brightness


@dataclass(frozen=True)
class View:
    """How an image is seen again.

    Attributes:
        angle: degrees by which it is turned anticlockwise.
        area: share of its area that is seen.
        light: factor of its brightness; what becomes brighter than white is white.
        place: of the crop between left and right, top and bottom, in [0, 1].
    """

    angle: float
    area: float
    light: float
    place: tuple[float, float]


def draw_view(seed: int, index: int) -> View:
    """The view of the image at a position of a set, the same whoever asks."""
    draws = np.random.default_rng(derive_seed(seed, "seen again", index))
    quarter, tilt = draws.choice(QUARTERS), draws.uniform(-MAX_TILT, MAX_TILT)
    area, light = draws.uniform(*AREAS), draws.uniform(*LIGHTS)
    left, top = draws.uniform(size=2)
    return View(float(quarter + tilt), float(area), float(light), (float(left), float(top)))


def see_again(image: Image.Image, view: View) -> Image.Image:
    """Turns, crops and relights an image of any channels.

    The crop has the shape of the image, turned by whole quarters, and lies inside of it; where a tilted crop does not
    fit into it, it lies in the middle and its corners show the mirrored border.
    """
    width, height = image.size
    side = math.sqrt(view.area)
    size = (width, height) if round(view.angle / 90) % 2 == 0 else (height, width)
    size = (max(round(size[0] * side), 1), max(round(size[1] * side), 1))
    reach = reach_of_tilted(size, view.angle)
    centre = [
        extent / 2 if 2 * half >= extent else half + share * (extent - 2 * half)
        for extent, half, share in zip(image.size, reach, view.place, strict=True)
    ]
    seen = cut_tilted(image, (centre[0], centre[1]), size, view.angle)
    return seen.point([min(round(level * view.light), 255) for level in range(256)] * len(seen.getbands()))


class ImagesSeenAgain(ImageDataset):
    """All images of a dataset, each seen again, with the same transform.

    Args:
        dataset: where the images come from; standardised light is standardised after the light has changed.
        seed: of the views.
    """

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        super().__init__(transform=dataset.transform, target_transform=dataset.target_transform)
        self.dataset = copy.copy(dataset)
        self.dataset.light = "original"
        self.light = dataset.light
        self.seed = seed
        self.classes = dataset.classes

    def as_dict(self) -> dict[str, Any]:
        """Within which bounds images are seen again, as plain values."""
        return {"quarters": list(QUARTERS), "max_tilt": MAX_TILT, "areas": list(AREAS), "lights": list(LIGHTS)}

    def __len__(self) -> int:
        return len(self.dataset)

    def get_image_path(self, index: int) -> Path:
        return self.dataset.get_image_path(index)

    def get_target(self, index: int) -> int | None:
        return self.dataset.get_target(index)

    def get_group_ids(self) -> list[str]:
        return self.dataset.get_group_ids()

    def get_placed_image(self, index: int) -> PlacedImage:
        """The image in RGB, seen again."""
        image = see_again(self.dataset.get_image(index), draw_view(self.seed, index))
        return PlacedImage(standardize_light(image) if self.light == "standardized" else image)
