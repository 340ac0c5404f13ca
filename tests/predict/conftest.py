"""What tests of the commands share."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.predict import images
from dinov2.tasks.package import TaskPackage
from tests.tasks.predictor_stand_ins import ColourModel, DepthModel, DifferenceModel, make_package


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> dict[str, TaskPackage]:
    """Models by the name of their file."""
    known = {
        "masks.pth": make_package(ColourModel()),
        "classes.pth": make_package(ColourModel(dense=False), "classification"),
        "depth.pth": make_package(DepthModel(), "depth"),
        "compared.pth": make_package(DifferenceModel(), "segmentation", "data.reference=true", classes=("same", "new")),
    }
    monkeypatch.setattr(images, "load_task_package", lambda path, device: known[path.name])
    if importlib.util.find_spec("av") is not None:
        monkeypatch.setattr("dinov2.predict.video.load_task_package", lambda path, device: known[path.name])
    return known


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)
