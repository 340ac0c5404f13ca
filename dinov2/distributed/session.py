"""Rank, device and process group of this process; without a group the answers are those of a single process."""

import contextlib
import datetime
import os
import re
import socket
import socketserver
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# Below the ports that systems hand out themselves.
_PORTS = range(12_000, 32_000)
_PORTS_TRIED = 4
_PORT_SECONDS = 3.0  # in which a process of the same run answers
_RETRY_SECONDS = 0.2


def is_distributed() -> bool:
    """Whether a process group exists (it may hold one process only)."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process's number among all processes of the run, from 0."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """How many processes take part in the run."""
    return dist.get_world_size() if is_distributed() else 1


def get_local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", get_world_size()))


def is_main_process() -> bool:
    """Whether this process writes the shared files and speaks for the run."""
    return get_rank() == 0


def barrier() -> None:
    """Waits for every process; returns at once when there is only one."""
    if get_world_size() > 1:
        dist.barrier()


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """Returns the device to compute on.

    Args:
        name: ``cpu``, ``cuda``, ``mps``, or ``auto`` for the best that is there.
        local_rank: this process's number on its machine, which selects the GPU.

    Raises:
        ValueError: when the device asked for is not there, or there are fewer GPUs than processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps was asked for, but this machine has none")
    if name == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError("device cuda was asked for, but torch sees no GPU")
        if local_rank >= count:
            raise ValueError(
                f"process {local_rank} of this machine has no GPU: torch sees {count}; start fewer processes"
            )
        return torch.device("cuda", local_rank)
    return torch.device(name)


_threads_left = threading.Event()


def may_abort_at_exit() -> bool:
    """Whether the interpreter's teardown could abort this process.

    Gloo's threads can outlive their group, and one that lets go of a tensor while the interpreter is taken apart aborts
    the process (https://github.com/pytorch/pytorch/pull/179291): a run whose work is done and saved would fail.
    """
    return _threads_left.is_set()


@dataclass(frozen=True)
class Launch:
    """This process among those that a scheduler has started as one run.

    Attributes:
        name: of the run; no other run has the same.
        rank: of this process, from 0.
        world_size: number of processes.
        local_rank: of this process on its machine.
        local_world_size: number of processes on a machine, if they are evenly spread.
        address: of the machine of rank 0.
        ports: rank 0 tells on the first free one of them where its store is, and the others ask there.
    """

    name: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    ports: Sequence[int]


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """Reads what a SLURM step (``srun``) or a job of submitit on this machine says about its processes.

    ``MASTER_ADDR`` and ``MASTER_PORT`` go before what is derived from the job. A step of one process is no launch.

    Args:
        environment: variables of this process.

    Raises:
        ValueError: the processes were started by a launcher that is not read, such as ``mpirun``.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        words = ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        name = " ".join(environment.get(word, "") for word in words)
        rank, world_size, local_rank = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
        machines = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
        # A machine need not be able to look up its own name.
        address = "127.0.0.1" if machines == 1 else first_host(environment["SLURM_STEP_NODELIST"])
    elif int(environment.get("SUBMITIT_LOCAL_NTASKS", "1")) > 1 and "SUBMITIT_LOCAL_GLOBALID" in environment:
        name = environment["SUBMITIT_LOCAL_JOB_ID"]
        rank, world_size, local_rank = "SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID"
        machines, address = 1, "127.0.0.1"
    else:
        for launcher, size in (("mpirun", "OMPI_COMM_WORLD_SIZE"), ("mpiexec", "PMI_SIZE")):
            if int(environment.get(size, "1")) > 1:
                raise ValueError(
                    f"{launcher} has started {environment[size]} processes ({size}), which would be as many runs that "
                    f"know nothing of each other: start them with torchrun, or with srun on SLURM"
                )
        return None
    start = zlib.crc32(name.encode())
    ports = [_PORTS[(start + 997 * number) % len(_PORTS)] for number in range(_PORTS_TRIED)]
    return Launch(
        name=name,
        rank=int(environment[rank]),
        world_size=int(environment[world_size]),
        local_rank=int(environment[local_rank]),
        local_world_size=-(-int(environment[world_size]) // machines),
        address=environment.get("MASTER_ADDR", address),
        ports=[int(environment["MASTER_PORT"])] if "MASTER_PORT" in environment else ports,
    )


def first_host(nodes: str) -> str:
    """The first machine of a list as SLURM writes it: ``node07`` of ``node[07-09,12],other``."""
    match = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    assert match is not None, "it matches the empty string"
    return "".join(part or "" for part in match.groups())


class _Announcement(socketserver.BaseRequestHandler):
    """Tells whoever connects which run listens here, and where its store is."""

    def handle(self) -> None:
        self.request.sendall(self.server.announced)  # type: ignore[attr-defined]


class _Announcer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, announced: str) -> None:
        super().__init__(("", port), _Announcement)
        self.announced = announced.encode()


@contextmanager
def _meeting(launch: Launch, timeout: datetime.timedelta) -> Iterator[Any]:
    """The store by which the processes of a launch find each other.

    It listens on a port that the system chooses. Rank 0 tells that on the first of the launch's ports that is free, and
    the others ask at all of them: what another program answers there is not the name of the run.

    Raises:
        OSError: rank 0 finds none of the ports free.
        TimeoutError: rank 0 is not found in time.
    """

    def store(port: int) -> Any:
        return dist.TCPStore(  # type: ignore[attr-defined]
            launch.address, port, is_master=launch.rank == 0, wait_for_workers=False, timeout=timeout
        )

    where = f"{launch.address}:{', '.join(map(str, launch.ports))}"
    if launch.rank == 0:
        made = store(0)
        for port in launch.ports:
            try:
                announcer = _Announcer(port, f"{launch.name}\n{made.port}")
            except OSError:
                continue  # another program listens there
            with announcer:
                threading.Thread(target=announcer.serve_forever, name="tells the port", daemon=True).start()
                try:
                    yield made
                finally:
                    announcer.shutdown()
            return
        raise OSError(f"no port of {where} is free: set MASTER_PORT to one that is, the same for all processes")
    deadline = time.monotonic() + timeout.total_seconds()
    while (found := _ask_for_store(launch)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"rank {launch.rank} has not found rank 0 at {where} in {timeout.total_seconds():.0f} s: a firewall, "
                f"another name of that machine (set MASTER_ADDR), or rank 0 has ended"
            )
        time.sleep(_RETRY_SECONDS)
    yield store(found)


def _ask_for_store(launch: Launch) -> int | None:
    """The port of rank 0's store; None while nobody of the run answers."""
    for port in launch.ports:
        with contextlib.suppress(OSError, UnicodeDecodeError):  # nobody listens there, or another program
            with socket.create_connection((launch.address, port), timeout=_PORT_SECONDS) as connection:
                name, _, number = connection.makefile(encoding="utf-8").read(len(launch.name) + 10).partition("\n")
            if name == launch.name and number.isdecimal():
                return int(number)
    return None


