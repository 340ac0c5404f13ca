"""What a run's folder holds, as a table and an exit code."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from checkpoint_stand_ins import build

from dinov2.checkpoint.integrity import check_run
from dinov2.utils.files import write_with_checksum


def make_run(folder: Path) -> None:
    for step in (1, 3, 5):
        build(folder, seed=step).save(f"model_{step:07d}", iteration=step)
    for name in ("training_3", "best"):
        (folder / "eval" / name).mkdir(parents=True)
    teacher = {"teacher": {"backbone.norm.weight": torch.ones(3)}}
    write_with_checksum(folder / "eval" / "training_3" / "teacher_checkpoint.pth", partial(torch.save, teacher))
    torch.save(teacher, folder / "eval" / "best" / "teacher_checkpoint.pth")


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_good_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    found = check_run(tmp_path)
    assert found.good
    assert [(step.name, step.ranks, step.state) for step in found.steps] == [
        (f"model_000000{step}", 1, "good") for step in (5, 3, 1)
    ]
    assert found.steps[0].nbytes == (tmp_path / "model_0000005.rank_0.pth").stat().st_size
    assert {(teacher.name, teacher.state) for teacher in found.teachers} == {
        ("eval/training_3/teacher_checkpoint.pth", "good"),
        ("eval/best/teacher_checkpoint.pth", "good (no checksum)"),
    }
    assert (found.tagged, found.resumed) == ("model_0000005", "model_0000005")


def test_a_damaged_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    damage(tmp_path / "model_0000005.rank_0.pth")
    (tmp_path / "model_0000003.rank_0.pth.sha256").unlink()
    for teacher in tmp_path.glob("eval/*/teacher_checkpoint.pth"):
        teacher.write_bytes(teacher.read_bytes()[:-200])
    found = check_run(tmp_path)
    assert not found.good
    assert [step.state for step in found.steps] == ["damaged", "incomplete", "good"]
    assert [teacher.state for teacher in found.teachers] == ["damaged", "damaged"]
    assert (found.tagged, found.resumed) == ("model_0000005", "model_0000001")
    lines = str(found).splitlines()
    assert lines[0].split() == ["step", "ranks", "MiB", "state"]
    assert "damaged (model_0000005.rank_0.pth is damaged: its" in lines[1]
    assert lines[-3:] == [
        "last_checkpoint names: model_0000005 (NOT GOOD)",
        "newest and good:       model_0000001",
        "a run goes on from:    model_0000001",
    ]


def test_damage_to_an_older_step_is_shown_and_does_not_matter(tmp_path: Path) -> None:
    make_run(tmp_path)
    damage(tmp_path / "model_0000003.rank_0.pth")
    assert check_run(tmp_path).good
    assert "damaged (model_0000003.rank_0.pth is damaged" in str(check_run(tmp_path))


def test_a_missing_rank_is_incomplete(tmp_path: Path) -> None:
    make_run(tmp_path)
    content = torch.load(tmp_path / "model_0000005.rank_0.pth", weights_only=True)
    write_with_checksum(tmp_path / "model_0000005.rank_0.pth", partial(torch.save, content | {"world_size": 2}))
    found = check_run(tmp_path)
    assert found.steps[0].state == "incomplete"
    assert found.steps[0].reason == "model_0000005.rank_1.pth is missing"


def test_folders_without_checkpoints(tmp_path: Path) -> None:
    found = check_run(tmp_path)
    assert not found.good
    assert str(found).splitlines()[-3:] == [
        "last_checkpoint names: nothing (NOT GOOD)",
        "newest and good:       none",
        "a run goes on from:    nothing",
    ]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        check_run(tmp_path / "gone")


@pytest.mark.slow
def test_the_door(tmp_path: Path, repository: Path) -> None:
    make_run(tmp_path)
    words = [sys.executable, str(repository / "tools" / "check_run.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    good = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout) == (0, f"{check_run(tmp_path)}\n"), good.stderr
    damage(tmp_path / "model_0000005.rank_0.pth")
    assert subprocess.run(words, env=environment, capture_output=True, check=False).returncode == 1
