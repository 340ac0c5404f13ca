"""From the photos of a part to one prediction for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from dinov2.tasks.package import TaskPackage
from dinov2.tasks.predictions import ClassPrediction
from dinov2.tasks.predictor import Photo, TaskPredictor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PreparedPart:
    """The photos of a part as the network sees them: float32 ``[photos, 3, h, w]``."""

    images: Tensor


class PartPredictor:
    """Predicts one class per part with a model that was trained on parts (``head.per_part``).

    Args:
        package: the model and how photos are prepared for it.

    Raises:
        ValueError: for a model of single photos.
    """

    def __init__(self, package: TaskPackage) -> None:
        if not package.per_part:
            raise ValueError("this model takes single photos; train with head.per_part=true for parts")
        self.package = package
        self._photos = TaskPredictor(package)

    def choose(self, photos: Sequence[T]) -> list[T]:
        """At most ``max_photos`` of the photos of a part, evenly spread."""
        count = min(len(photos), self.package.max_photos)
        return [photos[place * len(photos) // count] for place in range(count)]

    def predict(self, parts: Sequence[Sequence[Photo]]) -> list[ClassPrediction]:
        """Predicts for parts, each given by its photos (at least one); more than ``max_photos`` are thinned out.

        Raises:
            ValueError: for a part without photos.
        """
        return self.predict_prepared([self.prepare(self.choose(list(photos))) for photos in parts])

    def prepare(self, photos: Sequence[Photo] | Sequence[Image.Image]) -> PreparedPart:
        """Light, size and normalisation of the photos of one part.

        Raises:
            ValueError: without photos.
        """
        if not photos:
            raise ValueError("a part needs at least one photo")
        return PreparedPart(torch.stack([self._photos.prepare(photo).image for photo in photos]))

    @torch.no_grad()
    def predict_prepared(self, parts: Sequence[PreparedPart]) -> list[ClassPrediction]:
        """Predicts for parts from `prepare`, all in one forward pass."""
        most = max(len(part.images) for part in parts)
        device = self._photos.device
        images = torch.zeros(len(parts), most, *parts[0].images.shape[1:], device=device)
        valid = torch.zeros(len(parts), most, dtype=torch.bool, device=device)
        for row, part in enumerate(parts):
            images[row, : len(part.images)] = part.images.to(device)
            valid[row, : len(part.images)] = True
        rows = self.package.model(images, valid).float().softmax(dim=1).cpu().numpy()
        return [ClassPrediction(row) for row in rows]
