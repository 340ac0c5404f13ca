"""Seeds: one number fixes everything random in a run."""

import hashlib
import random

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
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third-party code draws from the global generator
    torch.manual_seed(seed)
