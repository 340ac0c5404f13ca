"""Damage to checkpoints is found, named and never loaded; the step to go on from; what a check of a run tells."""

import logging
import random
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stand_ins import build, flip, is_equal, run_python, save_steps, states
from torch import Tensor, nn

from dinov2.checkpoint.integrity import (
    DamagedCheckpointError,
    check_run,
    find_steps,
    is_before_checksums,
    tagged_name,
    tags,
)
from dinov2.checkpoint.merge import extract_teacher
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.evaluation import save_teacher
from dinov2.utils.files import sidecar, write_with_checksum

CUTS, FLIPS = 20, 100
KINDS = ("model_0000007.rank_0.pth", "model_0000007.rank_0.pth.sha256")
TEACHER = "teacher_checkpoint.pth"


def path(folder: Path, step: int, rank: int = 0) -> Path:
    return folder / f"model_{step:07d}.rank_{rank}.pth"


def loud(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def rewrite(file: Path, to: Path | None = None, **changes: Any) -> None:
    content = torch.load(file, weights_only=True)
    write_with_checksum(to or file, partial(torch.save, content | changes))


def damaged(file: Path) -> Iterator[None]:
    """Cuts a file at 20 places, and flips each of 100 random bits in it; counts, and makes it whole again."""
    content, chance, count = file.read_bytes(), random.Random(0), 0
    contents = [content[: len(content) * cut // CUTS] for cut in range(CUTS)]
    for position in chance.sample(range(8 * len(content)), min(FLIPS, 8 * len(content))):
        byte = content[position // 8] ^ (1 << position % 8)
        contents.append(content[: position // 8] + bytes([byte]) + content[position // 8 + 1 :])
    for bad in contents:
        file.write_bytes(bad)
        yield
        count += 1
    assert count == CUTS + min(FLIPS, 8 * len(content))
    file.write_bytes(content)


@pytest.mark.parametrize("name", KINDS)
def test_the_older_step_is_loaded_in_place_of_a_damaged_one(tmp_path: Path, name: str) -> None:
    saved = save_steps(tmp_path, 3, 7)
    loader = build(tmp_path, seed=5)
    for _ in damaged(tmp_path / name):
        assert loader.resume_or_load("")["iteration"] == 3
        assert is_equal(states(loader), saved[3])
    assert loader.resume_or_load("")["iteration"] == 7


@pytest.mark.parametrize("name", KINDS)
def test_with_no_other_step_damage_is_an_error_and_nothing_is_loaded(tmp_path: Path, name: str) -> None:
    save_steps(tmp_path, 7)
    loader = build(tmp_path, seed=5)
    before = states(loader)
    for _ in damaged(tmp_path / name):
        with pytest.raises(DamagedCheckpointError, match=r"no checkpoint .*\n  model_0000007: model_0000007\.rank_0"):
            loader.resume_or_load("")
        with pytest.raises(ValueError, match="model_0000007"):
            loader.resume_or_load(str(tmp_path / "model_0000007.rank_0.pth"))
        assert not check_run(tmp_path).good
    assert is_equal(states(loader), before)


def test_damage_to_the_name_of_the_newest_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever its file says, one of the two good steps is loaded whole; the older one never without a word."""
    saved = save_steps(tmp_path, 3, 7)
    loader = build(tmp_path, seed=5)
    for _ in damaged(tmp_path / "last_checkpoint.rank_0"):
        caplog.clear()
        step = loader.resume_or_load("")["iteration"]
        assert is_equal(states(loader), saved[step])
        assert step == 7 or "WARNING" in {record.levelname for record in caplog.records}


@pytest.mark.parametrize("name", [TEACHER, f"{TEACHER}.sha256"])
def test_damage_to_a_teachers_file(tmp_path: Path, name: str) -> None:
    """By whatever reads it: as weights, as the source of a backbone alone, and when a run is checked."""

    def small_vit(seed: int) -> DinoVisionTransformer:
        torch.manual_seed(seed)
        return DinoVisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1)

    def states_of(network: nn.Module) -> list[Tensor]:
        return [tensor.clone() for tensor in network.state_dict().values()]

    folder = tmp_path / "eval" / "training_7"
    method = nn.ModuleDict({"teacher": nn.ModuleDict({"backbone": small_vit(0)})})
    file = save_teacher(method, folder)
    backbone = small_vit(1)
    load_pretrained_backbone(backbone, file, log=False)
    assert check_run(tmp_path).teachers[0].state == "good"
    before = states_of(backbone)
    for _ in damaged(folder / name):
        with pytest.raises(ValueError, match=r"teacher_checkpoint\.pth (is|has a) damaged"):
            load_pretrained_backbone(backbone, file, log=False)
        with pytest.raises(DamagedCheckpointError, match=r"teacher_checkpoint\.pth"):
            extract_teacher(file, tmp_path / "backbone.pth")
        assert check_run(tmp_path).teachers[0].state == "damaged"
    assert is_equal(states_of(backbone), before)
    assert not (tmp_path / "backbone.pth").exists()


def as_from_before(folder: Path, step: int) -> None:
    """Makes a step what the version without checksums wrote."""
    content = torch.load(path(folder, step), weights_only=True)
    del content["step_id"]
    torch.save(content | {"format_version": 1}, path(folder, step))
    sidecar(path(folder, step)).unlink()


def test_files_from_before_checksums_are_checked_by_the_sums_of_their_format(tmp_path: Path) -> None:
    """They hold no sum of everything, so that a flip may go unnoticed; but never one in the values."""
    expected = save_steps(tmp_path, 7)[7]
    as_from_before(tmp_path, 7)
    loader = build(tmp_path, seed=5)
    found = 0
    for _ in damaged(path(tmp_path, 7)):
        try:
            loader.resume_or_load("")
        except ValueError:
            found += 1
        else:
            assert is_equal(states(loader), expected)
    assert found >= CUTS


def test_a_folder_from_before_checksums(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save_steps(tmp_path, 1, 3)
    for step in (1, 3):
        as_from_before(tmp_path, step)
    assert is_before_checksums(tmp_path)
    loader = build(tmp_path, seed=9)
    for asked in ("", str(path(tmp_path, 3))):
        assert loader.resume_or_load(asked)["iteration"] == 3
        assert is_equal(states(loader), saved[3])
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


def test_fallback_goes_step_by_step_and_is_loud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save_steps(tmp_path, 1, 3, 5)
    flip(path(tmp_path, 5))
    path(tmp_path, 3).unlink()
    loader = build(tmp_path, seed=9)
    assert loader.resume_or_load("")["iteration"] == 1
    assert is_equal(states(loader), saved[1])
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
    assert is_equal(states(loader), before)


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
    for rank in (1, 0):  # a step of two processes that hold the same
        rewrite(path(tmp_path, 3), path(tmp_path, 3, rank), world_size=2, rank=rank)
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
    # All files of a step exist before any process names it, so that the newest name counts.
    for rank, step in enumerate((2, 12)):
        (tmp_path / f"last_checkpoint.rank_{rank}").write_text(f"a_{step}.rank_{rank}.pth\n")
    assert tagged_name(tmp_path) == "a_12.rank_1.pth"
    for tag in tags(tmp_path):
        tag.unlink()
    (tmp_path / "last_checkpoint.rank_0").mkdir()
    assert tagged_name(tmp_path) == "(last_checkpoint.rank_0 cannot be read: Is a directory)"


def make_run(folder: Path) -> None:
    save_steps(folder, 1, 3, 5)
    for name in ("training_3", "best"):
        (folder / "eval" / name).mkdir(parents=True)
    teacher = {"teacher": {"backbone.norm.weight": torch.ones(3)}}
    write_with_checksum(folder / "eval" / "training_3" / TEACHER, partial(torch.save, teacher))
    torch.save(teacher, folder / "eval" / "best" / TEACHER)


def test_the_check_of_a_good_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    found = check_run(tmp_path)
    assert found.good
    assert [(step.name, step.ranks, step.state) for step in found.steps] == [
        (f"model_000000{step}", 1, "good") for step in (5, 3, 1)
    ]
    assert found.steps[0].nbytes == path(tmp_path, 5).stat().st_size
    assert {(teacher.name, teacher.state) for teacher in found.teachers} == {
        ("eval/training_3/teacher_checkpoint.pth", "good"),
        ("eval/best/teacher_checkpoint.pth", "good (no checksum)"),
    }
    assert (found.tagged, found.resumed) == ("model_0000005", "model_0000005")
    flip(path(tmp_path, 3))
    assert check_run(tmp_path).good, "damage to an older step does not matter"
    assert "damaged (model_0000003.rank_0.pth is damaged" in str(check_run(tmp_path)), "but is shown"


def test_the_check_of_a_damaged_run(tmp_path: Path) -> None:
    make_run(tmp_path)
    flip(path(tmp_path, 5))
    sidecar(path(tmp_path, 3)).unlink()
    for teacher in tmp_path.glob(f"eval/*/{TEACHER}"):
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


def test_the_check_of_folders_without_checkpoints(tmp_path: Path) -> None:
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
def test_the_door_of_the_check(tmp_path: Path, repository: Path) -> None:
    make_run(tmp_path)
    good = run_python("tools/check_run.py", str(tmp_path), folder=repository)
    assert (good.returncode, good.stdout) == (0, f"{check_run(tmp_path)}\n"), good.stderr
    flip(path(tmp_path, 5))
    assert run_python("tools/check_run.py", str(tmp_path), folder=repository).returncode == 1
