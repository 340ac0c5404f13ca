"""A disk that takes nothing any more: the run goes on, ends well when there is room again, and has lost nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from train_stand_ins import Crash, Train, assert_same_run, before_step, crash, evaluation_pairs, records

from dinov2.eval.results import EvaluationResults
from dinov2.logging import metrics_file
from tests.small_disk import mounted_disk

EVERY_ITERATION = ("optim.epochs=6", "train.OFFICIAL_EPOCH_LENGTH=1", "train.keep_last=1")  # is saved


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", 24) as folder:
        yield folder


def fill(path: Path) -> None:
    """Takes the last byte of a disk."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass


def test_a_real_disk_without_a_byte_and_with_room_again(
    train: Train, tmp_path: Path, parts: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = (*EVERY_ITERATION, *evaluation_pairs(parts), "evaluation.eval_period_iterations=2", "evaluation.nb_knn=[1]")
    other, run = small_disk / "other", small_disk / "run"
    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, {2: lambda: fill(other), 5: other.unlink})
        assert train(run, *pairs) == 0
    assert train(tmp_path / "whole", *pairs) == 0
    assert_same_run(run, tmp_path / "whole")
    told = capfd.readouterr().err
    assert told.count("metrics.jsonl CANNOT BE WRITTEN") == 1
    assert "metrics.jsonl can be written again: " in told
    assert told.count("SAVING FAILED") == 3
    assert "SAVING FAILED (3 in a row" in told
    assert told.count("A TEACHER IS NOT SAVED, training goes on") == 1
    assert told.count("RESULTS OF AN EVALUATION ARE NOT SAVED, training goes on") == 1
    assert told.count("log.txt cannot be written") == 1
    assert "Traceback" not in told
    assert (run / "eval" / "training_5" / "results.json").is_file()
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("at", [1, 4])
def test_a_kill_while_the_disk_is_full_loses_nothing(train: Train, tmp_path: Path, at: int) -> None:
    """Half a line is on the disk, as a full one leaves it. With 1, the step after iteration 2 has found room."""

    real, calls = metrics_file._write_all, iter(range(99))

    def write(file: Any, data: bytes) -> None:
        if next(calls) <= at:  # the first is a look at the features
            real(file, data)
            return
        file.write(data[:9])
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_file, "_write_all", write)
        before_step(patch, {5: crash})
        with pytest.raises(Crash):
            train(tmp_path / "run")
    whole_lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().split(b"\n")
    assert len(whole_lines[:-1]) == at + 1
    assert train(tmp_path / "run") == 0
    assert train(tmp_path / "whole") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_records_that_are_lost_at_the_end_are_told(train: Train, tmp_path: Path) -> None:
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_file, "_write_all", write)
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: its last 8 line\(s\) are lost"):
            train(tmp_path)
    assert records(tmp_path) == []


def test_results_of_the_last_evaluation_must_be_written(
    train: Train, tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationResults, "write", refuse)
        with pytest.raises(OSError, match=r"the results in .*training_5 cannot be written: .*No space left"):
            train(tmp_path, *evaluation_pairs(parts))
    assert train(tmp_path, *evaluation_pairs(parts)) == 0
    assert (tmp_path / "eval" / "training_5" / "results.json").is_file()
    assert len([record for record in records(tmp_path) if "evaluation" in record]) == 2
