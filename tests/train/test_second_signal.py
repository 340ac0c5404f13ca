"""A second signal in the middle of a save ends the run at once, and the run goes on from the step before, exactly."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from train_stand_ins import OPTIONS

from dinov2.checkpoint.integrity import check_run
from dinov2.utils.errors import INTERRUPTED, RESUME_EXIT_CODE
from dinov2.utils.interruption import REPEAT_SECONDS
from tools.stress_resume import run_differences

pytestmark = pytest.mark.slow

# From the second save on, half a file is on the disk for as long as this waits; the first signal comes in iteration 4.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, "tests/train")
import pytest
from train_stand_ins import make_small
from dinov2.checkpoint import checkpointer
from dinov2.train import train as loop
from dinov2.train.command import main
from dinov2.run.launch import exit_with
make_small(pytest.MonkeyPatch())
seconds, signals, words = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
write_with_checksum, agree = checkpointer.write_with_checksum, loop.agree
saves, calls = iter(range(1000)), iter(range(1000))

def slow(path, write):
    def half(file):
        write(file)
        Path(os.environ["HALF"]).touch()
        time.sleep(seconds)
    return write_with_checksum(path, half if next(saves) else write)

def asked(*arguments, **keywords):
    if next(calls) == 4:
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
    return agree(*arguments, **keywords)

checkpointer.write_with_checksum, loop.agree = slow, asked
exit_with(lambda: main(words))
"""

Start = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def start(repository: Path, parts: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts the command in so many processes: ``start(folder, processes, seconds, signals)``."""
    started: list[subprocess.Popen[str]] = []

    def launch(folder: Path, processes: int, seconds: float = 0, signals: int = 0) -> list["subprocess.Popen[str]"]:
        words = [
            *OPTIONS, f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}", f"train.output_dir={folder}",
            f"train.batch_size_per_gpu={4 // processes}", "optim.epochs=3", "evaluation.probe_images=0",
            "train.process_group_timeout_minutes=2",
        ]  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        now = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(seconds), str(signals), *words],
                cwd=repository,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "HALF": str(tmp_path / f"half.{rank}")}
                | (group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        started.extend(now)
        return now

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def ends(processes: list["subprocess.Popen[str]"], seconds: float = 120) -> list[tuple[int, str]]:
    found = [(process.communicate(timeout=seconds)[1], process.returncode) for process in processes]
    return [(code, said) for said, code in found]


@pytest.mark.parametrize("processes", [1, 2])
def test_it_tears_nothing(start: Start, tmp_path: Path, processes: int) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    running = start(stopped, processes, seconds=600, signals=1)
    halves, limit = [tmp_path / f"half.{rank}" for rank in range(processes)], time.monotonic() + 120
    while not all(half.exists() for half in halves):
        assert time.monotonic() < limit
        time.sleep(0.1)
    time.sleep(REPEAT_SECONDS + 1)
    assert all(process.poll() is None for process in running), "they wait for the save"
    began = time.monotonic()
    for process in running:
        process.send_signal(signal.SIGTERM)
    for code, said in ends(running, seconds=60):
        assert code == INTERRUPTED, said
        assert "Traceback" not in said
    assert time.monotonic() - began < 20

    unfinished = list(stopped.glob(".model_*.tmp"))
    assert len(unfinished) == processes, "the save was cut off"
    assert all(path.stat().st_size > 0 for path in unfinished)
    found = check_run(stopped)
    assert found.good
    assert (found.tagged, found.resumed) == ("model_0000002", "model_0000002")
    assert [step.name for step in found.steps] == ["model_0000002"]

    assert [code for code, _ in ends([*start(stopped, processes), *start(whole, processes)])] == [0] * 2 * processes
    assert run_differences(stopped, whole) == []
    assert not list(stopped.glob(".model_*.tmp")), "and the remains are gone"


def test_one_that_comes_at_once_is_the_same_again(start: Start, tmp_path: Path) -> None:
    """As from a launcher that passes on what a terminal or a scheduler has sent to all."""
    ((code, said),) = ends(start(tmp_path / "run", 1, seconds=1, signals=3))
    assert code == RESUME_EXIT_CODE, said
    assert "stopped after iteration 5; the same command goes on from there" in said
    assert check_run(tmp_path / "run").resumed == "model_0000005"
