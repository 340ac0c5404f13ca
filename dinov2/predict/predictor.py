"""Prediction for users: a model that runs somewhere, and a task that knows what its outputs mean."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from dinov2.data.decoding import AnyImage
from dinov2.data.image_reader import PlacedImage
from dinov2.data.transforms import mode_of
from dinov2.tasks import TASKS, Tasks
from dinov2.tasks.inference import Inference
from dinov2.tasks.package import TaskPackage, load_task_package
from dinov2.tasks.task import PreparedImage


class Predictor(Inference):
    """Predicts for images of any size with a trained task model; they are prepared as for evaluation in training.

    The model may be a network, or any callable that maps a batch of images to outputs by name, such as the session of
    another runtime; see `Inference` for its arguments. The model of a file comes by `load`::

        predictor = Predictor.load("outputs/cracks/best.pth")
        (prediction,) = predictor.predict([image])
        prediction.draw(image).save("found.png")
    """

    @classmethod
    def of(cls, package: TaskPackage, **options: Any) -> Self:
        """A predictor with the model of a package.

        Args:
            package: the model and how images are prepared for it.
            **options: ``batch_size``, ``flips`` and ``scales``, see `Inference`.
        """
        return cls(
            package.model,
            package.task,
            package.preprocessing,
            device=package.device,
            thresholds=package.thresholds,
            **options,
        )

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str = "cpu", tasks: Tasks = TASKS, **options: Any
    ) -> Self:
        """A predictor with the model of a file, such as ``best.pth``.

        Args:
            path: written by ``run/train/finetune.py``.
            device: where to compute.
            tasks: by name.
            **options: ``batch_size``, ``flips`` and ``scales``, see `Inference`.

        Raises:
            FileNotFoundError, ValueError: see `load_task_package`.
        """
        return cls.of(load_task_package(path, device, tasks), **options)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of an image that the model sees at once, in pixels."""
        return self.preprocessing.image_size

    def prepare_blank(self) -> PreparedImage:
        """A black image to warm up with, of that size; steps of preprocessing, which may refuse it, are left out."""
        mode = mode_of(self.preprocessing.chain.num_channels)
        return self.prepare(PlacedImage(Image.new(mode, self.input_size[::-1])))

    def predict_parts(self, parts: Sequence[Sequence[AnyImage]]) -> list[Any]:
        """Predicts for parts, each given by its images (at least one), with a model trained with ``head.per_part``.

        More images than the model sees at once are thinned out evenly.

        Raises:
            ValueError: for a part without images, or a model of single images.
        """
        return self.predict_prepared([self.prepare(list(images)) for images in parts])
