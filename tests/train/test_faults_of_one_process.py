"""One of several processes is lost, hangs or fails: the others end in time, name it, and the same command goes on.

Started as a process, since it forks, this file makes the runs: ``python test_faults_of_one_process.py FOLDER PARTS
SCENARIO ...``. For each it leaves ``FOLDER/SCENARIO`` as the run's folder, ``SCENARIO.rank_R.txt`` with what a process
printed, and ``SCENARIO.json`` with exit codes (null for one that had to be killed) and seconds from the fault on. With
``--again`` before the scenarios, the same runs are started again, and nothing fails; ``undisturbed`` is one of its own.
"""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from train_stand_ins import OPTIONS, free_port, make_small, poison, run_forking

from dinov2.distributed import get_rank
from dinov2.run.launch import exit_with
from dinov2.train import data as batches
from dinov2.train import monitors
from dinov2.train import train as loop
from dinov2.train.command import main as train
from dinov2.train.monitors import ProbeSet
from dinov2.utils.errors import RESUME_EXIT_CODE
from tools.stress_resume import run_differences

pytestmark = pytest.mark.slow

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
    for worker in multiprocessing.active_children():
        os.kill(worker.pid or 0, signal.SIGKILL)
    time.sleep(0.3)


def before_call(owner: Any, name: str, when: Callable[[int], bool], fault: Callable[[], None]) -> None:
    """The fault comes before calls of a function or method whose number satisfies a condition."""
    real, calls = getattr(owner, name), iter(range(10**6))

    def call(*arguments: Any, **keywords: Any) -> Any:
        if when(next(calls)):
            note_fault()
            fault()
        return real(*arguments, **keywords)

    setattr(owner, name, call)


def at_iteration(number: int, fault: Callable[[], None]) -> None:
    """The fault comes after the gradients of an iteration."""
    before_call(loop, "agree", number.__eq__, fault)


def at_batch(number: int, fault: Callable[[], None]) -> None:
    """The fault comes before a batch is asked for."""
    before_call(batches.Batches, "__next__", number.__eq__, fault)


def at_evaluation(number: int, fault: Callable[[], None]) -> None:
    """The fault comes when the features of the probe set are computed: first before training."""
    before_call(monitors, "probe_features", number.__eq__, fault)


def at_image_of_evaluation(fault: Callable[[], None], *, in_worker: bool) -> None:
    """The fault comes while an image of the probe set is read, once training has begun; in a loading process or not."""
    own = os.getpid()

    def is_now(_: int) -> bool:
        return (os.getpid() != own) is in_worker and (folder_of_run() / "last_checkpoint.rank_0").exists()

    before_call(ProbeSet, "get_image", is_now, fault)


ONE_WORKER = ("train.num_workers=1",)
# Name -> processes, rank that fails, how, and further options.
SCENARIOS: dict[str, tuple[int, int, Callable[[], object], tuple[str, ...]]] = {
    "stopped_0": (2, 0, lambda: at_iteration(4, be_seen(stop)), ()),
    "stopped_2_of_3": (3, 2, lambda: at_iteration(4, be_seen(stop)), ()),
    "stopped_in_the_first_iteration": (2, 1, lambda: at_iteration(0, be_seen(stop)), ()),
    "stopped_in_an_evaluation": (2, 1, lambda: at_evaluation(1, be_seen(stop)), ()),
    "hangs_before_training": (2, 1, lambda: at_evaluation(0, hang), ()),
    "hangs_at_the_first_batch": (2, 1, lambda: at_batch(0, hang), ()),
    "hangs_in_an_evaluation": (2, 0, lambda: at_image_of_evaluation(hang, in_worker=False), ()),
    "killed_0": (2, 0, lambda: at_iteration(4, be_seen(kill)), ()),
    "killed_1_of_3": (3, 1, lambda: at_iteration(4, be_seen(kill)), ()),
    "fails": (2, 1, lambda: at_iteration(4, fail), ()),
    "bad_batch": (2, 1, lambda: poison(pytest.MonkeyPatch(), {2}), ("train.max_bad_steps=0",)),
    "worker_killed": (2, 1, lambda: at_batch(4, kill_workers), ONE_WORKER),
    "worker_killed_in_an_evaluation": (2, 1, lambda: at_image_of_evaluation(kill, in_worker=True), ONE_WORKER),
}
UNDISTURBED = "undisturbed"
AT_ONCE = 6  # more would keep two cores so busy that those that are well run out of time


def folder_of_run() -> Path:
    return Path(os.environ["FOLDER_OF_RUN"])


def note_fault() -> None:
    (folder_of_run().parent / f"{folder_of_run().name}.fault").write_text(str(get_rank()))


def live(name: str, rank: int, folder: Path, parts: str, port: str, *, again: bool) -> NoReturn:
    """What a forked process does instead of going on."""
    processes, failing, fault, more = SCENARIOS.get(name, (2, -1, stop, ()))
    with (folder / f"{name}.rank_{rank}.txt").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FOLDER_OF_RUN": str(folder / name)}
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


RESUMED = (
    "killed_0", "stopped_in_an_evaluation", "hangs_in_an_evaluation", "worker_killed", "worker_killed_in_an_evaluation",
)  # fmt: skip
STUCK = [name for name in SCENARIOS if name.startswith(("stopped", "hangs"))]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, parts: Path) -> Path:
    """Folder of all scenarios after the fault."""
    folder = tmp_path_factory.mktemp("faults")
    run_forking(__file__, str(folder), str(parts), *SCENARIOS)
    return folder


