"""The state of every random generator of a process, as plain tensors and builtins."""

import random
from typing import Any

import numpy as np
import torch


class RandomState:
    """Saves and restores the generators of Python, NumPy and torch (processor and current GPU).

    Stochastic depth and anything else that draws in the training process goes on, after a resume, where it stopped.
    """

    def state_dict(self) -> dict[str, Any]:
        """Current states; nothing in it needs code to be read."""
        version, numbers, gauss = random.getstate()
        numpy_state: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
        state: dict[str, Any] = {
            "python": [version, list(numbers), gauss],
            "numpy": {**numpy_state, "state": _plain(numpy_state["state"])},
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
        np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})  # noqa: NPY002
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"].cpu())


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in state.items()}
