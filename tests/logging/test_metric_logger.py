"""The names that code written for upstream imports: averages, and a loop that logs them."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dinov2.logging import MetricLogger, SmoothedValue, metric_logger


@pytest.mark.parametrize("count", [1, 20, 53])
def test_statistics_are_those_of_numpy(count: int) -> None:
    generator = np.random.default_rng(count)
    values, weights = generator.normal(size=count), generator.integers(1, 9, size=count)
    meter = SmoothedValue(window_size=20)
    for index, (value, weight) in enumerate(zip(values, weights, strict=True)):
        meter.update(torch.tensor([value]) if index % 2 else float(value), num=int(weight))
    window = values[-20:]
    assert meter.median == pytest.approx(np.median(window))
    assert meter.avg == pytest.approx(window.mean())
    assert (meter.max, meter.value, meter.count) == (window.max(), values[-1], weights.sum())
    assert meter.global_avg == pytest.approx(np.average(values, weights=weights))


def test_a_series_without_values_is_nan_and_prints_and_bad_arguments_are_refused() -> None:
    assert str(SmoothedValue()) == "nan (nan)"
    assert str(SmoothedValue(fmt="{avg} {max} {value}")) == "nan nan nan"
    with pytest.raises(ValueError, match="window_size must be at least 1, got 0"):
        SmoothedValue(window_size=0)
    with pytest.raises(ValueError, match="print_freq must be at least 1, got 0"):
        next(MetricLogger().log_every([1], 0))


def test_synchronising_sums_over_processes_and_may_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricLogger()
    for loss in (1.0, 3.0):
        metrics.update(loss=loss)
    other = {"loss": (2, 16.0), "rare": (1, 7.0)}
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


def test_the_loop_logs_and_fetches_nothing_that_it_does_not_yield(caplog: pytest.LogCaptureFixture) -> None:
    fetched = []

    def loader() -> Iterator[int]:
        for number in range(100):
            fetched.append(number)
            yield number

    metrics = MetricLogger()
    metrics.add_meter("loss", SmoothedValue(fmt="{value:.1f}"))
    with caplog.at_level(logging.INFO, "dinov2"):
        for number in metrics.log_every(loader(), 10, "Test:", n_iterations=25, start_iteration=5):
            metrics.update(loss=number)
    assert fetched == list(range(20))
    assert [line.split("]")[0] for line in caplog.messages[:-1]] == ["Test: [11/25", "Test: [21/25", "Test: [25/25"]
    assert "eta: 0:00:00  loss: 5.0  time: " in caplog.messages[0]
    assert caplog.messages[-1] == "Test: took 0:00:00 (20 done)"


@pytest.mark.parametrize("items", [[], [1, 2, 3]])
def test_the_loop_ends_with_its_items(items: list[int], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "dinov2"):
        assert list(MetricLogger().log_every(items, 10, start_iteration=5)) == items
        assert list(MetricLogger().log_every(iter(items), 10)) == items
    assert caplog.messages[-1].endswith(f"({len(items)} done)")
