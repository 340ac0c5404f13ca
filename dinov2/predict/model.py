"""A trained network for use from Python: features of images, and predictions where it has a head."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dinov2.config import Config, as_pair, load_config
from dinov2.data.decoding import AnyImage as ImageInMemory
from dinov2.data.image_reader import ImageReader, PlacedImage
from dinov2.data.preprocessing import Chain
from dinov2.data.value_range import ValueRange
from dinov2.distributed import choose_device
from dinov2.eval.command import build_frozen_backbone, trained_on
from dinov2.eval.features import FEATURES, ModelWithFeatures, make_eval_transform
from dinov2.models.description import config_of_weights, fingerprint, released_config
from dinov2.models.pretrained import read_checkpoint
from dinov2.models.released import RELEASED_BACKBONES, fetch_weights
from dinov2.models.task_model import TaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.predict.predictor import Predictor
from dinov2.tasks import TASKS, Tasks
from dinov2.tasks.joint import join_heads
from dinov2.tasks.package import TaskPackage, load_task_package
from dinov2.tasks.predictions import Prediction
from dinov2.tasks.task import PreparedImage

AnyImage = str | PathLike[str] | ImageInMemory


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network, with what decides how images are prepared for it; `load_model` makes one.

    Attributes:
        backbone: in evaluation mode, without gradients, on its device.
        image_size: height and width, in pixels, that images get before the backbone embeds them.
        whole_image: whether images are squeezed into that size; otherwise their middle is cut out.
        package: task, classes and preparation of a model with a head; None for a backbone alone.
        value_range: of the images that it was trained on, where those were more than levels of 8 bits.
        light: of the images that it was trained on, ``original`` or ``standardized``; images are prepared alike.
        preprocessing: steps that these went through, after the range of values and before the light; images are
            prepared alike.
        heads: packages by name, of several heads that were joined.
    """

    backbone: DinoVisionTransformer
    image_size: tuple[int, int]
    whole_image: bool = False
    package: TaskPackage | None = None
    value_range: ValueRange | None = None
    light: str = "original"
    preprocessing: Chain = field(default_factory=Chain)
    heads: Mapping[str, TaskPackage] = field(default_factory=dict)

    @property
    def reader(self) -> ImageReader:
        """How images are prepared, before they get their size."""
        return ImageReader(self.value_range, self.preprocessing, self.light)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.backbone.cls_token.device

    def resized(self, size: tuple[int, int]) -> "Model":
        """The same for images that are brought to another size, height and width in pixels."""

        def resize(package: TaskPackage) -> TaskPackage:
            return replace(package, preprocessing=replace(package.preprocessing, image_size=size))

        heads = {name: resize(package) for name, package in self.heads.items()}
        package = None if self.package is None else resize(self.package)
        return replace(self, image_size=size, package=package, heads=heads)

    @torch.inference_mode()
    def embed(
        self, images: AnyImage | Iterable[AnyImage], *, features: str = "cls", batch_size: int = 32
    ) -> NDArray[np.float32]:
        """Describes images by vectors, of which those of similar images are close to each other.

        Args:
            images: files, PIL images, arrays ``[H, W]`` or ``[H, W, C]`` or tensors (see `to_upright_rgb`), of any
                size; or a single one of these.
            features: ``cls`` for the class token, ``patch_mean`` for the mean of the patch tokens, ``cls_patch_mean``
                for both, one after the other, each half of unit length, ``cls_patch_statistics`` for both and the
                standard deviation over the patch tokens, one after the other, each as it is.
            batch_size: images per forward pass.

        Returns:
            float32 ``[B, D]``, a row per image, as the network gives it; ``[B, 2 D]`` or ``[B, 3 D]`` for
            several vectors.

        Raises:
            UnreadableImageError: a file is missing or no image.
            TypeError: something is none of what stands for an image.
            ValueError: an array is no image, the features are none of these, or no image fits a batch.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, found {batch_size}")
        network = ModelWithFeatures(self.backbone, features)
        transform = make_eval_transform(self.image_size, whole_image=self.whole_image)
        rows = [np.empty((0, self.backbone.embed_dim * FEATURES[features]), dtype=np.float32)]
        for some in _batches(_entries(images), batch_size):
            pixels = torch.stack([transform(_open(entry, self.reader).image) for entry in some])
            rows.append(network(pixels.to(self.device)).float().cpu().numpy())
        return np.concatenate(rows)

    def predict(
        self,
        images: AnyImage | Iterable[AnyImage | Sequence[AnyImage]],
        references: AnyImage | Iterable[AnyImage] | None = None,
    ) -> list[Prediction]:
        """Predicts what the model was fine-tuned for: classes, a mask, a depth map or boxes per image.

        Args:
            images: files, PIL images, arrays ``[H, W]`` or ``[H, W, C]`` or tensors (see `to_upright_rgb`), of any
                size; or a single one of these. For a model of parts (``head.per_part``), an entry may be a list of the
                images of one part.
            references: for a model that compares (``data.reference``): of each image one without a defect, which shows
                the same in the same place; or a single one for all images.

        Returns:
            A `ClassPrediction`, `SegmentationPrediction`, `DepthPrediction` or `DetectionPrediction` per entry, at the
            image's own size; of several heads `NamedPredictions`, a dict of these by the names of the heads.

        Raises:
            UnreadableImageError: a file is missing or no image.
            TypeError: something is none of what stands for an image, or a list where the model is not one of parts.
            ValueError: the model is a backbone alone, or an array is no image; references are missing, of another
                number or size than the images, or given to a model that does not compare.
            RunError: not even one image fits into the device's memory.
        """
        predictor = self.predictor
        predictor.check_reference(given=references is not None)
        pairs = _pairs(images, references)
        return [
            prediction
            for some in _batches(pairs, predictor.batch_size)
            for prediction in predictor.predict_prepared([self._prepare(*pair) for pair in some])
        ]

    def _prepare(self, entry: Any, reference: Any) -> PreparedImage:
        """An image, or with a model of parts a list of those of a part, as the network sees it."""
        parts = self.predictor.task.max_images > 0 and isinstance(entry, list | tuple)
        image = [_open(one, self.reader) for one in entry] if parts else _open(entry, self.reader)
        other = None if reference is None else _open(reference, self.reader)
        try:
            return self.predictor.prepare(image, reference=other)
        except ValueError as error:
            if isinstance(entry, str | PathLike):
                raise ValueError(f"{entry}: {error}") from error
            raise

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all its weights, see `dinov2.models.description.fingerprint`."""
        alone = self.package is None and not self.heads
        return fingerprint(self.backbone if alone else cast(nn.Module, self.predictor.model))

    @cached_property
    def predictor(self) -> Predictor:
        """Prepares images and predicts; use it where preparing and predicting happen in different threads.

        Raises:
            ValueError: the model is a backbone alone.
        """
        if self.heads:
            model, task, thresholds = join_heads(self.heads)
            preparation = next(iter(self.heads.values())).preprocessing
            return Predictor(model, task, preparation, device=self.device, thresholds=thresholds)
        if self.package is None:
            raise ValueError(
                "this is a backbone, which has features but predicts nothing: train a head on it with "
                "dinov2.finetune(..., backbone={'pretrained_weights': ...}) and load the best.pth of that run"
            )
        return Predictor.of(self.package)


