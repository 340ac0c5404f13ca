"""Set-up and optimisation: clipping per sub-network, AdamW with a step's rates, loss scaling, schedules."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dinov2.config import Config, load_config
from dinov2.config.schema import OptimOptions
from dinov2.loop.optimization import Agreement, NonFiniteLossError, Optimization, agree
from dinov2.train.setup import build_grad_scaler, build_optimization, build_schedules, scaled_learning_rate

CPU = torch.device("cpu")
RATES = {"lr": 0.1, "weight_decay": 0.5, "last_layer_lr": 0.0}


class Network(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        nn.init.constant_(self.fc.weight, value)
        nn.init.constant_(self.fc.bias, value)


class Head(Network):
    def __init__(self, value: float) -> None:
        super().__init__(value)
        self.last_layer = Network(value)


def options(*pairs: str) -> Config:
    return load_config(None, ["optim.layerwise_decay=1", *pairs])


def build(config: Config, scaler: torch.amp.GradScaler | None = None) -> tuple[nn.ModuleDict, Optimization]:
    torch.manual_seed(0)
    student = nn.ModuleDict({"backbone": Network(1.0), "dino_head": Head(2.0)})
    optimization = build_optimization(config, student, CPU)
    return student, optimization if scaler is None else replace(optimization, scaler=scaler)


def set_gradients(student: nn.ModuleDict, factor: float = 1.0) -> None:
    torch.manual_seed(1)
    for parameter in student.parameters():
        parameter.grad = factor * torch.randn_like(parameter)


def gradient_norm(network: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in network.parameters() if p.grad is not None))


@pytest.mark.parametrize("limit", [0.0, 0.5, 1000.0])
def test_each_network_is_clipped_by_its_own_norm(limit: float) -> None:
    student, optimization = build(options(f"optim.clip_grad={limit}"))
    set_gradients(student)
    before = {name: gradient_norm(network) for name, network in student.items()}
    norms = optimization.clip()
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(before)
    for name, network in student.items():
        expected = min(before[name], limit) if limit else before[name]
        assert gradient_norm(network) == pytest.approx(expected, rel=1e-4)


def test_a_step_is_adamw_with_the_rates_of_the_step() -> None:
    config = options("optim.adamw_beta1=0.7", "optim.adamw_beta2=0.8")
    student, optimization = build(config)
    start = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    set_gradients(student)
    optimization.step(**RATES)
    torch.manual_seed(1)
    for name, parameter in student.named_parameters():
        gradient = torch.randn_like(parameter)
        lr = 0.0 if "last_layer" in name else 0.1
        decay = 0.0 if name.endswith("bias") else 0.5
        # The first step of Adam: both bias-corrected moments are the gradient's own.
        expected = start[name] * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)
        assert parameter.grad is None, "gradients are cleared"
    assert optimization.optimizer.defaults["betas"] == (0.7, 0.8)


def test_names_of_all_parameters_are_known_to_the_optimiser() -> None:
    student, optimization = build(options())
    names = [name for group in optimization.optimizer.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in student.named_parameters())


def fp16(*parts: str) -> Sequence[str]:
    return [f"compute_precision.student.{part}.mixed_precision.param_dtype=fp16" for part in parts]


@pytest.mark.parametrize(
    ("device", "pairs", "enabled"),
    [
        ("cuda", fp16("backbone"), True),
        ("cuda", fp16("ibot_head"), True),
        ("cuda", [*fp16("backbone"), "compute_precision.grad_scaler=false"], False),
        ("cuda", ["compute_precision.student.backbone.mixed_precision.param_dtype=bf16"], False),
        ("cuda", ["compute_precision.teacher.backbone.mixed_precision.param_dtype=fp16"], False),
        ("cpu", fp16("backbone", "dino_head", "ibot_head"), False),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
def test_the_loss_is_scaled_only_where_the_student_computes_in_fp16(
    device: str, pairs: Sequence[str], enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: asked.append((device, enabled)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    build_grad_scaler(load_config(None, pairs), torch.device(device))
    assert asked == [(device, enabled)]


def test_a_scaled_loss_gives_the_same_step_and_an_overflow_gives_none() -> None:
    plain, unscaled = build(options())
    assert unscaled.loss_scale(CPU).item() == 1
    student, scaled = build(options(), torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert scaled.loss_scale(CPU).item() == 1024
    set_gradients(plain)
    set_gradients(student, 1024.0)
    norms = unscaled.clip()
    assert {name: norm.item() for name, norm in scaled.clip().items()} == pytest.approx(
        {name: norm.item() for name, norm in norms.items()}
    )
    unscaled.step(**RATES)
    scaled.step(**RATES)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    for ours, expected in zip(before, plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.detach())

    set_gradients(student)
    next(iter(student["backbone"].parameters())).grad.fill_(math.inf)
    scaled.loss_scale(CPU)
    assert not math.isfinite(scaled.clip()["backbone"].item())
    scaled.step(**RATES)
    for parameter, expected in zip(student.parameters(), before, strict=True):
        assert torch.equal(parameter.detach(), expected), "an overflowed step is left out"
        assert parameter.grad is None
    assert scaled.loss_scale(CPU).item() == 512


def test_one_process_agrees_with_itself() -> None:
    losses = {"total_loss": torch.tensor(3.0, dtype=torch.bfloat16), "koleo_loss": torch.tensor(0.5)}
    assert agree(losses, stop=False) == Agreement({"total_loss": 3.0, "koleo_loss": 0.5}, stop=False, unreadable=())
    assert agree(losses, stop=True, unreadable=["a", "b"]) == Agreement(
        {"total_loss": 3.0, "koleo_loss": 0.5}, stop=True, unreadable=("a", "b")
    )


def check(
    losses: dict[str, torch.Tensor],
    norms: dict[str, torch.Tensor],
    images: list[str],
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Looks at a step's values with an optimiser of its own."""
    network = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2)})
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    optimization = Optimization(network, torch.optim.AdamW(network.parameters()), scaler, clip_grad=1.0)
    optimization.check_finite(agree(losses, stop=False), losses, norms, 41, images)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_message_names_term_iteration_and_images(value: float) -> None:
    losses = {"total_loss": torch.tensor(value), "ibot_loss": torch.tensor(value), "koleo_loss": torch.tensor(0.0)}
    images = [f"image_{number}.png" for number in range(11)]
    with pytest.raises(NonFiniteLossError) as failure:
        check(losses, {}, images)
    text = str(failure.value)
    assert text.startswith("total_loss, ibot_loss is not finite at iteration 41; no step was taken. rank 0: ")
    assert "image_7.png and 3 more" in text
    assert "image_8.png" not in text
    assert "koleo_loss" not in text


