"""Schedules against reference values and closed forms, at their edges, and with bad lengths."""

import math

import numpy as np
import pytest

from dinov2.utils.schedules import CosineSchedule, Schedule


def test_every_value_equals_the_reference(reference) -> None:
    for case in reference("schedule_fixture.json")["cosine"]:
        schedule = CosineSchedule(**case["args"])
        total = case["args"]["total_iters"]
        np.testing.assert_allclose(schedule.values, case["values"], rtol=1e-12, atol=0)
        assert [schedule[iteration] for iteration in range(total)] == schedule.values.tolist()
        assert [schedule[total], schedule[10 * total]] == case["beyond"]


def test_parts_follow_each_other() -> None:
    schedule = CosineSchedule(2.0, 1.0, 20, warmup_iters=5, start_warmup_value=0.4, freeze_iters=3)
    assert schedule.values[:3].tolist() == [0, 0, 0]
    assert schedule.values[3:8] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert schedule[8] == 2.0
    assert schedule[14] == pytest.approx(1.5)  # half of the cosine's 12 iterations
    assert schedule[19] == pytest.approx(1 + (1 + math.cos(math.pi * 11 / 12)) / 2)


def test_bad_lengths_are_value_errors(reference) -> None:
    with pytest.raises(ValueError, match="must not be negative, found -1, 0 and 0"):
        CosineSchedule(1.0, 0.0, -1)
    for case in reference("schedule_fixture.json")["cosine_errors"]:
        with pytest.raises(ValueError, match=r"warmup_iters \+ freeze_iters must not exceed total_iters"):
            CosineSchedule(**case["args"])


def test_negative_iterations_are_index_errors(reference) -> None:
    case = reference("schedule_fixture.json")["cosine_negative_index"]
    schedule = CosineSchedule(**case["args"])
    with pytest.raises(IndexError, match="found -1"):
        schedule[case["index"]]


def test_length_and_iteration() -> None:
    empty, schedule = CosineSchedule(0.07, 0.07, 0), CosineSchedule(1.0, 0.0, 4)
    assert (len(empty), empty[0]) == (0, 0.07)
    assert len(schedule) == 4
    assert list(schedule) == schedule.values.tolist()
    with pytest.raises(ValueError, match="read-only"):
        schedule.values[0] = 5.0


def test_frozen_until_zeroes_a_copy() -> None:
    schedule = Schedule([1.0, 2.0, 3.0], 4.0)
    frozen = schedule.frozen_until(2)
    assert [frozen[iteration] for iteration in range(5)] == [0, 0, 3, 4, 4]
    assert schedule[0] == 1.0
    assert schedule.frozen_until(99)[2] == 0.0
