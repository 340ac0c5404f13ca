"""Loading processes that are killed, files that never end, and a data order that changes on resuming."""

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_stand_ins import Train, assert_identical, checkpoint, iterations, records, steps

from dinov2.train import data as module
from dinov2.utils.errors import RESUME_EXIT_CODE


def test_a_killed_loading_process_ends_the_run_saved_and_nothing_is_lost(train: Train, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        real, calls = module.Batches.__next__, iter(range(1000))

        def kill_first(self: Any) -> Any:
            if next(calls) == 2:
                for worker in self._begin()._workers:
                    os.kill(worker.pid, signal.SIGKILL)
                time.sleep(0.2)
            return real(self)

        monkeypatch.setattr(module.Batches, "__next__", kill_first)
        assert train(tmp_path / "killed", "train.num_workers=1", "optim.epochs=4") == RESUME_EXIT_CODE
    log = (tmp_path / "killed" / "log" / "log.txt").read_text()
    assert "A DATA-LOADING PROCESS OF RANK 0 IS LOST: DataLoader worker (pid" in log
    assert "lower train.num_workers (1)" in log
    (last,) = steps(tmp_path / "killed")[-1:]
    assert 2 <= last < 11
    assert f"stopped after iteration {last}" in log
    assert train(tmp_path / "killed", "train.num_workers=1", "optim.epochs=4") == 0
    assert train(tmp_path / "whole", "optim.epochs=4") == 0
    states = [tmp_path / "killed", tmp_path / "whole"]
    assert iterations(states[0]) == iterations(states[1]) == list(range(12))
    assert records(states[0]) == records(states[1])
    assert_identical(checkpoint(states[0], 11)["model"], checkpoint(states[1], 11)["model"])


def test_an_endless_file_is_counted(train: Train, tmp_path: Path, parts: Path) -> None:
    shutil.copytree(parts, tmp_path / "parts")
    image = min((tmp_path / "parts" / "train").rglob("*.jpeg"))
    image.unlink()
    os.mkfifo(image)
    dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={tmp_path / 'parts'}"
    pairs = ("data.read_timeout_seconds=1", "data.max_bad_fraction=0.2")
    assert train(tmp_path / "run", dataset, "train.num_workers=1", *pairs) == 0
    assert checkpoint(tmp_path / "run")["unreadable"] == {"names": [str(image)]}
    first = torch.load(tmp_path / "run" / "eval" / "probe_start.pth", weights_only=True)
    assert [first["names"][i] for i in (~first["readable"]).nonzero()] == [image.name], "also among those watched"


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
