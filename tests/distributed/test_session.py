"""The device of a process, and joining and leaving the group of processes."""

import datetime
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from dinov2.distributed import (
    barrier,
    choose_device,
    distributed_session,
    get_rank,
    get_world_size,
    is_distributed,
    is_main_process,
)
from dinov2.distributed.session import _meeting, find_launch, first_host

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)


def test_without_a_group_there_is_one_main_process() -> None:
    assert not is_distributed()
    assert (get_rank(), get_world_size()) == (0, 1)
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


def test_a_session_inside_a_group_stays_in_it_and_an_error_leaves_it() -> None:
    def fail() -> None:
        with distributed_session("cpu"):
            group = dist.group.WORLD
            with distributed_session("cpu") as device:
                assert device == torch.device("cpu")
                assert dist.group.WORLD is group
            assert is_distributed(), "the outer session ends it"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not is_distributed()


def test_an_incomplete_launch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost")):
        monkeypatch.setenv(name, value)
    message = "RANK and WORLD_SIZE are set but LOCAL_RANK, MASTER_PORT not: start with torchrun, or unset them"
    with pytest.raises(ValueError, match=message), distributed_session("cpu"):
        pass
    assert not is_distributed()


def test_a_launched_process_takes_part_with_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with distributed_session("cpu"):
        assert (get_rank(), get_world_size()) == (0, 1)


STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "node[07-09,12]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
MEET = """
import os
from dinov2.distributed import (
    all_gather_objects, distributed_session, get_local_world_size, get_rank, get_world_size,
)
with distributed_session("cpu", timeout_minutes=0.5):
    sizes = get_world_size(), os.environ["LOCAL_RANK"], get_local_world_size()
    print(get_rank(), *sizes, all_gather_objects(get_rank()))
assert "RANK" not in os.environ
"""


def test_the_processes_of_a_slurm_step_meet_also_where_a_port_is_taken() -> None:
    launch = find_launch(STEP)
    assert launch is not None
    with socket.create_server(("127.0.0.1", launch.ports[0])):  # accepts connections and never answers
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", MEET],
                env=os.environ | STEP | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        assert [process.communicate()[0] for process in processes] == [f"{rank} 2 {rank} 2 [0, 1]\n" for rank in (0, 1)]


def test_an_error_after_the_meeting_is_not_taken_for_one_of_the_meeting() -> None:
    timeout = datetime.timedelta(seconds=10)
    first, second = (find_launch(STEP | {"SLURM_JOB_ID": "8", "SLURM_PROCID": rank}) for rank in "01")
    assert first is not None
    assert second is not None
    error = pytest.raises(FileNotFoundError, match="no such image")
    with _meeting(first, timeout), error, _meeting(second, timeout):
        raise FileNotFoundError("no such image")


def test_what_a_launcher_says_about_its_processes() -> None:
    several = STEP | {"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "24", "SLURM_PROCID": "17"}
    launch = find_launch(several)
    assert launch is not None
    assert (launch.rank, launch.world_size, launch.local_rank, launch.address) == (17, 24, 1, "node07")
    assert launch.local_world_size == 8
    others = [find_launch(several | change) for change in ({"SLURM_JOB_ID": "8"}, {"SLURM_RESTART_COUNT": "1"})]
    assert not {launch.name, *launch.ports} & {item for other in others if other for item in (other.name, *other.ports)}
    given = find_launch(several | {"MASTER_ADDR": "ib-node07", "MASTER_PORT": "4567"})
    assert given is not None
    assert (given.address, given.ports) == ("ib-node07", [4567])
    # The batch script itself, and a step of one process.
    assert find_launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) is None
    assert find_launch(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        with pytest.raises(ValueError, match=rf"has started 4 processes \({name}\).*torchrun, or with srun"):
            find_launch({name: "4"})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node[07-09,12],other", "node07"), ("a,b", "a"), ("gpu-3", "gpu-3"), ("n[1-2].site", "n1.site"), ("n[5]", "n5")],
)
def test_the_first_machine_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_device_that_is_not_there_stops_before_a_group_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="torch sees no GPU"), distributed_session("cuda"):
        pass
    assert not is_distributed()


def machine(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"), [(2, False, "cuda:1"), (2, True, "cuda:1"), (0, True, "mps"), (0, False, "cpu")]
)
def test_auto_takes_the_best_that_is_there(
    monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, expected: str
) -> None:
    machine(monkeypatch, gpus=gpus, mps=mps)
    assert choose_device("auto", 1) == torch.device(expected)


def test_a_named_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=4, mps=True)
    assert choose_device("cpu", 3) == torch.device("cpu")
    assert choose_device("cuda", 3) == torch.device("cuda", 3)
    assert choose_device("mps") == torch.device("mps")


@pytest.mark.parametrize(
    ("gpus", "name", "rank", "message"),
    [
        (0, "cuda", 0, "device cuda was asked for, but torch sees no GPU"),
        (0, "mps", 0, "device mps was asked for"),
        (2, "auto", 2, r"process 2 of this machine has no GPU: torch sees 2; start fewer processes"),
        (2, "cuda", 2, r"process 2 of this machine has no GPU: torch sees 2; start fewer processes"),
    ],
)
def test_what_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, gpus: int, name: str, rank: int, message: str
) -> None:
    machine(monkeypatch, gpus=gpus)
    with pytest.raises(ValueError, match=message):
        choose_device(name, rank)