@pytest.fixture(scope="module")
def found(failed: Path) -> dict[str, dict[str, Any]]:
    """How each scenario ended, and what its processes said; read before anything goes on."""
    return {
        name: json.loads((failed / f"{name}.json").read_text())
        | {"said": [(failed / f"{name}.rank_{rank}.txt").read_text() for rank in range(SCENARIOS[name][0])]}
        | {"logs": [log(failed / name, rank) for rank in range(SCENARIOS[name][0])]}
        for name in SCENARIOS
    }


def log(folder: Path, rank: int) -> str:
    path = folder / "log" / (f"log.rank_{rank}.txt" if rank else "log.txt")
    return path.read_text() if path.exists() else ""


def others(name: str) -> list[int]:
    return [rank for rank in range(SCENARIOS[name][0]) if rank != SCENARIOS[name][1]]


def last_error(said: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


REASONS = {
    "stopped_0": "rank 0 does not answer: it is stopped, lost, or out of reach",
    "stopped_2_of_3": r"rank 2 does not answer: .* \(last seen in iteration 4, dinov2\.\S+, line \d+\)",
    "stopped_in_the_first_iteration": r"rank 1 does not answer: .* \(last seen in iteration 0, dinov2\.\S+, line \d+\)",
    "stopped_in_an_evaluation": r"rank 1 does not answer: .* \(last seen in the evaluation after iteration 5, ",
    "hangs_before_training": r"rank 1 keeps the others waiting \(in the first look at the features, dinov2\.train\.mon",
    "hangs_at_the_first_batch": r"rank 1 keeps the others waiting \(in iteration 0, dinov2\.train\.",
    "hangs_in_an_evaluation": (
        r"rank 0 keeps the others waiting \(in the evaluation after iteration 5, dinov2\.data\.datasets\.base\."
    ),
    "killed_0": "rank 0 does not answer: it is stopped, lost, or out of reach",
    "killed_1_of_3": r"rank 1 does not answer: .* \(last seen in iteration 4, dinov2\.",
    "worker_killed_in_an_evaluation": (
        r"rank 1 has ended: StartAgainError: a data-loading process of rank 1 is lost: DataLoader worker \(pid"
    ),
    "fails": "rank 1 has ended: ValueError: something of this process alone",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_others_name_it_and_end_in_time(found: dict[str, dict[str, Any]], name: str) -> None:
    codes, seconds = found[name]["codes"], found[name]["seconds"]
    for rank in others(name):
        error = last_error(found[name]["said"][rank])
        assert "a process is lost or hangs: " in error
        assert re.search(REASONS[name], error), error
        assert codes[str(rank)] == (1 if name == "fails" else RESUME_EXIT_CODE)
        limit = TIMEOUT_SECONDS + 15 if name in STUCK else 15
        assert seconds[str(rank)] < limit
        if name in STUCK:
            assert "NO PROGRESS" in found[name]["logs"][rank], "before the time-out, not only after it"


def test_all_stop_at_a_bad_batch_of_one(found: dict[str, dict[str, Any]], failed: Path) -> None:
    error = last_error(found["bad_batch"]["said"][0])
    assert " is not finite at iteration 2; no step was taken. rank 1: " in error
    assert "rank 0: " not in error
    assert found["bad_batch"]["codes"]["0"] == 1
    assert not list((failed / "bad_batch").glob("model_*"))


def test_a_killed_loading_process_of_one_ends_all_saved(found: dict[str, dict[str, Any]], failed: Path) -> None:
    ended = found["worker_killed"]
    assert ended["codes"] == {"0": RESUME_EXIT_CODE, "1": RESUME_EXIT_CODE}
    assert max(ended["seconds"].values()) < 15
    assert "A DATA-LOADING PROCESS OF RANK 1 IS LOST: DataLoader worker (pid" in ended["logs"][1]
    assert "lower train.num_workers (1)" in ended["logs"][1]
    assert "IS LOST" not in ended["logs"][0]
    (last,) = {
        path.name[6:13] for path in (failed / "worker_killed").glob("model_*.pth") if int(path.name[6:13]) not in (2, 5)
    }
    assert f"stopped after iteration {int(last)}; the same command goes on from there" in ended["logs"][0]
    for rank in (0, 1):
        named = (failed / "worker_killed" / f"last_checkpoint.rank_{rank}").read_text()
        assert named == f"model_{last}.rank_{rank}.pth\n"
    ended = found["worker_killed_in_an_evaluation"]
    assert ended["codes"]["1"] == RESUME_EXIT_CODE
    assert "a data-loading process of rank 1 is lost: DataLoader worker (pid" in last_error(ended["said"][1])


def test_the_same_command_goes_on_exactly(found: dict[str, dict[str, Any]], failed: Path, parts: Path) -> None:
    run_forking(__file__, str(failed), str(parts), "--again", UNDISTURBED, *RESUMED)
    for name in RESUMED:
        assert json.loads((failed / f"{name}.json").read_text())["codes"] == {"0": 0, "1": 0}, name
        assert run_differences(failed / name, failed / UNDISTURBED) == [], name


if __name__ == "__main__":
    main()
