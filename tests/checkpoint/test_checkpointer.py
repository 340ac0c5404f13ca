"""The checkpointer in one process: atomic steps, what is kept, and resuming from whatever lies in the folder."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stand_ins import assert_equal, build, names, states
from torch import nn

from dinov2.checkpoint import checkpointer as checkpointer_module
from dinov2.checkpoint.checkpointer import FSDPCheckpointer, PeriodicFSDPCheckpointer
from dinov2.checkpoint.sharding import rank_pattern
from dinov2.utils.files import write_with_checksum
from dinov2.utils.seeds import RandomState


class Counter:
    """Something with a state."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    saved = build(tmp_path, counter=Counter(7))
    saved.save("model_0000004", iteration=4, samples_seen=80)
    expected = states(saved)
    other = build(tmp_path, seed=1, counter=Counter())
    extras = other.resume_or_load("")
    assert_equal(states(other), expected)
    assert (extras["iteration"], extras["samples_seen"]) == (4, 80)
    assert other.checkpointables["counter"].value == 7
    assert not {"model", "optimizer", "rows", "counter"} & extras.keys()


def test_loading_works_before_the_first_step_of_the_optimiser(tmp_path: Path) -> None:
    saved = build(tmp_path)
    saved.save("model_0000000", iteration=0)
    fresh = build(tmp_path, seed=1)
    fresh.optimizer.state.clear()
    fresh.resume_or_load("")
    assert_equal(states(fresh), states(saved))
    for checkpointer in (saved, fresh):
        checkpointer.model.eval()(torch.ones(2, 4)).sum().backward()
        checkpointer.optimizer.step()
    assert_equal(states(fresh), states(saved))


def test_a_loaded_model_is_independent_of_the_file(tmp_path: Path) -> None:
    saved = build(tmp_path)
    saved.save("model_0000000", iteration=0)
    loaded = build(tmp_path, seed=1)
    loaded.resume_or_load("")
    (tmp_path / "model_0000000.rank_0.pth").write_bytes(b"")
    assert_equal(states(loaded), states(saved))


def test_an_empty_folder_resumes_nothing(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    before = states(checkpointer)
    assert not checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == ""
    assert checkpointer.resume_or_load("") == {}
    assert checkpointer.newest() == {}
    checkpointer.save("model_0000003", iteration=3)
    assert checkpointer.resume_or_load("", resume=False) == {}
    assert_equal(states(checkpointer), before)


def test_a_named_step_comes_before_the_newest(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    for iteration in (1, 2):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    for path in ("model_0000001.rank_0.pth", "model_0000001.rank_7.pth", "model_0000001.rank_{rank}.pth"):
        assert checkpointer.resume_or_load(str(tmp_path / path))["iteration"] == 1
    assert checkpointer.resume_or_load("")["iteration"] == 2
    assert checkpointer.newest()["iteration"] == 2


@pytest.mark.parametrize("moment", ["while writing", "before naming"])
def test_a_crash_leaves_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    checkpointer = build(tmp_path)
    checkpointer.save("model_0000001", iteration=1)
    before = names(tmp_path)

    def crash(*arguments: Any) -> None:
        if moment == "while writing":
            arguments[1].write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(
            *(torch, "save", crash)
            if moment == "while writing"
            else (checkpointer_module.FSDPCheckpointer, "_settle", crash)
        )
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save("model_0000002", iteration=2)
    assert set(names(tmp_path)) - set(before) <= {"model_0000002.rank_0.pth"}
    again = build(tmp_path)
    assert again.resume_or_load("")["iteration"] == 1
    again.save("model_0000002", iteration=2)
    assert again.resume_or_load("")["iteration"] == 2


def test_what_a_killed_process_left_is_removed_and_the_files_of_others_stay(tmp_path: Path) -> None:
    mine, others = ".model_0000001.rank_0.pth.x1.tmp", ".model_0000001.rank_1.pth.x2.tmp"
    for name in (mine, others, "notes.tmp"):
        (tmp_path / name).touch()
    build(tmp_path).save("model_0000002", iteration=2)
    assert names(tmp_path) == [others, "last_checkpoint.rank_0", "model_0000002.rank_0.pth", "notes.tmp"]


def test_tags_of_ranks_that_no_longer_exist_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "last_checkpoint.rank_1").write_text("model_0000009.rank_1.pth\n")
    (tmp_path / "last_checkpoint.rank_0.backup").write_text("a person's copy")
    checkpointer = build(tmp_path)
    checkpointer.save("model_0000002", iteration=2)
    assert names(tmp_path) == ["last_checkpoint.rank_0", "last_checkpoint.rank_0.backup", "model_0000002.rank_0.pth"]
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000002.rank_{rank}.pth")


def test_the_newest_step_counts_when_not_all_tags_were_written(tmp_path: Path) -> None:
    # All files of a step exist before any process names it.
    (tmp_path / "last_checkpoint.rank_0").write_text("model_0000005.rank_0.pth\n")
    (tmp_path / "last_checkpoint.rank_1").write_text("model_0000010.rank_1.pth\n")
    assert build(tmp_path).get_checkpoint_file() == str(tmp_path / "model_0000010.rank_{rank}.pth")


@pytest.mark.parametrize(("keep", "kept"), [(1, [6]), (3, [4, 5, 6]), (0, [0, 1, 2, 3, 4, 5, 6])])
def test_the_newest_steps_are_kept(tmp_path: Path, keep: int, kept: list[int]) -> None:
    checkpointer = build(tmp_path)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=1, max_iter=100, keep_last=keep)
    for iteration in range(4):
        periodic.step(iteration)
    again = PeriodicFSDPCheckpointer(build(tmp_path), period=1, max_iter=100, keep_last=keep)
    for iteration in range(4, 7):
        again.step(iteration)
    assert checkpointer.steps("model") == kept


