"""Seeds depend on their arguments and on nothing else; states of generators go through a checkpoint and back."""

import io
import random
from typing import Any

import numpy as np
import pytest
import torch

from dinov2.utils.seeds import RandomState, derive_seed, seed_everything


def test_derived_seeds_are_the_same_for_ever_and_never_shared_by_two_purposes() -> None:
    # Fixed numbers: a change would make old runs resume with other crops.
    assert derive_seed(0, "augment", 5) == 5093320495194489534
    assert derive_seed(1) == 4259241206155935355
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


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002
        float(np.random.randn()),  # noqa: NPY002
        torch.rand(1).item(),
        torch.randn(1).item(),
    ]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_generators_go_on_where_they_were_after_a_checkpoint() -> None:
    seed_everything(4)
    draw()  # leaves half a pair of normal numbers in store
    state = through_a_file(RandomState().state_dict())
    expected = [draw() for _ in range(3)]
    seed_everything(5)
    RandomState().load_state_dict(state)
    assert [draw() for _ in range(3)] == expected


def test_a_state_is_a_copy_and_looking_at_it_draws_nothing() -> None:
    seed_everything(4)
    state = RandomState().state_dict()
    expected = draw()
    draw()
    RandomState().load_state_dict(state)
    assert draw() == expected
    seed_everything(4)
    assert draw() == expected


def test_the_state_of_a_gpu_is_left_alone_where_there_is_none() -> None:
    if not torch.cuda.is_available():
        state = RandomState().state_dict()
        assert "cuda" not in state
        RandomState().load_state_dict(state | {"cuda": torch.zeros(16, dtype=torch.uint8)})
