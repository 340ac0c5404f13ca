"""Features of a frozen model over a whole dataset."""

import inspect
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import functional as TF

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.transforms import make_classification_eval_transform, make_normalize_transform
from dinov2.distributed import all_gather_objects, all_gather_rows, get_rank, get_world_size, is_main_process
from dinov2.logging.progress import format_duration, memory_gib

logger = logging.getLogger("dinov2")

T = TypeVar("T")

FEATURES = {"cls": 1, "patch_mean": 1, "cls_patch_mean": 2, "cls_patch_statistics": 3}  # widths of the backbone each
ROWS_AT_A_TIME = 65_536  # of a check, and of a gather
MARGIN = 256 / 224  # of the resized image over the crop, as published
MAX_NAMED = 5
MIN_DEVIATION = 1e-4  # of features between images, as share of their length
TRAIN, VAL = "train", "val"  # names of the sets in results
ALL = -1  # in place of a number of images per class


class ModelWithFeatures(nn.Module):
    """A backbone whose output is the chosen description of an image.

    The class token is what DINO trains to be the same for all crops of an image; the mean of the patches keeps more of
    what is somewhere in the image, such as a defect, and their standard deviation says how they differ, as in texture.

    Args:
        model: a vision transformer; only ``cls`` works with any network that maps images to ``[B, D]``.
        features: ``cls``, ``patch_mean``, ``cls_patch_mean`` for both, concatenated at unit length, or
            ``cls_patch_statistics`` for both and the standard deviation over the patches (0 for a single patch),
            concatenated as they are.

    Raises:
        ValueError: for other features, or those of patches from a network that has none.
    """

    def __init__(self, model: nn.Module, features: str = "cls") -> None:
        super().__init__()
        if features not in FEATURES:
            raise ValueError(f"features {features!r} is not one of {', '.join(FEATURES)}")
        if features != "cls":
            check_has_patches(model, features)
        self.model = model
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to ``[B, D]``, or ``[B, nD]`` where n vectors (`FEATURES`) are concatenated."""
        if self.features == "cls":
            output: Tensor = self.model(images)
            return output
        tokens = self.model(images, is_training=True)
        patches: Tensor = tokens["x_norm_patchtokens"].float()
        mean = patches.mean(dim=1)
        if self.features == "patch_mean":
            return mean
        cls: Tensor = tokens["x_norm_clstoken"].float()
        if self.features == "cls_patch_statistics":
            # With their lengths: that of the deviation says how much texture there is.
            return torch.cat([cls, mean, patches.std(dim=1, correction=0)], dim=1)
        # Each half has unit length, so that neither outweighs the other.
        return torch.cat([F.normalize(half, dim=1) for half in (cls, mean)], dim=1)


class ModelWithNormalize(nn.Module):
    """A backbone whose output rows have unit length.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Returns features ``[B, D]`` of unit Euclidean length, in float32 (half precision cannot hold the unit)."""
        return F.normalize(self.model(images).float(), dim=1, p=2.0)


def check_has_patches(model: nn.Module, features: str) -> None:
    """Raises ValueError for a network that cannot be asked for its patch tokens, which some features are made of."""
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(parameter.name == "is_training" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(f"{type(model).__name__} gives no patch tokens, so features must be cls, found {features!r}")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter (or buffer) lies; the CPU for a model that has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode and no gradients are kept; afterwards each has its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not `inference_mode`: a sharded model would keep inference tensors, and could not be trained on afterwards.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def share_of_this_process(num_rows: int) -> list[int]:
    """Positions of the rows that this process works on: one contiguous stretch, equally long on every process.

    Every process must run the model equally often, or the collectives of a sharded model never meet. Positions past the
    end therefore repeat the last row; `gather_shares` drops them. ``num_rows`` must be at least 1.
    """
    length = -(-num_rows // get_world_size())
    start = get_rank() * length
    return [min(position, num_rows - 1) for position in range(start, start + length)]


def gather_shares(rows: Tensor, num_rows: int, device: torch.device) -> Tensor:
    """Puts the shares of all processes back together.

    Args:
        rows: ``[length, ...]``, one row per position of `share_of_this_process`.
        num_rows: how many rows there are without the padding.
        device: of this process. Only CUDA matters: its backend (NCCL) sees no host memory, every other sees only that.

    Returns:
        All rows in order, ``[num_rows, ...]`` on the CPU, the same on every process.
    """
    world_size = get_world_size()
    if world_size == 1:
        return rows[:num_rows].cpu()
    device = device if device.type == "cuda" else torch.device("cpu")
    # In pieces, so that the device never holds the whole set.
    pieces = [
        all_gather_rows(piece.to(device)).cpu().reshape(world_size, *piece.shape)
        for piece in torch.split(rows, ROWS_AT_A_TIME)
    ]
    return torch.cat(pieces, dim=1).flatten(0, 1)[:num_rows]


def report_progress(
    steps: Iterable[T], name: str, rows_per_step: int, num_rows: int, *, every_seconds: float = 10.0
) -> Iterator[T]:
    """Yields the steps unchanged; the main process logs rows done, rate, time left and memory, and a line at the end.

    Args:
        steps: what the caller loops over.
        name: of the loop, for the log.
        rows_per_step: rows that all processes together finish in one step.
        num_rows: how many rows there are.
        every_seconds: least time between two lines.
    """
    start = spoken = time.monotonic()
    done = 0
    for step in steps:
        yield step
        done = min(done + rows_per_step, num_rows)
        now = time.monotonic()
        if is_main_process() and (done == num_rows or now - spoken >= every_seconds):
            spoken = now
            rate = done / max(now - start, 1e-9)
            left = format_duration((num_rows - done) / rate)
            logger.info(
                "%s: %d of %d, %.1f per second, %s left, %.1f GiB", name, done, num_rows, rate, left, memory_gib()
            )


class _ResizeToCover:
    """Resizes so that the image just covers a size (height, width), keeping its shape."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        """Returns the resized image (PIL or ``[C, H, W]``), at least ``size`` in both directions."""
        _, height, width = TF.get_dimensions(image)
        scale = max(self.size[0] / height, self.size[1] / width)
        size = [max(round(height * scale), self.size[0]), max(round(width * scale), self.size[1])]
        resized: Tensor = TF.resize(image, size, interpolation=transforms.InterpolationMode.BICUBIC)
        return resized


def make_eval_transform(image_size: int | tuple[int, int] = 224, *, whole_image: bool = False) -> transforms.Compose:
    """Builds the transform from a PIL image to a normalised tensor ``[3, H, W]``.

    Args:
        image_size: pixels of the result: one number for a square, or height and width.
        whole_image: squeezes the whole image into that size. By default the middle is cropped, as published, after
            resizing to 256/224 of the size, which cuts off at least an eighth of each side: a defect at the border is
            then never seen.

    Raises:
        ValueError: for a size below 1.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be at least 1, found {image_size}")
    if not whole_image and height == width:
        return make_classification_eval_transform(resize_size=round(height * MARGIN), crop_size=height)
    if whole_image:
        resize = [transforms.Resize((height, width), interpolation=transforms.InterpolationMode.BICUBIC)]
    else:
        resize = [
            _ResizeToCover((round(height * MARGIN), round(width * MARGIN))),
            transforms.CenterCrop((height, width)),
        ]
    return transforms.Compose([*resize, transforms.ToTensor(), make_normalize_transform()])


