"""The state of all generators goes through a checkpoint and back."""

import io
import random
from typing import Any

import numpy as np
import torch

from dinov2.utils.seeds import RandomState, seed_everything


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


def test_looking_at_the_state_draws_nothing() -> None:
    seed_everything(4)
    expected = draw()
    seed_everything(4)
    RandomState().state_dict()
    assert draw() == expected


def test_a_state_is_a_copy() -> None:
    seed_everything(4)
    state = RandomState().state_dict()
    expected = draw()
    draw()
    RandomState().load_state_dict(state)
    assert draw() == expected


def test_the_state_of_a_gpu_is_left_alone_where_there_is_none() -> None:
    if not torch.cuda.is_available():
        state = RandomState().state_dict()
        assert "cuda" not in state
        RandomState().load_state_dict(state | {"cuda": torch.zeros(16, dtype=torch.uint8)})
