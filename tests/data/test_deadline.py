"""Calls with a time limit, and images that take endless time to read."""

import os
import pickle
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.decoding import Deadline
from dinov2.data.pretraining import PretrainingDataset, SampleKey


def test_values_and_errors_come_back_from_one_thread() -> None:
    in_time = Deadline(10)
    assert in_time(lambda a, b: a + b, 2, 3) == 5
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0)
    threads = {in_time(threading.get_ident) for _ in range(5)}
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    assert Deadline(0)(threading.get_ident) == threading.get_ident()


def test_a_call_that_hangs_is_given_up_and_the_next_ones_work() -> None:
    in_time, go_on = Deadline(0.1), threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"given up after 0\.1 s \(data\.read_timeout_seconds\)"):
        in_time(go_on.wait)
    assert time.monotonic() - began < 5
    assert in_time(lambda: "next") == "next"
    number = threading.active_count()
    go_on.set()
    deadline = time.monotonic() + 5
    while threading.active_count() >= number and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == number - 1, "the thread that came back has ended"


def test_it_works_in_a_forked_process_and_travels() -> None:
    in_time = Deadline(5)
    assert in_time(lambda: 1) == 1
    child = os.fork()
    if child == 0:
        os._exit(in_time(lambda: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert pickle.loads(pickle.dumps(in_time))(lambda: 2) == 2


class Folder(ImageDataset):
    def __init__(self, paths: list[Path]) -> None:
        super().__init__()
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def get_image_path(self, index: int) -> Path:
        return self.paths[index]

    def get_target(self, index: int) -> int | None:
        return None


def test_an_endless_file_is_replaced_and_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.png")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "good.png")
    paths = [tmp_path / "endless.png", *[tmp_path / "good.png"] * 9]
    dataset = PretrainingDataset(
        Folder(paths), lambda image, partner=None: {"global_crops": [], "local_crops": []}, read_timeout=2
    )
    sample = dataset[SampleKey(0, 0)]
    assert sample.name == str(tmp_path / "good.png")
    assert sample.unreadable == (str(tmp_path / "endless.png"),)
