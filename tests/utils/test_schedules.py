"""Schedules against reference values and closed forms, at their edges, and with bad lengths."""

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


def test_bad_lengths_and_negative_iterations_are_errors(reference) -> None:
    with pytest.raises(ValueError, match="must not be negative, found -1, 0 and 0"):
        CosineSchedule(1.0, 0.0, -1)
    for case in reference("schedule_fixture.json")["cosine_errors"]:
        with pytest.raises(ValueError, match=r"warmup_iters \+ freeze_iters must not exceed total_iters"):
            CosineSchedule(**case["args"])
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
