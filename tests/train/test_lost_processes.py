"""Loading processes that are killed, files that never end, and processes of the run that stop."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_stand_ins import OPTIONS, Train, assert_identical, checkpoint, iterations, records, steps

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


STOPS = """
import os, signal, sys
sys.path.insert(0, "tests/train")
import pytest
from train_stand_ins import make_small
from dinov2.train import train as loop
from dinov2.train.command import main
from dinov2.run.launch import exit_with
make_small(pytest.MonkeyPatch())
real, calls = loop.agree, iter(range(1000))
def agree(*arguments, **keywords):
    if next(calls) == 4 and os.environ["RANK"] == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(*arguments, **keywords)
loop.agree = agree
words = sys.argv[2:]
exit_with(lambda: main(words))
"""


@pytest.mark.slow
def test_a_stopped_rank_ends_the_others_in_time_and_is_named(tmp_path: Path, parts: Path, repository: Path) -> None:
    """The first rank, which the others ask who is there; real processes, so that the other one also ends as they do."""
    words = [
        *OPTIONS, f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}", f"train.output_dir={tmp_path / 'run'}",
        "train.batch_size_per_gpu=2", "train.process_group_timeout_minutes=0.2", "optim.epochs=50",
        "train.saveckp_freq=1", "evaluation.probe_images=0",
    ]  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STOPS, "0", *words], cwd=repository, stderr=subprocess.PIPE, text=True,
            env=os.environ | launch | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        _, said = processes[1].communicate(timeout=150)
        assert processes[1].returncode == RESUME_EXIT_CODE, said
        assert "NO PROGRESS" in (tmp_path / "run" / "log" / "log.rank_1.txt").read_text()
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: a process is lost or hangs: rank 0 does not answer: it is stopped, lost, or out")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
