"""A resumed run whose data would come in another order says so, and what has changed."""

import shutil
from pathlib import Path

import pytest
from train_stand_ins import Train, checkpoint

CHANGES = {
    "train.seed=3": "train.seed was 0 and is 3",
    "train.sampler_type=INFINITE": "train.sampler_type was SHARDED_INFINITE and is INFINITE",
}
WARNING = "THE ORDER OF THE DATA CHANGES"


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_option_is_named(train: Train, tmp_path: Path, change: str) -> None:
    train(tmp_path, "optim.epochs=1")
    assert train(tmp_path, change) == 0
    log = (tmp_path / "log" / "log.txt").read_text()
    assert log.count(WARNING) == 1
    assert CHANGES[change] in log


def test_a_changed_set_is_noticed_and_a_moved_one_is_not(train: Train, tmp_path: Path, parts: Path) -> None:
    train(tmp_path / "run", "optim.epochs=1")
    moved = tmp_path / "moved"
    shutil.copytree(parts, moved)
    train(tmp_path / "run", f"train.dataset_path=GroupedJSON:split=TRAIN:root={moved}", "optim.epochs=2")
    log = tmp_path / "run" / "log" / "log.txt"
    assert WARNING not in log.read_text()
    assert checkpoint(tmp_path / "run")["identity"]["dataset"].startswith("14 images, names ")
    train(tmp_path / "run", f"train.dataset_path=GroupedJSON:split=VAL:root={moved}", "optim.epochs=3")
    assert "dataset was 14 images, names " in log.read_text()
    assert "and is 4 images, names " in log.read_text()
