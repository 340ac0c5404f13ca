"""Data loaders for evaluation, supervised training and pretraining."""

import functools
import itertools
import logging
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import cv2
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from dinov2.data.collate import PretrainingBatch
from dinov2.data.datasets.base import READ_TIMEOUT, ImageDataset
from dinov2.data.datasets.registry import named_value_range, parse_dataset_string
from dinov2.data.preprocessing import Chain
from dinov2.data.pretraining import CropSample, PretrainingDataset, SampleKey
from dinov2.data.samplers import EpochSampler, InfiniteSampler, ShardedInfiniteSampler
from dinov2.data.value_range import ValueRange
from dinov2.distributed import all_gather_objects, get_rank, get_world_size, is_main_process
from dinov2.utils.interruption import HANDLED
from dinov2.utils.seeds import derive_seed, seed_everything

logger = logging.getLogger("dinov2")


class SamplerType(Enum):
    """How indices are drawn and dealt to processes; see ``dinov2.data.samplers``.

    Attributes:
        DISTRIBUTED: One pass, each process its share, the last ones padded to equal length; for evaluation.
        EPOCH: Finite epochs of ``sampler_size`` samples.
        INFINITE: Endless passes.
        SHARDED_INFINITE: Endless passes that can be entered anywhere at once; for pretraining.
        SHARDED_INFINITE_NEW: The same, shuffled by one random permutation per pass: faster for very large sets.
    """

    DISTRIBUTED = 0
    EPOCH = 1
    INFINITE = 2
    SHARDED_INFINITE = 3
    SHARDED_INFINITE_NEW = 4


def make_dataset(
    *,
    dataset_str: str,
    transform: Callable[..., Any] | None = None,
    target_transform: Callable[..., Any] | None = None,
    value_range: ValueRange | None = None,
    preprocessing: Chain = Chain(),
    read_timeout: float = READ_TIMEOUT,
) -> ImageDataset:
    """Opens the dataset that a string such as ``GroupedJSON:split=TRAIN:root=/data/parts`` names.

    Args:
        dataset_str: ``Name:key=value:key=value``.
        transform: Applied to every image (PIL, RGB).
        target_transform: Applied to every target.
        value_range: Of the set that was trained on, for one whose string names none. Without either, it is estimated
            where the files need one (`ImageDataset.value_range`).
        preprocessing: Steps that every image goes through; by default none.
        read_timeout: Seconds for an image that is read to estimate it; 0 for no limit.

    Raises:
        FileNotFoundError: A step of preprocessing names a file that is not there.
        ValueError: The string is malformed, names an unknown dataset, or the dataset has no images.
    """
    preprocessing.check_files()
    dataset_class, arguments = parse_dataset_string(dataset_str)
    light = arguments.pop("light", dataset_class.light)
    named: ValueRange | None = arguments.pop("value_range", None)
    dataset = dataset_class(transform=transform, target_transform=target_transform, **arguments)
    dataset.light = light
    dataset.preprocessing = preprocessing
    if len(dataset) == 0:
        raise ValueError(f"dataset {dataset_str} has no images")
    logger.info("dataset %s: %d images", dataset_str, len(dataset))
    if preprocessing.steps:
        logger.info("dataset %s: preprocessing %s", dataset_str, preprocessing.to_values())
    dataset.value_range = named or value_range
    if named is not None and value_range not in (None, named):
        logger.warning("dataset %s: %s becomes black and white, in training it was %s", dataset_str, named, value_range)
    if dataset.value_range is None and (found := dataset.estimate_value_range(read_timeout)) is not None:
        dataset.value_range = found
        logger.info("dataset %s: range=%s, estimated: these values become black and white", dataset_str, found)
    return dataset


def settle_value_range(sets: Sequence[tuple[str, ImageDataset]], stored: Sequence[float] | None) -> ValueRange | None:
    """Gives the sets of a run the range of values that all its processes and all its starts share.

    That is the one that the string of the training set names, else that of the checkpoint, else what the main process
    estimates. All processes call it, before an image is read.

    Args:
        sets: Dataset strings and sets, first the one that is trained on. Others may name a range of their own.
        stored: Of the checkpoint that the run goes on from, see `ValueRange.ends`; None where it begins.

    Returns:
        The range; None where the files say themselves what is white.
    """
    before, (path, trained) = ValueRange.of(stored), sets[0]
    found: ValueRange | None = all_gather_objects(named_value_range(path) or before or trained.value_range)[0]
    if stored is not None and before != found and is_main_process():
        logger.warning(
            "THE RANGE OF VALUES CHANGES from here on: %s become black and white, before it was %s",
            *(found, before or "that of each file"),
        )
    for text, dataset in sets:
        dataset.value_range = named_value_range(text) or found or dataset.value_range
    return found


