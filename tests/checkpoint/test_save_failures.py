"""Disks that are full or gone: training goes on, nothing good is lost, and a set number of failures ends the run."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_stand_ins import assert_equal, build, names, states

from dinov2.checkpoint import checkpointer as checkpointer_module
from dinov2.checkpoint.checkpointer import FSDPCheckpointer, PeriodicFSDPCheckpointer
from dinov2.checkpoint.integrity import check_run
from dinov2.utils import files as checksums_module
from dinov2.utils.errors import RunError
from tests.small_disk import mounted_disk

FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """Fails writes while it is full, after some bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        real = checksums_module.HashingWriter.write

        def write(writer: checksums_module.HashingWriter, data: bytes) -> int:
            if self.full and writer._file.tell() > 2000 and writer.error is None:
                writer.error = FULL
            return real(writer, data)

        monkeypatch.setattr(checksums_module.HashingWriter, "write", write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_is_said_and_tried_again_at_each_period(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture, asynchronous: bool
) -> None:
    checkpointer = build(tmp_path, asynchronous=asynchronous)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=2, max_iter=100, keep_last=1)
    for iteration in range(12):
        disk.full = 3 <= iteration < 9
        periodic.step(iteration)
        if checkpointer.pending is not None:
            checkpointer.pending.join()  # so that the disk is in its state while it writes
        if disk.full:
            periodic.checkpointer.wait()
            assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000001.rank_0.pth"], "and no leftovers"
    assert periodic.checkpointer.wait()
    assert checkpointer.steps("model") == [11]
    loud = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.message.partition("row")[0] for record in loud] == [f"SAVING FAILED ({n} in a " for n in (1, 2, 3)]
    assert "iteration 3 is not saved: [Errno 28] No space left on device. Training goes on" in loud[0].message
    assert "newest good checkpoint: model_0000001.rank_0.pth" in loud[0].message
    assert checkpointer.failures == 0


def test_too_many_failures_in_a_row_end_the_run(tmp_path: Path, disk: Disk) -> None:
    checkpointer = build(tmp_path, max_failures=3)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=1, max_iter=100, keep_last=1)
    periodic.step(0)
    for start in (1, 4):  # a success in between counts anew
        disk.full = True
        periodic.step(start)
        periodic.step(start + 1)
        disk.full = False
        if start == 1:
            periodic.step(3)
    disk.full = True
    with pytest.raises(
        RunError, match=r"3 saves in a row failed, the last after iteration 6: .*No space left on device"
    ):
        periodic.step(6)
    assert checkpointer.steps("model") == [3]
    assert build(tmp_path, seed=1).resume_or_load("")["iteration"] == 3


def test_the_last_iteration_is_saved_as_soon_as_there_is_room(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        disk.full = len(pauses) < 3

    monkeypatch.setattr("dinov2.checkpoint.checkpointer.time.sleep", sleep)
    periodic = PeriodicFSDPCheckpointer(build(tmp_path), period=5, max_iter=10, keep_last=1, retry_seconds=7.0)
    disk.full = True
    periodic.step(9)
    assert pauses == [7.0] * 3
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000009.rank_0.pth"]
    assert "the last iteration is not saved: trying again in 7 s" in caplog.text


def test_saving_now_tells_whether_it_worked(tmp_path: Path, disk: Disk) -> None:
    periodic = PeriodicFSDPCheckpointer(build(tmp_path, asynchronous=True), period=100, max_iter=1000, keep_last=1)
    disk.full = True
    assert not periodic.save_step(5)
    disk.full = False
    assert periodic.save_step(6)


def test_a_folder_that_vanishes_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    checkpointer = build(folder)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=1, max_iter=100, keep_last=2)
    periodic.step(0)
    folder.rename(tmp_path / "away")
    periodic.step(1)
    (tmp_path / "away").rename(folder)
    periodic.step(2)
    assert checkpointer.steps("model") == [0, 2]
    assert "iteration 1 is not saved: [Errno 2] No such file or directory" in caplog.text


def test_a_step_that_cannot_be_named_is_a_failure_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = build(tmp_path)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=1, max_iter=100, keep_last=1)
    periodic.step(0)

    def fail(*_: Any) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer_module, "write_text_atomically", fail)
        periodic.step(1)
    assert checkpointer.steps("model") == [0, 1]
    assert "iteration 1 is not saved: [Errno 28]" in caplog.text
    assert build(tmp_path, seed=2).resume_or_load("")["iteration"] == 0


