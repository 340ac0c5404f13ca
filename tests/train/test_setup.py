"""Set-up: schedules against reference values, scaling rules, short runs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dinov2.config.schema import Config, OptimOptions
from dinov2.train.setup import build_schedules, scaled_learning_rate


def make_config(*, optim: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None, **train: Any) -> Config:
    config = Config()
    return replace(
        config,
        optim=replace(config.optim, **(optim or {})),
        teacher=replace(config.teacher, **(teacher or {})),
        train=replace(config.train, **train),
    )


def test_all_schedules_equal_the_reference(reference) -> None:
    fixture = reference("schedule_fixture.json")["build_schedulers"]
    config = make_config(
        optim=fixture["optim"],
        teacher=fixture["teacher"],
        OFFICIAL_EPOCH_LENGTH=fixture["official_epoch_length"],
        batch_size_per_gpu=fixture["batch_size_per_gpu"],
    )
    schedules = build_schedules(config, world_size=1)
    for name, expected in fixture["values"].items():
        schedule = schedules[{"wd": "weight_decay"}.get(name, name)]
        values = [schedule[iteration] for iteration in fixture["iterations"]]
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=0, err_msg=name)


def test_learning_rate_scales_with_the_global_batch(reference) -> None:
    for case in reference("schedule_fixture.json")["lr_scaling_sqrt_wrt_1024"]:
        optim = OptimOptions(base_lr=case["base_lr"], scaling_rule="sqrt_wrt_1024")
        assert scaled_learning_rate(optim, case["total_batch"]) == pytest.approx(case["lr"], rel=1e-12)
    config = make_config(optim={"base_lr": 0.004}, batch_size_per_gpu=64)
    peaks = [max(build_schedules(config, world_size)["lr"].values) for world_size in (1, 16)]
    assert peaks == pytest.approx([0.001, 0.004], rel=1e-12)


@pytest.mark.parametrize(("rule", "factor"), [("sqrt_wrt_1024", 0.5), ("linear_wrt_256", 1.0), ("none", 1.0)])
def test_scaling_rules_at_batch_256(rule: str, factor: float) -> None:
    assert scaled_learning_rate(OptimOptions(base_lr=0.008, scaling_rule=rule), 256) == pytest.approx(0.008 * factor)


def test_linear_rule_and_a_given_learning_rate() -> None:
    assert scaled_learning_rate(OptimOptions(base_lr=0.001, scaling_rule="linear_wrt_256"), 512) == 0.002
    assert scaled_learning_rate(OptimOptions(base_lr=0.001, scaling_rule="none"), 512) == 0.001
    assert scaled_learning_rate(OptimOptions(base_lr=0.001, lr=0.5), 512) == 0.5


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"optim\.scaling_rule: found 'cubic', allowed are 'sqrt_wrt_1024'"):
        scaled_learning_rate(OptimOptions(scaling_rule="cubic"), 1)


def test_a_warm_up_longer_than_the_run_names_both_options() -> None:
    config = make_config(optim={"epochs": 5, "warmup_epochs": 10})
    with pytest.raises(ValueError, match=r"optim\.warmup_epochs must not exceed optim\.epochs, found 10 > 5"):
        build_schedules(config, world_size=1)


def test_a_run_may_end_before_the_temperature_and_the_last_layer_have_warmed_up() -> None:
    config = make_config(
        optim={"epochs": 2, "warmup_epochs": 2, "freeze_last_layer_epochs": 3},
        teacher={"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 30},
        OFFICIAL_EPOCH_LENGTH=10,
    )
    schedules = build_schedules(config, world_size=1)
    assert schedules["teacher_temp"][19] == pytest.approx(0.04 + 0.03 * 19 / 299)
    assert schedules["last_layer_lr"].values.tolist() == [0.0] * 20
    assert schedules["lr"][19] == pytest.approx(scaled_learning_rate(config.optim, config.train.batch_size_per_gpu))


def test_without_a_warm_up_the_temperature_is_constant() -> None:
    schedules = build_schedules(make_config(teacher={"warmup_teacher_temp_epochs": 0, "teacher_temp": 0.06}), 1)
    assert schedules["teacher_temp"][0] == schedules["teacher_temp"][10_000] == 0.06
