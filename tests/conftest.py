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


@pytest.fixture(scope="session")
def magnetic_tile() -> Path:
    """Folder of the magnetic-tile set; skips the test where it is absent."""
    path = SHARED / "data" / "magnetic_tile"
    if not path.exists():
        pytest.skip("the magnetic-tile set is absent")
    return path


@pytest.fixture(scope="session")
def deep_pcb() -> Path:
    """Folder of the set of printed boards; skips the test where it is absent."""
    path = SHARED / "data" / "deep_pcb"
    if not path.exists():
        pytest.skip("the set of printed boards is absent")
    return path


@pytest.fixture(scope="session")
def neu() -> Path:
    """Folder of the steel-strip set; skips the test where it is absent."""
    path = SHARED / "data" / "neu"
    if not path.exists():
        pytest.skip("the steel-strip set is absent")
    return path
