import json
import math
from typing import Any

import pytest
import torch

from dinov2.logging import ProgressReport, TrainingProgress, progress

SCHEDULES = {"lr": 1.2345e-4, "weight_decay": 0.0412, "momentum": 0.99214, "teacher_temp": 0.0409, "last_layer_lr": 0.0}


class FakeClock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make(clock: FakeClock, **changes: Any) -> TrainingProgress:
    settings: dict[str, Any] = {"total_iterations": 100, "epoch_length": 50, "log_period": 4} | changes
    return TrainingProgress(device=torch.device("cpu"), clock=clock, memory=lambda: 3.14, **settings)


def step(
    run: TrainingProgress, clock: FakeClock, iteration: int, seconds: float = 2.0, **changes: Any
) -> ProgressReport | None:
    clock.now += seconds
    losses = {
        "dino_local_crops_loss": torch.tensor(float(iteration)),
        "koleo_loss": 0.25,
        "total_loss": torch.tensor(10.0 + iteration),
    }
    facts: dict[str, Any] = {
        "batch_size": 38,
        "data_seconds": 0.03 * seconds,
        "iteration_seconds": seconds,
        "losses": losses,
        "schedules": SCHEDULES,
    }
    return run.update(iteration, **(facts | changes))


def test_the_line_says_how_it_goes() -> None:
    clock = FakeClock()
    run = make(clock)
    reports = [step(run, clock, iteration) for iteration in range(4)]
    assert reports[:3] == [None] * 3
    assert reports[3].line == (
        "iteration 4/100 (epoch 0.08) | total 11.5 local 1.5 koleo 0.25 | lr 1.2e-04 wd 0.041 mom 0.9921 temp 0.041"
        " | 19 images/s | data wait 3 % | mem 3.1 GiB | ETA 0:03:12"
    )


def test_the_record_separates_metrics_from_timing() -> None:
    clock = FakeClock()
    run = make(clock, log_period=2)
    step(run, clock, 0, grad_norms={"backbone": torch.tensor(1.0)})
    report = step(run, clock, 1, grad_norms={"backbone": torch.tensor(2.0)})
    record = dict(report.record)
    timing = record.pop("timing")
    assert record == {
        "iteration": 1,
        "total_loss": 10.5,
        "dino_local_crops_loss": 0.5,
        "koleo_loss": 0.25,
        "grad_norm_backbone": 1.5,
        **SCHEDULES,
        "batch_size": 38,
    }
    assert timing == pytest.approx(
        {
            "images_per_second": 19.0,
            "data_wait_fraction": 0.03,
            "iteration_seconds": 2.0,
            "memory_gib": 3.14,
            "seconds": 4.0,
            "eta_seconds": 196.0,
        }
    )
    json.dumps(report.record)


def test_reports_come_every_period_and_after_the_last_iteration() -> None:
    clock = FakeClock()
    run = make(clock, total_iterations=10)
    reports = [step(run, clock, iteration) for iteration in range(10)]
    assert [report.record["iteration"] for report in reports if report] == [3, 7, 9]
    assert reports[9].line.endswith("ETA 0:00:00")
    assert reports[9].record["total_loss"] == 18.5  # the mean of the unfinished period alone


def test_remaining_time_ignores_the_first_iteration_and_follows_the_recent_rate() -> None:
    clock = FakeClock()
    run = make(clock, total_iterations=1000, log_period=100)
    for iteration in range(99):
        step(run, clock, iteration, seconds=60.0 if iteration == 0 else 2.0)
    first = step(run, clock, 99)
    assert first.record["timing"]["eta_seconds"] == pytest.approx(900 * 2.0)
    for iteration in range(100, 199):
        step(run, clock, iteration, seconds=0.5)
    second = step(run, clock, 199, seconds=0.5)
    assert second.record["timing"]["eta_seconds"] == pytest.approx(800 * 0.5)


@pytest.mark.parametrize("stop", [1, 4, 6, 7])
def test_a_resumed_run_records_the_metrics_of_an_uninterrupted_one(stop: int) -> None:
    clock = FakeClock()
    whole, first = make(clock), make(clock)
    expected = [report.record for i in range(12) if (report := step(whole, clock, i))]
    actual = [report.record for i in range(stop) if (report := step(first, clock, i))]
    state = json.loads(json.dumps(first.state_dict()))  # builtins only
    assert first.state_dict() == state  # reading the state disturbs nothing
    clock.now += 3600.0  # the time between the two sessions is not the run's
    second = make(clock)
    second.load_state_dict(state)
    actual += [report.record for i in range(stop, 12) if (report := step(second, clock, i))]
    assert [{**record, "timing": None} for record in actual] == [{**record, "timing": None} for record in expected]
    assert actual[-1]["timing"]["seconds"] == state["seconds"] + 2.0 * (12 - stop)


def test_processes_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    run = make(clock, log_period=2)

    other = {"sums": {"total_loss": (2, 1.0), "ibot_loss": (1, 9.0)}, "batch_size": 2, "images": 4}
    other |= {"seconds": 8.0, "data_seconds": 4.0, "memory": 5.0}
    monkeypatch.setattr(progress, "all_gather_objects", lambda mine: [mine, other])
    step(run, clock, 0)
    report = step(run, clock, 1)
    record = report.record
    assert record["total_loss"] == (10.0 + 11.0 + 1.0) / 4
    assert record["ibot_loss"] == 9.0
    assert record["batch_size"] == 40
    assert record["timing"]["images_per_second"] == pytest.approx(80 / 8)
    assert record["timing"]["data_wait_fraction"] == 0.5
    assert record["timing"]["memory_gib"] == 5.0


def test_other_runs_and_losses_are_readable() -> None:
    clock = FakeClock()
    nan = {"total_loss": torch.tensor(math.nan)}
    report = step(make(clock, total_iterations=125_000, log_period=1), clock, 0, batch_size=4, losses=nan)
    assert "| total nan |" in report.line
    assert math.isnan(report.record["total_loss"])
    assert "| 2 images/s |" in report.line
    assert report.record["timing"]["eta_seconds"] == pytest.approx(249_998.0), (
        "of the first iteration, for want of more"
    )
    assert report.line.endswith("ETA 2 d 21:26:38")


def test_memory_is_measured_by_default_and_lengths_below_one_are_refused() -> None:
    clock = FakeClock()
    run = TrainingProgress(total_iterations=2, epoch_length=1, log_period=1, device=torch.device("cpu"), clock=clock)
    report = step(run, clock, 0)
    assert 0.01 < report.record["timing"]["memory_gib"] < 100
    with pytest.raises(ValueError, match="log_period must be at least 1, got 0"):
        make(clock, log_period=0)


def test_tensors_are_held_as_they_are_and_of_any_dtype() -> None:
    clock = FakeClock()
    run = make(clock, log_period=3)
    loss = torch.ones((), requires_grad=True)
    step(run, clock, 0, losses={"total_loss": loss})
    with torch.no_grad():
        loss.fill_(5.0)  # as a captured step overwrites its outputs
    step(run, clock, 1, losses={"total_loss": torch.tensor(1.5, dtype=torch.bfloat16)})
    report = step(run, clock, 2, losses={"total_loss": torch.tensor([2])})
    assert report.record["total_loss"] == 1.5
    with pytest.raises(ValueError, match=r"one number, got a tensor of shape \(2,\)"):
        step(run, clock, 3, losses={"total_loss": torch.zeros(2)})