def make_data_loader(
    *,
    dataset: Dataset[Any],
    batch_size: int,
    num_workers: int,
    shuffle: bool = True,
    seed: int = 0,
    sampler_type: SamplerType | None = SamplerType.INFINITE,
    sampler_size: int = -1,
    sampler_advance: int = 0,
    drop_last: bool = True,
    persistent_workers: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    prefetch_factor: int | None = None,
) -> DataLoader[Any]:
    """Builds a loader whose order and workers are seeded; with workers, batches are reproducible for a fixed number.

    Args:
        dataset: A dataset with a length.
        batch_size: Samples per batch and process.
        num_workers: Worker processes; 0 loads in this process and leaves its random generators as they are.
        shuffle: Whether the order is random.
        seed: The run's seed.
        sampler_type: How indices are drawn; None for one pass over the whole dataset in every process.
        sampler_size: Length of an epoch over all processes, for ``EPOCH`` only; -1 for the dataset's length.
        sampler_advance: Samples that this process has already taken (not for ``DISTRIBUTED`` and None).
        drop_last: Whether an incomplete last batch is left out.
        persistent_workers: Whether workers stay alive between passes.
        collate_fn: Makes a batch from samples; None for torch's default.
        prefetch_factor: Batches loaded ahead by each worker; None for torch's default.

    Raises:
        ValueError: The dataset is empty, smaller than a batch or than the number of processes, or an argument does not
            go with the sampler.
    """
    size = len(cast(Sized, dataset))
    _check_sizes(size, batch_size, num_workers, drop_last)
    if sampler_size > 0 and sampler_type is not SamplerType.EPOCH:
        raise ValueError(f"sampler_size goes with the EPOCH sampler only, got {sampler_size} with {sampler_type}")
    sampler: Sampler[int] | None = None
    if sampler_type is None or sampler_type is SamplerType.DISTRIBUTED:
        if sampler_advance > 0:
            raise ValueError(
                f"sampler_advance needs an EPOCH or infinite sampler, got {sampler_advance} with {sampler_type}"
            )
        if sampler_type is not None:
            sampler = DistributedSampler(dataset, get_world_size(), get_rank(), shuffle=shuffle, seed=seed)
    elif sampler_type is SamplerType.EPOCH:
        sampler = EpochSampler(
            size=sampler_size if sampler_size > 0 else size,
            sample_count=size,
            shuffle=shuffle,
            seed=seed,
            advance=sampler_advance,
            independent_epochs=True,
        )
    else:
        sampler = _endless_sampler(sampler_type, sample_count=size, shuffle=shuffle, seed=seed, advance=sampler_advance)
    share = len(sampler) if isinstance(sampler, Sized) else size
    if drop_last and share < batch_size:
        raise ValueError(
            f"each process gets {share} of the dataset's {size} images, fewer than one batch of {batch_size}: "
            "lower the batch size or keep incomplete batches (drop_last=False)"
        )
    return DataLoader(
        dataset,
        sampler=sampler,
        shuffle=shuffle if sampler is None else None,
        batch_size=batch_size,
        drop_last=drop_last,
        collate_fn=collate_fn,
        **_process_options(num_workers, seed, persistent_workers, prefetch_factor),
    )


