"""Fixtures shared by all tests: where reference values and real images lie, and a place in the import path."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    """Loads a file of reference values by name; skips the test where the folder is absent."""

    def load(name: str) -> Any:
        path = SHARED / "fixtures" / name
        if not path.exists():
            pytest.skip(f"reference values are absent: {path.name}")
        if path.suffix == ".json":
            return json.loads(path.read_text())
        if path.suffix == ".npz":
            import numpy as np

            with np.load(path) as file:
                return {name: file[name] for name in file.files}
        return torch.load(path, weights_only=True)

    return load


def shared_set(name: str) -> Path:
    """Folder of a set of images; skips the test where it is absent."""
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"the set {name} is absent")
    return path


@pytest.fixture(scope="session")
def magnetic_tile() -> Path:
    return shared_set("magnetic_tile")


@pytest.fixture(scope="session")
def deep_pcb() -> Path:
    return shared_set("deep_pcb")


@pytest.fixture(scope="session")
def neu() -> Path:
    return shared_set("neu")
