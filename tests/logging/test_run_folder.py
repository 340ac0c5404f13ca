"""A run's folder: made, or refused by name."""

import re
from pathlib import Path

import pytest

from dinov2.logging import run_log as run_folder
from dinov2.logging.run_log import check_run_folder, prepare_run_folder


def test_a_folder_is_made_with_those_above_it_and_stays_empty(tmp_path: Path) -> None:
    check_run_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists(), "looking leaves no trace"
    assert prepare_run_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    assert prepare_run_folder(tmp_path / "a" / "b").is_dir(), "a folder that is there already is fine"


@pytest.mark.parametrize("look", [check_run_folder, prepare_run_folder])
def test_a_folder_below_a_file_is_refused(look: object, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert callable(look)
    with pytest.raises(OSError, match=re.escape(f"the run's folder {tmp_path / 'file' / 'run'} (train.output_dir)")):
        look(tmp_path / "file" / "run")


def test_a_folder_that_must_not_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_folder.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OSError, match=re.escape(f"cannot be written: {tmp_path} cannot be written")):
        check_run_folder(tmp_path / "a" / "b")