def test_an_older_file_of_the_same_name_survives_a_failure(tmp_path: Path, disk: Disk) -> None:
    checkpointer = build(tmp_path)
    checkpointer.save("model_0000004", iteration=4)
    expected = states(checkpointer)
    disk.full = True
    build(tmp_path, seed=1).save("model_0000004", iteration=4)
    other = build(tmp_path, seed=2)
    other.resume_or_load("")
    assert_equal(states(other), expected)


def test_an_old_step_that_cannot_be_deleted_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path) -> None:
        raise PermissionError(f"not {path.name}")

    monkeypatch.setattr(checkpointer_module, "remove_with_checksum", fail)
    periodic = PeriodicFSDPCheckpointer(build(tmp_path), period=1, max_iter=100, keep_last=1)
    periodic.step(0)
    periodic.step(1)
    assert periodic.checkpointer.wait()
    assert "model_0000000.rank_0.pth cannot be deleted: not model_0000000.rank_0.pth" in caplog.text


def test_a_name_without_a_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a step's name ends in its number, .*: model_final"):
        build(tmp_path).save("model_final", iteration=4)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", 2) as folder:
        yield folder


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_real_disk_that_fills_up_and_is_freed(small_disk: Path, asynchronous: bool) -> None:
    """Two steps of 700 kB fit; somebody else takes half of the second's room, and gives it back."""
    checkpointer = build(small_disk, width=6000, asynchronous=asynchronous)
    periodic = PeriodicFSDPCheckpointer(checkpointer, period=1, max_iter=100, keep_last=1)
    assert periodic.save_step(0)
    size = (small_disk / "model_0000000.rank_0.pth").stat().st_size
    assert 600_000 < size < 750_000
    other = small_disk / "other"
    other.write_bytes(bytes(2 * 2**20 - size - size // 2))
    free = shutil.disk_usage(small_disk).free
    for iteration in (1, 2, 3):
        assert not periodic.save_step(iteration)
        assert shutil.disk_usage(small_disk).free == free, "a failed save leaves nothing"
        assert check_run(small_disk).resumed == "model_0000000"
    other.unlink()
    assert periodic.save_step(4)
    assert check_run(small_disk).good
    loader = build(small_disk, seed=1, width=6000)
    assert loader.resume_or_load("")["iteration"] == 4
    assert_equal(states(loader), states(checkpointer))


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from checkpoint_stand_ins import build
from dinov2.utils import files

folder, moment = Path(sys.argv[1]), sys.argv[2]
checkpointer = build(folder, asynchronous=True)
checkpointer.save("model_0000001", iteration=1)
assert checkpointer.wait()
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
names = []
rename, write = files.os.replace, files.HashingWriter.write

def replace(source, target):
    names.append(target.name)
    if (moment, len(names)) in (("before the checksum", 1), ("before the name", 2), ("before the tag", 3)):
        die()
    rename(source, target)

def part(self, data):
    return die() if self._file.tell() > 2000 else write(self, data)

files.os.replace = replace
if moment == "while writing":
    files.HashingWriter.write = part
checkpointer.save("model_0000002", iteration=2)
checkpointer.wait()
print("survived")
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while writing", "before the checksum", "before the name", "before the tag"])
def test_a_kill_inside_a_save_leaves_the_step_before(tmp_path: Path, moment: str) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), moment],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "survived" not in killed.stdout
    assert check_run(tmp_path).resumed == "model_0000001"
    again = build(tmp_path, seed=9)
    assert again.resume_or_load("")["iteration"] == 1
    again.save("model_0000002", iteration=2)
    assert names(tmp_path) == ["last_checkpoint.rank_0", "model_0000001.rank_0.pth", "model_0000002.rank_0.pth"]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert check_run(tmp_path).good


def test_what_was_written_is_what_is_read_after_a_failure(tmp_path: Path, disk: Disk) -> None:
    checkpointer = build(tmp_path)
    disk.full = True
    checkpointer.save("model_0000001", iteration=1)
    disk.full = False
    with torch.no_grad():
        for parameter in checkpointer.model.parameters():
            parameter.add_(1)
    checkpointer.save("model_0000002", iteration=2)
    loader: FSDPCheckpointer = build(tmp_path, seed=1)
    loader.resume_or_load("")
    assert_equal(states(loader), states(checkpointer))
