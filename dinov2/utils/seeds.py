"""Seeds: one number fixes everything random in a run."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(seed: int, *parts: int | str) -> int:
    """Mixes a run's seed with a purpose and counters into an independent 63-bit seed.

    The result depends on nothing but the arguments: not on the process, the Python hash seed, or what was drawn before.
    Samples seeded by ``derive_seed(seed, "augment", position)`` are therefore the same whoever computes them, and a
    resumed run draws what the undisturbed run would have drawn.
    """
    text = "\0".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch (every device) of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def isolated_random_state(seed: int) -> Iterator[None]:
    """Seeds torch's CPU generator, NumPy and Python inside the block, and restores their states after it."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # augmentations may draw from the global generator
    with torch.random.fork_rng(devices=[]):
        # The CPU generator alone: torch.manual_seed would queue work for every device in every worker.
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


class RandomState:
    """Saves and restores the generators of Python, NumPy and torch (processor and current GPU).

    Stochastic depth and anything else that draws in the training process goes on, after a resume, where it stopped.
    """

    def state_dict(self) -> dict[str, Any]:
        """Current states; nothing in it needs code to be read."""
        version, numbers, gauss = random.getstate()
        numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
        inner = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in numpy_state["state"].items()
        }
        state: dict[str, Any] = {
            "python": [version, list(numbers), gauss],
            "numpy": {**numpy_state, "state": inner},
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores states; a GPU's is left alone when the checkpoint comes from a machine without one."""
        version, numbers, gauss = state["python"]
        random.setstate((version, tuple(numbers), gauss))
        numpy_state = state["numpy"]
        key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
        np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())
