"""One of several processes is lost, hangs or fails: the others end in time, name it, and the same command goes on."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs_with_faults import SCENARIOS, TIMEOUT_SECONDS, UNDISTURBED

from dinov2.utils.errors import RESUME_EXIT_CODE
from tools.stress_resume import run_differences

pytestmark = pytest.mark.slow

RESUMED = (
    "killed_0", "stopped_in_an_evaluation", "hangs_in_an_evaluation", "worker_killed", "worker_killed_in_an_evaluation",
)  # fmt: skip
STUCK = [name for name in SCENARIOS if name.startswith(("stopped", "hangs"))]


def run(repository: Path, folder: Path, parts: Path, *words: str) -> None:
    script = Path(__file__).parent / "runs_with_faults.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(parts), *words],
        env=os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, parts: Path, repository: Path) -> Path:
    """Folder of all scenarios after the fault."""
    folder = tmp_path_factory.mktemp("faults")
    run(repository, folder, parts, *SCENARIOS)
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


def test_a_killed_loading_process_of_one_ends_all_saved(found: dict[str, dict[str, Any]], failed: Path) -> None:
    ended = found["worker_killed"]
    assert ended["codes"] == {"0": RESUME_EXIT_CODE, "1": RESUME_EXIT_CODE}
    assert max(ended["seconds"].values()) < 15
    assert "A DATA-LOADING PROCESS OF RANK 1 IS LOST: DataLoader worker (pid" in ended["logs"][1]
    assert "IS LOST" not in ended["logs"][0]
    (last,) = {
        path.name[6:13] for path in (failed / "worker_killed").glob("model_*.pth") if int(path.name[6:13]) not in (2, 5)
    }
    assert f"stopped after iteration {int(last)}; the same command goes on from there" in ended["logs"][0]
    for rank in (0, 1):
        named = (failed / "worker_killed" / f"last_checkpoint.rank_{rank}").read_text()
        assert named == f"model_{last}.rank_{rank}.pth\n"


def test_a_killed_loading_process_in_an_evaluation_names_itself(found: dict[str, dict[str, Any]]) -> None:
    ended = found["worker_killed_in_an_evaluation"]
    assert ended["codes"]["1"] == RESUME_EXIT_CODE
    assert "a data-loading process of rank 1 is lost: DataLoader worker (pid" in last_error(ended["said"][1])


def test_the_same_command_goes_on_exactly(
    found: dict[str, dict[str, Any]], failed: Path, parts: Path, repository: Path
) -> None:
    run(repository, failed, parts, "--again", UNDISTURBED, *RESUMED)
    for name in RESUMED:
        assert json.loads((failed / f"{name}.json").read_text())["codes"] == {"0": 0, "1": 0}, name
        assert run_differences(failed / name, failed / UNDISTURBED) == [], name
