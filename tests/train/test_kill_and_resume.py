"""Runs that are killed with SIGKILL, again and again, end bit for bit like one that was left alone."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_stand_ins import Train

from dinov2.checkpoint.integrity import find_steps
from tools.stress_resume import StressPlan, run_differences

KILLS = {1: 17, 2: 8}


def figure(table: str, name: str) -> int:
    match = re.search(rf"^ *{name} +(\d+)", table, re.MULTILINE)
    assert match is not None, table
    return int(match.group(1))


def test_these_are_the_kills_that_are_promised() -> None:
    assert sum(KILLS.values()) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("processes", KILLS)
def test_a_killed_run_ends_like_an_undisturbed_one(repository: Path, tmp_path: Path, processes: int) -> None:
    # A process of its own: it forks, and this one has used torch. With this seed, five of the first eight kills
    # wait for a save; with some others it is one, which may come after the end of its run.
    words = [f"--kills={KILLS[processes]}", f"--processes={processes}", f"--folder={tmp_path / 'stress'}", "--seed=3"]
    done = subprocess.run(
        [sys.executable, str(repository / "tools" / "stress_resume.py"), *words],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert figure(done.stdout, "kills") == KILLS[processes]
    assert figure(done.stdout, "faults") == 0
    assert figure(done.stdout, "restarts from a checkpoint") > 0
    assert figure(done.stdout, "that cut off a save") > 0
    assert figure(done.stdout, "runs compared with the undisturbed one") > 0


def test_a_run_that_differs_in_one_bit_is_told_apart(train: Train, tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    train(whole, "optim.epochs=1")
    shutil.copytree(whole, other)
    assert run_differences(other, whole) == []

    newest = find_steps(other)[0].path(0)
    content = torch.load(newest, weights_only=True)
    name = next(name for name, tensor in content["optimizer"]["exp_avg"].items() if tensor.ndim > 1)
    content["optimizer"]["exp_avg"][name].view(torch.int32).view(-1)[0] ^= 1
    torch.save(content, newest)
    assert run_differences(other, whole) == [f"{newest.name}: optimizer/exp_avg/{name} differs"]


def test_a_metrics_line_too_many_is_told(train: Train, tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    train(whole, "optim.epochs=1")
    shutil.copytree(whole, other)
    lines = (other / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))
    assert run_differences(other, whole) == [f"metrics.jsonl has {len(lines) + 1} lines, expected {len(lines)}"]


def test_a_run_without_its_last_checkpoint_is_told(train: Train, tmp_path: Path) -> None:
    train(tmp_path / "whole")
    train(tmp_path / "short", "optim.epochs=1")
    (line,) = run_differences(tmp_path / "short", tmp_path / "whole")
    assert "model_0000002" in line
    assert "model_0000005" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kills": 0}, "kills must be at least 1"), ({"iterations": 7}, r"iterations \(7\) must be a multiple")],
)
def test_plans_that_make_no_sense(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StressPlan(**options)
