"""Runs of the real command in several processes, of which one fails; started as a process, since it forks.

Usage: ``python runs_with_faults.py FOLDER PARTS SCENARIO ...``. For each it leaves ``FOLDER/SCENARIO`` as the run's
folder, ``SCENARIO.rank_R.txt`` with what a process printed, and ``SCENARIO.json`` with exit codes (null for one that
had to be killed) and seconds from the fault on. With ``--again`` before the scenarios, the same runs are started again,
and nothing fails; ``undisturbed`` is a run of its own then.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from train_stand_ins import OPTIONS, make_small

from dinov2.distributed import get_rank
from dinov2.run.launch import exit_with
from dinov2.train import data as batches
from dinov2.train import monitors
from dinov2.train import train as loop
from dinov2.train.command import main as train
from dinov2.train.monitors import ProbeSet

TIMEOUT_SECONDS = 20.0
PATIENCE_SECONDS = 110.0
SLOW = 1000.0
LINES_SECONDS = 2.0  # several times as long as a process takes to write another line about what it does


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_seen(fault: Callable[[], None]) -> Callable[[], None]:
    """The fault comes after the others have been told where the process is."""

    def late() -> None:
        time.sleep(LINES_SECONDS)
        note_fault()
        fault()

    return late


def hang() -> None:
    time.sleep(SLOW)


def fail() -> NoReturn:
    raise ValueError("something of this process alone")


def kill_workers() -> None:
    """Kills the processes that load data for this one."""
    own = os.getpid()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, parent = stat.read_text().rpartition(")")[0], int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == own and name:
            os.kill(int(stat.parent.name), signal.SIGKILL)
    time.sleep(0.3)


def at_iteration(number: int, fault: Callable[[], None]) -> None:
    """The fault comes after the gradients of an iteration."""
    real, calls = loop.agree, iter(range(10**6))

    def agree(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            note_fault()
            fault()
        return real(*arguments, **keywords)

    loop.agree = agree


def at_batch(number: int, fault: Callable[[], None]) -> None:
    """The fault comes before a batch is asked for."""
    real, calls = batches.Batches.__next__, iter(range(10**6))

    def following(self: batches.Batches) -> Any:
        if next(calls) == number:
            note_fault()
            fault()
        return real(self)

    batches.Batches.__next__ = following  # type: ignore[method-assign]


def at_evaluation(number: int, fault: Callable[[], None]) -> None:
    """The fault comes when the features of the probe set are computed: first before training."""
    real, calls = monitors.probe_features, iter(range(10**6))

    def probe_features(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == number:
            note_fault()
            fault()
        return real(*arguments, **keywords)

    monitors.probe_features = probe_features


def at_image_of_evaluation(fault: Callable[[], None]) -> None:
    """The fault comes while an image of the probe set is read, after training has begun; without loading processes."""
    real = ProbeSet.get_image

    def get_image(self: ProbeSet, index: int) -> Any:
        if loop_has_begun():
            note_fault()
            fault()
        return real(self, index)

    ProbeSet.get_image = get_image  # type: ignore[method-assign]


def loop_has_begun() -> bool:
    return (folder_of_run() / "last_checkpoint.rank_0").exists()


def kill_worker_in_evaluation() -> None:
    """A loading process of the second evaluation kills itself at its first image."""
    real, own = ProbeSet.get_image, os.getpid()

    def get_image(self: ProbeSet, index: int) -> Any:
        if os.getpid() != own and loop_has_begun():
            note_fault()
            kill()
        return real(self, index)

    ProbeSet.get_image = get_image  # type: ignore[method-assign]


# Name -> processes, rank that fails, how, and further options.
SCENARIOS: dict[str, tuple[int, int, Callable[[], None], tuple[str, ...]]] = {
    "stopped_0": (2, 0, lambda: at_iteration(4, be_seen(stop)), ()),
    "stopped_2_of_3": (3, 2, lambda: at_iteration(4, be_seen(stop)), ()),
    "stopped_in_the_first_iteration": (2, 1, lambda: at_iteration(0, be_seen(stop)), ()),
    "stopped_in_an_evaluation": (2, 1, lambda: at_evaluation(1, be_seen(stop)), ()),
    "hangs_before_training": (2, 1, lambda: at_evaluation(0, hang), ()),
    "hangs_at_the_first_batch": (2, 1, lambda: at_batch(0, hang), ()),
    "hangs_in_an_evaluation": (2, 0, lambda: at_image_of_evaluation(hang), ()),
    "killed_0": (2, 0, lambda: at_iteration(4, be_seen(kill)), ()),
    "killed_1_of_3": (3, 1, lambda: at_iteration(4, be_seen(kill)), ()),
    "fails": (2, 1, lambda: at_iteration(4, fail), ()),
    "worker_killed": (2, 1, lambda: at_batch(4, kill_workers), ("train.num_workers=1",)),
    "worker_killed_in_an_evaluation": (2, 1, kill_worker_in_evaluation, ("train.num_workers=1",)),
}
UNDISTURBED = "undisturbed"
AT_ONCE = 6  # more would keep two cores so busy that those that are well run out of time


def folder_of_run() -> Path:
    return Path(os.environ["FOLDER_OF_RUN"])


def note_fault() -> None:
    (folder_of_run().parent / f"{folder_of_run().name}.fault").write_text(str(get_rank()))


def live(name: str, rank: int, folder: Path, parts: str, port: int, *, again: bool) -> NoReturn:
    """What a forked process does instead of going on."""
    processes, failing, fault, more = SCENARIOS.get(name, (2, -1, stop, ()))
    with (folder / f"{name}.rank_{rank}.txt").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "FOLDER_OF_RUN": str(folder / name)}
    make_small(pytest.MonkeyPatch())
    if rank == failing and not again:
        fault()
    words = [
        *OPTIONS, f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}", f"train.output_dir={folder / name}",
        "train.batch_size_per_gpu=2", f"train.process_group_timeout_minutes={TIMEOUT_SECONDS / 60}", "optim.epochs=3",
        "evaluation.probe_images=4", "evaluation.eval_period_iterations=6", *more,
    ]  # fmt: skip
    code: Any = 1
    try:
        exit_with(lambda: train(words))
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_at_once(names: list[str], folder: Path, parts: str, *, again: bool) -> None:
    """Starts the scenarios, waits until only processes that hang are left, and writes down how the others ended."""
    left: dict[int, tuple[str, int]] = {}
    for name in names:
        port = free_port()
        for rank in range(SCENARIOS.get(name, (2,))[0]):
            child = os.fork()
            if child == 0:
                live(name, rank, folder, parts, port, again=again)
            left[child] = (name, rank)
    codes: dict[str, dict[int, int | None]] = {name: {} for name in names}
    seconds: dict[str, dict[int, float]] = {name: {} for name in names}
    limit = time.monotonic() + PATIENCE_SECONDS
    while any(again or rank != SCENARIOS[name][1] for name, rank in left.values()) and time.monotonic() < limit:
        for child, (name, rank) in list(left.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                fault = folder / f"{name}.fault"
                seconds[name][rank] = time.time() - fault.stat().st_mtime if fault.exists() else 0.0
                codes[name][rank] = os.waitstatus_to_exitcode(status)
                del left[child]
        time.sleep(0.05)
    for child, (name, rank) in left.items():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        codes[name][rank] = None
    for name in names:
        (folder / f"{name}.json").write_text(json.dumps({"codes": codes[name], "seconds": seconds[name]}))


def main() -> None:
    folder, parts, *names = sys.argv[1:]
    again = names[0] == "--again"
    names = names[1:] if again else names
    for start in range(0, len(names), AT_ONCE):
        run_at_once(names[start : start + AT_ONCE], Path(folder), parts, again=again)


if __name__ == "__main__":
    main()
