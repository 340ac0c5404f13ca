"""Two runs in one folder: the second is told who the first is; a dead one is not in the way."""

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from dinov2.checkpoint.run_lock import FolderInUseError, run_lock
from dinov2.config import Config
from dinov2.train.command import evaluate_newest
from dinov2.train.train import do_train

HOLDER = """
import os, sys, time
from pathlib import Path
from dinov2.checkpoint.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    if os.fork() == 0:  # as data-loading processes are
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path, repository: Path) -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=repository, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("kind", ["symbolic link", "hard link", "pipe", "folder"])
def test_a_lock_that_leads_elsewhere_is_refused_and_nothing_is_written_there(tmp_path: Path, kind: str) -> None:
    precious, lock = tmp_path / "precious", tmp_path / "run" / "run.lock"
    precious.write_text("keep me")
    lock.parent.mkdir()
    match kind:
        case "symbolic link":
            lock.symlink_to(precious)
        case "hard link":
            lock.hardlink_to(precious)
        case "pipe":
            os.mkfifo(lock)
        case _:
            lock.mkdir()
    with pytest.raises(FolderInUseError, match=r"run\.lock cannot be (opened|locked)"), run_lock(lock.parent):
        pass
    assert precious.read_text() == "keep me"


WRITER = """
import sys, time
from pathlib import Path
from dinov2.utils.files import write_atomically
def write(file):
    file.write(b"x" * 100)
    print("writing", flush=True)
    time.sleep(60)
write_atomically(Path(sys.argv[1]), write)
"""


def test_what_a_killed_run_was_writing_is_deleted_and_what_others_write_is_not(
    tmp_path: Path, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def start(path: Path) -> "subprocess.Popen[str]":
        path.parent.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], cwd=repository, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    run, report = tmp_path / "run", tmp_path / "run" / "report.html"
    killed = start(run / "eval" / "training_3" / "teacher_checkpoint.pth")
    killed.kill()
    killed.communicate()
    (left,) = (run / "eval" / "training_3").iterdir()
    for folder in (run, run / "val", run / "eval" / "best", run / "sweep" / "another_run"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / left.name).write_bytes(b"y")
    (run / "eval" / "best" / ".teacher_checkpoint.pth.tmp").touch()  # of an earlier version
    (run / "sweep" / "another_run" / "run.lock").touch()
    mine = [run / name for name in (".of_a_user.tmp", "notes.tmp", "model_1.rank_0.pth")]
    for path in mine:
        path.touch()
    (run / ".link.0123456789ab.tmp").symlink_to(mine[2])
    living = start(report)
    try:
        with caplog.at_level(logging.INFO, "dinov2"), run_lock(run):
            pass
        kept = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name.endswith(".tmp"))
        assert [path for path in kept if not path.startswith(".report.html.")] == [
            ".link.0123456789ab.tmp", ".of_a_user.tmp", "notes.tmp", f"sweep/another_run/{left.name}",
        ]  # fmt: skip
        assert len(kept) == 5, "what another process writes stays"
        assert all(path.exists() for path in mine)
        assert "deleted 5 unfinished file(s) of 0.0 MiB that a killed run has left" in caplog.text
    finally:
        living.kill()
        living.communicate()


def test_a_second_run_is_told_about_the_first(
    holder: "subprocess.Popen[str]", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rf"{tmp_path} is in use: process {holder.pid} on {socket.gethostname()} trains in it"
    with pytest.raises(FolderInUseError, match=expected), run_lock(tmp_path, patience_seconds=0.3):
        pass
    monkeypatch.setattr("dinov2.train.train.run_lock", partial(run_lock, patience_seconds=0))
    with pytest.raises(FolderInUseError, match=expected):
        do_train(Config(), nn.Module(), output_dir=tmp_path, device=torch.device("cpu"))
    monkeypatch.setattr("dinov2.train.command.run_lock", partial(run_lock, patience_seconds=0))
    with pytest.raises(FolderInUseError, match=expected):  # it would write there
        evaluate_newest(Config(), nn.Module(), tmp_path, torch.device("cpu"))
    # Killed, it is out of the way, although a process that it forked lives on.
    holder.kill()
    holder.wait()
    began = time.monotonic()
    with run_lock(tmp_path):
        assert time.monotonic() - began < 5
    with run_lock(tmp_path):
        pass


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with caplog.at_level(logging.WARNING, "dinov2"), run_lock(tmp_path):
        assert "nothing keeps a second run out" in caplog.text
