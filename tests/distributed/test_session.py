"""Joining and leaving the group of processes."""

import os

import pytest
import torch
import torch.distributed as dist

from dinov2.distributed import (
    barrier,
    distributed_session,
    get_local_rank,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
)

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)


def test_without_a_group_there_is_one_main_process() -> None:
    assert not is_distributed()
    assert (get_rank(), get_world_size(), get_local_rank()) == (0, 1, 0)
    assert is_main_process()
    barrier()


def test_a_single_process_gets_a_group_of_one_and_leaves_no_trace() -> None:
    before = dict(os.environ)
    with distributed_session("cpu") as device:
        assert device == torch.device("cpu")
        assert is_distributed()
        assert (get_rank(), get_world_size()) == (0, 1)
        barrier()
    assert not is_distributed()
    assert dict(os.environ) == before
    with distributed_session("cpu"):
        assert is_distributed(), "a second session works"


def test_the_group_is_left_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), distributed_session("cpu"):
        _ = 1 / 0
    assert not is_distributed()


def test_a_session_inside_a_group_stays_in_it() -> None:
    with distributed_session("cpu"):
        group = dist.group.WORLD
        with distributed_session("cpu") as device:
            assert device == torch.device("cpu")
            assert dist.group.WORLD is group
        assert is_distributed(), "the outer session ends it"
    assert not is_distributed()


def test_an_incomplete_launch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    message = "RANK and WORLD_SIZE are set but LOCAL_RANK, MASTER_PORT not: start with torchrun, or unset them"
    with pytest.raises(ValueError, match=message), distributed_session("cpu"):
        pass
    assert not is_distributed()


def test_a_launched_process_takes_part_with_its_numbers(monkeypatch: pytest.MonkeyPatch, unused_port: int) -> None:
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (values | {"MASTER_PORT": str(unused_port)}).items():
        monkeypatch.setenv(name, value)
    with distributed_session("cpu"):
        assert (get_rank(), get_world_size(), get_local_rank()) == (0, 1, 0)


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_device_that_is_not_there_stops_before_a_group_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="torch sees no GPU"), distributed_session("cuda"):
        pass
    assert not is_distributed()
