"""Images with the targets of a task, ready for a supervised network."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypedDict, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.data.datasets.boxes import BoxSource
from dinov2.data.datasets.dense_targets import BadTargetError, DepthSource, MaskSource
from dinov2.data.datasets.references import References
from dinov2.data.preprocessing import Placement
from dinov2.data.pretraining import MAX_SUBSTITUTES, SampleKey, UnreadableLog, candidates
from dinov2.data.reading import Deadline
from dinov2.utils.errors import RunError
from dinov2.utils.seeds import derive_seed, isolated_random_state


class Depth(tv_tensors.Mask):  # type: ignore[misc]  # torchvision ships no types
    """Depth or height at every pixel: float32 ``[H, W]``, NaN where nothing was measured.

    As a kind of mask it is resampled by nearest neighbour wherever torchvision's v2 transforms handle it, so values are
    never mixed across edges. What those transforms add around the image must be filled with NaN (their ``fill``);
    `dinov2.data.task_transforms` does so by itself.
    """


class TaskSample(TypedDict, total=False):
    """One image with its targets; a key is absent where nothing is known.

    Attributes:
        image: uint8 `tv_tensors.Image` ``[3, H, W]``; after a transform float32 ``[3, h, w]``, normalised by the
            ImageNet statistics; in a bag ``[P, 3, h, w]``.
        reference: an image to compare with, of the same kind and size, for tasks that look at two.
        mask: uint8 `tv_tensors.Mask` ``[H, W]``, classes or ``IGNORED``; after a transform int64 ``[h, w]``.
        depth: `Depth` ``[H, W]``; after a transform float32 ``[h, w]``, NaN where unknown.
        boxes: `tv_tensors.BoundingBoxes` ``[n, 4]``; after a transform in XYXY pixels, float32.
        box_labels: int64 ``[n]``, class of each box.
        label: int64 scalar, -1 where it is missing; float32 ``[C]`` of zeros and ones for several labels at once, all
            -1 where they are missing.
        valid: bool ``[P]``, in a bag only: which of its places hold an image.
        index: number of the image, or of the part, in its dataset.
        unreadable: paths of images that came first but could not be read.
    """

    image: Tensor
    reference: Tensor
    mask: Tensor
    depth: Tensor
    boxes: Tensor
    box_labels: Tensor
    label: Tensor
    valid: Tensor
    index: int
    unreadable: tuple[str, ...]


logger = logging.getLogger("dinov2")


@runtime_checkable
class LabelSource(Protocol):
    """A dataset whose images may have several classes at once."""

    def get_labels(self, index: int) -> tuple[int, ...]:
        """All classes of an image; empty where it is of none."""


ReadOther = Callable[[], TaskSample | None]
"""Gives another sample of the set, drawn at random and not transformed; None where none can be read."""

ReadTargets = Callable[[int], TaskSample]
"""Gives what a task wants to know about an image, by its number; it goes through the transform with the image."""


def label_targets(dataset: ImageDataset, num_classes: int, *, multi_label: bool = False) -> ReadTargets:
    """Reads ``label``: the class of each image, or zeros and ones for several classes at once.

    Args:
        dataset: knows the labels.
        num_classes: of the task; a label outside is a ValueError that names the image.
        multi_label: whether an image may have several classes (``get_labels`` of the dataset).

    Raises:
        ValueError: the dataset knows one class per image only, and several are asked for.
    """
    if multi_label and not isinstance(dataset, LabelSource):
        name = type(dataset).__name__
        raise ValueError(f"dataset {name} knows one class per image only; several at once need gt_labels (GroupedJSON)")
    return functools.partial(_read_label, dataset, num_classes, multi_label)


def _read_label(dataset: Any, num_classes: int, multi_label: bool, index: int) -> TaskSample:
    label = None if multi_label else dataset.get_target(index)
    labels = dataset.get_labels(index) if multi_label else () if label is None else (label,)
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        name = dataset.get_image_path(index)
        raise ValueError(f"{name}: label {wrong[0]} is outside the {num_classes} classes of the task")
    if multi_label:
        places = torch.tensor(labels, dtype=torch.int64)
        return {"label": torch.zeros(num_classes).index_fill(0, places, 1.0)}
    return {"label": torch.tensor(MISSING_TARGET if label is None else label)}


def mask_targets(dataset: ImageDataset, num_classes: int) -> ReadTargets:
    """Reads ``mask``: the class of every pixel.

    Args:
        dataset: a `MaskSource`; a mask that cannot be used is a BadTargetError.
        num_classes: of the task.

    Raises:
        ValueError: the dataset has no masks, or masks of more classes.
    """
    name = type(dataset).__name__
    if not isinstance(dataset, MaskSource):
        raise ValueError(f"dataset {name} has no masks, which segmentation needs")
    if len(dataset.mask_classes) > num_classes:
        raise ValueError(f"masks of {name} have {len(dataset.mask_classes)} classes, the task {num_classes}")
    return functools.partial(_read_mask, dataset)


def _read_mask(dataset: MaskSource, index: int) -> TaskSample:
    return {"mask": tv_tensors.Mask(torch.from_numpy(dataset.get_mask(index)))}


def depth_targets(dataset: ImageDataset) -> ReadTargets:
    """Reads ``depth`` of every pixel.

    Args:
        dataset: a `DepthSource`; a map that cannot be used is a BadTargetError.

    Raises:
        ValueError: the dataset has no depth maps.
    """
    if not isinstance(dataset, DepthSource):
        raise ValueError(f"dataset {type(dataset).__name__} has no depth maps, which the task depth needs")
    return functools.partial(_read_depth, dataset)


def _read_depth(dataset: DepthSource, index: int) -> TaskSample:
    return {"depth": Depth(torch.from_numpy(dataset.get_depth(index)))}


def box_targets(dataset: ImageDataset, num_classes: int) -> ReadTargets:
    """Reads ``boxes`` and ``box_labels``, without those of crowds.

    Args:
        dataset: a `BoxSource`; boxes of an image that cannot be used are a BadTargetError.
        num_classes: of the task.

    Raises:
        ValueError: the dataset has no boxes, or boxes of more classes.
    """
    name = type(dataset).__name__
    if not isinstance(dataset, BoxSource):
        raise ValueError(f"dataset {name} has no boxes, which detection needs")
    if len(dataset.box_classes) > num_classes:
        raise ValueError(f"boxes of {name} have {len(dataset.box_classes)} classes, the task {num_classes}")
    return functools.partial(_read_boxes, dataset)


def _read_boxes(dataset: Any, index: int) -> TaskSample:
    boxes, labels = dataset.get_objects(index)
    size = dataset.get_image_size(index)
    return {
        "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=size),
        "box_labels": torch.from_numpy(labels),
    }


def reference_targets(dataset: ImageDataset, read_targets: ReadTargets) -> ReadTargets:
    """Reads ``reference`` beside other targets: an image without a defect, see `References`.

    Args:
        dataset: names references, or has good images of the same part.
        read_targets: reads the others.

    Raises:
        FileNotFoundError, ValueError: an image has nothing to be compared with; it is named.
    """
    return functools.partial(_read_reference, References(dataset), read_targets)


def _read_reference(references: References, read_targets: ReadTargets, index: int) -> TaskSample:
    pixels = torch.from_numpy(np.array(references.read(index)))
    return {"reference": tv_tensors.Image(pixels.permute(2, 0, 1)), **read_targets(index)}


class TaskDataset(Dataset[TaskSample]):
    """Reads images and the targets of one task, and transforms them together.

    It is indexed by a number, or by a `SampleKey`: then everything random follows from the seed and the key's position,
    in any process, so that a resumed run goes on with the same crops. With a number, transforms draw from torch's
    global generator as it stands.

    In training, an image that cannot be read is replaced by another, chosen by seed and position, and reported in
    ``unreadable``. In evaluation it is an error, for a score over other images would mislead. A target that cannot be
    read is an error always.

    Args:
        dataset: where images come from.
        read_targets: gives the targets of an image, such as `label_targets`, `mask_targets`, `depth_targets` or
            `box_targets`.
        transform: see `dinov2.data.task_transforms`.
        training: what happens to images that cannot be read.
        seed: the run's seed.
        read_timeout: seconds after which an image counts as unreadable; 0 for no limit.

    Attributes:
        mix: makes one sample of several, before the transform, for a position of the stream; None for none.
        transform_at: gives the transform for a position of the stream; None for one and the same.
        spares: images that may take the place of an unreadable one, by default all. Where a run leaves out images, such
            as those without a label, it should leave them out here too.

    Raises:
        ValueError: for an empty dataset.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        read_targets: ReadTargets,
        transform: Callable[[TaskSample], TaskSample],
        *,
        training: bool = False,
        seed: int = 0,
        read_timeout: float = 0.0,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError(f"dataset {type(dataset).__name__} has no images")
        self.dataset = dataset
        self.read_targets = read_targets
        self.transform = transform
        self.training = training
        self.seed = seed
        self.mix: Callable[[TaskSample, ReadOther, int], TaskSample] | None = None
        self.transform_at: Callable[[int], Callable[[TaskSample], TaskSample]] | None = None
        self.spares: Sequence[int] = range(len(dataset))
        self._in_time = Deadline(read_timeout)
        self._log = UnreadableLog()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | SampleKey) -> TaskSample:
        """Returns the transformed sample; its index is that of the image that was read.

        Raises:
            UnreadableImageError: in evaluation.
            BadTargetError: the mask or the depth map cannot be used.
            ValueError: a label outside the classes, or what the transform refuses; the image is named.
            RunError: in training, when neither the image nor any of its substitutes can be read.
        """
        unreadable: list[str] = []
        with self.random_state(key):
            for index in self.candidates(key, self.spares):
                try:
                    sample = self.load(index, key, unreadable)
                    return {**sample, "unreadable": tuple(dict.fromkeys(unreadable))}
                except OSError as error:
                    unreadable.append(self.replace_unreadable(index, error))
        raise RunError(f"no readable image after {MAX_SUBSTITUTES} substitutes: {', '.join(dict.fromkeys(unreadable))}")

    def load(self, index: int, key: int | SampleKey | None = None, unreadable: list[str] | None = None) -> TaskSample:
        """The transformed sample of one image, which is never replaced by another.

        Args:
            index: of the image.
            key: what was asked for; its position may decide the transform, and whether others are mixed in.
            unreadable: takes the names of images that should have been mixed in and cannot be read.

        Raises:
            OSError: the image cannot be read.
            BadTargetError, ValueError: see `__getitem__`.
        """
        sample: TaskSample = self._in_time(self._read, index)
        transform = self.transform
        try:
            if isinstance(key, SampleKey):
                if self.mix is not None:
                    names = [] if unreadable is None else unreadable
                    sample = self.mix(sample, functools.partial(self._read_other, names), key.position)
                if self.transform_at is not None:
                    transform = self.transform_at(key.position)
            return transform(sample)
        except BadTargetError:
            raise  # of another image, which it names
        except ValueError as error:
            raise ValueError(f"{self.dataset.get_image_path(index)}: {error}") from error

    def _read_other(self, unreadable: list[str]) -> TaskSample | None:
        for _ in range(MAX_SUBSTITUTES):
            index = self.spares[int(torch.randint(len(self.spares), ()))]
            try:
                return self._in_time(self._read, index)
            except OSError as error:
                unreadable.append(self.replace_unreadable(index, error))
        return None

    def random_state(self, key: int | SampleKey) -> AbstractContextManager[None]:
        """Inside the block, the generators are those of the key's position; a plain index leaves them alone."""
        if isinstance(key, SampleKey):
            return isolated_random_state(derive_seed(self.seed, "augment", key.position))
        return nullcontext()

    def candidates(self, key: int | SampleKey, spares: Sequence[int]) -> Iterator[int]:
        """The index of a key, then those among the spares to try in its place."""
        index, position = (key.index, key.position) if isinstance(key, SampleKey) else (key, key)
        return candidates(index, position, self.seed, spares)

    def replace_unreadable(self, index: int, error: OSError) -> str:
        """Path of an image that another will replace, logged once per process; in evaluation, the error is raised."""
        if not self.training:
            raise error
        return self._log(self.dataset.get_image_path(index), error)

    def name_of(self, index: int) -> str:
        """Path of an image, for messages."""
        return str(self.dataset.get_image_path(index))

    def _read(self, index: int) -> TaskSample:
        placed = self.dataset.get_placed_image(index)
        pixels, placement = torch.from_numpy(np.array(placed.image)), placed.placement
        image = pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
        full_size = tuple(pixels.shape[:2]) if placement is None else placement.full_size
        sample: TaskSample = {"image": tv_tensors.Image(image), "index": index, "unreadable": ()}
        targets = self.read_targets(index)
        for name, target in targets.items():
            if isinstance(target, tv_tensors.Mask | tv_tensors.Image) and target.shape[-2:] != full_size:
                found, expected = (f"{height} x {width}" for height, width in (target.shape[-2:], full_size))
                what = name if name == "reference" else "target"
                message = f"its {what} has {found} pixels (height x width), the image {expected}"
                raise BadTargetError(self.name_of(index), message)
        sample.update(targets if placement is None else cut_targets(targets, placement))
        return sample


