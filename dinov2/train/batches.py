"""The batches of a run, in order, also when a data-loading process is lost on the way."""

import logging
import signal
from collections.abc import Iterator
from typing import Any

from dinov2.config import Config
from dinov2.data.collate import PretrainingBatch
from dinov2.data.pretraining import PretrainingDataset
from dinov2.distributed import get_rank, get_world_size
from dinov2.train.data import build_pretraining_loader

logger = logging.getLogger("dinov2")

_LOST = "DataLoader worker (pid"  # how torch begins to say that a process has gone


def is_loss_of_worker(error: RuntimeError) -> bool:
    """Whether a data loader says so that one of its processes has gone, most often killed for lack of memory."""
    return str(error).startswith(_LOST)


class Batches:
    """Endless iterator; when a loading process dies, this process loads the batch that is missing by itself.

    So the iteration can be finished and saved by all processes of the run, and `lost` says that it should end then:
    where memory is short, loading on in the same way would only be killed again.

    Args:
        config: options of the run.
        dataset: gives the crops.
        samples_seen: images that all processes together have trained on.

    Attributes:
        lost: what has happened to a loading process; empty as long as all is well.
    """

    def __init__(self, config: Config, dataset: PretrainingDataset, *, samples_seen: int) -> None:
        self.lost = ""
        self._config = config
        self._dataset = dataset
        self._position = samples_seen
        self._step = config.train.batch_size_per_gpu * get_world_size()
        self._loader = build_pretraining_loader(config, dataset, samples_seen=samples_seen)
        self._source: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[PretrainingBatch]:
        return self

    def __next__(self) -> PretrainingBatch:
        try:
            batch: PretrainingBatch = next(self._begin())
        except RuntimeError as error:
            if not is_loss_of_worker(error):
                raise
            self._replace(error)
            batch = next(self._begin())
        self._position += self._step
        return batch

    def _begin(self) -> Iterator[Any]:
        if self._source is None:
            self._source = iter(self._loader)
            # Torch raises its error wherever the main thread is when a process dies, even between weights and teacher.
            # Without its handler, the loader itself finds out when it waits for the batch.
            handler = signal.getsignal(signal.SIGCHLD)
            if getattr(handler, "__module__", "").startswith("torch."):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self._source

    def close(self) -> None:
        """Ends the loading processes.

        They ignore the signal by which the end of a program ends such processes, so it would wait for them for ever.
        """
        self._source = None  # the iterator tells its processes to end when it goes

    def _replace(self, error: RuntimeError) -> None:
        self.lost = str(error).splitlines()[0]
        logger.error(
            "A DATA-LOADING PROCESS OF RANK %d IS LOST: %s. Most often the system killed it for lack of memory: "
            "lower train.num_workers (%d), data.cache_gib (%g) or the batch. This iteration is finished without it and "
            "saved, then the run ends; the same command goes on",
            *(get_rank(), self.lost, self._config.train.num_workers, self._config.data.cache_gib),
        )
        self._loader = build_pretraining_loader(self._config, self._dataset, samples_seen=self._position, num_workers=0)
        self._source = None