def common_classes(train_dataset: ImageDataset, val_dataset: ImageDataset) -> tuple[str, ...]:
    """Class names of both sets; made up from the labels ("0", "1", …) where the sets name none.

    Raises:
        ValueError: naming the set with missing labels or labels outside the classes, or the classes that differ.
    """
    if train_dataset.classes != val_dataset.classes:
        raise ValueError(
            "the classes of the two sets differ: "
            f"training {list(train_dataset.classes)}, validation {list(val_dataset.classes)}"
        )
    targets = {"training": train_dataset.get_targets(), "validation": val_dataset.get_targets()}
    for name, labels in targets.items():
        check_labels(labels, name)
    largest = int(max(np.max(labels) for labels in targets.values()))
    classes = train_dataset.classes or tuple(str(index) for index in range(largest + 1))
    if largest >= len(classes):
        raise ValueError(f"label {largest} is outside the {len(classes)} classes {list(classes)}")
    return classes


def check_labels(labels: NDArray[np.int64], name: str) -> None:
    """Raises ValueError unless there are labels, all of them known (not -1); ``name`` is that of the set."""
    if len(labels) == 0:
        raise ValueError(f"the {name} set has no images")
    missing = int((labels < 0).sum())
    if missing:
        raise ValueError(f"{missing} of {len(labels)} images of the {name} set have no label; all need one")


def shared_parts(train_groups: Iterable[str], val_groups: Iterable[str]) -> list[str]:
    """Parts that are in both sets, sorted."""
    return sorted(set(train_groups) & set(val_groups))


def warn_of_shared_parts(
    known_groups: Iterable[str],
    evaluated_groups: Iterable[str],
    sets: str = "the training and the validation set",
) -> list[str]:
    """Parts that are in both sets, sorted; the main process warns of them: images of a part are almost copies."""
    shared = shared_parts(known_groups, evaluated_groups)
    if shared and is_main_process():
        logger.warning("%d parts are in both %s, so the scores are too good: %s", len(shared), sets, name_some(shared))
    return shared