def make_pretraining_loader(
    *,
    dataset: PretrainingDataset,
    collate: Callable[[Sequence[CropSample]], PretrainingBatch],
    batch_size: int,
    num_workers: int,
    seed: int = 0,
    sampler_type: SamplerType = SamplerType.SHARDED_INFINITE,
    shuffle: bool = True,
    start_position: int = 0,
    prefetch_factor: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> DataLoader[CropSample]:
    """Builds the endless loader of pretraining.

    All processes follow one global stream of samples; process r takes the positions ``start_position`` + r, + r + the
    number of processes, ... Order and crops depend on seed and position only, so that a run resumes exactly where it
    was, with any number of workers, and with another number of processes.

    Args:
        dataset: Gives the crops.
        collate: Makes the batch.
        batch_size: Images per batch and process.
        num_workers: Worker processes; 0 loads in this process.
        seed: The run's seed.
        sampler_type: One of the infinite kinds.
        shuffle: Whether the order is random.
        start_position: Samples that all processes together have already taken: iterations x batch size x processes.
        prefetch_factor: Batches loaded ahead by each worker; None for torch's default.
        rank: This process's number; None to ask the process group.
        world_size: Number of processes; None to ask the process group.
    """
    infinite = (SamplerType.INFINITE, SamplerType.SHARDED_INFINITE, SamplerType.SHARDED_INFINITE_NEW)
    if sampler_type not in infinite:
        allowed = ", ".join(kind.name for kind in infinite)
        raise ValueError(f"pretraining needs an endless sampler ({allowed}), got {sampler_type.name}")
    # The single-process stream is dealt out: that way it is the same for every number of processes.
    stream = _endless_sampler(
        sampler_type, sample_count=len(dataset), shuffle=shuffle, seed=seed, start=0, step=1, advance=start_position
    )
    return make_keyed_loader(
        dataset=dataset,
        collate=collate,
        stream=stream,
        start_position=start_position,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        prefetch_factor=prefetch_factor,
        rank=rank,
        world_size=world_size,
    )


def make_keyed_loader(
    *,
    dataset: Dataset[Any],
    collate: Callable[[Sequence[Any]], Any],
    stream: Iterable[int],
    start_position: int,
    batch_size: int,
    num_workers: int,
    seed: int = 0,
    prefetch_factor: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> DataLoader[Any]:
    """Builds a loader over one global stream of samples, each asked for by its `SampleKey`.

    Args:
        dataset: is indexed with `SampleKey`: the place in the stream decides all randomness of a sample.
        collate: makes the batch.
        stream: indices of the images from ``start_position`` on, the same in all processes; each takes its share.
        start_position: samples that all processes together have already taken.
        batch_size: samples per batch and process.
        num_workers: worker processes; 0 loads in this process.
        seed: the run's seed.
        prefetch_factor: batches loaded ahead by each worker; None for torch's default.
        rank: this process's number; None to ask the process group.
        world_size: number of processes; None to ask the process group.
    """
    rank = get_rank() if rank is None else rank
    world_size = get_world_size() if world_size is None else world_size
    _check_sizes(len(cast(Sized, dataset)), batch_size, num_workers, drop_last=True, world_size=world_size)
    if start_position < 0:
        raise ValueError(f"start_position must be at least 0, got {start_position}")
    return DataLoader(
        dataset,
        sampler=cast(Sampler[Any], _KeySampler(stream, start_position, rank, world_size)),
        batch_size=batch_size,
        drop_last=True,
        collate_fn=collate,
        **_process_options(num_workers, seed, False, prefetch_factor, rank),
    )


@dataclass(eq=False)
class _KeySampler(Sampler[SampleKey]):
    """One process's share of the global stream, each index with its position."""

    stream: Iterable[int]
    start_position: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[SampleKey]:
        positions = itertools.count(self.start_position + self.rank, self.world_size)
        indices = itertools.islice(self.stream, self.rank, None, self.world_size)
        return map(SampleKey, positions, indices)


def _init_worker(worker_id: int, *, seed: int, rank: int) -> None:
    """Seeds the generators of a worker process, keeps it on one core, and leaves signals to the process that trains."""
    # Terminals, launchers and schedulers signal workers too; the run needs them until it has stopped and saved, and
    # then tells them to end.
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)
    seed_everything(derive_seed(seed, "worker", rank, worker_id))
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def _endless_sampler(sampler_type: SamplerType, **options: Any) -> Sampler[int]:
    if sampler_type is SamplerType.INFINITE:
        return InfiniteSampler(**options)
    new = sampler_type is SamplerType.SHARDED_INFINITE_NEW
    return ShardedInfiniteSampler(**options, use_new_shuffle_tensor_slice=new)


def _process_options(
    num_workers: int, seed: int, persistent_workers: bool, prefetch_factor: int | None, rank: int | None = None
) -> dict[str, Any]:
    """Arguments of ``DataLoader`` about processes, memory and seeds."""
    rank = get_rank() if rank is None else rank
    return {
        "num_workers": num_workers,
        "persistent_workers": persistent_workers and num_workers > 0,
        "prefetch_factor": prefetch_factor if num_workers > 0 else None,
        "worker_init_fn": functools.partial(_init_worker, seed=seed, rank=rank),
        "pin_memory": torch.cuda.is_available(),
        # With a generator of its own the loader draws nothing from the caller's.
        "generator": torch.Generator().manual_seed(derive_seed(seed, "loader", rank)),
    }


def _check_sizes(size: int, batch_size: int, num_workers: int, drop_last: bool, world_size: int | None = None) -> None:
    world_size = get_world_size() if world_size is None else world_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}")
    if size == 0:
        raise ValueError("the dataset has no images")
    if size < world_size:
        raise ValueError(f"dataset has {size} images, fewer than the {world_size} processes: use fewer processes")
    if drop_last and size < batch_size:
        raise ValueError(
            f"dataset has {size} images, fewer than one batch of {batch_size}: lower the batch size "
            f"(train.batch_size_per_gpu={size}) or add images"
        )
