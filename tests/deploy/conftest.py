"""What tests of exported files share."""

from pathlib import Path

import pytest

from tests.deploy.deploy_stand_ins import draw_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn plates; not to be changed."""
    return draw_parts(tmp_path_factory.mktemp("set"))
