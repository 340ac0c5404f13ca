"""Photos with what a task wants to know about them, ready for a supervised network."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.data.datasets.dense_targets import BadTargetError, DepthSource, MaskSource
from dinov2.data.deadline import Deadline
from dinov2.data.pretraining import SampleKey, isolated_random_state
from dinov2.data.task_samples import Depth, TaskSample
from dinov2.utils.errors import RunError
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")

TASKS = ("classification", "segmentation", "depth")
MAX_SUBSTITUTES = 16


@runtime_checkable
class LabelSource(Protocol):
    """A dataset whose photos may have several classes at once."""

    def get_labels(self, index: int) -> tuple[int, ...]:
        """All classes of a photo; empty where it is of none."""


class TaskDataset(Dataset[TaskSample]):
    """Reads photos and the targets of one task, and transforms them together.

    It is indexed by a number, or by a `SampleKey`: then everything random follows from the seed and the key's position,
    in any process, so that a resumed run goes on with the same crops. With a number, transforms draw from torch's
    global generator as it stands.

    In training, a photo that cannot be read is replaced by another, chosen by seed and position, and reported in
    ``unreadable``. In evaluation it is an error, for a score over other photos would mislead. A target that cannot be
    read is an error always.

    Args:
        dataset: where photos and targets come from: a `MaskSource` for segmentation, a `DepthSource` for depth.
        task: one of ``TASKS``.
        transform: see `dinov2.data.task_transforms`.
        num_classes: classes of photos or pixels; of no account for depth.
        multi_label: whether a photo may have several classes (``get_labels`` of the dataset).
        training: what happens to photos that cannot be read.
        seed: the run's seed.
        read_timeout: seconds after which a photo counts as unreadable; 0 for no limit.

    Attributes:
        spares: photos that may take the place of an unreadable one, by default all. Where a run leaves out photos, such
            as those without a label, it should leave them out here too.

    Raises:
        ValueError: for an unknown task, an empty dataset, or one that does not know what the task asks for.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        task: str,
        transform: Callable[[TaskSample], TaskSample],
        *,
        num_classes: int,
        multi_label: bool = False,
        training: bool = False,
        seed: int = 0,
        read_timeout: float = 0.0,
    ) -> None:
        _check(dataset, task, num_classes, multi_label)
        self.dataset = dataset
        self.task = task
        self.transform = transform
        self.num_classes = num_classes
        self.multi_label = multi_label
        self.training = training
        self.seed = seed
        self.spares: Sequence[int] = range(len(dataset))
        self._in_time = Deadline(read_timeout)
        self._logged: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: int | SampleKey) -> TaskSample:
        """Returns the transformed sample; its index is that of the photo that was read.

        Raises:
            UnreadableImageError: in evaluation.
            BadTargetError: the mask or the depth map cannot be used.
            ValueError: a label outside the classes, or what the transform refuses; the photo is named.
            RunError: in training, when neither the photo nor any of its substitutes can be read.
        """
        with self.random_state(key):
            if not self.training:
                return self.load(_index(key))
            unreadable: list[str] = []
            for index in self.substitutes(key, self.spares):
                try:
                    return {**self.load(index), "unreadable": tuple(dict.fromkeys(unreadable))}
                except OSError as error:
                    unreadable.append(self.note_unreadable(index, error))
        raise RunError(f"no readable photo after {MAX_SUBSTITUTES} substitutes: {', '.join(dict.fromkeys(unreadable))}")

    def load(self, index: int) -> TaskSample:
        """The transformed sample of one photo, which is never replaced by another.

        Raises:
            OSError: the photo cannot be read.
            BadTargetError, ValueError: see `__getitem__`.
        """
        sample: TaskSample = self._in_time(self._read, index)
        try:
            return self.transform(sample)
        except ValueError as error:
            raise ValueError(f"{self.dataset.get_image_path(index)}: {error}") from error

    @contextmanager
    def random_state(self, key: int | SampleKey) -> Iterator[None]:
        """Inside the block, the generators are those of the key's position; a plain index leaves them alone."""
        if isinstance(key, SampleKey):
            with isolated_random_state(derive_seed(self.seed, "augment", key.position)):
                yield
        else:
            yield

    def substitutes(self, key: int | SampleKey, spares: Sequence[int]) -> Iterator[int]:
        """The index of a key, then those among the spares to try in its place."""
        yield _index(key)
        position = key.position if isinstance(key, SampleKey) else key
        for attempt in range(MAX_SUBSTITUTES):
            yield spares[derive_seed(self.seed, "substitute", position, attempt) % len(spares)]

    def note_unreadable(self, index: int, error: OSError) -> str:
        """Logs, once per process, that a photo is left out; returns its path."""
        name = str(self.dataset.get_image_path(index))
        if name not in self._logged:
            self._logged.add(name)
            logger.warning("image %s cannot be read and is replaced by another: %s", name, error)
        return name

    def _read(self, index: int) -> TaskSample:
        pixels = torch.from_numpy(np.array(self.dataset.get_image(index)))
        sample: TaskSample = {"image": tv_tensors.Image(pixels.permute(2, 0, 1)), "index": index, "unreadable": ()}
        if self.task == "classification":
            sample["label"] = self._read_label(index)
            return sample
        if self.task == "segmentation":
            assert isinstance(self.dataset, MaskSource)
            target = sample["mask"] = tv_tensors.Mask(torch.from_numpy(self.dataset.get_mask(index)))
        else:
            assert isinstance(self.dataset, DepthSource)
            target = sample["depth"] = Depth(torch.from_numpy(self.dataset.get_depth(index)))
        if target.shape != pixels.shape[:2]:
            found, expected = (f"{height} x {width}" for height, width in (target.shape, pixels.shape[:2]))
            name = str(self.dataset.get_image_path(index))
            raise BadTargetError(name, f"its target has {found} pixels (height x width), the photo {expected}")
        return sample

    def _read_label(self, index: int) -> Tensor:
        if not self.multi_label:
            label = self.dataset.get_target(index)
            self._check_labels(index, () if label is None else (label,))
            return torch.tensor(MISSING_TARGET if label is None else label)
        assert isinstance(self.dataset, LabelSource)
        labels = self.dataset.get_labels(index)
        self._check_labels(index, labels)
        return torch.zeros(self.num_classes).index_fill(0, torch.tensor(labels, dtype=torch.int64), 1.0)

    def _check_labels(self, index: int, labels: tuple[int, ...]) -> None:
        wrong = [label for label in labels if not 0 <= label < self.num_classes]
        if wrong:
            name = self.dataset.get_image_path(index)
            raise ValueError(f"{name}: label {wrong[0]} is outside the {self.num_classes} classes of the task")


