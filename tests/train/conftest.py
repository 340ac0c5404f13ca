"""Fixtures of the training tests: a drawn set of parts and the command that trains on it."""

from functools import partial
from pathlib import Path

import pytest
from train_stand_ins import Train, make_small, run_command

from dinov2.data.prepare.demo_parts import make_demo_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grouped set with 14 training and a few validation images of 48 x 48 pixels."""
    folder = tmp_path_factory.mktemp("parts")
    make_demo_parts(folder, parts=12, photos=2, image_size=48)
    return folder


@pytest.fixture
def train(parts: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Runs the command with a very small backbone: ``train(output, *pairs)``."""
    make_small(monkeypatch)
    return partial(run_command, parts)
