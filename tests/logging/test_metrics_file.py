import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dinov2.logging import MetricsFile, metrics_file, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def write(path: Path, iterations: range) -> None:
    with MetricsFile(path) as file:
        for iteration in iterations:
            file.append({"iteration": iteration, "total_loss": iteration / 3})


def iterations_of(path: Path) -> list[int]:
    return [record["iteration"] for record in read_metrics(path)]


def test_values_are_readable_at_once_exact_numbers_and_null_where_json_knows_none(path: Path) -> None:
    with MetricsFile(path) as file:
        with pytest.raises(TypeError, match="not JSON serializable"):
            file.append({"iteration": 0, "loss": object()})
        assert file.position == 0, "what is refused leaves no trace"
        exact = {"iteration": 0, "loss": 0.1 + 0.2, "tiny": 5e-324, "timing": {"seconds": 1 / 3}}
        file.append(exact)
        assert read_metrics(path) == [exact]
        file.append({"a": torch.tensor(1.5), "b": np.float32(2.5), "c": (np.int64(3), [torch.tensor(4)]), "d": path})
        file.append({"a": math.nan, "b": math.inf, "c": {"d": torch.tensor(-math.inf)}, "e": [np.float64("nan")]})
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    assert read_metrics(path)[1:] == [
        {"a": 1.5, "b": 2.5, "c": [3, [4]], "d": str(path)},
        {"a": None, "b": None, "c": {"d": None}, "e": [None]},
    ]


def test_truncation_equals_never_having_gone_on(path: Path, tmp_path: Path) -> None:
    write(path, range(10))
    with MetricsFile(path) as file:
        assert file.truncate_after(5) == 4
        for iteration in range(6, 10):
            file.append({"iteration": iteration, "total_loss": iteration / 3})
    write(tmp_path / "undisturbed.jsonl", range(10))
    assert path.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_truncation_keeps_records_without_an_iteration_and_all_when_none_is_later(path: Path) -> None:
    with MetricsFile(path) as file:
        file.append({"note": "start"})
        file.append({"iteration": 7})
        assert file.truncate_after(7) == 0
        assert file.truncate_after(-1) == 1
        assert file.position == path.stat().st_size
    assert read_metrics(path) == [{"note": "start"}]


@pytest.mark.parametrize("torn", [b'{"iteration": 3, "total', b"\0\0\0\0", b'{"iteration": 3}'])
def test_a_torn_last_line_is_dropped(path: Path, torn: bytes) -> None:
    write(path, range(3))
    with path.open("ab") as raw:
        raw.write(torn)
    assert iterations_of(path) == [0, 1, 2]
    write(path, range(3, 5))
    assert iterations_of(path) == [0, 1, 2, 3, 4]


def test_position_leads_back(path: Path) -> None:
    write(path, range(3))
    with MetricsFile(path) as file:
        position = file.position
        assert position == path.stat().st_size
        file.append({"iteration": 3})
        file.truncate_to(position)
        file.append({"iteration": 4})
        with pytest.raises(ValueError, match="cannot be cut to 100000"):
            file.truncate_to(100_000)
    assert iterations_of(path) == [0, 1, 2, 4]


@pytest.mark.parametrize("damage", [b"[1]", b"{", b'{"iteration\xff": 1}', b"", b"[" * 100_000, b"\0\0"])
def test_a_damaged_line_is_named_and_left_out(path: Path, caplog: pytest.LogCaptureFixture, damage: bytes) -> None:
    write(path, range(4))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[1:], b""]))
    told = f"{path}: 1 damaged line(s) are left out, no JSON objects: 2"
    assert iterations_of(path) == [0, 1, 2, 3]
    assert caplog.messages == [told]
    assert [record["iteration"] for record in read_metrics(path, start=len(lines[0]) + 1)] == [1, 2, 3]
    assert caplog.messages == [told] * 2
    with MetricsFile(path) as file:
        assert file.truncate_after(1) == 3
    assert iterations_of(path) == [0, 1]
    with pytest.raises(FileNotFoundError, match="no metrics file"):
        read_metrics(path.with_name("other.jsonl"))


