"""Fixtures of the launching tests: a drawn set of parts."""

from pathlib import Path

import pytest

from dinov2.data.prepare.demo_parts import make_demo_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grouped set with 14 training images of 48 x 48 pixels."""
    folder = tmp_path_factory.mktemp("parts")
    make_demo_parts(folder, parts=12, photos=2, image_size=48)
    return folder
