import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dinov2.logging import MetricLogger, SmoothedValue, metric_logger


class FakeClock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("count", [1, 7, 20, 53])
def test_statistics_are_those_of_numpy(count: int) -> None:
    generator = np.random.default_rng(count)
    values, weights = generator.normal(size=count), generator.integers(1, 9, size=count)
    meter = SmoothedValue(window_size=20)
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        meter.update(torch.tensor(value) if index % 2 else float(value), num=int(weight))
    window = values[-20:]
    assert meter.median == pytest.approx(np.median(window))
    assert meter.avg == pytest.approx(window.mean())
    assert meter.max == window.max()
    assert meter.value == values[-1]
    assert meter.count == weights.sum()
    assert meter.total == pytest.approx((values * weights).sum())
    assert meter.global_avg == pytest.approx(np.average(values, weights=weights))


def test_a_series_without_values_is_nan_and_prints() -> None:
    meter = SmoothedValue()
    assert np.isnan([meter.median, meter.avg, meter.max, meter.value, meter.global_avg]).all()
    assert str(meter) == "nan (nan)"


def test_many_values_before_the_first_look_are_all_counted() -> None:
    meter = SmoothedValue(window_size=3)
    for number in range(3000):
        meter.update(torch.tensor(number))
    assert meter.total == sum(range(3000))
    assert meter.median == 2998


def test_tensors_are_read_only_when_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading waits for the device, so it must happen once per look, not once per value."""
    reads = 0

    def counting(values: list[torch.Tensor | float]) -> list[float]:
        nonlocal reads
        reads += 1
        return [float(value) for value in values]

    monkeypatch.setattr(metric_logger, "to_floats", counting)
    meter = SmoothedValue()
    for number in range(10):
        meter.update(torch.tensor(float(number)))
    assert reads == 0
    assert (meter.avg, meter.max) == (4.5, 9.0)
    assert reads == 1


def test_a_tensor_that_is_overwritten_later_keeps_its_value() -> None:
    loss = torch.ones((), requires_grad=True)
    meter = SmoothedValue()
    meter.update(loss)
    with torch.no_grad():
        loss.fill_(5.0)
    assert meter.value == 1.0


def test_half_precision_and_integers_mix() -> None:
    meter = SmoothedValue()
    for value in (torch.tensor(1.5, dtype=torch.bfloat16), torch.tensor([2]), torch.tensor(2.5, dtype=torch.half), 3):
        meter.update(value)
    assert meter.total == 9.0


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one number, got a tensor of shape \(2,\)"):
        MetricLogger().update(loss=torch.zeros(2))
    with pytest.raises(ValueError, match="window_size must be at least 1, got 0"):
        SmoothedValue(window_size=0)
    with pytest.raises(ValueError, match="print_freq must be at least 1, got 0"):
        next(MetricLogger().log_every([1], 0))


def test_synchronising_sums_over_processes_and_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricLogger()
    metrics.update(loss=1.0)
    metrics.update(loss=3.0)
    other: dict[str, tuple[int, float]] = {"loss": (2, 16.0), "rare": (1, 7.0)}
    monkeypatch.setattr(metric_logger, "all_gather_objects", lambda mine: [mine, other])
    metrics.synchronize_between_processes()
    assert metrics.meters["loss"].global_avg == 5.0
    assert metrics.meters["rare"].global_avg == 7.0
    monkeypatch.setattr(metric_logger, "all_gather_objects", lambda mine: [mine])
    metrics.synchronize_between_processes()
    assert (metrics.meters["loss"].count, metrics.meters["loss"].total) == (4, 20.0)
    metrics.update(loss=10.0)
    assert metrics.meters["loss"].global_avg == 6.0
    assert metrics.meters["loss"].median == 3.0  # the window stays this process's own


def test_the_loop_logs_rate_and_remaining_time(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    metrics = MetricLogger(clock=clock)

    def loader() -> Iterator[int]:
        while True:
            clock.now += 0.5
            yield 1

    with caplog.at_level(logging.INFO, "dinov2"):
        for number in metrics.log_every(loader(), 10, "Test:", n_iterations=25):
            clock.now += 1.5
            metrics.update(loss=number)
    lines = caplog.messages
    assert [line.split("]")[0] for line in lines[:-1]] == [
        "Test: [ 1/25",
        "Test: [11/25",
        "Test: [21/25",
        "Test: [25/25",
    ]
    assert "eta: 0:00:28  loss: 1.0000 (1.0000)  time: 2.0000 s  data: 0.5000 s  mem: " in lines[1]
    assert lines[-1] == "Test: took 0:00:50 (2.0000 s per iteration, 25 done)"


def test_the_loop_fetches_nothing_that_it_does_not_yield() -> None:
    fetched = []

    def loader() -> Iterator[int]:
        for number in range(100):
            fetched.append(number)
            yield number

    assert list(MetricLogger().log_every(loader(), 2, n_iterations=7, start_iteration=3)) == [0, 1, 2, 3]
    assert fetched == [0, 1, 2, 3]


@pytest.mark.parametrize("items", [[], [1, 2, 3]])
def test_the_loop_ends_with_its_items(items: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dinov2"):
        assert list(MetricLogger().log_every(items, 10, start_iteration=5)) == items
        assert list(MetricLogger().log_every(iter(items), 10)) == items
    assert caplog.messages[-1].endswith(f"{len(items)} done)")
