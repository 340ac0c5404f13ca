"""Where the batches of linear classifiers come from: features computed once, or afresh from augmented images."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.pretraining import SampleKey, isolated_random_state
from dinov2.data.samplers import ShardedInfiniteSampler
from dinov2.distributed import get_rank, get_world_size
from dinov2.eval.common_checks import MOST_NAMED, name_some
from dinov2.eval.features import Features
from dinov2.eval.linear.features import Extraction
from dinov2.utils.seeds import derive_seed

Batch = tuple[Tensor, Tensor]


class BatchSource(Protocol):
    """Gives the batches of a training run; those of an iteration depend on nothing but the seed and its number.

    All processes follow one stream of images, of which iteration ``i`` takes the next ``batch_size`` times the number
    of processes; a set that is smaller than that is gone through several times.
    """

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Rows ``[B, (blocks + 1) * D]`` and labels ``[B]`` of this process for iterations ``start`` to ``stop``."""
        ...


class CachedBatches:
    """Batches of features that are already there; see `BatchSource`.

    Args:
        features: of the training set, with all labels.
        batch_size: images per process.
        seed: of the order.
        device: where the batches go.
    """

    def __init__(self, features: Features, *, batch_size: int, seed: int, device: torch.device) -> None:
        self.features = features
        self.batch_size = batch_size
        self.seed = seed
        self.device = device

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        indices = iter(_order(len(self.features), self.seed, start * self.batch_size))
        for _ in range(start, stop):
            chosen = torch.tensor(list(itertools.islice(indices, self.batch_size)))
            rows, labels = self.features.embeddings[chosen], self.features.labels[chosen]
            yield rows.to(self.device), labels.to(self.device)


class ImageBatches:
    """Batches of features of augmented images, computed when they are asked for; see `BatchSource`.

    Args:
        extraction: makes the features.
        dataset: with all labels; its own transform is left aside.
        transform: maps an RGB image to a tensor ``[3, H, W]``; what it draws depends on the seed and the image's place
            in the stream.
        batch_size: images per process.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        extraction: Extraction,
        dataset: ImageDataset,
        transform: Callable[[Any], Tensor],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.extraction = extraction
        self.images = _AugmentedImages(dataset, transform, seed)
        self.batch_size = batch_size
        self.seed = seed

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """See `BatchSource`.

        Raises:
            ValueError: for an image that cannot be read, or features that are not finite; the images are named.
        """
        keys = _Keys(len(self.images), self.seed, start * self.batch_size, stop * self.batch_size)
        device = self.extraction.device
        loader: DataLoader[Any] = DataLoader(
            self.images,
            sampler=keys,
            batch_size=self.batch_size,
            num_workers=self.extraction.num_workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a seed; the caller's generator must not notice
        )
        for images, labels, paths, problems in loader:
            if problems:
                distinct = list(dict.fromkeys(problems))  # a small set comes several times in a batch
                raise ValueError(f"the training set needs every image, but {'; '.join(distinct[:MOST_NAMED])}")
            rows = self.extraction.of_batch(images)
            finite = rows.isfinite().all(dim=1)
            if not bool(finite.all()):
                bad = [path for path, good in zip(paths, finite.tolist(), strict=True) if not good]
                raise ValueError(f"features of {len(bad)} training images are NaN or infinite: {name_some(bad)}")
            yield rows, labels.to(device)


class _Keys(Sampler[SampleKey]):
    """This process's share of the stream, from one of its samples to another."""

    def __init__(self, num_images: int, seed: int, start: int, stop: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[SampleKey]:
        world_size = get_world_size()
        positions = range(self.start * world_size + get_rank(), self.stop * world_size, world_size)
        return map(SampleKey, positions, _order(self.num_images, self.seed, self.start))


class _AugmentedImages(Dataset[tuple[Tensor | None, int, str, str]]):
    """Image, label, path, and what kept the image from being read, empty where nothing did."""

    def __init__(self, dataset: ImageDataset, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.labels = dataset.get_targets()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> tuple[Tensor | None, int, str, str]:
        path = str(self.dataset.get_image_path(key.index))
        label = int(self.labels[key.index])
        try:
            image = self.dataset.get_image(key.index)
        except OSError as error:
            return None, label, path, str(error) if path in str(error) else f"{path}: {error}"
        with isolated_random_state(derive_seed(self.seed, "augment", key.position)):
            return self.transform(image), label, path, ""


def _collate(items: list[tuple[Tensor | None, int, str, str]]) -> tuple[Tensor, Tensor, list[str], list[str]]:
    images, labels, paths, problems = zip(*items, strict=True)
    unread = [problem for problem in problems if problem]
    stacked = torch.empty(0) if unread else torch.stack(images)
    return stacked, torch.tensor(labels), list(paths), unread


def _order(num_images: int, seed: int, advance: int) -> Sampler[int]:
    """Endless indices for this process, after the ``advance`` that it has already taken."""
    return ShardedInfiniteSampler(
        sample_count=num_images,
        shuffle=True,
        seed=derive_seed(seed, "linear order") % 2**32,
        advance=advance,
        use_new_shuffle_tensor_slice=True,
    )
