"""Writing while training goes on: a copy of what is to be saved, and a thread that writes it.

The thread talks to no other process: what all processes must agree on is agreed on in the training thread.
"""

import copy
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("dinov2")

PATIENCE_SECONDS = 60.0


class BackgroundWrite:
    """One write, at work from the moment it is made; what it raises is kept in ``error``.

    Args:
        write: does the work.
        name: what is written, for messages.
        threaded: whether to write beside the caller, or before the constructor returns.
    """

    def __init__(self, write: Callable[[], object], name: str, *, threaded: bool = True) -> None:
        self.name = name
        self.error: BaseException | None = None
        self._write = write
        self._thread: threading.Thread | None = None
        if threaded:
            # A process that must end at once does not wait for it: an unfinished file has no name yet.
            self._thread = threading.Thread(target=self._run, name=f"writes {name}", daemon=True)
            self._thread.start()
        else:
            self._run()

    @property
    def done(self) -> bool:
        """Whether the write has ended, well or badly."""
        return self._thread is None or not self._thread.is_alive()

    def join(self) -> None:
        """Waits for the end, and says every minute that it is waiting."""
        while not self.done:
            assert self._thread is not None
            self._thread.join(PATIENCE_SECONDS)
            if not self.done:
                logger.warning("still waiting for %s to be written: the disk is slow, or gone", self.name)

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            if self._thread is None and not isinstance(error, Exception):
                raise  # Ctrl-C in the training thread
            self.error = error


def to_host(value: Any) -> Any:
    """Copies tensors, however nested, to the processor, where nothing changes them any more.

    Everything else is copied too. Copies from a GPU go through page-locked memory, all at once, and are finished on
    return.
    """
    devices: set[torch.device] = set()
    copied = _copy(value, devices)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copied


def _copy(value: Any, devices: set[torch.device]) -> Any:
    if isinstance(value, Tensor):
        tensor = value.detach()
        if tensor.device.type == "cpu":
            return tensor.clone()
        if tensor.device.type != "cuda":
            return tensor.cpu()
        devices.add(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _copy(item, devices) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(item, devices) for item in value)
    return copy.deepcopy(value)
