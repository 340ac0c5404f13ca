"""What tests of the supervised engine share."""

from pathlib import Path

import pytest
from fine_tune_stand_ins import make_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn plates, see `make_parts`; not to be changed."""
    return make_parts(tmp_path_factory.mktemp("set"))
