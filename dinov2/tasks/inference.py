"""From images of any size to predictions of that size: the one path of evaluation and of prediction."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torchvision.transforms.v2.functional as TF
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors

from dinov2.data.decoding import AnyImage
from dinov2.data.image_reader import PlacedImage
from dinov2.data.task_transforms import make_eval_transform
from dinov2.data.transforms import channel_statistics
from dinov2.eval.sliding_window import DenseInference, Tile
from dinov2.tasks.package import Preprocessing
from dinov2.tasks.task import Outputs, PreparedImage, TaskOutputs, spread_evenly
from dinov2.utils.errors import RunError

logger = logging.getLogger("dinov2")

RunModel = Callable[..., Mapping[str, Tensor | NDArray[Any]]]

_MAX_AT_ONCE = 64
_PIXELS_AT_ONCE_ON_CPU = 400_000  # more do not make a processor faster
_BYTES_PER_PIXEL = 4000  # of a large network, generously: out of memory costs a retry, not the run


class Inference:
    """Prepares images, runs a model on them (or on windows of large ones), and makes predictions of its outputs.

    Args:
        model: maps a batch of images, float32 ``[B, C, h, w]``, to outputs by name, as the task expects them: a network
            of torch, or whatever runs an exported one. It gets one argument per entry of `Task.inputs`.
        task: knows what the outputs mean.
        preprocessing: of images.
        device: where the model wants its images.
        batch_size: images (or windows of a large one) per forward pass; by default what suits the device. Where it does
            not fit into the device's memory it is halved.
        flips: average with the mirrored image.
        scales: average over the image at these sizes, as factors; dense tasks only.
        thresholds: of scores, by name; the task looks at them.

    Attributes:
        batch_size: as it is now.

    Raises:
        FileNotFoundError: a step of preprocessing names a file that is not there.
        ValueError: for a batch size below 1, scales that are not above 0, scales of a task that is not dense, or flips
            of one whose outputs cannot be averaged.
    """

    def __init__(
        self,
        model: RunModel,
        task: TaskOutputs,
        preprocessing: Preprocessing,
        *,
        device: torch.device | str = "cpu",
        batch_size: int | None = None,
        flips: bool = False,
        scales: Sequence[float] = (1.0,),
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.preprocessing = preprocessing
        self.device = torch.device(device)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        self.batch_size = batch_size or choose_batch_size(self.device, preprocessing.image_size)
        self.flips = flips
        self.scales = tuple(scales)
        self.thresholds = dict(thresholds or {})
        preprocessing.chain.check_files()
        # Once and on the device: (levels / 255 - mean) / std as a multiplication and an addition.
        mean, std = channel_statistics(preprocessing.chain.num_channels)
        self._scale = torch.tensor([1 / (255 * spread) for spread in std], device=self.device).view(-1, 1, 1)
        self._bias = torch.tensor(mean, device=self.device).view(-1, 1, 1) * -255 * self._scale
        self._keeps_size = preprocessing.resize == "original" and task.windowed
        if not task.dense and self.scales != (1.0,):
            raise ValueError(f"scales {list(self.scales)} are for dense tasks; task={task.name} is none")
        if flips:
            task.unmirror({})  # complains now, where the task has nothing to average
        self._crops = not task.windowed and preprocessing.resize == "shorter_side"
        self._transform = make_eval_transform(preprocessing.image_size, preprocessing.resize, center_crop=self._crops)
        self._dense_inference(1)  # complains of scales now

    @property
    def compares(self) -> bool:
        """Whether the model compares every image with one without a defect."""
        return "reference" in self.task.inputs

    def predict(
        self, images: Sequence[AnyImage | PlacedImage], references: Sequence[AnyImage | PlacedImage] | None = None
    ) -> list[Any]:
        """Predicts for images of any size: opened by Pillow, arrays or tensors, see `to_upright_rgb`.

        A `PlacedImage` has been through preprocessing and light already.

        Args:
            images: of any size.
            references: of each image one without a defect, for a model that compares.

        Raises:
            ValueError: for an image that cannot be prepared (see `prepare`), or another number of references.
            RunError: when the model gives NaN, or not even one image fits into the device's memory.
        """
        beside = [None] * len(images) if references is None else references
        if len(beside) != len(images):
            raise ValueError(f"{len(images)} images need a reference each, found {len(beside)} references")
        return self.predict_prepared(
            [self.prepare(image, reference=other) for image, other in zip(images, beside, strict=True)]
        )

    def prepare(
        self,
        image: AnyImage | PlacedImage | Sequence[AnyImage | PlacedImage],
        *,
        reference: AnyImage | PlacedImage | None = None,
    ) -> PreparedImage:
        """Preprocessing, light, size and normalisation; may run in several threads.

        Args:
            image: one, or several of a part, which are thinned out evenly to what the model sees at once.
            reference: an image without a defect to compare with, for a model that compares, and for no other.

        Raises:
            ValueError: for an array that is no image, one on which a step of preprocessing fails, an image so long and
                thin that it would be enlarged beyond all bounds, a part without images, or a part where the model takes
                single images; for a reference that is missing, of another size than the image, or given to a model that
                does not compare.
        """
        self.check_reference(given=reference is not None)
        if isinstance(image, Sequence):
            if not self.task.max_images:
                raise ValueError("this model takes single images; train with head.per_part=true for parts")
            if not image:
                raise ValueError("a part needs at least one image")
            single = [self.prepare(one) for one in spread_evenly(image, self.task.max_images)]
            return replace(single[0], inputs={"image": torch.stack([one.inputs["image"] for one in single])})
        placed = self._placed(image)
        pixels, size = self._pixels(placed)
        inputs = {"image": pixels}
        height, width = size
        if reference is not None:
            inputs["reference"], _ = self._pixels(placed.cut_alike(self._placed(reference)))
        rows, columns = pixels.shape[1:]
        scale = (rows / height, columns / width)
        padding = (0, 0)
        if self._crops:
            factor = min(self.preprocessing.image_size) / min(size)
            scale = (max(1, round(height * factor)) / height, max(1, round(width * factor)) / width)
            padding = (-((round(height * scale[0]) - rows) // 2), -((round(width * scale[1]) - columns) // 2))
        return PreparedImage(inputs, size, scale, padding, self.thresholds, placed.placement)

    def check_reference(self, *, given: bool) -> None:
        """Raises a ValueError where a reference is missing, or given to a model that does not compare."""
        if self.compares and not given:
            raise ValueError(
                "this model compares each image with one without a defect (data.reference): give its reference"
            )
        if given and not self.compares:
            raise ValueError(
                "this model looks at single images and takes no reference; train with data.reference=true for that"
            )

    def predict_prepared(self, images: Sequence[PreparedImage]) -> list[Any]:
        """Predicts for images from `prepare`; those of one size go through the network together."""
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for place, image in enumerate(images):
            by_shape.setdefault(tuple(image.inputs["image"].shape), []).append(place)
        predictions: dict[int, Any] = {}
        for places in by_shape.values():
            one_by_one = self._has_windows(images[places[0]])
            while places:
                predictions.update(self._predict_some(images, places, most=1 if one_by_one else len(places)))
                places = [place for place in places if place not in predictions]
        return [predictions[place] for place in range(len(images))]

    def _predict_some(self, images: Sequence[PreparedImage], places: Sequence[int], most: int) -> dict[int, Any]:
        """Predictions of a first few images, all prepared alike; the batch is halved as long as memory runs out."""
        while True:
            chosen = places[: min(most, self.batch_size)]
            try:
                found = self._predict_alike([images[place] for place in chosen])
            except RuntimeError as error:
                if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                    raise
                cause = str(error).splitlines()[0]
            else:
                return dict(zip(chosen, found, strict=True))
            if self.batch_size == 1:
                raise RunError(f"not even one image fits into the memory of {self.device}: {cause}")
            self.batch_size //= 2
            logger.warning("out of memory on %s: going on with a batch size of %d", self.device, self.batch_size)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    @torch.no_grad()
    def _predict_alike(self, images: Sequence[PreparedImage]) -> list[Any]:
        inputs = {name: torch.stack([image.inputs[name] for image in images]) for name in images[0].inputs}
        if self._has_windows(images[0]):
            outputs = self.task.merge_windows(self._tiles(inputs), images[0].size)
        else:
            inputs = {name: value.to(self.device) for name, value in inputs.items()}
            if not self.task.dense:
                outputs = self._run(inputs)
                if self.flips and inputs["image"].ndim == 4:
                    mirrored = self.task.unmirror(self._run({name: value.flip(-1) for name, value in inputs.items()}))
                    outputs = {name: (value + mirrored[name]) / 2 for name, value in outputs.items()}
            else:
                channels: dict[str, int] = {}
                maps = self._dense_inference(self.batch_size).predict(*self._stacked(inputs, channels))
                outputs = dict(zip(channels, maps.split(list(channels.values()), dim=1), strict=True))
        found = self.task.postprocess(outputs, images)
        return [
            prediction if image.placement is None else prediction.placed(image.placement)
            for prediction, image in zip(found, images, strict=True)
        ]

    def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor | NDArray[Any]]:
        """What the model says about a batch of normalised images, by name."""
        outputs: Mapping[str, Tensor | NDArray[Any]] = self.task.forward(self.model, inputs)
        return outputs

    def _run(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Activated outputs of the model for a batch as `prepare` gives it, on the device."""
        if self._keeps_size:
            inputs = {name: torch.addcmul(self._bias, value.float(), self._scale) for name, value in inputs.items()}
        outputs = self.forward(inputs)
        activated = self.task.activate({name: torch.as_tensor(value) for name, value in outputs.items()})
        for name, value in activated.items():
            if value.isnan().any():  # which would look like the first class, or like a value that nobody knows
                raise RunError(
                    f"the model's {name} is NaN, so nothing can be predicted: its weights are damaged or not finite, "
                    "or the runtime computes in a precision that they do not fit"
                )
        return activated

    def _stacked(
        self, inputs: Mapping[str, Tensor], channels: dict[str, int]
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """The model and its images as one function of one tensor; the outputs' channels are noted when it is run."""

        def run(images: Tensor) -> Tensor:
            outputs = self._run(dict(zip(inputs, images.chunk(len(inputs), dim=1), strict=True)))
            channels.update({name: value.shape[1] for name, value in outputs.items()})
            return torch.cat(list(outputs.values()), dim=1)

        return run, torch.cat(list(inputs.values()), dim=1)

    def _tiles(self, inputs: Mapping[str, Tensor]) -> Iterator[Tile]:
        """What the model says about windows of one large image: bands of averaged maps, or each window by itself."""
        if self.task.dense:
            top = 0
            channels: dict[str, int] = {}
            for band in self._dense_inference(self.batch_size).bands(*self._stacked(inputs, channels)):
                parts = dict(zip(channels, band.split(list(channels.values()), dim=1), strict=True))
                yield Tile(parts, top, 0, (band.shape[2], band.shape[3]))
                top += band.shape[2]
            return
        size = inputs["image"].shape[-2:]
        rows, columns = (min(most, length) for most, length in zip(self.preprocessing.image_size, size, strict=True))
        places = [(top, left) for top in _starts(size[0], rows) for left in _starts(size[1], columns)]
        for start in range(0, len(places), self.batch_size):
            chosen = places[start : start + self.batch_size]
            outputs = self._run(
                {
                    name: torch.cat([value[..., y : y + rows, x : x + columns] for y, x in chosen]).to(self.device)
                    for name, value in inputs.items()
                }
            )
            for number, (top, left) in enumerate(chosen):
                one = {name: value[number : number + 1] for name, value in outputs.items()}
                yield Tile(one, top, left, (rows, columns))

    def _placed(self, image: AnyImage | PlacedImage) -> PlacedImage:
        return image if isinstance(image, PlacedImage) else self.preprocessing.reader.convert(image)

    def _pixels(self, placed: PlacedImage) -> tuple[Tensor, tuple[int, int]]:
        """An image as the network sees it, and its own height and width."""
        pixels = TF.pil_to_tensor(placed.image)
        if not self._keeps_size:
            pixels = self._transform({"image": tv_tensors.Image(pixels)})["image"]
        return pixels, (placed.image.height, placed.image.width)

    def _has_windows(self, image: PreparedImage) -> bool:
        """Whether a prepared image is larger than what the model sees at once."""
        height, width = self.preprocessing.image_size
        largest = max(self.scales)
        return self._keeps_size and (image.size[0] * largest > height or image.size[1] * largest > width)

    def _dense_inference(self, batch_size: int) -> DenseInference:
        return DenseInference(
            window=self.preprocessing.image_size if self._keeps_size else None,
            flips=self.flips,
            scales=self.scales,
            batch_size=batch_size,
            device=self.device,
        )


def _starts(length: int, window: int) -> list[int]:
    """Where windows begin that overlap by a third; the last lies flush with the border."""
    return [*range(0, length - window, max(2 * window // 3, 1)), length - window]


def choose_batch_size(device: torch.device, image_size: tuple[int, int]) -> int:
    """Images per forward pass that suit a device: few on a processor, on a GPU what its free memory should hold."""
    pixels = image_size[0] * image_size[1]
    if device.type == "cpu":
        return min(max(_PIXELS_AT_ONCE_ON_CPU // pixels, 1), 8)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else torch.mps.recommended_max_memory() // 2
    return min(max(free // (_BYTES_PER_PIXEL * pixels), 1), _MAX_AT_ONCE)
