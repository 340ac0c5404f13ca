"""The batches that a supervised run learns from, in an order that depends on seed and position only."""

import itertools
import logging
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Subset

from dinov2.config import as_pair
from dinov2.data.class_balance import WeightedSampler, class_weights, sample_weights
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import MaskSource
from dinov2.data.datasets.references import References
from dinov2.data.loaders import make_dataset, make_keyed_loader
from dinov2.data.mixing import Mixing
from dinov2.data.preprocessing import Chain
from dinov2.data.pretraining import SampleKey
from dinov2.data.samplers import ShardedInfiniteSampler
from dinov2.data.shared_images import warn_of_shared_images
from dinov2.data.task_dataset import TaskDataset, TaskSample, collate_task, reference_targets
from dinov2.data.task_transforms import MultiScale, make_eval_transform, make_train_transform
from dinov2.data.value_range import ValueRange
from dinov2.distributed import get_world_size, is_main_process
from dinov2.eval.features import warn_of_shared_parts
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.task import Task, TaskFacts
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")

_MOSAIC_SHARE = 0.9  # of a run; the last images are to look as they will in use


class TrainingData:
    """The training set of a run as endless batches.

    Args:
        task: knows its targets, and the options of the run.
        dataset: the training set.
        indices: of the samples (images, or parts) that are used; None for all.
        augment: whether images are changed at random; without, they are prepared as for evaluation.
        patch_size: pixels (height, width) of the network's patches, of which changing image sizes are multiples.

    Raises:
        ValueError: the set is smaller than a batch of all processes, or has no labels.
    """

    def __init__(
        self,
        task: Task,
        dataset: ImageDataset,
        *,
        indices: Sequence[int] | None = None,
        augment: bool = True,
        patch_size: int | tuple[int, int] = 1,
    ) -> None:
        config = self.config = task.config
        self.task = task
        self.images = dataset
        size, resize = as_pair(config.data.image_size), config.data.resize
        if augment:
            transform = make_train_transform(config.augmentation, size, resize)
        elif resize == "original":
            transform = make_eval_transform(size, "stretch")
        else:
            transform = make_eval_transform(size, resize, center_crop=resize == "shorter_side")
        self._augment, self._patch_size = augment, patch_size
        read_targets = task.read_targets(dataset)
        if config.data.reference:
            read_targets = reference_targets(dataset, read_targets)
        self._single = TaskDataset(dataset, read_targets, transform, training=True, seed=config.train.seed)
        self._all = task.make_samples(self._single)
        self.labels = task.labels(dataset, self._all)
        self._indices = labelled(self.labels) if indices is None else list(indices)
        if not self._indices:
            raise ValueError(f"{config.data.train_dataset_path}: no image has a label to learn from")
        self._all.spares = self._indices  # what takes the place of an unreadable image
        self.samples: Dataset[TaskSample] = _Chosen(self._all, self._indices)
        self.batch_size = min(config.train.batch_size_per_gpu, max(1, len(self._indices) // get_world_size()))
        if indices is None and self.batch_size < config.train.batch_size_per_gpu and is_main_process():
            logger.warning(
                "train.batch_size_per_gpu=%d, but %d process(es) share the %d samples of %s: batches hold %d",
                *(config.train.batch_size_per_gpu, get_world_size(), len(self), config.data.train_dataset_path),
                self.batch_size,
            )

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def samples_per_step(self) -> int:
        """Images (parts) that all processes together learn from in one step of the optimiser."""
        return self.batch_size * self.config.train.accumulate_steps * get_world_size()

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every image (part) has been seen."""
        return math.ceil(len(self) / self.samples_per_step)

    def batches(self, *, samples_seen: int = 0, num_workers: int | None = None) -> Generator[TaskSample, None, None]:
        """This process's batches from a position of the run on, without end.

        Close it: loading processes ignore the signals by which the end of a program ends such processes.
        """
        if self._augment:
            self._mix_and_scale(samples_seen)
        loader = make_keyed_loader(
            dataset=self.samples,
            collate=collate_task,
            stream=self._stream(samples_seen),
            start_position=samples_seen,
            batch_size=self.batch_size,
            num_workers=self.config.data.num_workers if num_workers is None else num_workers,
            seed=self.config.train.seed,
        )
        return _endless(loader)

    def _mix_and_scale(self, start: int) -> None:
        """Sets what is random beyond single images; see `TaskDataset`."""
        options, config = self.config.augmentation, self.config
        if options.mosaic or options.copy_paste:
            num_samples = config.optim.epochs * self.steps_per_epoch * self.samples_per_step
            until = math.floor(_MOSAIC_SHARE * num_samples)
            self._single.mix = Mixing(mosaic=options.mosaic, copy_paste=options.copy_paste, mosaic_until=until)
            self._single.spares = self._indices
        if options.multi_scale != (1.0, 1.0):
            self._single.transform_at = MultiScale(
                options=options,
                image_size=as_pair(config.data.image_size),
                resize=config.data.resize,
                unit=as_pair(self._patch_size),
                batch=self.batch_size * get_world_size(),
                start=start,
                seed=config.train.seed,
            )

    def class_weights(self) -> tuple[float, ...]:
        """Weights of the classes in the loss, as ``loss.class_weights`` says; empty for none."""
        rule = self.config.loss.class_weights
        if rule == "none" or not self.task.classes:
            return ()
        counts = self.count_classes()
        return tuple(class_weights(np.array(counts, dtype=np.int64), rule).tolist())

    def count_classes(self) -> list[int]:
        """See `Task.count_classes`."""
        return self.task.count_classes(self.images, self._indices, self.labels)

    def find_classes(self) -> tuple[list[int], int]:
        """See `Task.find_classes`."""
        return self.task.find_classes(self.images, self._indices, self.labels)

    def names(self, batch: TaskSample) -> list[str]:
        """Names of a batch's images, for messages; of parts, their ids."""
        indices = torch.as_tensor(batch["index"]).tolist()
        return [self._all.name_of(index) for index in indices]

    def _classes_to_balance(self) -> list[tuple[int, ...]]:
        """Classes of every sample that is used: those of the image, or where no image has one, those in its target."""
        labels = [self.labels[index] or () for index in self._indices]
        if any(labels):
            return labels
        if is_main_process():
            logger.info("data.balance_classes: images have no labels, so all %d targets are read once", len(labels))
        found = self.task.classes_to_balance(self.images, self._indices)
        if found is None:
            raise ValueError(
                f"data.balance_classes: no image of {self.config.data.train_dataset_path} has a class to balance"
            )
        return found

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


def _endless(loader: Iterable[TaskSample]) -> Generator[TaskSample, None, None]:
    yield from loader  # loading processes start with the first batch


class _Chosen(Subset[TaskSample]):
    """Some of the samples, still asked for by place in the stream."""

    def __getitem__(self, key: Any) -> TaskSample:
        sample: TaskSample = self.dataset[SampleKey(key.position, self.indices[key.index])]
        return sample

    def __getitems__(self, keys: list[Any]) -> list[TaskSample]:
        return [self[key] for key in keys]


def check_classes(data: TrainingData, val: ImageDataset | None) -> dict[str, tuple[str, ...]]:
    """Looks whether the training set and val show every class that they name, and says which they do not.

    Args:
        data: the training set.
        val: the other one, if there is one.

    Returns:
        Names of the classes that a set, ``train`` or ``val``, never shows.

    Raises:
        ValueError: the training set shows so few that there is nothing to tell apart.
        BadTargetError: naming a target that cannot be used.
    """
    task, options = data.task, data.task.config.data
    missing: dict[str, tuple[str, ...]] = {}
    if not task.classes:
        return missing
    found = {"train": (*data.find_classes(), len(data), options.train_dataset_path)}
    if val is not None:
        samples = task.make_samples(TaskDataset(val, task.read_targets(val), lambda sample: sample))
        labels = task.labels(val, samples)
        chosen = labelled(labels)
        if not chosen:
            raise ValueError(f"{options.val_dataset_path} (val): no image has a label to evaluate")
        found["val"] = (*task.find_classes(val, chosen, labels), len(chosen), options.val_dataset_path)
    for name, (counts, num_seen, num_samples, path) in found.items():
        missing[name] = absent = tuple(label for label, count in zip(task.classes, counts, strict=True) if count == 0)
        if not absent:
            continue
        hint = f" ({task.class_hint})" if task.class_hint else ""
        looked = (
            f"{num_seen} of {num_samples} samples were looked at" if num_seen < num_samples else f"{num_seen} samples"
        )
        if name == "train" and len(task.classes) - len(absent) < task.fewest_classes:
            left = ", ".join(label for label in task.classes if label not in absent)
            raise ValueError(
                f"{path} (train, {looked}): no {task.counted} is of the class {' or '.join(absent)}, so that nothing "
                f"{f'but {left} ' if left else ''}is left to learn{hint}"
            )
        what = "is never learnt" if name == "train" else "is not evaluated"
        if is_main_process():
            logger.warning(
                "MISSING CLASS: %s (%s, %s): no %s is of the class %s, which %s%s",
                path, name, looked, task.counted, " or ".join(absent), what, hint,
            )  # fmt: skip
    return missing


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


def name_preprocessing(config: TaskConfig, trained: Chain, in_channels: int = 3) -> TaskConfig:
    """The options with the steps themselves in place of ``data.preprocessing=auto``, every parameter written out.

    Args:
        config: of the run.
        trained: steps that the images of the backbone went through.
        in_channels: that it takes.

    Raises:
        ConfigError: naming the step that is wrong, or other channels than it takes.
    """
    named = config.data.preprocessing
    chain = trained if named == "auto" else Chain.parse(named, "data.preprocessing")
    chain.check_channels(in_channels, f"data.preprocessing={named}" if named == "auto" else "data.preprocessing")
    if chain != trained and config.backbone.pretrained_weights and is_main_process():
        logger.warning(
            "data.preprocessing takes the place of the steps that the backbone was trained with: %s instead of %s",
            *(chain.to_values() or "none", trained.to_values() or "none"),
        )
    return replace(config, data=replace(config.data, preprocessing=tuple(chain.to_values())))


def open_task_sets(config: TaskConfig, value_range: ValueRange | None = None) -> TaskSets:
    """Opens the sets, and checks that they fit the task and each other.

    Args:
        config: names them, and the steps of preprocessing (``auto`` for none, see `name_preprocessing`).
        value_range: with which the backbone was trained, for a training set whose string names none; val and test are
            read as the training set is.

    Raises:
        FileNotFoundError: a set does not exist.
        ValueError: no training set is named; a set has no labels of the task, or other classes, units or light than the
            training set; a set cannot be learnt from.
    """
    paths = {
        "train": config.data.train_dataset_path,
        "val": config.data.val_dataset_path,
        "test": config.data.test_dataset_path,
    }
    if not paths["train"]:
        raise ValueError("data.train_dataset_path is empty: name the training set, such as GroupedJSON:split=TRAIN:…")
    named = config.data.preprocessing
    chain = Chain() if named == "auto" else Chain.parse(named, "data.preprocessing")
    sets: dict[str, ImageDataset] = {}
    for name, path in paths.items():
        if path:
            sets[name] = make_dataset(dataset_str=path, value_range=value_range, preprocessing=chain)
            value_range = sets["train"].value_range
            if is_main_process() and name != "test" and (fault := sets[name].describe_light()):
                logger.warning("%s: %s", path, fault)
    kind: type[Task] = config.task_class
    facts = kind.read_facts(config, sets["train"], paths["train"])
    for name in sets.keys() - {"train"}:
        other = kind.read_facts(config, sets[name], paths[name])
        if other != facts:
            raise ValueError(f"{paths[name]} and {paths['train']} disagree: {other}, {facts}")
        try:
            kind.check_other_set(config, sets["train"], sets[name])
        except ValueError as error:
            raise ValueError(f"{paths[name]}: {error}") from error
        if sets[name].light != sets["train"].light:
            raise ValueError(
                f"{paths[name]} has light={sets[name].light}, the training set light={sets['train'].light}"
            )
    for name, dataset in sets.items():
        kind.check_dataset(config, dataset, paths[name])
        if config.data.reference:
            References(dataset)  # complains now of images without one
    for name in sets.keys() - {"train"}:
        warn_of_shared_parts(sets["train"].get_group_ids(), sets[name].get_group_ids(), f"train and {name}")
    warn_of_shared_images(sets)
    values = {name: dataset.mask_values for name, dataset in sets.items() if isinstance(dataset, MaskSource)}
    if len(set(values.values())) > 1 and is_main_process():
        given = ", ".join(f"{name} has {value or 'none'}" for name, value in values.items())
        logger.warning(
            "mask_values differ: %s; only where the masks were made differently do they mean the same", given
        )
    if "val" not in sets and is_main_process():
        logger.warning("data.val_dataset_path is empty: the last weights are kept as the best")
    return TaskSets(train=sets["train"], val=sets.get("val"), test=sets.get("test"), facts=facts)
