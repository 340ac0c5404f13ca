"""Samplers that share a stream of dataset indices among processes.

In all of them process ``start`` of ``step`` takes its own share of the stream, and ``advance`` is the number of samples
that this process has already taken. ``start`` and ``step`` default to the rank and the number of processes.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

from dinov2.distributed import get_rank, get_world_size
from dinov2.utils.seeds import derive_seed

_SKIP_CHUNK = 1 << 24


@dataclass(kw_only=True, eq=False, repr=False)
class SharedStream(Sampler[int]):
    """One process's share of a stream of indices.

    Attributes:
        seed: The run's seed.
        start: First position of this process.
        step: Distance between its positions.
        advance: Samples that this process has already taken.
    """

    seed: int = 0
    start: int = field(default_factory=get_rank)
    step: int = field(default_factory=get_world_size)
    advance: int = 0

    def __post_init__(self) -> None:
        if self.advance < 0:
            raise ValueError(f"advance must be at least 0, got {self.advance}")
        if self.step < 1 or self.start < 0:
            raise ValueError(
                f"start must be at least 0 and step at least 1, got start={self.start} and step={self.step}"
            )


@dataclass(kw_only=True, eq=False, repr=False)
class DatasetStream(SharedStream):
    """A stream of all images of a dataset, as often one as another.

    Attributes:
        sample_count: Number of images in the dataset.
        shuffle: Whether the order is random.
    """

    sample_count: int
    shuffle: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample_count < 1:
            raise ValueError("the dataset has no images to sample from")


@dataclass(kw_only=True, eq=False, repr=False)
class EpochStream(SharedStream):
    """Finite epochs; ``advance`` counts within the epoch that is iterated first, later ones are whole.

    Attributes:
        size: Length of an epoch over all processes.
        epoch: The epoch that the next iteration goes through.
    """

    size: int
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise ValueError(f"an epoch needs at least one sample, got size={self.size}")
        self._to_skip = self.advance

    @abstractmethod
    def order(self) -> npt.NDArray[np.int64]:
        """Indices ``[size]`` of the selected epoch, for all processes together."""

    def set_epoch(self, epoch: int) -> None:
        """Selects the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(0, len(range(self.start, self.size, self.step)) - self._to_skip)

    def __iter__(self) -> Iterator[int]:
        skipped, self._to_skip = self._to_skip, 0
        yield from self.order()[self.start :: self.step][skipped:].tolist()


