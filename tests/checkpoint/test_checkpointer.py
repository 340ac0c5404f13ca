"""Saving and resuming: atomic steps, beside training, on disks that are full or gone, in one process and in several."""

import errno
import logging
import os
import shutil
import signal
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_stand_ins import build, build_sharded, in_processes, is_equal, names, states, whole
from torch import nn

from dinov2.checkpoint import checkpointer as checkpointer_module
from dinov2.checkpoint import integrity as integrity_module
from dinov2.checkpoint.checkpointer import BackgroundWrite, FSDPCheckpointer, PeriodicFSDPCheckpointer, to_host
from dinov2.checkpoint.integrity import check_run
from dinov2.fsdp import PeriodicCheckpointer
from dinov2.utils import files as files_module
from dinov2.utils.errors import RunError
from dinov2.utils.files import write_with_checksum
from dinov2.utils.seeds import RandomState
from tests.processes import forking_context
from tests.small_disk import mounted_disk

FULL = OSError(errno.ENOSPC, "No space left on device")


def periodic(
    checkpointer: FSDPCheckpointer, period: int = 1, keep_last: int = 1, **more: Any
) -> PeriodicFSDPCheckpointer:
    return PeriodicFSDPCheckpointer(checkpointer, **{"period": period, "max_iter": 100, "keep_last": keep_last} | more)


def fail(error: BaseException, *_: Any) -> None:
    raise error