def warn_of_unseen_classes(labels: Iterable[int], classes: Sequence[str], name: str = TRAIN) -> list[str]:
    """Names of the classes that no image of a set shows; the main process warns of them.

    Args:
        labels: of the images.
        classes: names by label.
        name: of the set; without a class, a training set teaches less, any other says less.
    """
    seen = set(labels)
    unseen = [shown for label, shown in enumerate(classes) if label not in seen]
    if not unseen or not is_main_process():
        return unseen
    if name == TRAIN:
        logger.warning("no training image shows %s: it will never be predicted", name_some(unseen))
    elif len(seen) == 1:
        logger.warning(
            "all images of the %s set show only %s, and no image shows %s: no metric can say whether the classes are "
            "told apart, and accuracies are those of calling everything the same",
            *(name, classes[next(iter(seen))], name_some(unseen)),
        )
    else:
        logger.warning("no image of the %s set shows %s: means over classes leave it out", name, name_some(unseen))
    return unseen


def warn_of_idle_aggregation(aggregation: str, classes: Sequence[str]) -> None:
    """The main process warns of a part aggregation that was asked for and means nothing to so many classes."""
    if aggregation not in ("max", "mean") and len(classes) != 2 and is_main_process():
        logger.warning(
            "part_aggregation=%s has no effect with %d classes: a part has the mean probabilities of its images",
            aggregation,
            len(classes),
        )


def check_finite_features(embeddings: Tensor, paths: Sequence[str], name: str = "") -> None:
    """Checks that all features are finite.

    Args:
        embeddings: ``[N, …]``.
        paths: of the N images.
        name: of the set, for the message.

    Raises:
        ValueError: naming some of the images whose features are not.
    """
    # In pieces: what isfinite makes on the way is larger than the features themselves.
    pieces = embeddings.flatten(1).split(ROWS_AT_A_TIME)
    finite = torch.cat([rows.isfinite().all(dim=1) for rows in pieces])
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        where = f" of the {name} set" if name else ""
        raise ValueError(
            f"features of {len(bad)} of {len(paths)} images{where} are NaN or infinite: "
            f"{name_some([paths[index] for index in bad])}"
        )


def name_some(names: Sequence[str]) -> str:
    """The first few names, with a sign that there are more."""
    return ", ".join(names[:MAX_NAMED]) + (", …" if len(names) > MAX_NAMED else "")