def load_model(
    path_or_name: str | PathLike[str] | Sequence[str | PathLike[str]] | Mapping[str, str | PathLike[str]],
    config: str | Path | Mapping[str, Any] | Config | None = None,
    device: str | torch.device | None = "cpu",
    *,
    tasks: Tasks | None = None,
) -> Model:
    """Loads a fine-tuned model, a teacher of pretraining, or a released backbone; `dinov2.load` explains the arguments.

    Several paths, or paths by name, are heads that were trained on one frozen backbone.

    Raises:
        FileNotFoundError: there is no such file.
        ConnectionError: a download failed.
        ValueError: the file is damaged or no checkpoint, does not fit the options, or nothing says what it
            holds; there is no such device; or ``config`` is given for a model that describes itself.
    """
    if not isinstance(path_or_name, str | PathLike):
        if config is not None:
            raise ValueError("several heads describe themselves: leave config out")
        return _load_heads(_by_name(path_or_name), device, tasks)
    source, device = str(path_or_name), _usable_device(device)
    if isinstance(config, str) and config in RELEASED_BACKBONES:
        config = released_config(config)
    content: Mapping[str, Any] = {}
    if source not in RELEASED_BACKBONES or Path(source).exists():
        path = fetch_weights(source)
        content = read_checkpoint(path)
        if "backbone_config" in content:
            if config is not None:
                raise ValueError(
                    f"{path} is a fine-tuned model and describes itself: leave config out. Its backbone alone is the "
                    f"attribute backbone of what is loaded"
                )
            package = load_task_package(path, device, TASKS if tasks is None else tasks)
            preparation, backbone = package.preprocessing, cast(TaskModel, package.model).backbone
            whole = preparation.resize == "stretch"
            prepared = preparation.value_range, preparation.light, preparation.chain
            return Model(backbone, preparation.image_size, whole, package, *prepared)
    config = config_of_weights(source, content) if config is None else load_config(config)
    prepared = trained_on(source, config, content)
    del content
    size = as_pair(config.evaluation.image_size or config.crops.global_crops_size)
    backbone = build_frozen_backbone(config, source, device)
    return Model(backbone, size, config.evaluation.whole_image, None, *prepared)