@pytest.mark.parametrize(
    ("scale", "normal"), [(65536.0, True), (2.0, True), (1.001, True), (1.0, False), (0.5, False), (None, False)]
)
def test_an_overflow_is_normal_where_the_loss_scale_can_shrink(scale: float | None, normal: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 4.0, enabled=scale is not None)
    scaler.scale(torch.ones(()))
    check({"total_loss": torch.tensor(1.0)}, {"backbone": torch.tensor(1e30)}, ["a.png"], scaler)
    with nullcontext() if normal else pytest.raises(NonFiniteLossError):
        check({"total_loss": torch.tensor(1.0)}, {"backbone": torch.tensor(math.inf)}, ["a.png"], scaler)
    assert scaler.get_scale() == pytest.approx(scale or 1.0), "lowered by the step only"


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


@pytest.mark.parametrize(
    ("options", "batch", "expected"),
    [
        ({"base_lr": 0.008, "scaling_rule": "sqrt_wrt_1024"}, 256, 0.004),
        ({"base_lr": 0.008, "scaling_rule": "linear_wrt_256"}, 256, 0.008),
        ({"base_lr": 0.001, "scaling_rule": "linear_wrt_256"}, 512, 0.002),
        ({"base_lr": 0.001, "scaling_rule": "none"}, 512, 0.001),
        ({"base_lr": 0.001, "lr": 0.5}, 512, 0.5),
    ],
)
def test_scaling_rules(options: dict[str, Any], batch: int, expected: float) -> None:
    assert scaled_learning_rate(OptimOptions(**options), batch) == pytest.approx(expected)


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
