"""The batches that a supervised run learns from, in an order that depends on seed and position only."""

import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Subset

from dinov2.config import as_pair
from dinov2.data.class_balance import WeightedSampler, class_weights, sample_weights
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import IGNORED, DepthSource, MaskSource
from dinov2.data.loaders import make_dataset, make_keyed_loader
from dinov2.data.pretraining import SampleKey
from dinov2.data.samplers import ShardedInfiniteSampler
from dinov2.data.task_dataset import (
    DepthTargets,
    LabelTargets,
    MaskTargets,
    PartBags,
    ReadTargets,
    TaskDataset,
    TaskSample,
    collate_task,
)
from dinov2.data.task_transforms import make_eval_transform, make_train_transform
from dinov2.distributed import get_world_size, is_main_process
from dinov2.eval.features import name_some, shared_parts
from dinov2.tasks.classification import several_labels
from dinov2.tasks.depth import check_depths_in_range
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.task import TaskFacts
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")

_MASKS_COUNTED = 500  # for class weights of pixels: enough for their shares, and seconds instead of hours


class TrainingData:
    """The training set of a run as endless batches.

    Args:
        config: options of the run.
        dataset: the training set.
        facts: its classes.
        indices: of the photos (parts) that are used; None for all.
        augment: whether images are changed at random; without, they are prepared as for evaluation.

    Raises:
        ValueError: the set is smaller than a batch of all processes, or has no labels.
    """

    def __init__(
        self,
        config: TaskConfig,
        dataset: ImageDataset,
        facts: TaskFacts,
        *,
        indices: Sequence[int] | None = None,
        augment: bool = True,
    ) -> None:
        self.config = config
        self.images = dataset
        photos = TaskDataset(
            dataset,
            _targets_reader(config, dataset, facts),
            _train_transform(config) if augment else _eval_transform(config),
            training=True,
            seed=config.train.seed,
        )
        most = config.data.max_photos
        self._all = PartBags(photos, num_classes=facts.num_outputs, max_photos=most) if config.head.per_part else photos
        self.labels = _labels(config, dataset, self._all)
        self._indices = labelled(self.labels) if indices is None else list(indices)
        if not self._indices:
            raise ValueError(f"{config.data.train_dataset_path}: no image has a label to learn from")
        self._all.spares = self._indices  # what takes the place of an unreadable photo
        self.samples: Dataset[TaskSample] = _Chosen(self._all, self._indices)
        self.batch_size = min(config.train.batch_size_per_gpu, max(1, len(self._indices) // get_world_size()))

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def samples_per_step(self) -> int:
        """Photos (parts) that all processes together learn from in one step of the optimiser."""
        return self.batch_size * self.config.train.accumulate_steps * get_world_size()

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every photo (part) has been seen."""
        return math.ceil(len(self) / self.samples_per_step)

    def batches(self, *, samples_seen: int = 0, num_workers: int | None = None) -> "EndlessBatches":
        """This process's batches from a position of the run on."""
        workers = self.config.data.num_workers if num_workers is None else num_workers
        return EndlessBatches(
            make_keyed_loader(
                dataset=self.samples,
                collate=collate_task,
                stream=self._stream(samples_seen),
                start_position=samples_seen,
                batch_size=self.batch_size,
                num_workers=workers,
                seed=self.config.train.seed,
            )
        )

    def class_weights(self, facts: TaskFacts) -> tuple[float, ...]:
        """Weights of the classes in the loss, as ``loss.class_weights`` says; empty for none."""
        rule = self.config.loss.class_weights
        if rule == "none" or not facts.classes:
            return ()
        counts = np.zeros(len(facts.classes), dtype=np.int64)
        if self.config.task == "segmentation":
            assert isinstance(self.images, MaskSource)
            counts += count_pixels(self.images, self._indices)
        else:
            for index in self._indices:
                for label in self.labels[index] or ():
                    counts[label] += 1
        return tuple(class_weights(counts, rule).tolist())

    def names(self, batch: TaskSample) -> list[str]:
        """Names of a batch's photos, for messages; of parts, their ids."""
        indices = torch.as_tensor(batch["index"]).tolist()
        return [self._all.name_of(index) for index in indices]

    def _classes_to_balance(self) -> list[tuple[int, ...]]:
        """Classes of every sample that is used: those of the photo, or where no photo has one, those in its mask."""
        labels = [self.labels[index] or () for index in self._indices]
        if any(labels):
            return labels
        if not isinstance(self.images, MaskSource) or self.config.task != "segmentation":
            raise ValueError(
                f"data.balance_classes: no photo of {self.config.data.train_dataset_path} has a class to balance"
            )
        if is_main_process():
            logger.info("data.balance_classes: photos have no labels, so all %d masks are read once", len(labels))
        return [classes_in(self.images.get_mask(index)) for index in self._indices]

    def _stream(self, position: int) -> Iterator[int]:
        if not self.config.data.balance_classes:
            return iter(
                ShardedInfiniteSampler(
                    sample_count=len(self), shuffle=True, seed=self.config.train.seed, start=0, step=1, advance=position
                )
            )
        return self._balanced_stream(sample_weights(self._classes_to_balance()), position)

    def _balanced_stream(self, weights: npt.NDArray[np.float64], position: int) -> Iterator[int]:
        epoch, skipped = divmod(position, len(self))
        for number in itertools.count(epoch):
            advance = skipped if number == epoch else 0
            sampler = WeightedSampler(
                weights, size=len(self), seed=self.config.train.seed, start=0, step=1, advance=advance
            )
            sampler.set_epoch(number)
            yield from sampler


def count_pixels(masks: MaskSource, indices: Sequence[int]) -> npt.NDArray[np.int64]:
    """How many pixels every class has ``[C]``, in masks spread over the set.

    A few hundred masks tell the shares. Where a class is in none of them, others are looked through until it is found:
    a rare class must not come out as one that does not exist.
    """
    counts = np.zeros(len(masks.mask_classes), dtype=np.int64)
    spread = np.unique(np.linspace(0, len(indices) - 1, min(_MASKS_COUNTED, len(indices))).astype(int))
    others = np.setdiff1d(np.arange(len(indices)), spread)
    for number, place in enumerate([*spread.tolist(), *others.tolist()]):
        if number >= len(spread) and counts.all():
            break
        mask = masks.get_mask(indices[place])
        counts += np.bincount(mask[mask != IGNORED].ravel(), minlength=len(counts))
    return counts


class EndlessBatches:
    """Iterator over batches, whose loading processes end when it is closed."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._source: Iterator[Any] | None = None

    def __iter__(self) -> "EndlessBatches":
        return self

    def __next__(self) -> TaskSample:
        if self._source is None:
            self._source = iter(self._loader)
        batch: TaskSample = next(self._source)
        return batch

    def close(self) -> None:
        """Ends the loading processes: they ignore the signals by which the end of a program ends such processes."""
        self._source = None


class _Chosen(Subset[TaskSample]):
    """Some of the samples, still asked for by place in the stream."""

    def __getitem__(self, key: Any) -> TaskSample:
        sample: TaskSample = self.dataset[SampleKey(key.position, self.indices[key.index])]
        return sample

    def __getitems__(self, keys: list[Any]) -> list[TaskSample]:
        return [self[key] for key in keys]


def classes_in(mask: npt.NDArray[np.uint8]) -> tuple[int, ...]:
    """Classes of a mask beside the background."""
    return tuple(value for value in np.unique(mask).tolist() if value not in (0, IGNORED))


def labelled(labels: Sequence[tuple[int, ...] | None]) -> list[int]:
    """Numbers of the samples that say anything."""
    return [index for index, label in enumerate(labels) if label is not None]


def spread_over_classes(labels: Sequence[tuple[int, ...] | None], count: int, seed: int) -> list[int]:
    """A few labelled samples, drawn so that every class comes about equally often.

    Args:
        labels: of every sample; None where it has none.
        count: how many; fewer where there are fewer.
        seed: draws them.
    """
    rng = np.random.default_rng(derive_seed(seed, "few samples"))
    by_class: dict[tuple[int, ...], list[int]] = {}
    for index in rng.permutation(labelled(labels)).tolist():
        by_class.setdefault(labels[index] or (), []).append(index)
    turns = itertools.zip_longest(*(by_class[key] for key in sorted(by_class)))
    chosen = [index for turn in turns for index in turn if index is not None]
    return sorted(chosen[:count])


def _labels(config: TaskConfig, dataset: ImageDataset, samples: TaskDataset | PartBags) -> list[tuple[int, ...] | None]:
    """Classes of every sample, None where there is nothing to learn from it.

    Masks are not opened: a photo counts by its label where it has one. Every photo of a set with depth counts.
    """
    if isinstance(samples, PartBags):
        return [(int(label),) if label >= 0 else None for label in samples.labels]
    if config.data.multi_label:
        return [several_labels(dataset, index) for index in range(len(dataset))]
    targets = dataset.get_targets().tolist()
    nothing = None if config.task == "classification" else ()
    return [(target,) if target >= 0 else nothing for target in targets]


def _targets_reader(config: TaskConfig, dataset: ImageDataset, facts: TaskFacts) -> ReadTargets:
    if config.task == "segmentation":
        return MaskTargets(dataset, facts.num_outputs)
    if config.task == "depth":
        return DepthTargets(dataset)
    return LabelTargets(dataset, facts.num_outputs, multi_label=config.data.multi_label)


def _train_transform(config: TaskConfig) -> Any:
    return make_train_transform(config.augmentation, as_pair(config.data.image_size), config.data.resize)


def _eval_transform(config: TaskConfig) -> Any:
    size = as_pair(config.data.image_size)
    if config.data.resize == "original":
        return make_eval_transform(size, "stretch")
    crop = config.data.resize == "shorter_side"
    return make_eval_transform(size, config.data.resize, center_crop=crop)


@dataclass(frozen=True, kw_only=True)
class TaskSets:
    """Opened sets.

    Attributes:
        train: what is learnt from.
        val: chooses the best weights; None where none is named.
        test: scored once at the end; None where none is named.
        facts: what they all say about the task.
    """

    train: ImageDataset
    val: ImageDataset | None
    test: ImageDataset | None
    facts: TaskFacts

    def named(self) -> dict[str, ImageDataset]:
        """The sets there are, by role."""
        sets = {"train": self.train, "val": self.val, "test": self.test}
        return {name: dataset for name, dataset in sets.items() if dataset is not None}


def open_task_sets(config: TaskConfig) -> TaskSets:
    """Opens the sets, and checks that they fit the task and each other.

    Raises:
        FileNotFoundError: a set does not exist.
        ValueError: no training set is named; a set has no labels of the task, or other classes, units or light than the
            training set; a set has no depth that the head can say.
    """
    paths = {
        "train": config.data.train_dataset_path,
        "val": config.data.val_dataset_path,
        "test": config.data.test_dataset_path,
    }
    if not paths["train"]:
        raise ValueError("data.train_dataset_path is empty: name the training set, such as GroupedJSON:split=TRAIN:…")
    sets = {name: make_dataset(dataset_str=path) for name, path in paths.items() if path}
    facts = task_facts(config, sets["train"], paths["train"])
    for name in sets.keys() - {"train"}:
        other = task_facts(config, sets[name], paths[name])
        if other != facts:
            raise ValueError(f"{paths[name]} and {paths['train']} disagree: {_describe(other)}, {_describe(facts)}")
        if sets[name].light != sets["train"].light:
            raise ValueError(
                f"{paths[name]} has light={sets[name].light}, the training set light={sets['train'].light}"
            )
    if config.task == "depth":
        span = {"min_depth": config.head.min_depth, "max_depth": config.head.max_depth}
        for name, dataset in sets.items():
            check_depths_in_range(dataset, paths[name], **span)
    _warn_of_shared_parts(sets)
    if "val" not in sets and is_main_process():
        logger.warning("data.val_dataset_path is empty: the last weights are kept as the best")
    return TaskSets(train=sets["train"], val=sets.get("val"), test=sets.get("test"), facts=facts)


def task_facts(config: TaskConfig, dataset: ImageDataset, path: str) -> TaskFacts:
    """What a set says about the task.

    Raises:
        ValueError: when it has no labels for it, or fewer than two classes.
    """
    if config.task == "depth":
        if not isinstance(dataset, DepthSource):
            raise ValueError(f"{path} has no depth maps; GroupedJSON (depth_path, height_path), NYUDepthV2 … do")
        return TaskFacts(depth_unit=dataset.depth_unit)
    if config.task == "segmentation":
        if not isinstance(dataset, MaskSource):
            raise ValueError(f"{path} has no masks; GroupedJSON (mask_path), VOCSegmentation, ImageMaskFolder do")
        classes = tuple(dataset.mask_classes)
    else:
        classes = dataset.classes
    if len(classes) < (1 if config.data.multi_label else 2):
        raise ValueError(f"{path} has the classes {list(classes)}: {config.task} needs at least two")
    return TaskFacts(classes=classes)


def _describe(facts: TaskFacts) -> str:
    return f"classes {list(facts.classes)}" if facts.classes else f"depth in {facts.depth_unit!r}"


def _warn_of_shared_parts(sets: dict[str, ImageDataset]) -> None:
    if not is_main_process():
        return
    train_groups = sets["train"].get_group_ids()
    for name in sets.keys() - {"train"}:
        shared = shared_parts(train_groups, sets[name].get_group_ids())
        if shared:
            logger.warning(
                "%d parts are in both train and %s, so its scores are too good: %s",
                *(len(shared), name, name_some(shared)),
            )
