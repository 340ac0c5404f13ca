"""Files appear whole or not at all, with a digest that sha256sum knows; errors of a disk leave nothing behind."""

import errno
import hashlib
import os
import re
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from dinov2.utils import files as files_module
from dinov2.utils.files import (
    HashingWriter,
    checksum_fault,
    file_digest,
    remove_with_checksum,
    sidecar,
    write_atomically,
    write_text_atomically,
    write_with_checksum,
)


def test_text_is_written_as_utf8_and_replaces_what_was_there_in_a_folder_that_exists(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    for text in ("first", "zweite: größer\n", ""):
        write_text_atomically(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        write_text_atomically(tmp_path / "gone" / "file", "x")


@pytest.mark.parametrize("write_file", [write_atomically, write_with_checksum])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_failure_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, error: BaseException, write_file: Any
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text_atomically(path, "a" * 100_000)
    seen: set[tuple[str, int]] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            content = path.read_text()
            seen.add((content[:1] + content[-1:], len(content)))

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(20):
        write_text_atomically(path, "ab"[number % 2] * 100_000)
    done.set()
    reader.join()
    assert seen <= {("aa", 100_000), ("bb", 100_000)}


def test_content_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("flush"), flush(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), rename(*paths))[1])
    write_text_atomically(tmp_path / "file", "x")
    assert events == ["flush", "rename", "flush"], "content, name, folder"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o027, 0o640)])
def test_permissions_are_those_of_an_ordinary_new_file_and_many_threads_leave_the_mask_alone(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        with ThreadPoolExecutor(30) as pool:
            list(pool.map(lambda number: write_text_atomically(tmp_path / str(number), "x"), range(30)))
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_a_failed_file_gives_its_room_back_even_while_it_is_open_elsewhere(tmp_path: Path) -> None:
    held: list[int] = []

    def fail(file: IO[bytes]) -> None:
        file.write(bytes(100_000))
        file.flush()
        held.append(os.dup(file.fileno()))  # as a process forked meanwhile would
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", fail)
    assert os.fstat(held[0]).st_size == 0
    os.close(held[0])


def write(path: Path, content: bytes = b"content") -> str:
    return write_with_checksum(path, lambda file: file.write(content))


def test_the_digest_is_that_of_the_file_and_sha256sum_agrees(tmp_path: Path) -> None:
    values = {"a": torch.arange(100_000), "b": [1, "x"]}
    digest = write_with_checksum(tmp_path / "a.pth", lambda file: torch.save(values, file))
    assert torch.equal(torch.load(tmp_path / "a.pth", weights_only=True)["a"], values["a"])
    assert digest == hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest() == file_digest(tmp_path / "a.pth")
    assert (tmp_path / "a.pth.sha256").read_text() == f"{digest}  a.pth\n"
    assert checksum_fault(tmp_path / "a.pth") == ""
    if shutil.which("sha256sum") is not None:
        subprocess.run(["sha256sum", "-c", "a.pth.sha256"], check=True, cwd=tmp_path, capture_output=True)
    for _ in range(2):
        remove_with_checksum(tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: sidecar(path).unlink(), r"has no checksum \(a\.pth\.sha256\)"),
        (lambda path: path.write_bytes(b"contenu"), "is damaged: its 7 bytes do not have"),
        (lambda path: path.write_bytes(b""), "is damaged: its 0 bytes do not have"),
        (lambda path: sidecar(path).write_bytes(b""), "has a damaged checksum file"),
        (lambda path: sidecar(path).write_text("0" * 64 + "  b.pth\n"), "has a damaged checksum file"),
        (lambda path: sidecar(path).write_text("0" * 64 + "  a.pth\n"), "is damaged"),
        (lambda path: sidecar(path).write_bytes(b"\xff" * 73), "has a damaged checksum file"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Any, fault: str) -> None:
    write(tmp_path / "a.pth")
    damage(tmp_path / "a.pth")
    assert re.match(fault, checksum_fault(tmp_path / "a.pth"))


def test_the_digest_is_there_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named: list[str] = []
    rename = files_module.os.replace
    monkeypatch.setattr(files_module.os, "replace", lambda *paths: (named.append(paths[1].name), rename(*paths))[1])
    write(tmp_path / "a.pth")
    assert named == ["a.pth.sha256", "a.pth"]


class FullDisk:
    """A file that takes so many bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def write(self, data: bytes) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return memoryview(data).nbytes


@pytest.mark.parametrize("room", [0, 100, 50_000, 199_000])
def test_a_full_disk_is_an_os_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    write(tmp_path / "a.pth", b"before")
    real = HashingWriter.__init__
    monkeypatch.setattr(HashingWriter, "__init__", lambda self, file: real(self, FullDisk(room)))
    for name in ("a.pth", "new.pth"):
        with pytest.raises(OSError, match="No space left"):
            write_with_checksum(tmp_path / name, lambda file: torch.save(torch.zeros(50_000), file))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.pth.sha256"]
    assert checksum_fault(tmp_path / "a.pth") == ""


def test_a_failure_to_name_leaves_no_digest_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = files_module.os.replace

    def fail(source: Path, target: Path) -> None:
        if target.suffix == ".pth":
            raise OSError(errno.EIO, "I/O error")
        rename(source, target)

    monkeypatch.setattr(files_module.os, "replace", fail)
    with pytest.raises(OSError, match="I/O error"):
        write(tmp_path / "a.pth")
    assert not list(tmp_path.iterdir())
