"""The metrics file after a resume is the one that the checkpoint knew, and the evaluation right after it."""

import json
import logging
from pathlib import Path

import pytest

from dinov2.logging import MetricsFile, read_metrics
from dinov2.logging.run_log import cut_metrics


def write(path: Path, *records: dict[str, object]) -> list[int]:
    positions = []
    with MetricsFile(path) as metrics:
        for record in records:
            metrics.append(record)
            positions.append(metrics.sync())
    return positions


def test_everything_after_the_length_goes_but_the_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first, second = {"iteration": 0}, {"iteration": 1, "a": 1.5}
    evaluation = {"iteration": 1, "evaluation": {"x": 1.0}}
    lengths = write(path, first, second, {"iteration": 1, "a": 2}, evaluation, {"iteration": 2}, {"other": 1})
    with MetricsFile(path) as metrics:
        cut_metrics(metrics, 2, lengths[1])
        assert path.read_text() == "".join(json.dumps(record) + "\n" for record in (first, second, evaluation))
        metrics.append({"iteration": 2})
    assert read_metrics(path)[-1] == {"iteration": 2}


@pytest.mark.parametrize("length", [5, 10_000])
def test_a_changed_file_is_cut_by_iteration_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"iteration": 0}, {"iteration": 1}, {"iteration": 2})
    with caplog.at_level(logging.WARNING, "dinov2"), MetricsFile(path) as metrics:
        cut_metrics(metrics, 2, length)
    assert [record["iteration"] for record in read_metrics(path)] == [0, 1]
    assert "changed since the checkpoint" in caplog.text


def test_a_checkpoint_of_before_cuts_by_iteration(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"iteration": -1}, {"iteration": 0}, {"iteration": 1})
    with MetricsFile(path) as metrics:
        cut_metrics(metrics, 1, None)
        assert [record["iteration"] for record in read_metrics(path)] == [-1, 0]
        cut_metrics(metrics, 0, None)
    assert path.read_text() == ""