def _load_heads(
    paths: Mapping[str, str | PathLike[str]], device: str | torch.device | None, tasks: Tasks | None
) -> Model:
    """Heads on one backbone."""
    opened = {name: load_model(path, device=device, tasks=tasks) for name, path in paths.items()}
    heads: dict[str, TaskPackage] = {}
    for name, model in opened.items():
        if model.package is None:
            raise ValueError(f"{paths[name]} is a backbone alone, and only models with a head can be joined")
        heads[name] = model.package
    joined = replace(next(iter(opened.values())), package=None, heads=heads)
    joined.predictor  # noqa: B018  # joins them, or says why not
    return joined


def _by_name(
    paths: Sequence[str | PathLike[str]] | Mapping[str, str | PathLike[str]],
) -> dict[str, str | PathLike[str]]:
    """Paths by the names of their files, or by those of their folders where the files are called alike.

    Raises:
        ValueError: there is none, or two have the same name and folder.
    """
    if isinstance(paths, Mapping):
        named = dict(paths)
    else:
        files = [Path(path).expanduser().absolute() for path in paths]
        stems = [file.stem for file in files]
        names = stems if len(set(stems)) == len(stems) else [file.parent.name for file in files]
        if len(set(names)) < len(names):
            raise ValueError(f"the heads {', '.join(map(str, paths))} need names: give a mapping from names to files")
        named = dict(zip(names, paths, strict=True))
    if not named:
        raise ValueError("no model is named")
    return named


def _usable_device(device: str | torch.device | None) -> torch.device:
    """The device, where it is there.

    Raises:
        ValueError: for an unknown name, or a device that this machine lacks.
    """
    name = "auto" if device is None else str(device)
    if name in ("auto", "cpu", "cuda", "mps"):
        return choose_device(name)
    allowed = "auto, cpu, cuda, cuda:1 for the second GPU, or mps"
    try:
        found = torch.device(name)
    except RuntimeError:
        hint = "; GPUs are called cuda" if name.lower().startswith(("gpu", "nvidia")) else ""
        raise ValueError(f"device {name!r} is unknown{hint}; allowed are {allowed}") from None
    if found.type == "cuda":
        count = torch.cuda.device_count()
        if (found.index or 0) >= count:
            raise ValueError(
                f"device {name} was asked for, but torch sees {f'{count} GPUs, from cuda:0' if count else 'no GPU'}"
            )
    return found


def _batches(entries: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """So many entries at a time."""
    remaining = iter(entries)
    while some := list(itertools.islice(remaining, size)):
        yield some


def _entries(images: Any) -> Iterable[Any]:
    """What stands for the images, one after the other, also where it is a single one."""
    return [images] if _is_single(images) else images


def _is_single(images: Any) -> bool:
    if isinstance(images, np.ndarray | torch.Tensor):
        return images.ndim < 4
    return not isinstance(images, Iterable) or isinstance(images, _ONE_IMAGE)


def _pairs(images: Any, references: Any) -> Iterator[tuple[Any, Any]]:
    """What stands for an image, and for what it is compared with; None for nothing.

    Raises:
        ValueError: there are several references, but not as many as images.
    """
    if references is None or _is_single(references):
        yield from ((entry, references) for entry in _entries(images))
        return
    nothing = object()
    for number, (entry, other) in enumerate(itertools.zip_longest(_entries(images), references, fillvalue=nothing)):
        if entry is nothing or other is nothing:
            ended, longer = ("images", "references") if entry is nothing else ("references", "images")
            raise ValueError(
                f"each image needs one reference, but the {ended} end after {number}, and the {longer} do not"
            )
        yield entry, other


_ONE_IMAGE = (str, PathLike, bytes, bytearray, Mapping, Image.Image)


def _open(image: object, reader: ImageReader) -> PlacedImage:
    """Opens and prepares what stands for an image.

    Raises:
        TypeError: for anything but a file, a PIL image or an array, with what to do.
        ValueError: for an array that is no image, or one on which a step of preprocessing fails.
    """
    if isinstance(image, str | PathLike):
        return reader.read(Path(image).expanduser())
    if isinstance(image, Image.Image | np.ndarray | torch.Tensor):
        return reader.convert(image)
    hint = ""
    if isinstance(image, bytes | bytearray):
        hint = "; open bytes by PIL.Image.open(io.BytesIO(data))"
    elif isinstance(image, list | tuple):
        hint = "; only predict takes lists in the list, of the images of one part, and only of a model of parts"
    raise TypeError(
        f"an image is a file, a PIL image, an array [H, W, C] or a tensor, found {type(image).__name__}{hint}"
    )