@dataclass(frozen=True)
class Features:
    """What a frozen model makes of a dataset; row ``i`` belongs to image ``i`` of the dataset.

    Attributes:
        embeddings: ``[N, D]`` float32 on the CPU.
        labels: ``[N]`` int64 on the CPU, -1 where the label is missing.
        group_ids: the part of every image.
        paths: the file of every image.
    """

    embeddings: Tensor
    labels: Tensor
    group_ids: list[str]
    paths: list[str]

    def __post_init__(self) -> None:
        lengths = {len(self.embeddings), len(self.labels), len(self.group_ids), len(self.paths)}
        if len(lengths) != 1:
            raise ValueError(f"embeddings, labels, group_ids and paths must be equally long, not {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Tensor) -> "Features":
        """The features of some images, given by their positions ``[n]``."""
        indices = rows.tolist()
        return Features(
            embeddings=self.embeddings[rows],
            labels=self.labels[rows],
            group_ids=[self.group_ids[index] for index in indices],
            paths=[self.paths[index] for index in indices],
        )


class _Images(Dataset[tuple[Tensor, str]]):
    """The images at some positions of a dataset, each with what kept it from being read, empty where nothing did."""

    def __init__(self, dataset: ImageDataset, positions: Sequence[int]) -> None:
        self.dataset = dataset
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        own, problem = self.positions[index], ""
        # Another image stands in for one that cannot be read: all processes must run the model equally often, and they
        # raise together afterwards.
        for position in (own, *range(len(self.dataset))):
            try:
                image, _ = self.dataset[position]
            except OSError as error:
                path = str(self.dataset.get_image_path(own))
                problem = problem or (str(error) if path in str(error) else f"{path}: {error}")
                continue
            if not isinstance(image, Tensor):
                raise TypeError(f"the dataset's transform must return a tensor, not {type(image).__name__}")
            return image, problem
        raise ValueError(f"none of the {len(self.dataset)} images can be read")


def _collate(items: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    """Images ``[B, 3, H, W]``, and what kept some of them from being read."""
    return torch.stack([image for image, _ in items]), [problem for _, problem in items if problem]


def extract_features(
    model: nn.Module,
    dataset: ImageDataset,
    *,
    batch_size: int = 32,
    num_workers: int = 2,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    name: str = "features",
) -> Features:
    """Runs a frozen model over every image of a dataset, on all processes of the run together.

    Every process runs the same number of batches of the same sizes, so that a sharded model cannot dead-lock, and ends
    with the same result, in the dataset's order.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]``; it is not moved, and gets its modes back.
        dataset: images of one size after its transform. Labels are those of ``get_targets()``.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run; 0 decodes in this one.
        device: where images are sent; by default where the model lies.
        autocast_dtype: precision of the forward pass; by default that of the model.
        name: of the loop, for the log.

    Raises:
        ValueError: for an empty dataset, an image that cannot be read (an evaluation with holes would compare with
            nothing), features of another shape, or features that are not finite.
    """
    if len(dataset) == 0:
        raise ValueError(f"the dataset ({type(dataset).__name__}) has no images")
    device = device_of(model) if device is None else torch.device(device)
    positions = share_of_this_process(len(dataset))
    loader: DataLoader[Any] = DataLoader(  # of batches, which `_collate` makes of items
        _Images(dataset, positions),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # the loader draws a seed; an evaluation must not move a training run's numbers
    )
    autocast = torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None)
    embeddings = None
    filled = 0
    problems: list[str] = []
    with evaluating(model):
        for batch, unread in report_progress(loader, name, batch_size * get_world_size(), len(dataset)):
            problems += unread
            with autocast:
                output = model(batch.to(device, non_blocking=True))
            if not isinstance(output, Tensor) or output.ndim != 2:
                found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"the model must return features of shape [B, D], not {found}")
            if embeddings is None:
                embeddings = torch.empty(len(positions), output.shape[1])
            embeddings[filled : filled + len(output)] = output.float().cpu()
            filled += len(output)
    assert embeddings is not None
    assert filled == len(positions)
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(all_gather_objects(problems))))  # padding repeats one
    if distinct:
        more = f"; and {len(distinct) - MAX_NAMED} more" if len(distinct) > MAX_NAMED else ""
        raise ValueError("evaluation needs every image, but " + "; ".join(distinct[:MAX_NAMED]) + more)
    features = Features(
        embeddings=gather_shares(embeddings, len(dataset), device),
        labels=torch.from_numpy(dataset.get_targets()),
        group_ids=list(dataset.get_group_ids()),
        paths=[str(dataset.get_image_path(index)) for index in range(len(dataset))],
    )
    check_finite_features(features.embeddings, features.paths)
    _warn_of_equal_features(features.embeddings)
    return features


def _warn_of_equal_features(embeddings: Tensor) -> None:
    """The main process warns of features ``[N, D]`` that are the same for all images, or nearly so."""
    rows = embeddings[: min(len(embeddings), ROWS_AT_A_TIME)].double()
    deviation, length = (rows - rows.mean(dim=0)).norm(dim=1).mean(), rows.norm(dim=1).mean()
    if len(rows) > 1 and is_main_process() and bool(deviation <= MIN_DEVIATION * length):
        logger.warning(
            "the features of all %d images are nearly the same (they differ by %.1g of their length), so they hardly "
            "tell images apart: are these the right weights and images? Random weights with student.layerscale=1e-5 "
            "are like that.",
            *(len(embeddings), float(deviation / length.clamp(min=1e-300))),
        )


def few_shot_subset(labels: Tensor, n_per_class: int, seed: int) -> Tensor:
    """Draws the same number of images of every class that occurs; the draws are those of upstream.

    Args:
        labels: ``[N]`` int64.
        n_per_class: images per class; all of a class that has no more.
        seed: of the draw.

    Returns:
        Indices of the drawn images, class after class, int64.

    Raises:
        ValueError: for fewer than one image per class.
    """
    if n_per_class < 1:
        raise ValueError(f"the number of images per class must be at least 1, found {n_per_class}")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        drawn.append(members[torch.randperm(len(members), generator=generator)[:n_per_class]])
    return torch.cat(drawn)


def check_few_shot(n_per_class_list: Sequence[int], n_tries: int) -> None:
    """Raises ValueError unless every number of images per class is -1 (all) or from 1 up, and there is a try."""
    wrong = [number for number in n_per_class_list if number != ALL and number < 1]
    if wrong or not n_per_class_list:
        raise ValueError(f"n_per_class_list takes numbers from 1 up, or -1 for all images, found {n_per_class_list}")
    if n_tries < 1:
        raise ValueError(f"n_tries must be at least 1, found {n_tries}")
