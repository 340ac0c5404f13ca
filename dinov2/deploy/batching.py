"""Dynamic batching: what many callers submit one by one goes through the model together."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, Queue
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Job(NamedTuple, Generic[Item, Result]):
    item: Item
    future: "Future[Result]"


class Batcher(Generic[Item, Result]):
    """Runs a function on batches of items that callers of other threads submit; use it in a ``with`` block.

    A batch begins with the first item that waits, takes what else is there, and waits a moment for more while it is not
    full. An error of a batch of several is found out item by item, so that only the item that causes it fails. Leaving
    the block finishes what was submitted.

    Args:
        run: maps items to as many results; called by one thread.
        batch_size: most items of a batch; asked for before every batch, as what runs them may lower it.
        wait_s: seconds that a batch waits for further items.
        observe: is told the number of items of every batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        batch_size: Callable[[], int],
        *,
        wait_s: float = 0.0,
        observe: Callable[[int], object] = lambda count: None,
    ) -> None:
        self._run = run
        self._batch_size = batch_size
        self._wait_s = wait_s
        self._observe = observe
        self._jobs: Queue[_Job[Item, Result] | None] = Queue()
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)

    def submit(self, item: Item) -> "Future[Result]":
        """The result to come; cancelling it takes the item out of the queue, unless its batch has begun."""
        future: Future[Result] = Future()
        self._jobs.put(_Job(item, future))
        return future

    def __enter__(self) -> "Batcher[Item, Result]":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            first = self._jobs.get()
            if first is None:
                return
            batch, ended = self._gather(first)
            running = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if running:
                self._observe(len(running))
                self._finish(running)
            del first, batch, running  # or the last images stay in memory while nothing comes

    def _gather(self, first: _Job[Item, Result]) -> tuple[list[_Job[Item, Result]], bool]:
        """A batch, and whether the end was met."""
        batch, most = [first], self._batch_size()
        deadline = time.monotonic() + self._wait_s
        while len(batch) < most:
            left = deadline - time.monotonic()
            try:
                job = self._jobs.get(timeout=left) if left > 0 else self._jobs.get_nowait()
            except Empty:
                break
            if job is None:
                return batch, True
            batch.append(job)
        return batch, False

    def _finish(self, jobs: list[_Job[Item, Result]]) -> None:
        try:
            results = self._run([job.item for job in jobs])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
            else:
                for job in jobs:
                    self._finish([job])
        else:
            for job, result in zip(jobs, results, strict=True):
                job.future.set_result(result)
