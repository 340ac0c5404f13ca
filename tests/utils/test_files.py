"""Files appear whole or not at all."""

import os
import threading
from pathlib import Path
from typing import IO

import pytest

from dinov2.utils.files import write_atomically, write_text_atomically


def test_text_is_written_as_utf8_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    for text in ("first", "zweite: größer\n", ""):
        write_text_atomically(path, text)
        assert path.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        file.flush()
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, fail)
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


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_an_ordinary_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text_atomically(tmp_path / "file", "x")
        assert os.umask(umask) == umask, "the mask is left as it was"
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text_atomically(tmp_path / "gone" / "file", "x")


def test_content_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    flush, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("flush"), flush(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("rename"), rename(*paths))[1])
    write_text_atomically(tmp_path / "file", "x")
    assert events == ["flush", "rename", "flush"], "content, name, folder"


def test_many_threads_leave_the_mask_alone(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        threads = [
            threading.Thread(target=lambda number=number: write_text_atomically(tmp_path / f"{number}", "x"))
            for number in range(30)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


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
