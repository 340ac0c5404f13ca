"""A run's folder, its records, and after a resume just those that the checkpoint knew."""

import json
import logging
import re
from pathlib import Path

import pytest

from dinov2.logging import MetricsFile, ProgressReport, RunLog, read_metrics, run_log
from dinov2.logging.run_log import EventFile, check_run_folder, cut_metrics, prepare_run_folder
from dinov2.utils.files import HeldFolder


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


def test_a_folder_is_made_with_those_above_it_and_stays_empty(tmp_path: Path) -> None:
    check_run_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists(), "looking leaves no trace"
    assert prepare_run_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []
    assert prepare_run_folder(tmp_path / "a" / "b").is_dir(), "a folder that is there already is fine"


def test_the_processes_of_a_run_have_one_folder_that_all_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process says stands in for it."""
    monkeypatch.setattr("dinov2.logging.run_log.all_gather_objects", lambda own: [own, "/elsewhere"])
    with pytest.raises(ValueError, match=rf"2 processes were started as one run but.*/elsewhere, {tmp_path}/run;"):
        prepare_run_folder(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("dinov2.logging.run_log.all_gather_objects", lambda own: [own, own or "the disk is full"])
    with pytest.raises(OSError, match=r"run \(train\.output_dir\) cannot be written on rank 1: the disk is full"):
        prepare_run_folder(tmp_path / "run")


def test_a_folder_below_a_file_or_that_must_not_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run"
    for look in (check_run_folder, prepare_run_folder):
        with pytest.raises(OSError, match=re.escape(f"the run's folder {folder} (train.output_dir)")):
            look(folder)
    monkeypatch.setattr(run_log.os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OSError, match=re.escape(f"cannot be written: {tmp_path} cannot be written")):
        check_run_folder(tmp_path / "a" / "b")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def write_losses(folder: Path, iterations: range, *, loss: float = 1.0, resumed_at: int = 0) -> None:
    with RunLog(folder, resumed_at=resumed_at) as log:
        for iteration in iterations:
            log.write(ProgressReport("", {"iteration": iteration, "loss": loss}))


def test_numbers_of_a_record_become_curves_and_the_rest_is_left_out(tmp_path: Path) -> None:
    with RunLog(tmp_path, resumed_at=0) as log:
        for iteration in range(2):
            record = {"iteration": iteration, "lr": 0.5, "timing": {"seconds": iteration}, "name": "run", "flag": True}
            log.write(ProgressReport("", record))
        log.write(None)
        log.write_evaluation(1, {"knn": 0.75}, ["low"])
        log.write_evaluation(1, {})
    assert scalars(tmp_path / "tensorboard") == {
        "lr": [(0, 0.5), (1, 0.5)],
        "timing/seconds": [(0, 0.0), (1, 1.0)],
        "evaluation/knn": [(1, 0.75)],
    }
    assert read_metrics(tmp_path / "metrics.jsonl")[2:] == [
        {"iteration": 1, "evaluation": {"knn": 0.75}, "warnings": ["low"]}
    ]


def test_a_resumed_run_hides_what_it_repeats(tmp_path: Path) -> None:
    write_losses(tmp_path, range(5))
    write_losses(tmp_path, range(3, 4), loss=2.0, resumed_at=3)
    assert scalars(tmp_path / "tensorboard")["loss"] == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]


def test_a_disk_that_takes_no_curves_costs_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = EventFile.add_scalars

    def refuse_second(file: EventFile, values: dict[str, float], step: int) -> None:
        if step == 1:
            raise OSError(28, "No space left on device")
        real(file, values, step)

    monkeypatch.setattr(EventFile, "add_scalars", refuse_second)
    write_losses(tmp_path, range(4))
    assert scalars(tmp_path / "tensorboard")["loss"] == [(0, 1.0), (2, 1.0), (3, 1.0)]
    (message,) = caplog.messages
    assert message.endswith(
        "tensorboard cannot be written, its curves will have a gap: [Errno 28] No space left on device"
    )


@pytest.mark.parametrize("instead", ["nothing", "an empty folder", "another run"])
def test_nothing_is_made_where_the_folder_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, instead: str
) -> None:
    """Neither by TensorBoard, whose own writer makes folders anew and prints tracebacks, nor for metrics."""
    run, moved = tmp_path / "run", tmp_path / "moved"
    run.mkdir()
    held = HeldFolder(run)
    with RunLog(run, resumed_at=0, check_folder=held.check) as log:
        log.write_evaluation(0, {"knn": 0.5})
        run.rename(moved)
        if instead == "an empty folder":
            run.mkdir()
        elif instead == "another run":
            write_losses(run, range(1))
        before = sorted((path, path.stat().st_size) for path in run.rglob("*"))
        for iteration in range(1, 4):
            log.write_evaluation(iteration, {"knn": 0.5})
        log._close_events()
        log.write_evaluation(4, {"knn": 0.5})
        log.state_dict()
    held.close()
    assert sorted((path, path.stat().st_size) for path in run.rglob("*")) == before
    assert [step for step, _ in scalars(moved / "tensorboard")["evaluation/knn"]] == [0, 1, 2, 3]
    assert len(read_metrics(moved / "metrics.jsonl")) == 5, "where the files are, they go on"
    (message,) = caplog.messages
    assert "curves will have a gap: the folder" in message
    assert capfd.readouterr().err == ""


def test_no_curves_before_the_first_record_and_nothing_by_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_losses(tmp_path, range(0))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    monkeypatch.setattr(run_log, "is_main_process", lambda: False)
    write_losses(tmp_path / "other", range(3))
    with RunLog(tmp_path / "other", resumed_at=0) as log:
        assert log.state_dict() == {"metrics_bytes": 0, "metrics_waiting": []}
    assert not (tmp_path / "other").exists()