def test_a_link_in_its_place_is_not_followed(path: Path) -> None:
    precious = path.parent.parent / "precious"
    precious.write_text("no line end")
    path.parent.mkdir()
    path.symlink_to(precious)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        MetricsFile(path)
    assert precious.read_text() == "no line end"


class Disk:
    """Takes so many more bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1 << 30
        real = metrics_file._write_all

        def write(file: Any, data: bytes) -> None:
            real(file, data[: self.room])
            self.room -= len(data)
            if self.room < 0:
                self.room = 0
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(metrics_file, "_write_all", write)


@pytest.mark.parametrize("room", [0, 5, 40])
def test_lines_wait_for_room_and_none_is_torn(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    disk = Disk(monkeypatch)
    with caplog.at_level("WARNING", "dinov2"), MetricsFile(path) as file:
        file.append({"iteration": 0})
        disk.room = room
        for iteration in range(1, 5):
            file.append({"iteration": iteration})
        assert file.position == file.sync() == 5 * len('{"iteration": 0}\n')
        assert file.waiting[-1] == '{"iteration": 4}\n'
        assert iterations_of(path) == list(range(1 + room // 17)), "a reader sees whole lines only"
        disk.room = 1 << 30
        file.append({"iteration": 5})
        assert file.waiting == []
        assert file.sync() == path.stat().st_size == file.position
    assert iterations_of(path) == [0, 1, 2, 3, 4, 5]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "CANNOT BE WRITTEN, its lines wait in memory and are tried again: [Errno 28]" in caplog.messages[0]


def test_lines_that_a_disk_has_not_kept_are_written_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an fsync that fails, what was written since the last one may be lost."""
    real, calls = os.fsync, iter(range(9))

    def fsync(handle: int) -> None:
        if next(calls) == 1:
            os.truncate(handle, 20)
            raise OSError(5, "Input/output error")
        real(handle)

    with MetricsFile(path) as file:
        file.append({"iteration": 0})
        file.sync()
        monkeypatch.setattr(os, "fsync", fsync)
        next(calls)
        for iteration in (1, 2):
            file.append({"iteration": iteration})
        position = file.sync()
        assert file.waiting == ['{"iteration": 1}\n', '{"iteration": 2}\n']
        assert file.sync() == position == path.stat().st_size
        assert file.waiting == []
    assert iterations_of(path) == [0, 1, 2]


def test_a_folder_that_is_away_for_a_while_gets_its_lines(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    with MetricsFile(path) as file:
        file.append({"iteration": 0})
        file.sync()
        path.parent.rename(path.parent.with_name("away"))
        path.parent.mkdir()  # as a mount point is left
        disk.room = 0
        file.append({"iteration": 1})
        disk.room = 1 << 30
        file.append({"iteration": 2})
        assert not list(path.parent.iterdir()), "no second file is begun"
        of_another_run = "x" * 100 + "\n"
        path.write_text(of_another_run)
        file.append({"iteration": 3})
        assert len(file.waiting) == 3
        assert path.read_text() == of_another_run
        path.unlink()
        path.parent.rmdir()
        path.parent.with_name("away").rename(path.parent)
    assert iterations_of(path) == [0, 1, 2, 3]


def test_lines_that_never_find_room_are_lost_aloud_unless_there_is_an_earlier_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    file, other = MetricsFile(path), MetricsFile(path.with_name("other.jsonl"))
    disk.room = 3
    for one in (file, other):
        one.append({"iteration": 0})
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: its last 1 line\(s\) are lost"):
        file.close()
    file.close()
    other.__exit__(KeyError, KeyError("first"), None)
    assert read_metrics(other.path) == []
