"""Fixtures of the training tests: a drawn set of parts, the command that trains on it, and runs that it has made."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from train_stand_ins import EVERY_TWO, Train, crashed_run, evaluation_pairs, make_small, run_command, shared_run

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


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    """Folder of an undisturbed run, not to be changed."""
    return shared_run(tmp_path_factory, parts)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    """Folder of an undisturbed run that is evaluated every two iterations, not to be changed."""
    return shared_run(tmp_path_factory, parts, *evaluation_pairs(parts), EVERY_TWO)


@pytest.fixture(scope="session")
def _half(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    output = tmp_path_factory.mktemp("shared") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        crashed_run(partial(run_command, parts), output, at=4)
    return output


@pytest.fixture
def half(_half: Path, tmp_path: Path) -> Path:
    """Folder of a run that has died in iteration 4, saved after 2, to be gone on with; ends like ``whole``."""
    return Path(shutil.copytree(_half, tmp_path / "half"))
