"""A run that goes on on another number of processes has the losses of one that was left alone, and the same images."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runs_on_other_numbers import CHANGES, GLOBAL_BATCH, RESUMED_AFTER, WRITERS
from train_stand_ins import LAST, checkpoint, records

pytestmark = pytest.mark.slow

TERMS = {"total_loss", "dino_local_crops_loss", "dino_global_crops_loss", "koleo_loss", "ibot_loss"}
NORMS = {"grad_norm_backbone", "grad_norm_dino_head"}
SCHEDULES = {"lr", "weight_decay", "momentum", "teacher_temp", "last_layer_lr"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, parts: Path, repository: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "runs_on_other_numbers.py"), str(folder / "all"), str(parts)],
        env=os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "all"


def lines(folder: Path) -> dict[int, dict[str, Any]]:
    return {record["iteration"]: record for record in records(folder)}


def names(folder: Path) -> list[list[str]]:
    """Images of each iteration in the order of the run's stream: rank r has every r-th of M."""
    by_rank = [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("names.rank_*.jsonl"))
    ]
    return [[name for row in zip(*batches, strict=True) for name in row] for batches in zip(*by_rank, strict=True)]


def assert_same_losses(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours.keys() >= TERMS | NORMS | SCHEDULES
    for name in TERMS | NORMS | SCHEDULES:
        assert ours[name] == pytest.approx(expected[name], rel=3e-6, abs=1e-7), (ours["iteration"], name)


@pytest.mark.parametrize(("writers", "readers"), CHANGES)
def test_losses_go_on_as_if_nothing_had_happened(runs: Path, writers: int, readers: int) -> None:
    resumed, whole = (lines(runs / name) for name in (f"{writers}_to_{readers}", f"whole_{writers}"))
    assert list(resumed) == list(range(RESUMED_AFTER + 1, LAST + 1))
    for iteration, record in resumed.items():
        assert_same_losses(record, whole[iteration])
    assert resumed[LAST]["total_loss"] != resumed[LAST - 1]["total_loss"]


@pytest.mark.parametrize(("writers", "readers"), CHANGES)
def test_no_image_is_left_out_or_seen_twice(runs: Path, writers: int, readers: int) -> None:
    whole = names(runs / f"whole_{writers}")
    assert [len(batch) for batch in whole] == [GLOBAL_BATCH] * (LAST + 1)
    assert names(runs / f"{writers}_to_{readers}") == whole[RESUMED_AFTER + 1 :]
    resumed = checkpoint(runs / f"{writers}_to_{readers}")
    assert (resumed["world_size"], resumed["samples_seen"]) == (readers, GLOBAL_BATCH * (LAST + 1))


@pytest.mark.parametrize("processes", WRITERS[1:])
def test_undisturbed_runs_agree_too(runs: Path, processes: int) -> None:
    ours, expected = lines(runs / f"whole_{processes}"), lines(runs / "whole_1")
    for iteration in range(LAST + 1):
        assert_same_losses(ours[iteration], expected[iteration])
    assert names(runs / f"whole_{processes}") == names(runs / "whole_1")
