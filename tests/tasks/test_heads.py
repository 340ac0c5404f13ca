"""Building heads from options: every kind learns, reads exactly the options it claims, and refuses what it must."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dinov2.models.heads.features import PixelHead
from dinov2.tasks import TASKS
from dinov2.tasks.depth import ACTIVATIONS
from dinov2.tasks.options import HeadOptions
from dinov2.tasks.task import HeadSizes
from tests.models.heads.random_features import random_features

KINDS = [(name, kind) for name, task in TASKS.items() for kind in task.heads]
ONE_MAP = [
    (name, kind) for name, kind in KINDS if name not in ("detection", "anomaly")
]  # boxes are learnt beside their losses; for what is learnt of good parts there is no target
OPTIONS = HeadOptions(
    standardize=False,
    hidden_dim=32,
    channels=32,
    upsample=2,
    num_bins=16,
    depth_activation="softplus",
    min_depth=0.1,
    max_depth=5.0,
    num_queries=5,
    num_denoising=4,
)


class Recorder:
    """Options that remember which of them were read."""

    def __init__(self, options: HeadOptions) -> None:
        self.options = options
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.options, name)


def build(options: Any, task: str, kind: str) -> nn.Module:
    sizes = HeadSizes(embed_dim=16, num_blocks=4, num_outputs=1 if task == "depth" else 3, patch_size=14)
    return TASKS[task].heads[kind].build(options, sizes)


def run(head: nn.Module, batch: int = 2) -> torch.Tensor:
    """The output for random features, and for images of 3 x 5 patches where the head takes them; several in a row."""
    images = torch.randn(batch, 3, 42, 70, generator=torch.Generator().manual_seed(0))
    output = head(random_features(4, batch=batch), *[images] * isinstance(head, PixelHead))
    found: torch.Tensor = output
    if isinstance(output, dict):
        found = torch.cat([output[name].float().flatten() for name in sorted(output)])
    return found


def targets_by_heart(task: str, size: torch.Size) -> torch.Tensor:
    if task == "classification":
        return torch.arange(3)
    coarse = torch.rand(3, 1, 3, 5)  # a value per patch
    if task == "segmentation":
        return F.interpolate((3 * coarse).floor(), size=size)[:, 0].long()
    return F.interpolate(1 + 3 * coarse, size=size, mode="bilinear")


@pytest.mark.parametrize(("task", "kind"), ONE_MAP)
def test_every_head_learns_a_target_by_heart(task: str, kind: str) -> None:
    torch.manual_seed(0)
    head = build(OPTIONS, task, kind).train()
    output = run(head, batch=3)
    assert output.ndim == (2 if task == "classification" else 4)
    targets = targets_by_heart(task, output.shape[-2:])

    def loss() -> torch.Tensor:
        output = run(head, batch=3)
        return F.l1_loss(output, targets) if task == "depth" else F.cross_entropy(output, targets)

    # Large steps kill the rectified layers of a DPT head for good.
    optimizer = torch.optim.Adam(head.parameters(), lr=0.001 if kind == "dpt" else 0.01)
    first = loss().item()
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.3 * first
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_exactly_the_named_options_are_read(task: str, kind: str) -> None:
    recorder = Recorder(OPTIONS)
    build(recorder, task, kind)
    assert recorder.read == set(TASKS[task].heads[kind].options)


CHANGES: dict[str, Any] = {
    "pooling": "mean",
    "standardize": True,
    "per_part": True,
    "hidden_dim": 64,
    "channels": 64,
    "dropout": 0.5,
    "class_token": True,
    "output_stride": 16,
    "upsample": 4,
    "num_bins": 8,
    "bins": "SID",
    "norm_strategy": "softmax",
    "depth_activation": "sigmoid",
    "min_depth": 1.0,
    "max_depth": 9.0,
    "detail": False,
    "num_queries": 7,
    "num_layers": 2,
    "cross_attention": "standard",
    "two_stage": False,
    "num_denoising": 0,
    "one_to_many": False,
}


@pytest.mark.parametrize(
    ("task", "kind", "name"),
    [(task, kind, name) for task, kind in KINDS for name in sorted(TASKS[task].heads[kind].options)],
)
def test_every_option_that_is_read_changes_the_head(task: str, kind: str, name: str) -> None:
    def facts(chosen: HeadOptions) -> tuple[Any, ...]:
        torch.manual_seed(0)
        head = build(chosen, task, kind)
        shapes = [(key, tuple(tensor.shape)) for key, tensor in head.state_dict().items()]
        torch.manual_seed(1)
        return shapes, tuple(run(head).shape), run(head).sum().item()

    assert facts(OPTIONS) == facts(OPTIONS)
    assert facts(replace(OPTIONS, **{name: CHANGES[name]})) != facts(OPTIONS)


@pytest.mark.parametrize("kind", ["linear_bins", "dpt", "conv_decoder"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_depth_keeps_to_the_range_asked_for(kind: str, activation: str) -> None:
    torch.manual_seed(0)
    options = replace(OPTIONS, depth_activation=activation, min_depth=0.4, max_depth=0.6)
    head = build(options, "depth", kind).eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=2.0)
    depth = head(random_features(4))
    assert depth.min() >= 0.4
    assert depth.max() <= 0.6
    assert depth.std() > 0