@dataclass(kw_only=True, eq=False, repr=False)
class EpochSampler(EpochStream, DatasetStream):
    """A finite epoch of ``size`` indices, drawn from as many copies of the dataset as are needed.

    ``set_epoch`` selects the epoch. Upstream seeds epoch e with ``seed * e``, so that the first epoch ignores the seed
    and others coincide; ``independent_epochs`` seeds each (seed, epoch) on its own.

    Attributes:
        independent_epochs: Whether the seed of an epoch mixes seed and epoch properly.
    """

    independent_epochs: bool = False

    def order(self) -> npt.NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.size) % self.sample_count
        copies = -(-self.size // self.sample_count)
        seed = self.seed * self.epoch if self.seed != 0 else self.epoch
        rng = np.random.default_rng(derive_seed(self.seed, "epoch", self.epoch) if self.independent_epochs else seed)
        return rng.choice(np.tile(np.arange(self.sample_count), copies), self.size, replace=False)


@dataclass(kw_only=True, eq=False, repr=False)
class InfiniteSampler(DatasetStream):
    """Endless passes over the dataset, each in a new order.

    Every pass is dealt to the processes from its beginning; with a number of images that is no multiple of ``step`` the
    first processes therefore finish a pass with one sample more. Skipping replays random numbers, not shuffles.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start >= self.sample_count:
            raise ValueError(
                f"process {self.start} would never get one of {self.sample_count} images: use fewer processes"
            )

    def __iter__(self) -> Iterator[int]:
        passes, skipped = divmod(self.advance, len(range(self.start, self.sample_count, self.step)))
        words = _TorchWords(self.seed)
        if self.shuffle:
            words.skip(passes * self.sample_count)
        while True:
            order = list(range(self.sample_count))
            if self.shuffle:
                _swap_shuffle(order, words.draw(self.sample_count))
            yield from order[self.start :: self.step][skipped:]
            skipped = 0


@dataclass(kw_only=True, eq=False, repr=False)
class ShardedInfiniteSampler(DatasetStream):
    """Endless passes over the dataset; any pass can be computed without the ones before it.

    All processes follow one global stream that depends on the seed alone: pass e is ``order(e)``, and process ``start``
    takes the positions start, start + step, ... of the stream. Nothing is ever dropped, and a run may go on with
    another number of processes. With one process the stream is upstream's; upstream's with several leaves out the same
    ``sample_count % step`` images for ever.

    Attributes:
        use_new_shuffle_tensor_slice: Whether a pass is shuffled by one random permutation instead of successive swaps.
    """

    use_new_shuffle_tensor_slice: bool = False

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Indices ``[sample_count]`` of pass ``epoch``, for all processes together."""
        if not self.shuffle:
            return np.arange(self.sample_count)
        base = _random_permutation(self.sample_count, self.seed)
        # Of ``epoch << 24`` 32 bits are used, which would come again after 256 passes.
        seed = self.seed + ((epoch % 256) << 24) + epoch // 256
        if self.use_new_shuffle_tensor_slice:
            return base[_random_permutation(self.sample_count, seed)]
        return _inside_out_shuffle(base, _TorchWords(seed).draw(self.sample_count - 1))

    def __iter__(self) -> Iterator[int]:
        epoch, offset = divmod(self.start + self.step * self.advance, self.sample_count)
        while True:
            order = self.order(epoch)
            yield from order[offset :: self.step].tolist()
            # Where this process's next position lies, counted from the beginning of the following pass (or passes).
            offset += self.step * len(range(offset, self.sample_count, self.step))
            passes, offset = divmod(offset, self.sample_count)
            epoch += passes


class _TorchWords:
    """The 32-bit numbers that a seeded torch CPU generator draws, in bulk (both are MT19937 with the same seeding)."""

    def __init__(self, seed: int) -> None:
        self._source = np.random.RandomState(seed % 2**32)

    def draw(self, count: int) -> npt.NDArray[np.int64]:
        """The next ``count`` numbers, 0..2**32 - 1."""
        return self._source.randint(0, 2**32, size=count, dtype=np.uint32).astype(np.int64)

    def skip(self, count: int) -> None:
        """Draws and drops ``count`` numbers."""
        for done in range(0, count, _SKIP_CHUNK):
            self._source.randint(0, 2**32, size=min(_SKIP_CHUNK, count - done), dtype=np.uint32)


def _swap_shuffle(values: list[int], words: npt.NDArray[np.int64]) -> None:
    """Fisher-Yates in place: position i is swapped with one of i..n-1, as ``torch.randint(i, n)`` would draw it."""
    positions = np.arange(len(values))
    for i, j in enumerate((positions + words % (len(values) - positions)).tolist()):
        values[i], values[j] = values[j], values[i]


def _inside_out_shuffle(values: npt.NDArray[np.int64], words: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Fisher-Yates inside out: value i goes to one of 0..i, as ``torch.randint(i + 1)`` would draw it for i >= 1."""
    first, *rest = values.tolist()
    shuffled = [first]
    targets = (words % np.arange(2, len(values) + 1)).tolist()
    for value, j in zip(rest, targets, strict=True):
        shuffled.append(value)
        shuffled[-1], shuffled[j] = shuffled[j], value
    return np.array(shuffled, dtype=np.int64)


def _random_permutation(count: int, seed: int) -> npt.NDArray[np.int64]:
    generator = torch.Generator().manual_seed(seed % 2**32)
    permutation: npt.NDArray[np.int64] = torch.randperm(count, generator=generator).numpy()
    return permutation