class Counter:
    """Something with a state."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_the_published_training_loop_works_with_its_own_names(tmp_path: Path) -> None:
    saved = build(tmp_path, save_to_disk=True, counter=Counter(7))
    loop = PeriodicCheckpointer(saved, period=2, max_iter=6, max_to_keep=2)
    for iteration in range(saved.resume_or_load("", resume=True).get("iteration", -1) + 1, 6):
        loop.step(iteration)
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000003.rank_0.pth", "model_0000005.rank_0.pth"]
    silent = build(tmp_path / "nowhere", save_to_disk=False)
    PeriodicCheckpointer(silent, period=1, max_iter=2).step(1)
    assert not (tmp_path / "nowhere").exists()
    assert silent.wait()


def test_processes_that_disagree_about_writing_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = build(tmp_path)
    monkeypatch.setattr(checkpointer_module, "all_gather_objects", lambda value: [value, False, False])
    with pytest.raises(ValueError, match="save_to_disk is False in the processes 1, 2 and True in others"):
        saved.save("model_0000004", iteration=4)
    assert not list(tmp_path.iterdir())


def test_what_was_saved_comes_back_and_is_independent_of_the_file(tmp_path: Path) -> None:
    saved = build(tmp_path, counter=Counter(7))
    saved.save("model_0000004", iteration=4, samples_seen=80)
    expected = states(saved)
    other = build(tmp_path, seed=1, counter=Counter())
    extras = other.resume_or_load("")
    (tmp_path / "model_0000004.rank_0.pth").write_bytes(b"")
    assert is_equal(states(other), expected)
    assert (extras["iteration"], extras["samples_seen"]) == (4, 80)
    assert other.checkpointables["counter"].value == 7
    assert not {"model", "optimizer", "rows", "counter"} & extras.keys()


def test_loading_works_before_the_first_step_of_the_optimiser(tmp_path: Path) -> None:
    saved = build(tmp_path)
    unused = next(iter(saved.model.parameters()))
    del saved.optimizer.state[unused]
    saved.save("model_0000000", iteration=0)
    fresh = build(tmp_path, seed=1)
    fresh.optimizer.state.clear()
    fresh.resume_or_load("")
    assert is_equal(states(fresh), states(saved)), "parameters without state stay without"
    for checkpointer in (saved, fresh):
        checkpointer.model.eval()(torch.ones(2, 4)).sum().backward()
        checkpointer.optimizer.step()
    assert is_equal(states(fresh), states(saved))


def test_an_empty_folder_resumes_nothing(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    before = states(checkpointer)
    assert not checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == ""
    assert checkpointer.resume_or_load("") == checkpointer.newest() == {}
    checkpointer.save("model_0000003", iteration=3)
    assert checkpointer.has_checkpoint()
    assert checkpointer.resume_or_load("", resume=False) == {}
    assert is_equal(states(checkpointer), before)


def test_a_named_step_comes_before_the_newest(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    for iteration in (1, 2):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    for path in ("model_0000001.rank_0.pth", "model_0000001.rank_7.pth", "model_0000001.rank_{rank}.pth"):
        assert checkpointer.resume_or_load(str(tmp_path / path))["iteration"] == 1
    assert checkpointer.resume_or_load("")["iteration"] == checkpointer.newest()["iteration"] == 2


def test_leftovers_of_this_process_go_and_files_of_others_stay(tmp_path: Path) -> None:
    others = ".model_0000001.rank_1.pth.x2.tmp"
    (tmp_path / "last_checkpoint.rank_1").write_text("model_0000009.rank_1.pth\n")  # of a rank that no longer exists
    (tmp_path / "last_checkpoint.rank_0.backup").write_text("a person's copy")
    for name in (".model_0000001.rank_0.pth.x1.tmp", "model_0000008.rank_0.pth.sha256", others, "notes.tmp"):
        (tmp_path / name).touch()
    checkpointer = build(tmp_path)
    checkpointer.save("model_0000002", iteration=2)
    expected = [others, "last_checkpoint.rank_0", "last_checkpoint.rank_0.backup"]
    assert names(tmp_path) == [*expected, "model_0000002.rank_0.pth", "notes.tmp"]
    assert not (tmp_path / "model_0000008.rank_0.pth.sha256").exists()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000002.rank_{rank}.pth")


@pytest.mark.parametrize(("keep", "kept"), [(1, [6]), (3, [4, 5, 6]), (0, [0, 1, 2, 3, 4, 5, 6])])
def test_the_newest_steps_are_kept(tmp_path: Path, keep: int, kept: list[int]) -> None:
    for iterations in (range(4), range(4, 7)):
        saves = periodic(build(tmp_path), keep_last=keep)
        for iteration in iterations:
            saves.step(iteration)
    assert saves.checkpointer.steps("model") == kept


def test_steps_are_saved_every_period_and_at_the_end(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    saves = periodic(checkpointer, 4, 0, max_iter=11)
    for iteration in range(11):
        saves.step(iteration, note="x")
    assert checkpointer.steps("model") == [3, 7, 10]
    saves.save_step(8)
    assert checkpointer.steps("model") == [3, 7, 8, 10]


def test_later_steps_of_an_abandoned_start_do_not_push_out_a_new_one(tmp_path: Path) -> None:
    checkpointer = build(tmp_path)
    saves = periodic(checkpointer, keep_last=2)
    for iteration in (10, 11, 3, 4, 5):
        saves.step(iteration)
    assert checkpointer.steps("model") == [4, 5, 10, 11]
    assert checkpointer.resume_or_load("")["iteration"] == 5
    for iteration in (10, 11, 12):
        saves.step(iteration)
    assert checkpointer.steps("model") == [11, 12]


def test_files_of_ranks_that_no_longer_exist_are_forgotten_too(tmp_path: Path) -> None:
    for name in (*(f"model_0000001.rank_{rank}.pth" for rank in range(3)), "model_0000001.rank_0.pth.backup"):
        (tmp_path / name).touch()
    build(tmp_path).forget(1, "model")
    assert names(tmp_path) == ["model_0000001.rank_0.pth.backup"]


def test_another_architecture_is_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    build(tmp_path, width=5).save("model_0000000", iteration=0)
    checkpointer = build(tmp_path)
    before = states(checkpointer)
    with pytest.raises(ValueError, match=r"0\.weight: \(5, 4\) in the checkpoint, \(3, 4\) in the model"):
        checkpointer.resume_or_load("")
    deep = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    for model, message in (
        (nn.Sequential(*checkpointer.model, nn.Linear(2, 2)), r"checkpoint: 3\.bias\n  not in the checkpoint: 3\.weig"),
        (nn.Sequential(*list(checkpointer.model)[:1]), r"only in the checkpoint: 1\.bias"),
        (deep, r"and \d+ more$"),
    ):
        with pytest.raises(ValueError, match=message) as failure:
            FSDPCheckpointer(model, tmp_path, optimizer=checkpointer.optimizer).resume_or_load("")
        assert str(failure.value).count("\n") <= 13
    assert is_equal(states(checkpointer), before)


def test_random_states_belong_to_their_number_of_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpointer = build(tmp_path, random=RandomState())
    checkpointer.save("model_0000000", iteration=0)
    expected = torch.rand(3)
    checkpointer.resume_or_load("")
    assert torch.equal(torch.rand(3), expected)
    content = torch.load(tmp_path / "model_0000000.rank_0.pth", weights_only=True)
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


def test_a_name_without_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a step's name ends in its number, .*: model_final"):
        build(tmp_path).save("model_final", iteration=4)


class Gate:
    """Holds back writes until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.event = threading.Event()
        self.at_work = self.max_at_work = 0
        real = checkpointer_module.write_with_checksum

        def write(*arguments: Any) -> str:
            self.at_work += 1
            self.max_at_work = max(self.max_at_work, self.at_work)
            assert self.event.wait(20)
            try:
                return real(*arguments)
            finally:
                self.at_work -= 1

        monkeypatch.setattr(checkpointer_module, "write_with_checksum", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_files_are_those_of_a_save_that_is_waited_for(tmp_path: Path, gate: Gate) -> None:
    contents = []
    for asynchronous in (True, False):
        folder = tmp_path / str(asynchronous)
        folder.mkdir()
        history = {"list": [1, 2], "tensor": torch.zeros(3)}
        checkpointer = build(folder, asynchronous=asynchronous, random=RandomState())
        checkpointer.save("model_0000004", iteration=4, history=history)
        if asynchronous:  # training goes on right after `save` has returned
            with torch.no_grad():
                moments = [tensor for state in checkpointer.optimizer.state.values() for tensor in state.values()]
                for tensor in (*checkpointer.model.parameters(), *checkpointer.model.buffers(), *moments):
                    tensor.fill_(77)
            torch.rand(1000)
            history["list"].append(3)
            history["tensor"].fill_(9)
            assert names(folder) == [], "the write has not even begun"
            gate.event.set()
        assert checkpointer.wait()
        contents.append((folder / "model_0000004.rank_0.pth").read_bytes())
    assert contents[0] == contents[1]


def test_training_goes_on_and_the_step_counts_when_it_is_polled(tmp_path: Path, gate: Gate) -> None:
    checkpointer = build(tmp_path, asynchronous=True)
    checkpointer.save("model_0000004", iteration=4)
    checkpointer.poll()
    assert checkpointer.get_checkpoint_file() == ""
    gate.event.set()
    while checkpointer.pending is not None:
        checkpointer.poll()
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000004.rank_0.pth"]
    checkpointer.save("model_0000005", iteration=5)
    assert checkpointer.newest()["iteration"] == 5, "reading waits"
    checkpointer.save("model_0000006", iteration=6)
    assert checkpointer.resume_or_load("")["iteration"] == 6


def test_a_second_save_waits_for_the_first_and_says_so(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = build(tmp_path, asynchronous=True)
    saves = periodic(checkpointer, keep_last=2)
    saves.step(0)
    expected = states(checkpointer)
    threading.Timer(0.3, gate.event.set).start()
    saves.step(1)
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"training waits: {tmp_path / 'model_0000000.rank_0.pth'} is still being written, and the next save is due"
    ]
    assert checkpointer.steps("model")[0] == 0
    saves.step(2)
    assert checkpointer.wait()
    assert gate.max_at_work == 1, "one write at a time"
    assert checkpointer.steps("model") == [1, 2]
    other = build(tmp_path, seed=3)
    other.resume_or_load("")
    assert is_equal(states(other), expected)


def test_old_steps_stay_until_the_new_one_counts(tmp_path: Path, gate: Gate) -> None:
    saves = periodic(build(tmp_path, asynchronous=True))
    gate.event.set()
    saves.save_step(0)
    gate.event.clear()
    saves.step(1)
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000000.rank_0.pth"]
    gate.event.set()
    assert saves.checkpointer.wait()
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000001.rank_0.pth"]
    saves.step(99)
    assert saves.checkpointer.get_checkpoint_file().endswith("model_0000099.rank_{rank}.pth"), "the last is waited for"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_the_file_is_finished_without_being_named(
    tmp_path: Path, gate: Gate, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    saves = periodic(build(tmp_path, asynchronous=True))

    def train() -> None:
        with saves:
            saves.step(4)
            threading.Timer(0.2, gate.event.set).start()
            raise error

    with pytest.raises(error):
        train()
    assert (saves.checkpointer.pending is None) is (error is RuntimeError), "Ctrl-C does not wait"
    saves.checkpointer.close()
    assert names(tmp_path) == ["model_0000004.rank_0.pth"]
    # It was the first and is whole: better than beginning anew.
    assert build(tmp_path).resume_or_load("")["iteration"] == 4
    assert "no last_checkpoint file: going on from model_0000004, which is complete and undamaged" in caplog.text


def test_a_defect_surfaces_in_the_training_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = build(tmp_path, asynchronous=True)
    monkeypatch.setattr(checkpointer_module, "write_with_checksum", partial(fail, ZeroDivisionError()))
    checkpointer.save("model_0000004", iteration=4)
    with pytest.raises(ZeroDivisionError):
        checkpointer.wait()
    assert names(tmp_path) == []


def test_waiting_long_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(checkpointer_module, "PATIENCE_SECONDS", 0.05)
    event = threading.Event()
    write = BackgroundWrite(lambda: event.wait(20), Path("model_0000004.rank_0.pth"), 4)
    threading.Timer(0.3, event.set).start()
    write.join()
    assert write.done
    assert "still waiting for model_0000004.rank_0.pth to be written: the disk is slow, or gone" in caplog.text


def test_copies_share_nothing() -> None:
    base = torch.arange(6.0)
    value = {"view": base[2:4], "deep": [(base, {"n": 1})], "ordered": OrderedDict(a=base), "name": "x"}
    copied = to_host(value)
    base.fill_(0)
    assert copied["view"].tolist() == [2, 3]
    assert copied["view"].untyped_storage().nbytes() == 8, "of a view, only what it shows"
    assert copied["deep"][0][0].tolist() == copied["ordered"]["a"].tolist() == list(range(6))
    assert copied["deep"][0][1] is not value["deep"][0][1]
    assert not to_host(torch.nn.Parameter(torch.zeros(2))).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_copies_from_a_gpu_are_finished_on_return() -> None:
    tensors = {str(size): torch.randn(size, 1000, device="cuda", dtype=torch.bfloat16) for size in (1, 7, 3000)}
    expected = {name: tensor.cpu() for name, tensor in tensors.items()}
    copied = to_host(tensors)
    for tensor in tensors.values():
        tensor.fill_(0)
    for name, tensor in copied.items():
        assert tensor.is_pinned()
        assert torch.equal(tensor, expected[name])


class Disk:
    """Fails writes while it is full, after some bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        real = files_module.HashingWriter.write

        def write(writer: files_module.HashingWriter, data: bytes) -> int:
            if self.full and writer._file.tell() > 2000 and writer.error is None:
                writer.error = FULL
            return real(writer, data)

        monkeypatch.setattr(files_module.HashingWriter, "write", write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_said_and_tried_again_at_each_period(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, asynchronous: bool
) -> None:
    checkpointer = build(tmp_path, asynchronous=asynchronous)
    saves = periodic(checkpointer, period=2)
    for iteration in range(12):
        disk.full = 3 <= iteration < 9
        saves.step(iteration)
        if checkpointer.pending is not None:
            checkpointer.pending.join()  # so that the disk is in its state while it writes
        if disk.full:
            checkpointer.wait()
            assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000001.rank_0.pth"], "and no leftovers"
    assert checkpointer.wait()
    assert checkpointer.steps("model") == [11]
    loud = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.message.partition("row")[0] for record in loud] == [f"SAVING FAILED ({n} in a " for n in (1, 2, 3)]
    assert "iteration 3 is not saved: [Errno 28] No space left on device. Training goes on" in loud[0].message
    assert "newest good checkpoint: model_0000001.rank_0.pth" in loud[0].message
    assert checkpointer.failures == 0


def test_too_many_failures_in_a_row_end_the_run(tmp_path: Path, disk: Disk) -> None:
    checkpointer = build(tmp_path, max_failures=3)
    saves = periodic(checkpointer)
    for iteration in range(6):  # a success in between counts anew
        disk.full = iteration not in (0, 3)
        assert saves.save_step(iteration) is not disk.full
    with pytest.raises(RunError, match=r"3 saves in a row failed, the last after iteration 6: .*No space left on dev"):
        saves.step(6)
    assert checkpointer.steps("model") == [3]
    assert build(tmp_path, seed=1).resume_or_load("")["iteration"] == 3


def test_the_last_iteration_is_saved_as_soon_as_there_is_room(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        disk.full = len(pauses) < 3

    monkeypatch.setattr(checkpointer_module.time, "sleep", sleep)
    disk.full = True
    periodic(build(tmp_path), 5, max_iter=10, retry_seconds=7.0).step(9)
    assert pauses == [7.0] * 3
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000009.rank_0.pth"]
    assert "the last iteration is not saved: trying again in 7 s" in caplog.text


def test_a_folder_that_vanishes_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    checkpointer = build(folder)
    saves = periodic(checkpointer, keep_last=2)
    saves.step(0)
    folder.rename(tmp_path / "away")
    saves.step(1)
    (tmp_path / "away").rename(folder)
    saves.step(2)
    assert checkpointer.steps("model") == [0, 2]
    assert "iteration 1 is not saved: [Errno 2] No such file or directory" in caplog.text


def test_a_step_that_cannot_be_named_is_a_failure_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = build(tmp_path)
    saves = periodic(checkpointer)
    saves.step(0)
    monkeypatch.setattr(checkpointer_module, "write_text_atomically", partial(fail, FULL))
    saves.step(1)
    assert checkpointer.steps("model") == [0, 1]
    assert "iteration 1 is not saved: [Errno 28]" in caplog.text
    assert build(tmp_path, seed=2).resume_or_load("")["iteration"] == 0


def test_an_older_file_of_the_same_name_survives_a_failure(tmp_path: Path, disk: Disk) -> None:
    checkpointer = build(tmp_path)
    checkpointer.save("model_0000004", iteration=4)
    expected = states(checkpointer)
    other = build(tmp_path, seed=1)
    disk.full = True
    other.save("model_0000004", iteration=4)
    disk.full = False
    loader = build(tmp_path, seed=2)
    loader.resume_or_load("")
    assert is_equal(states(loader), expected)
    other.save("model_0000005", iteration=5)
    loader.resume_or_load("")
    assert is_equal(states(loader), states(other)), "nothing of the failed save is left"


def test_an_old_step_that_cannot_be_deleted_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(checkpointer_module, "remove_with_checksum", partial(fail, PermissionError("not allowed")))
    saves = periodic(build(tmp_path))
    saves.step(0)
    saves.step(1)
    assert saves.checkpointer.wait()
    assert "model_0000000.rank_0.pth cannot be deleted: not allowed" in caplog.text


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", 2) as folder:
        yield folder


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_real_disk_that_fills_up_and_is_freed(small_disk: Path, asynchronous: bool) -> None:
    """Two steps of 700 kB fit; somebody else takes half of the second's room, and gives it back."""
    checkpointer = build(small_disk, width=6000, asynchronous=asynchronous)
    saves = periodic(checkpointer)
    assert saves.save_step(0)
    size = (small_disk / "model_0000000.rank_0.pth").stat().st_size
    assert 600_000 < size < 750_000
    other = small_disk / "other"
    other.write_bytes(bytes(2 * 2**20 - size - size // 2))
    free = shutil.disk_usage(small_disk).free
    for iteration in (1, 2, 3):
        assert not saves.save_step(iteration)
        assert shutil.disk_usage(small_disk).free == free, "a failed save leaves nothing"
        assert check_run(small_disk).resumed == "model_0000000"
    other.unlink()
    assert saves.save_step(4)
    assert check_run(small_disk).good
    loader = build(small_disk, seed=1, width=6000)
    assert loader.resume_or_load("")["iteration"] == 4
    assert is_equal(states(loader), states(checkpointer))


def save_until_killed(folder: Path, moment: str) -> None:
    checkpointer = build(folder, asynchronous=True)
    checkpointer.save("model_0000001", iteration=1)
    assert checkpointer.wait()
    replaced: list[str] = []
    rename, write = files_module.os.replace, files_module.HashingWriter.write

    def die() -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def replace(source: Path, target: Path) -> None:
        replaced.append(target.name)
        if (moment, len(replaced)) in (("before the checksum", 1), ("before the name", 2), ("before the tag", 3)):
            die()
        rename(source, target)

    def part(self: files_module.HashingWriter, data: bytes) -> int:
        return die() if self._file.tell() > 2000 else write(self, data)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(files_module.os, "replace", replace)
        if moment == "while writing":
            monkeypatch.setattr(files_module.HashingWriter, "write", part)
        checkpointer.save("model_0000002", iteration=2)
        checkpointer.wait()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while writing", "before the checksum", "before the name", "before the tag"])
def test_a_kill_inside_a_save_leaves_the_step_before(tmp_path: Path, moment: str) -> None:
    killed = forking_context().Process(target=save_until_killed, args=(tmp_path, moment))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert check_run(tmp_path).resumed == "model_0000001"
    again = build(tmp_path, seed=9)
    assert again.resume_or_load("")["iteration"] == 1
    again.save("model_0000002", iteration=2)
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000001.rank_0.pth", "model_0000002.rank_0.pth"]
    assert check_run(tmp_path).good


def save(folder: Path) -> None:
    checkpointer = build_sharded(folder / "run")
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
@pytest.mark.parametrize(("writers", "readers"), [(1, [2]), (2, [1, 3]), (4, [2])])
def test_what_n_processes_wrote_m_load(tmp_path: Path, writers: int, readers: list[int]) -> None:
    in_processes(writers, tmp_path, save)
    assert len(list((tmp_path / "run").glob("model_*.pth"))) == writers
    for count in readers:
        in_processes(count, tmp_path, load)


def fail_on_rank_1(folder: Path) -> None:
    checkpointer = build_sharded(folder, max_failures=2)
    saves = periodic(checkpointer)
    assert saves.save_step(0)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(checkpointer_module, "write_with_checksum", partial(fail, FULL))
        assert not saves.save_step(1)
        if dist.get_rank() == 0:
            assert checkpointer.steps("model") == [0], "the others took theirs back"
        dist.barrier()
        with pytest.raises(RunError, match=r"2 saves in a row failed, .* rank 1: .*No space left"):
            saves.save_step(2)
    checkpointer.failures = 0
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(checkpointer_module, "write_text_atomically", partial(fail, FULL))
        assert not saves.save_step(3)
        assert checkpointer.steps("model") == [0, 3], "nothing is deleted before all have named the new step"
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(checkpointer_module, "write_with_checksum", partial(fail, ZeroDivisionError()))
        expected: type[Exception] = ZeroDivisionError if dist.get_rank() == 1 else RunError
        with pytest.raises(expected):
            saves.save_step(4)
    assert saves.save_step(5)
    assert checkpointer.steps("model") == [5]
    dist.barrier()
    assert check_run(folder).good


def one_sees_damage(folder: Path) -> None:
    checkpointer = build_sharded(folder)
    for iteration in (1, 3):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    checkpointer.wait()
    named, real = folder / "model_0000003.rank_1.pth", integrity_module.checksum_fault

    def fault(path: Path) -> str:
        # A disk that only this process reads badly.
        return "cannot be read: input/output error" if path == named else real(path)

    def all_fall_back(message: str) -> None:
        assert checkpointer.newest()["iteration"] == checkpointer.resume_or_load("")["iteration"] == 1
        with pytest.raises(ValueError, match=message):
            checkpointer.load(str(folder / "model_0000003.rank_0.pth"))

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(integrity_module, "checksum_fault", fault)
        all_fall_back(r"model_0000003\.rank_1\.pth cannot be read")
    dist.barrier()
    if dist.get_rank() == 0:
        os.truncate(named, 900)
    dist.barrier()
    all_fall_back(r"model_0000003\.rank_1\.pth")


def poll_until_all_are_done(folder: Path) -> None:
    checkpointer = build_sharded(folder)
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


def agree(folder: Path) -> None:
    for scenario in (fail_on_rank_1, one_sees_damage, poll_until_all_are_done):
        scenario(folder / scenario.__name__)


@pytest.mark.slow
def test_two_processes_agree_on_failures_on_damage_and_on_what_is_finished(tmp_path: Path) -> None:
    in_processes(2, tmp_path, agree)
