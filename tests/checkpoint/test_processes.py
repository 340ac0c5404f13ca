"""Several processes save and load as one: any number of them, and all agree when one fails or sees damage."""

import errno
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_stand_ins import build_sharded, in_processes, whole

from dinov2.checkpoint import checkpointer as checkpointer_module
from dinov2.checkpoint import integrity as integrity_module
from dinov2.checkpoint.checkpointer import PeriodicFSDPCheckpointer
from dinov2.checkpoint.integrity import check_run
from dinov2.utils.errors import RunError

FULL = OSError(errno.ENOSPC, "No space left on device")


def save(folder: Path) -> None:
    checkpointer = build_sharded(folder / "run", asynchronous=True)
    values = whole(checkpointer)
    checkpointer.save("model_0000004", iteration=4)
    with torch.no_grad():
        for parameter in checkpointer.model.parameters():
            parameter.mul_(3)  # training goes on
    assert checkpointer.wait()
    if dist.get_rank() == 0:
        torch.save(values, folder / "values.pth")


def load(folder: Path) -> None:
    checkpointer = build_sharded(folder / "run", seed=7)
    expected = torch.load(folder / "values.pth", weights_only=True)
    assert not torch.equal(whole(checkpointer)["0.weight"], expected["0.weight"])
    assert checkpointer.resume_or_load("")["iteration"] == 4
    ours = whole(checkpointer)
    assert ours.keys() == expected.keys()
    assert {"exp_avg.0.weight", "step.0.weight", "center"} <= ours.keys()
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 3), (4, 2)])
def test_what_n_processes_wrote_m_load(tmp_path: Path, writers: int, readers: int) -> None:
    (tmp_path / "run").mkdir()
    in_processes(writers, tmp_path, save)
    assert len(list((tmp_path / "run").glob("model_*.pth"))) == writers
    in_processes(readers, tmp_path, load)


def fail_on_rank_1(folder: Path) -> None:
    checkpointer = build_sharded(folder, asynchronous=True, max_failures=2)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=1, max_iter=100, keep_last=1)
    assert periodic.save_step(0)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(checkpointer_module, "write_with_checksum", partial(_raise, FULL))
        assert not periodic.save_step(1)
        if dist.get_rank() == 0:
            assert checkpointer.steps("model") == [0], "the others took theirs back"
        dist.barrier()
        with pytest.raises(RunError, match=r"2 saves in a row failed, .* rank 1: .*No space left"):
            periodic.save_step(2)
    checkpointer.failures = 0
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(checkpointer_module, "write_text_atomically", partial(_raise, FULL))
        assert not periodic.save_step(3)
        assert checkpointer.steps("model") == [0, 3], "nothing is deleted before all have named the new step"
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(checkpointer_module, "write_with_checksum", partial(_raise, ZeroDivisionError()))
        expected: type[Exception] = ZeroDivisionError if dist.get_rank() == 1 else RunError
        with pytest.raises(expected):
            periodic.save_step(4)
    assert periodic.save_step(5)
    assert checkpointer.steps("model") == [5]


def _raise(error: BaseException, *_: Any) -> None:
    raise error


@pytest.mark.slow
def test_a_failure_of_one_is_a_failure_of_all(tmp_path: Path) -> None:
    in_processes(2, tmp_path, fail_on_rank_1)
    assert check_run(tmp_path).good


def one_sees_damage(folder: Path) -> None:
    checkpointer = build_sharded(folder, asynchronous=True)
    for iteration in (1, 3):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    checkpointer.wait()
    real = integrity_module.checksum_fault

    def fault(path: Path) -> str:
        # A disk that only this process reads badly.
        return "cannot be read: input/output error" if "0000003.rank_1" in path.name else real(path)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(integrity_module, "checksum_fault", fault)
        assert checkpointer.newest()["iteration"] == 1
        assert checkpointer.resume_or_load("")["iteration"] == 1
        with pytest.raises(ValueError, match=r"model_0000003\.rank_1\.pth cannot be read"):
            checkpointer.load(str(folder / "model_0000003.rank_0.pth"))
    dist.barrier()
    if dist.get_rank() == 0:
        os.truncate(folder / "model_0000003.rank_1.pth", 900)
    dist.barrier()
    assert checkpointer.resume_or_load("")["iteration"] == 1
    with pytest.raises(ValueError, match=r"model_0000003\.rank_1\.pth"):
        checkpointer.load(str(folder / "model_0000003.rank_0.pth"))


@pytest.mark.slow
def test_damage_that_one_sees_makes_all_fall_back(tmp_path: Path) -> None:
    in_processes(2, tmp_path, one_sees_damage)


def poll_until_all_are_done(folder: Path) -> None:
    checkpointer = build_sharded(folder, asynchronous=True)
    slow = dist.get_rank() == 1
    with pytest.MonkeyPatch.context() as patch:
        if slow:
            event = threading.Event()
            real = checkpointer_module.write_with_checksum
            patch.setattr(checkpointer_module, "write_with_checksum", lambda *a: (event.wait(20), real(*a))[1])
        checkpointer.save("model_0000001", iteration=1)
        for _ in range(5):
            checkpointer.poll()
            assert not list(folder.glob("last_checkpoint*")), "one process is not ready"
        dist.barrier()
        if slow:
            event.set()
        while checkpointer.pending is not None:
            checkpointer.poll()
    dist.barrier()
    assert len(list(folder.glob("last_checkpoint*"))) == 2


@pytest.mark.slow
def test_a_step_is_named_only_when_every_process_has_finished(tmp_path: Path) -> None:
    in_processes(2, tmp_path, poll_until_all_are_done)
