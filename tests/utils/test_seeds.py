"""Seeds depend on their arguments and on nothing else."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from dinov2.utils.seeds import derive_seed, seed_everything


def test_a_derived_seed_is_the_same_for_ever() -> None:
    # Fixed numbers: a change would make old runs resume with other crops.
    assert derive_seed(0, "augment", 5) == 5093320495194489534
    assert derive_seed(1) == 4259241206155935355


def test_a_derived_seed_is_the_same_in_another_process() -> None:
    code = "from dinov2.utils.seeds import derive_seed; print(derive_seed(3, 'mask', 7))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(result.stdout) == derive_seed(3, "mask", 7)


def test_different_purposes_never_share_a_seed() -> None:
    seeds = {derive_seed(seed, name, i) for seed in range(10) for name in ("augment", "mask") for i in range(100)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7, 2**63 - 1])
def test_everything_is_seeded(seed: int) -> None:
    draws = []
    for _ in range(2):
        seed_everything(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert draws[0] == draws[1]
    seed_everything(seed - 1 if seed else 1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) != draws[0]  # noqa: NPY002
