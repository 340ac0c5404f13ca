"""Which step is gone on from: the newest that was finished and is undamaged, and never one without a word."""

import logging
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stand_ins import assert_equal, build, states

from dinov2.checkpoint.integrity import DamagedCheckpointError, find_steps, is_before_checksums, tagged_name
from dinov2.utils.files import sidecar, write_with_checksum


def save_steps(folder: Path, *steps: int) -> dict[int, list[torch.Tensor]]:
    found = {}
    for step in steps:
        checkpointer = build(folder, seed=step)
        checkpointer.save(f"model_{step:07d}", iteration=step)
        found[step] = states(checkpointer)
    return found


def path(folder: Path, step: int, rank: int = 0) -> Path:
    return folder / f"model_{step:07d}.rank_{rank}.pth"


def flip(file: Path, position: int = 500) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def loud(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def test_fallback_goes_step_by_step_and_is_loud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save_steps(tmp_path, 1, 3, 5)
    flip(path(tmp_path, 5))
    path(tmp_path, 3).unlink()
    loader = build(tmp_path, seed=9)
    assert loader.resume_or_load("")["iteration"] == 1
    assert_equal(states(loader), saved[1])
    size = path(tmp_path, 5).stat().st_size
    assert loud(caplog) == [
        f"checkpoint model_0000005 is not used: model_0000005.rank_0.pth is damaged: its {size} bytes do not have the "
        "SHA-256 of model_0000005.rank_0.pth.sha256",
        "going on from the older step model_0000001: what was done after it is done again",
    ]


def test_none_good_lists_every_step_with_its_fault(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 3, 5)
    flip(path(tmp_path, 5))
    sidecar(path(tmp_path, 3)).unlink()
    sidecar(path(tmp_path, 1)).write_text("nonsense")
    loader = build(tmp_path, seed=9)
    before = states(loader)
    message = (
        r"no checkpoint in .* can be used; to begin anew, give another folder or --no-resume:\n"
        r"  model_0000005: model_0000005\.rank_0\.pth is damaged: .*\n"
        r"  model_0000003: model_0000003\.rank_0\.pth has no checksum .*\n"
        r"  model_0000001: model_0000001\.rank_0\.pth has a damaged checksum file .*"
    )
    for ask in (lambda: loader.resume_or_load(""), loader.newest):
        with pytest.raises(DamagedCheckpointError, match=message):
            ask()
    assert loader.resume_or_load("", resume=False) == {}
    assert_equal(states(loader), before)


def test_a_named_step_has_no_substitute(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 3)
    flip(path(tmp_path, 3))
    with pytest.raises(ValueError, match=r"model_0000003\.rank_0\.pth is damaged"):
        build(tmp_path).resume_or_load(str(path(tmp_path, 3)))
    with pytest.raises(FileNotFoundError, match=r"model_0000002\.rank_0\.pth does not exist; beside it lie"):
        build(tmp_path).resume_or_load(str(path(tmp_path, 2)))


def test_steps_after_the_named_one_were_not_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, 1, 3)
    (tmp_path / "last_checkpoint.rank_0").write_text("model_0000001.rank_0.pth\n")
    assert build(tmp_path).resume_or_load("")["iteration"] == 1
    assert loud(caplog) == [
        "not used, because newer than the step model_0000001 that last_checkpoint names: model_0000003"
    ]


@pytest.mark.parametrize(
    "text", ["", "\n", "model_000", "\x00\xff", "model_0000009.rank_0.pth", "x_0000003.rank_0.pth"]
)
def test_a_tag_that_names_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    save_steps(tmp_path, 1, 3)
    (tmp_path / "last_checkpoint.rank_0").write_text(text, encoding="latin-1")
    assert build(tmp_path).resume_or_load("")["iteration"] == 3
    assert loud(caplog)


def test_before_the_first_finished_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_steps(tmp_path, 1)
    (tmp_path / "last_checkpoint.rank_0").unlink()
    loader = build(tmp_path)
    assert loader.has_checkpoint()
    assert loader.resume_or_load("")["iteration"] == 1
    assert loud(caplog) == ["no last_checkpoint file: going on from model_0000001, which is complete and undamaged"]
    flip(path(tmp_path, 1))
    assert loader.resume_or_load("") == {}
    assert loud(caplog)[-1].endswith("holds no step that was ever finished: the run begins anew")