def cut_targets(targets: TaskSample, placement: Placement) -> TaskSample:
    """Targets of a part of an image that preprocessing has cut out; boxes are clipped, those outside left out."""
    found: dict[str, Any] = {**targets}
    for name in ("mask", "depth", "boxes", "reference"):
        if name in found:
            found[name] = TF.crop(found[name], *placement.origin, *placement.size)
    if "boxes" in found:
        kept = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(dim=1)
        found["boxes"] = tv_tensors.wrap(found["boxes"][kept], like=found["boxes"])
        found["box_labels"] = found["box_labels"][kept]
    return cast(TaskSample, found)


def collate_task(samples: Sequence[TaskSample]) -> dict[str, Any]:
    """Stacks samples of one size into a batch.

    Returns:
        ``image [B, 3, h, w]``, ``mask [B, h, w]``, ``depth [B, h, w]``, ``label [B]`` or ``[B, C]``, ``valid [B, P]``
        and ``index [B]`` as far as the samples have them; ``boxes`` and ``box_labels`` as lists of ``B`` tensors;
        ``unreadable``, one tuple of paths.

    Raises:
        ValueError: for no samples, or samples of different sizes: where images are not stretched, batches hold one.
    """
    if not samples:
        raise ValueError("cannot collate an empty list of samples")
    batch: dict[str, Any] = {}
    rows: Sequence[Mapping[str, Any]] = samples
    for key in rows[0]:
        values = [row[key] for row in rows]
        if key in ("boxes", "box_labels"):  # every image has its own number of them
            batch[key] = values
        elif key == "unreadable":
            batch[key] = tuple(name for names in values for name in names)
        elif key == "index":
            batch[key] = torch.tensor(values)
        elif len({value.shape for value in values}) > 1:
            sizes = sorted({tuple(sample["image"].shape[-2:]) for sample in samples})
            found = ", ".join(f"{height} x {width}" for height, width in sizes)
            raise ValueError(
                f"images of one batch differ in size ({found}, or their targets do): use resize=stretch, or batches of "
                "one"
            )
        else:
            batch[key] = torch.stack(values)
    return batch