@contextmanager
def _environment(values: Mapping[str, object]) -> Iterator[None]:
    """Sets variables, by which torch and the watchdog know this process, and takes them back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def distributed_session(device: str = "auto", *, timeout_minutes: float = 10.0) -> Iterator[torch.device]:
    """Joins the processes that torchrun, srun or a job started, or makes a group of one; yields this process's device.

    NCCL connects GPUs and gloo everything else. A group exists even for one process, so that sharding and mixed
    precision need no special case. A process that already is in a group stays in it.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        timeout_minutes: how long a collective waits for a peer before the run fails.

    Raises:
        ValueError: on a device that is not there, an incomplete launch environment, or a launcher that is not read.
        OSError: the processes of a SLURM step do not find each other.
    """
    if dist.is_initialized():
        yield choose_device(device, int(os.environ.get("LOCAL_RANK", "0")))
        return
    by_torch = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if by_torch:
        missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(
                f"RANK and WORLD_SIZE are set but {', '.join(missing)} not: start with torchrun, or unset them"
            )
    launch = None if by_torch else find_launch(os.environ)
    local_rank = int(os.environ["LOCAL_RANK"]) if by_torch else 0
    if launch is not None and torch.cuda.device_count() != 1:  # srun may show every process the GPU that is its own
        local_rank = launch.local_rank
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    device_id = chosen if backend == "nccl" else None
    with contextlib.ExitStack() as stack:
        if by_torch:
            dist.init_process_group(backend, timeout=timeout, device_id=device_id)
        elif launch is not None:
            rank, size, store = launch.rank, launch.world_size, stack.enter_context(_meeting(launch, timeout))
            dist.init_process_group(
                backend, timeout=timeout, store=store, rank=rank, world_size=size, device_id=device_id
            )
            variables = {"RANK": rank, "LOCAL_RANK": local_rank, "MASTER_ADDR": launch.address}
            variables |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": launch.local_world_size, "MASTER_PORT": store.port}
            stack.enter_context(_environment(variables))
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
        try:
            yield chosen
        finally:
            if backend == "gloo" and dist.get_world_size() > 1:
                _threads_left.set()
            dist.destroy_process_group()
