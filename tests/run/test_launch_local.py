"""Jobs on this machine: several processes in one group, a real training, errors, and coming back after preemption."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from launch_stand_ins import StandInOptions, fail, meet, stop_once

from dinov2.run import launch
from dinov2.utils.errors import RunError

TINY = (
    "student.arch=vit_tiny",
    "student.patch_size=16",
    "crops.global_crops_size=32",
    "crops.local_crops_size=16",
    "crops.local_crops_number=2",
    *(
        f"{head}.{option}"
        for head in ("dino", "ibot")
        for option in ("head_n_prototypes=64", "head_hidden_dim=32", "head_bottleneck_dim=16")
    ),
    "optim.epochs=1",
    "optim.warmup_epochs=0",
    "train.batch_size_per_gpu=4",
    "train.OFFICIAL_EPOCH_LENGTH=2",
    "train.log_period=1",
    "train.num_workers=0",
    "train.device=cpu",
)


@pytest.fixture(autouse=True)
def importable_in_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs import the commands of `launch_stand_ins` by name."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def error_log(folder: Path, rank: int = 0) -> str:
    (path,) = (folder / "slurm").glob(f"*_{rank}_log.err")
    return path.read_text()


def test_the_processes_of_a_job_meet_in_one_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(meet, StandInOptions, ["--slurm.local", "--ngpus", "2", "--wait", "--output-dir", str(tmp_path)]) == 0
    met = json.loads((tmp_path / "met.json").read_text())
    assert [(rank, local_rank) for rank, local_rank, _ in met] == [(0, 0), (1, 1)]
    assert len({pid for _, _, pid in met} | {os.getpid()}) == 3
    printed = capsys.readouterr().out
    assert "1 x 2 process(es)" in printed
    assert str(tmp_path / "slurm") in printed


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"(?s)job \d+ failed: .*the data is wrong.*_0_log\.err"):
        launch(fail, StandInOptions, ["--slurm.local", "--wait", "--output-dir", str(tmp_path)])


@pytest.mark.slow
def test_a_preempted_job_saves_first_and_comes_back(tmp_path: Path) -> None:
    pids = [tmp_path / f"pid.{rank}" for rank in (0, 1)]

    def preempt() -> None:
        wait_until(lambda: all(path.exists() and path.read_text() for path in pids))
        for path in pids:
            os.kill(int(path.read_text()), signal.SIGUSR2)

    with ThreadPoolExecutor() as pool:
        preempted = pool.submit(preempt)
        words = ["--slurm.local", "--ngpus", "2", "--output-dir", str(tmp_path), "--wait"]
        assert launch(stop_once, StandInOptions, words) == 0
        preempted.result()
    out = next((tmp_path / "slurm").glob("*_0_log.out")).read_text()
    assert "Requeued job" in out
    assert out.count("Starting with JobEnvironment") == 2
    assert error_log(tmp_path).count("saved") == error_log(tmp_path, 1).count("saved") == 1


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.1)


@pytest.mark.slow
def test_the_training_door_trains_in_two_processes(repository: Path, tmp_path: Path, parts: Path) -> None:
    pairs = (f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}", f"train.output_dir={tmp_path / 'run'}", *TINY)
    finished = subprocess.run(
        [sys.executable, "run/train/train.py", *pairs, "--slurm-local", "--ngpus", "2", "--wait"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "done: 2 iterations" in error_log(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").glob("model_*.pth")} == {
        f"model_0000001.rank_{rank}.pth" for rank in (0, 1)
    }