def collate_task(samples: Sequence[TaskSample]) -> dict[str, Any]:
    """Stacks samples of one size into a batch.

    Returns:
        ``image [B, 3, h, w]``, ``mask [B, h, w]``, ``depth [B, h, w]``, ``label [B]`` or ``[B, C]``, ``valid [B, P]``
        and ``index [B]`` as far as the samples have them; ``boxes`` and ``box_labels`` as lists of ``B`` tensors;
        ``unreadable``, one tuple of paths.

    Raises:
        ValueError: for no samples, or samples of different sizes: where photos are not stretched, batches hold one.
    """
    if not samples:
        raise ValueError("cannot collate an empty list of samples")
    shapes = {_shapes(sample) for sample in samples}
    if len(shapes) > 1:
        found = ", ".join(f"{height} x {width}" for height, width in sorted({shape[0][-2:] for shape in shapes}))
        raise ValueError(
            f"photos of one batch differ in size ({found}, or their targets do): use resize=stretch, or batches of one"
        )
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values: list[Any] = [sample[key] for sample in samples]  # type: ignore[literal-required]
        if key in ("boxes", "box_labels"):
            batch[key] = values
        elif key == "unreadable":
            batch[key] = tuple(name for names in values for name in names)
        else:
            batch[key] = torch.tensor(values) if key == "index" else torch.stack(values)
    return batch


def _shapes(sample: TaskSample) -> tuple[tuple[int, ...], ...]:
    pixels = (sample.get("image"), sample.get("mask"), sample.get("depth"))
    return tuple(tuple(tensor.shape) for tensor in pixels if tensor is not None)


def _index(key: int | SampleKey) -> int:
    return key.index if isinstance(key, SampleKey) else key


def _check(dataset: ImageDataset, task: str, num_classes: int, multi_label: bool) -> None:
    name = type(dataset).__name__
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; allowed: {', '.join(TASKS)}")
    if len(dataset) == 0:
        raise ValueError(f"dataset {name} has no images")
    if multi_label and task != "classification":
        raise ValueError(f"multi_label goes with classification only, got task {task}")
    if multi_label and not isinstance(dataset, LabelSource):
        raise ValueError(f"dataset {name} knows one class per photo only; several at once need gt_labels (GroupedJSON)")
    if task == "segmentation":
        if not isinstance(dataset, MaskSource):
            raise ValueError(f"dataset {name} has no masks, which segmentation needs")
        if len(dataset.mask_classes) > num_classes:
            raise ValueError(f"masks of {name} have {len(dataset.mask_classes)} classes, the task {num_classes}")
    if task == "depth" and not isinstance(dataset, DepthSource):
        raise ValueError(f"dataset {name} has no depth maps, which the task depth needs")
