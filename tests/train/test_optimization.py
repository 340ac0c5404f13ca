"""Clipping per sub-network, AdamW with a step's rates, and loss scaling that skips overflows."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from dinov2.config import Config, load_config
from dinov2.loop.optimization import Optimization
from dinov2.train.setup import StepHyperparameters, build_grad_scaler, build_optimizer

CPU = torch.device("cpu")
RATES = StepHyperparameters(lr=0.1, weight_decay=0.5, momentum=0.9, teacher_temp=0.05, last_layer_lr=0.0)


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
    scaler = scaler or build_grad_scaler(config, CPU)
    return student, Optimization(student, build_optimizer(config, student, CPU), scaler, config.optim.clip_grad)


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
    optimization.step(RATES)
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


def test_an_idle_scaler_leaves_the_loss_alone() -> None:
    _, optimization = build(options())
    assert optimization.loss_scale(CPU).item() == 1


def test_a_scaled_loss_gives_the_same_step_and_an_overflow_gives_none() -> None:
    plain, unscaled = build(options())
    student, scaled = build(options(), torch.amp.GradScaler("cpu", init_scale=1024.0))
    assert scaled.loss_scale(CPU).item() == 1024
    set_gradients(plain)
    set_gradients(student, 1024.0)
    norms = unscaled.clip()
    assert {name: norm.item() for name, norm in scaled.clip().items()} == pytest.approx(
        {name: norm.item() for name, norm in norms.items()}
    )
    unscaled.step(RATES)
    scaled.step(RATES)
    before = [parameter.detach().clone() for parameter in student.parameters()]
    for ours, expected in zip(before, plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.detach())

    set_gradients(student)
    next(iter(student["backbone"].parameters())).grad.fill_(math.inf)
    scaled.loss_scale(CPU)
    assert not math.isfinite(scaled.clip()["backbone"].item())
    scaled.step(RATES)
    for parameter, expected in zip(student.parameters(), before, strict=True):
        assert torch.equal(parameter.detach(), expected), "an overflowed step is left out"
        assert parameter.grad is None
    assert scaled.loss_scale(CPU).item() == 512