def test_steps_are_saved_every_period_and_at_the_end(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=4, max_iter=11, keep_last=0)
    for iteration in range(11):
        periodic.step(iteration, note="x")
    assert checkpointer.steps("model") == [3, 7, 10]
    periodic.save_step(8)
    assert checkpointer.steps("model") == [3, 7, 8, 10]


def test_later_steps_of_an_abandoned_start_do_not_push_out_a_new_one(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=1, max_iter=100, keep_last=2)
    for iteration in (10, 11, 3, 4, 5):
        periodic.step(iteration)
    assert checkpointer.steps("model") == [4, 5, 10, 11]
    assert checkpointer.resume_or_load("")["iteration"] == 5
    for iteration in (10, 11, 12):
        periodic.step(iteration)
    assert checkpointer.steps("model") == [11, 12]


def test_files_of_ranks_that_no_longer_exist_are_forgotten_too(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    for rank in range(3):
        (tmp_path / f"model_0000001.rank_{rank}.pth").touch()
    (tmp_path / "model_0000001.rank_0.pth.backup").touch()
    checkpointer.forget(1, "model")
    assert names(tmp_path) == ["model_0000001.rank_0.pth.backup"]


def test_another_architecture_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    build(tmp_path, width=5).save("model_0000000", iteration=0)
    checkpointer = build(tmp_path)
    before = states(checkpointer)
    with pytest.raises(ValueError, match=r"0\.weight: \(5, 4\) in the checkpoint, \(3, 4\) in the model"):
        checkpointer.resume_or_load("")
    extra = nn.Sequential(*checkpointer.model, nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"not in the checkpoint: 3\.bias\n  not in the checkpoint: 3\.weight"):
        FSDPCheckpointer(extra, tmp_path, optimizer=checkpointer.optimizer).resume_or_load("")
    few = nn.Sequential(*list(checkpointer.model)[:1])
    with pytest.raises(ValueError, match=r"only in the checkpoint: 1\.bias"):
        FSDPCheckpointer(few, tmp_path, optimizer=checkpointer.optimizer).resume_or_load("")
    assert_equal(states(checkpointer), before)


def test_long_lists_of_differences_are_cut(tmp_path: Path) -> None:
    build(tmp_path).save("model_0000000", iteration=0)
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    checkpointer = FSDPCheckpointer(deep, tmp_path, optimizer=torch.optim.AdamW(deep.parameters()))
    with pytest.raises(ValueError, match=r"and \d+ more$") as failure:
        checkpointer.resume_or_load("")
    assert str(failure.value).count("\n") == 13


def test_random_states_belong_to_their_number_of_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = build(tmp_path, random=RandomState())
    checkpointer.save("model_0000000", iteration=0)
    expected = torch.rand(3)
    checkpointer.resume_or_load("")
    assert torch.equal(torch.rand(3), expected)
    path = tmp_path / "model_0000000.rank_0.pth"
    content = torch.load(path, weights_only=True)
    for rank in (0, 1):
        changed = content | {"world_size": 2, "rank": rank}
        write_with_checksum(tmp_path / f"model_0000000.rank_{rank}.pth", partial(torch.save, changed))
    torch.manual_seed(5)
    undisturbed = torch.rand(3)
    torch.manual_seed(5)
    checkpointer.resume_or_load("")
    assert torch.equal(torch.rand(3), undisturbed)
    assert "written by 2 processes and is loaded by 1: random states start anew" in caplog.text


def test_a_scaler_that_was_idle_can_be_in_use_after_a_resume(tmp_path: Path) -> None:
    build(tmp_path, scaler=torch.amp.GradScaler("cpu", enabled=False)).save("model_0000000", iteration=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    build(tmp_path, scaler=scaler).resume_or_load("")
    assert scaler.get_scale() == 4.0


def test_parameters_without_state_stay_without(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    unused = next(iter(checkpointer.model.parameters()))
    del checkpointer.optimizer.state[unused]
    checkpointer.save("model_0000000", iteration=0)
    other = build(tmp_path, seed=1)
    other.optimizer.state.clear()
    other.resume_or_load("")
    assert len(other.optimizer.state) == len(list(other.model.parameters())) - 1


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        build(tmp_path).save("model_0000000", iteration=0)
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("path", ["x/model_0000001.rank_12.pth", "x/model_0000001.rank_{rank}.pth"])
def test_rank_patterns(path: str) -> None:
    assert rank_pattern(path) == "x/model_0000001.rank_{rank}.pth"


@pytest.mark.parametrize("path", ["model.pth", "model.rank_.pth", "model.rank_0.pth.bak", ""])
def test_a_path_without_a_rank_is_refused(path: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not a rank file: expected a name such as model_0011249\.rank_\{rank\}\.pth"
    ):
        rank_pattern(path)