def as_from_before(folder: Path, step: int) -> None:
    """Makes a step what the version without checksums wrote."""
    content = torch.load(path(folder, step), weights_only=True)
    del content["step_id"]
    torch.save(content | {"format_version": 1}, path(folder, step))
    sidecar(path(folder, step)).unlink()


def test_a_folder_from_before_checksums(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save_steps(tmp_path, 1, 3)
    for step in (1, 3):
        as_from_before(tmp_path, step)
    assert is_before_checksums(tmp_path)
    loader = build(tmp_path, seed=9)
    for asked in ("", str(path(tmp_path, 3))):
        assert loader.resume_or_load(asked)["iteration"] == 3
        assert_equal(states(loader), saved[3])
        assert loud(caplog)[-1].endswith("from before checksums: damage may go unnoticed")
    # With one new step, files without checksum are no longer trusted.
    loader.save("model_0000005", iteration=5)
    assert build(tmp_path).resume_or_load("")["iteration"] == 5
    flip(path(tmp_path, 5))
    with pytest.raises(DamagedCheckpointError, match=r"model_0000003\.rank_0\.pth has no checksum"):
        loader.resume_or_load("")


def test_the_last_checksum_of_a_folder_cannot_be_lost_unnoticed(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    sidecar(path(tmp_path, 3)).unlink()
    with pytest.raises(DamagedCheckpointError, match="has no checksum"):
        build(tmp_path).resume_or_load("")


def rewrite(file: Path, **changes: Any) -> None:
    content = torch.load(file, weights_only=True)
    write_with_checksum(file, partial(torch.save, content | changes))


def make_two(folder: Path, step: int) -> None:
    """Makes a step one of two processes that hold the same."""
    content = torch.load(path(folder, step), weights_only=True)
    for rank in range(2):
        changed = content | {"world_size": 2, "rank": rank}
        write_with_checksum(path(folder, step, rank), partial(torch.save, changed))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: path(folder, 3, 1).unlink(), r"model_0000003\.rank_1\.pth is missing"),
        (lambda folder: path(folder, 3, 0).unlink(), r"model_0000003\.rank_0\.pth is missing"),
        (lambda folder: flip(path(folder, 3, 1)), r"model_0000003\.rank_1\.pth is damaged"),
        (lambda folder: rewrite(path(folder, 3, 1), iteration=1), r"is of rank 1 of 2, iteration 1; rank 0 is"),
        (lambda folder: rewrite(path(folder, 3, 1), step_id="other"), r"rank_1\.pth is of another run than .*rank_0"),
        (lambda folder: rewrite(path(folder, 3, 0), world_size="many"), "invalid literal"),
    ],
)
def test_every_file_of_a_step_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, fault: str) -> None:
    save_steps(tmp_path, 1, 3)
    make_two(tmp_path, 3)
    assert build(tmp_path).resume_or_load("")["iteration"] == 3
    damage(tmp_path)
    caplog.clear()
    assert build(tmp_path).resume_or_load("")["iteration"] == 1
    assert re.search(fault, loud(caplog)[0])


def test_files_of_ranks_that_no_longer_exist_do_not_matter(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    path(tmp_path, 3, 1).write_bytes(b"left by a run of two processes")
    assert build(tmp_path).resume_or_load("")["iteration"] == 3


def test_what_lies_in_a_folder(tmp_path: Path) -> None:
    assert find_steps(tmp_path) == []
    assert tagged_name(tmp_path) == ""
    assert is_before_checksums(tmp_path)
    for name in ("a_12.rank_0.pth", "a_12.rank_10.pth", "a_2.rank_0.pth", ".a_3.rank_0.pth", "a_4.rank_0.pth.sha256"):
        (tmp_path / name).touch()
    assert [(step.name, step.number, step.ranks) for step in find_steps(tmp_path)] == [
        ("a_12", 12, (0, 10)),
        ("a_2", 2, (0,)),
    ]
