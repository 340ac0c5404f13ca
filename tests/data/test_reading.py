"""Reading files: the cache, the limit of time, and the error that says what could not be read."""

import gc
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dinov2.data.reading import ByteCache, Deadline, UnreadableImageError


def test_error_is_an_os_error_that_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UnreadableImageError(Path("a.png"), "it is bad")))
    assert isinstance(error, OSError)
    assert (error.path, error.cause, str(error)) == ("a.png", "it is bad", "cannot read image a.png: it is bad")


class TestByteCache:
    def test_reads_each_file_once_and_past_the_budget_from_disk(self, tmp_path: Path) -> None:
        for name in "abc":
            (tmp_path / name).write_bytes(name.encode() * 4)
        cache = ByteCache(9)
        assert [cache.read(tmp_path / name) for name in "abc"] == [b"aaaa", b"bbbb", b"cccc"]
        assert (len(cache), cache.used_bytes) == (2, 8)
        for name in "abc":
            (tmp_path / name).write_bytes(b"new")
        assert [cache.read(tmp_path / name) for name in "abc"] == [b"aaaa", b"bbbb", b"new"]
        with pytest.raises(UnreadableImageError, match="no such file"):
            cache.read(tmp_path / "absent")
        with pytest.raises(ValueError, match="must not be negative, got -1"):
            ByteCache(-1)

    def test_threads_agree(self, tmp_path: Path) -> None:
        for number in range(50):
            (tmp_path / str(number)).write_bytes(b"x" * 10)
        cache = ByteCache(10_000)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: cache.read(tmp_path / str(number % 50)), range(400)))
        assert (len(cache), cache.used_bytes) == (50, 500)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_values_and_errors_come_back_from_one_thread() -> None:
    in_time = Deadline(10)
    assert in_time(lambda a, b: a + b, 2, 3) == 5
    with pytest.raises(ZeroDivisionError):
        in_time(lambda: 1 / 0)
    threads = {in_time(threading.get_ident) for _ in range(5)}
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    del in_time
    gc.collect()  # the error from above holds on to it
    wait_until(lambda: threads.isdisjoint(thread.ident for thread in threading.enumerate()))
    assert Deadline(0)(threading.get_ident) == threading.get_ident()


def test_a_call_that_hangs_is_given_up_and_the_next_ones_work() -> None:
    in_time, go_on = Deadline(0.1), threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"given up after 0\.1 s \(data\.read_timeout_seconds\)"):
        in_time(lambda: go_on.wait() and "late")
    assert time.monotonic() - began < 5
    assert in_time(lambda: "next") == "next"
    number = threading.active_count()
    go_on.set()
    wait_until(lambda: threading.active_count() == number - 1)  # the thread that came back has ended
    assert in_time(lambda: "own") == "own", "the answer that came late is not taken for another's"


def test_it_works_in_a_forked_process_and_travels() -> None:
    in_time = Deadline(5)
    assert in_time(lambda: 1) == 1
    child = os.fork()
    if child == 0:
        os._exit(in_time(lambda: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert pickle.loads(pickle.dumps(in_time))(lambda: 2) == 2
