"""``auto``: published values for published lengths, measured ones for short runs, stored and kept by the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_stand_ins import ALL_BF16, AUTO, NETWORKS, Train, assert_same_run, crashed_run

from dinov2.config import Config, ConfigError, leaf_values, load_config, render_config
from dinov2.train import recipe
from dinov2.train.recipe import auto_values, proportions
from dinov2.train.setup import build_schedules, settle

CPU = torch.device("cpu")
CONFIGS = Path(__file__).parents[2] / "configs"
AUTO_PRECISION = [f"{network}.mixed_precision.param_dtype=auto" for network in NETWORKS]


def settled(config: Config, monkeypatch: pytest.MonkeyPatch, world_size: int = 1, **stored: Any) -> Config:
    monkeypatch.setattr(recipe, "get_world_size", lambda: world_size)
    return load_config(config, auto_values(config, CPU, stored))


@pytest.mark.parametrize(("name", "world_size"), [("vitl16_short", 32), ("vitl14", 96), ("vitg14", 256)])
def test_published_lengths_get_the_published_values(
    name: str, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = load_config(CONFIGS / "train" / f"{name}.yaml")
    ours = settled(load_config(published, AUTO), monkeypatch, world_size)
    assert ours.teacher == published.teacher
    assert ours.optim == published.optim
    assert "auto" not in render_config(ours).replace("reduce_dtype: auto", "").replace("device: auto", "")


def test_the_reference_schedules_follow_from_auto(reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = reference("schedule_fixture.json")["build_schedulers"]
    config = settled(load_config(CONFIGS / "train" / "vitl16_short.yaml", AUTO), monkeypatch, world_size=32)
    # The reference has the same epochs, of few iterations.
    train = {"OFFICIAL_EPOCH_LENGTH": fixture["official_epoch_length"], "batch_size_per_gpu": 64}
    short = load_config(config, {"train": train})
    schedules = build_schedules(short, world_size=1)
    for name, expected in fixture["values"].items():
        values = [schedules[{"wd": "weight_decay"}.get(name, name)][iteration] for iteration in fixture["iterations"]]
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=0, err_msg=name)


@pytest.mark.parametrize(
    ("iterations", "epoch_length", "final"),
    [(165, 55, 0.99), (165, 165, 0.99), (600, 50, 0.995), (1800, 50, 0.997), (3600, 50, 0.998), (3600, 7, 0.998)],
)
def test_short_runs_get_the_measured_values(
    iterations: int, epoch_length: int, final: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = (f"optim.epochs={-(-iterations // epoch_length)}", f"train.OFFICIAL_EPOCH_LENGTH={epoch_length}")
    schedules = build_schedules(settled(load_config(None, [*AUTO, *length]), monkeypatch), world_size=1)
    momentum, lr, frozen = schedules["momentum"], schedules["lr"], schedules["last_layer_lr"]
    assert (momentum[0], momentum.final_value) == (0.9, final)
    assert max(lr.values) == pytest.approx(5e-4)
    assert np.argmax(lr.values) + 1 == pytest.approx(iterations / 12, abs=1)
    assert {schedules["teacher_temp"][number] for number in range(iterations)} == {0.04}
    assert np.array_equal(frozen.values, lr.values)


@pytest.mark.parametrize(("name", "iterations"), [("cpu_10min", 600), ("cpu_60min", 3600), ("gpu_1h", 10_000)])
def test_the_recipes_for_any_set_need_its_name_alone(name: str, iterations: int) -> None:
    path = CONFIGS / "train" / f"{name}.yaml"
    _, *sections = path.read_text().split("\n\n")
    assert "root=" not in "".join(sections), "the same bytes for every set"
    config = load_config(path, ["train.dataset_path=ImageFolder:root=/data/images"])
    assert (config.evaluation.train_dataset_path, config.evaluation.val_dataset_path) == ("", "")
    assert config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH == iterations
    assert config.evaluation.eval_period_iterations <= iterations / 3, "what it learns is told by a third of its length"
    assert {f"{name}=auto" for name, value in leaf_values(config) if value == "auto"} >= set(AUTO)


def test_numbers_follow_the_length_without_a_jump() -> None:
    lengths = np.unique(np.geomspace(1, 2_000_000, 300).astype(int))
    found = [proportions(64 * int(length), 64) for length in lengths]
    for name, most in (
        ("teacher.momentum_teacher", 0.012),
        ("teacher.final_momentum_teacher", 0.04),
        ("teacher.teacher_temp", 0.001),
        ("optim.base_lr", 0.0002),
    ):
        values = [one[name] for one in found]
        assert max(np.abs(np.diff(values))) <= most + 1e-9, name
    for length, one in zip(lengths, found, strict=True):
        assert 0.9 <= one["teacher.momentum_teacher"] <= one["teacher.final_momentum_teacher"] <= 1
        assert all(0 <= value <= length for name, value in one.items() if name.endswith("_epochs"))


def test_auto_takes_the_images_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, [*AUTO, "optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=9"])
    one, two = (settled(config, monkeypatch, world_size) for world_size in (1, 2))
    assert one == two, "as many iterations"
    peaks = [max(build_schedules(one, world_size)["lr"].values) for world_size in (1, 4)]
    assert peaks[1] == pytest.approx(2 * peaks[0])


def test_options_are_what_was_given_where_nothing_is_auto() -> None:
    config = load_config(None, ALL_BF16)
    assert settle(config, CPU) == (config, {})
    assert settle(config, CPU)[0] is config
    with pytest.raises(ConfigError, match=r"still auto: dinov2\.train\.setup\.settle"):
        build_schedules(load_config(None, AUTO), 1)
    with pytest.raises(ConfigError, match=r"base_lr=auto is meant for optim\.scaling_rule=sqrt_wrt_1024, not none"):
        load_config(None, ["optim.base_lr=auto", "optim.scaling_rule=none"])
    with pytest.raises(ConfigError, match=r"warmup_epochs .*expected a number or auto, found 'car'"):
        load_config(None, ["optim.warmup_epochs=car"])


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_precision_is_that_of_the_machine_where_the_run_began(
    has: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "multiplies_bf16", lambda: has)
    config = Config()
    new = auto_values(config, CPU, {})
    assert set(new) == {name for name, value in leaf_values(config) if name.endswith("param_dtype")}
    assert set(new.values()) == {expected}
    other = dict.fromkeys(new, "bf16" if expected == "fp32" else "fp32")
    assert auto_values(config, CPU, other) == other, "as stored, on whatever machine"
    assert set(auto_values(config, CPU, dict.fromkeys(new, "auto")).values()) == {"fp32"}, "as runs did before"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has)
    assert set(auto_values(config, torch.device("cuda"), {}).values()) == {expected}


def test_a_run_keeps_what_auto_became(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recipe, "multiplies_bf16", lambda: True)
    pairs = [*AUTO, *AUTO_PRECISION]
    assert train(tmp_path / "whole", *pairs) == 0
    assert "auto became teacher.momentum_teacher=0.9 " in (tmp_path / "whole" / "log" / "log.txt").read_text()
    stored = load_config(tmp_path / "whole" / "config.yaml")
    assert stored.teacher.momentum_teacher == 0.9
    assert stored.compute_precision.student.backbone.mixed_precision.param_dtype == "bf16"

    crashed_run(train, tmp_path / "half", *pairs, at=4)
    monkeypatch.setattr(recipe, "multiplies_bf16", lambda: False)  # it goes on elsewhere
    assert train(tmp_path / "half", *pairs) == 0
    assert_same_run(tmp_path / "half", tmp_path / "whole")

    # Made longer, it keeps its numbers; a new run has its own.
    for folder, resume, final in (("half", True, 0.949), ("half", False, 0.958), ("new", True, 0.958)):
        config = load_config(None, [*pairs, "optim.epochs=3", "train.OFFICIAL_EPOCH_LENGTH=3"])
        config = load_config(config, {"train.output_dir": str(tmp_path / folder)})
        assert settle(config, CPU, resume=resume)[0].teacher.final_momentum_teacher == final

    (tmp_path / "half" / "config.yaml").write_text("optim: {epochs: none}")
    assert settle(load_config(config, {"train.output_dir": str(tmp_path / "half")}), CPU)[1]["optim.base_lr"] == 0.002
    assert "what auto meant when the run began is not known" in caplog.text
    caplog.clear()
    explicit = load_config(None, {"train.output_dir": str(tmp_path / "half")})
    assert settle(load_config(explicit, ALL_BF16), CPU)[1] == {}
    assert not caplog.text, "nothing is looked for where nothing is auto"