class PartBags(Dataset[TaskSample]):
    """One item per part: up to ``max_images`` of its images, each transformed by itself, and the part's label.

    In training the images are a random subset, drawn anew every time; in evaluation they are evenly spaced over the
    part, in the order of the dataset. Bags with fewer images are filled up with zeros that ``valid`` marks.

    Where the labels of a part's images differ, the part gets the label by which parts are scored
    (`dinov2.eval.metrics.classification`): with two classes 1 as soon as one image has it, for a defect is often seen
    in one image only; with more classes the most frequent label, of equally frequent ones the lowest. Images
    without a label do not count; a part without any label has -1.

    Images that cannot be read are left out in training, and other images of the part take their place; a part without
    any readable image is replaced by another one. In evaluation they are an error.

    Args:
        images: reads and transforms single images, with one label each.
        num_classes: of the labels.
        max_images: largest number ``P`` of images of a bag, at least 1.

    Attributes:
        part_ids: the parts, in the order in which they first occur.
        labels: ``[parts]``, -1 where missing.
        num_mixed: parts whose images have different labels.
        spares: parts that may take the place of one without a readable image, by default all.

    Raises:
        ValueError: for ``max_images`` below 1.
    """

    def __init__(self, images: TaskDataset, *, num_classes: int, max_images: int) -> None:
        if max_images < 1:
            raise ValueError(f"max_photos must be at least 1, got {max_images}")
        self.images = images
        self.max_images = max_images
        members: dict[str, list[int]] = {}
        for index, part in enumerate(images.dataset.get_group_ids()):
            members.setdefault(part, []).append(index)
        self.part_ids = tuple(members)
        self._members = [np.array(indices, dtype=np.int64) for indices in members.values()]
        targets = images.dataset.get_targets()
        self.labels = np.array([part_label(targets[indices], num_classes) for indices in self._members])
        self.spares: Sequence[int] = range(len(self._members))
        self.num_mixed = sum(len(set(targets[indices].tolist()) - {MISSING_TARGET}) > 1 for indices in self._members)
        if self.num_mixed:
            logger.info("%d of %d parts have images of different labels", self.num_mixed, len(self))

    def __len__(self) -> int:
        return len(self._members)

    def name_of(self, part: int) -> str:
        """Id of a part, for messages."""
        return f"part {self.part_ids[part]}"

    def __getitem__(self, key: int | SampleKey) -> TaskSample:
        """Returns ``image [P, 3, h, w]``, ``valid [P]``, ``label`` and ``index``, the number of the part.

        Raises:
            OSError: in evaluation, for an image that cannot be read.
            ValueError: images of different sizes, or what `TaskDataset` refuses.
            RunError: in training, when neither the part nor any of its substitutes has a readable image.
        """
        unreadable: list[str] = []
        with self.images.random_state(key):
            for part in self.images.candidates(key, self.spares):
                found = self._load(part, key, unreadable)
                if not found:
                    continue
                sizes = sorted({tuple(image.shape[-2:]) for image in found})
                if len(sizes) > 1:
                    raise ValueError(
                        f"images of part {self.part_ids[part]!r} have the sizes {sizes} after the transform; bags need "
                        "one: use resize=stretch, or center_crop"
                    )
                bag = found[0].new_zeros(self.max_images, *found[0].shape)
                bag[: len(found)] = torch.stack(found)
                return {
                    "image": bag,
                    "valid": torch.arange(self.max_images) < len(found),
                    "label": torch.tensor(int(self.labels[part])),
                    "index": part,
                    "unreadable": tuple(dict.fromkeys(unreadable)),
                }
        raise RunError(f"no part with a readable image after {MAX_SUBSTITUTES} substitutes: {', '.join(unreadable)}")

    def _load(self, part: int, key: int | SampleKey, unreadable: list[str]) -> list[Tensor]:
        """Up to ``max_images`` images of a part; adds the names of those that cannot be read."""
        order = self._members[part]
        if self.images.training:
            order = order[torch.randperm(len(order)).numpy()]
        elif len(order) > self.max_images:
            order = order[np.linspace(0, len(order) - 1, self.max_images).round().astype(np.int64)]
        found: list[Tensor] = []
        for index in order.tolist():
            if len(found) == self.max_images:
                break
            try:
                found.append(self.images.load(index, key, unreadable)["image"])
            except OSError as error:
                unreadable.append(self.images.replace_unreadable(index, error))
        return found


def part_label(labels: npt.NDArray[np.int64], num_classes: int) -> int:
    """The label of a part whose images have ``labels``, -1 where missing; see `PartBags`."""
    known = labels[labels != MISSING_TARGET]
    if len(known) == 0:
        return MISSING_TARGET
    return int(known.max()) if num_classes == 2 else int(np.bincount(known).argmax())
