"""Who is to blame that a run does not go on: the rule, what a process says of itself, and two that say it."""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dinov2.data.reading import Deadline
from dinov2.distributed import StallWatch, stall
from dinov2.distributed.stall import Beat, Board, Finding, find_culprits
from tests.processes import run_processes

PATIENCE = 10.0


def beat(*, age: float = 1.0, **changes: Any) -> tuple[Beat, float]:
    doing = {"number": 5, "phase": 3, "what": "iteration 3", "has_data": True, "where": "dinov2.x", "waits": True}
    return Beat(**doing | changes), age


CASES: dict[str, tuple[list[tuple[Beat, float]], str]] = {
    "nothing is known yet": ([], ""),
    "all wait": ([beat(), beat()], ""),
    "all work": ([beat(waits=False), beat(waits=False)], ""),
    "one is silent": (
        [beat(), beat(age=11.0)],
        "rank 1 does not answer: it is stopped, lost, or out of reach (last seen in iteration 3, dinov2.x)",
    ),
    "two are silent": ([beat(age=11.0), beat(), beat(age=99.0)], "rank 0 does not answer.*; rank 2 does not answer"),
    "a silent one before all": (
        [beat(phase=1), beat(age=11.0, phase=9), beat(waits=False), beat(ended=True)],
        "rank 1 does not answer",
    ),
    "silent for the end": ([beat(age=99.0, ended=True), beat()], "rank 0 has ended (in iteration 3, dinov2.x)"),
    "one is an iteration behind": (
        [beat(), beat(phase=2, what="iteration 2", waits=False)],
        "rank 1 keeps the others waiting (in iteration 2, dinov2.x)",
    ),
    "one has no data": ([beat(has_data=False), beat(), beat()], "rank 0 keeps the others waiting"),
    "an iteration counts more than data": (
        [beat(has_data=False), beat(phase=2, has_data=True)],
        "rank 1 keeps the others waiting",
    ),
    "two are behind": ([beat(phase=2), beat(phase=2), beat()], "rank 0 keeps .*; rank 1 keeps the others waiting"),
    "one is not in the collective": (
        [beat(), beat(waits=False, where="dinov2.data.y"), beat()],
        "rank 1 keeps the others waiting (in iteration 3, dinov2.data.y)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_who_is_to_blame(name: str) -> None:
    beats, expected = CASES[name]
    finding = find_culprits(dict(enumerate(beats)), PATIENCE)
    first, _, last = expected.partition(".*")
    assert finding.text.startswith(first)
    assert last in finding.text
    assert bool(finding.text) is bool(expected)
    assert finding.text.count("rank ") == expected.count("rank ")
    assert finding.start_again


def in_module(name: str, call: Callable[[], Any]) -> Any:
    """Calls from a function of a module of that name."""
    namespace: dict[str, Any] = {"__name__": name}
    exec("def function(call):\n    return call()", namespace)
    return namespace["function"](call)


def test_where_a_process_is() -> None:
    def here() -> tuple[str, bool]:
        return stall._position(sys._getframe())

    where, waits = Deadline(0)(here)
    assert where.startswith("dinov2.data.reading.__call__, line ")
    assert not waits
    where, waits = Deadline(0)(lambda: in_module("torch.distributed.anything", here))
    assert where.startswith("dinov2.data.reading.__call__, line ")
    assert waits
    where, waits = in_module("torch.distributed.fsdp", lambda: Deadline(0)(here))
    assert not waits, "a collective that was left for this library again"
    where, waits = Deadline(0)(lambda: in_module("dinov2.distributed.reduce", here))
    assert where.startswith("dinov2.data.reading."), "who calls the reduction is of interest"
    assert stall._position(None) == ("no function of the library", False)


def test_one_process_has_nobody_to_watch() -> None:
    with StallWatch(0.001) as watch:
        watch.begin("anything")
        time.sleep(0.1)
        assert watch.finding.text == ""
        assert watch.explain(RuntimeError("gloo: connection closed by peer")) is None


def in_two(rank: int, work: Callable[[int], dict[str, Any]], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(work(rank)))
    dist.barrier()
    dist.destroy_process_group()


def results(work: Callable[[int], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    run_processes(in_two, work, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("dinov2").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def boards_and_watches(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    board = Board(Beat(1, 0, "start", False, "dinov2.x", False), 5.0)
    found["fault"], found["none yet"] = board.fault, board.read_failure()
    found["first"] = [one.number for one in board.read()]
    dist.barrier()
    board.put(Beat(2 + rank, 7, "iteration 7", True, "dinov2.y", True))
    if rank == 1:
        board.put_failure(Finding("ValueError: x", start_again=False))
    dist.barrier()
    if rank == 0:
        board.put_failure(Finding("OSError: later"))
    dist.barrier()
    failure = board.read_failure()
    found["second"] = [(one.number, one.what, one.has_data, one.waits) for one in board.read()]
    found["failure"] = None if failure is None else (failure.text, failure.start_again)

    # A phase that takes long and has nobody to blame: said, and nothing found.
    logged = Lines()
    with StallWatch(0.05) as watch:  # looks after 1.8 s
        watch.begin("something long")
        time.sleep(4)
        found["long"], lines = watch.finding.text, list(logged.lines)
        found["said"] = [line for line in lines if "something long" in line]
        found["unrelated"] = watch.explain(RuntimeError("shapes differ")) is None
        found["unexplained"] = getattr(watch.explain(RuntimeError("[gloo] Timed out waiting 1ms")), "text", None)
        watch.pause()
        dist.barrier()

    # One that cannot reach the board: both do without, and say so.
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Board, "_open", refuse)
        with StallWatch(1.0) as watch:
            found["refused"] = [line for line in logged.lines if "will not be named" in line]
            found["still"] = getattr(watch.explain(dist.DistNetworkError("closed")), "text", None)
    return found


def refuse(self: Board, *, is_master: bool) -> Any:
    raise RuntimeError("the port is closed")


@pytest.mark.slow
def test_what_two_processes_say(tmp_path: Path) -> None:
    unreached = "the processes do not reach one another"
    for found in results(boards_and_watches, tmp_path):
        said = found.pop("said")
        assert said
        assert all(line.startswith("WARNING ") and "all 2 processes work" in line for line in said)
        assert found == {
            "fault": "",
            "none yet": None,
            "first": [1, 1],
            "second": [[2, "iteration 7", True, True], [3, "iteration 7", True, True]],
            "failure": ["ValueError: x", False],  # the first one counts
            "long": "",
            "unrelated": True,
            "unexplained": unreached,
            "refused": ["WARNING a process that hangs will not be named: the port is closed"],
            "still": unreached,
        }
