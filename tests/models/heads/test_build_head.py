"""Building heads from options: every kind learns, reads exactly the options it claims, and refuses what it must."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_features import random_features
from torch import nn

from dinov2.models.heads.build import DEPTH_ACTIVATIONS, HEAD_OPTIONS, build_head
from dinov2.models.heads.classification import PartClassifier

KINDS = [(task, kind) for task, kinds in HEAD_OPTIONS.items() for kind in kinds]


@dataclass(frozen=True)
class Options:
    kind: str
    pooling: str = "cls_mean"
    standardize: bool = False
    per_part: bool = False
    hidden_dim: int = 32
    channels: int = 32
    dropout: float = 0.0
    class_token: bool = False
    output_stride: int = 4
    upsample: int = 2
    num_bins: int = 16
    bins: str = "UD"
    norm_strategy: str = "linear"
    depth_activation: str = "softplus"
    min_depth: float = 0.1
    max_depth: float = 5.0


class Recorder:
    """Options that remember which of them were read."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.options, name)


def build(options: Any, task: str, **changes: Any) -> nn.Module:
    sizes = {"embed_dim": 16, "num_blocks": 4, "num_outputs": 1 if task == "depth" else 3, "patch_size": 14} | changes
    return build_head(options, task=task, **sizes)


def targets_by_heart(task: str, size: torch.Size) -> torch.Tensor:
    if task == "classification":
        return torch.arange(3)
    coarse = torch.rand(3, 1, 3, 5)  # a value per patch
    if task == "segmentation":
        return F.interpolate((3 * coarse).floor(), size=size)[:, 0].long()
    return F.interpolate(1 + 3 * coarse, size=size, mode="bilinear")


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_every_head_learns_a_target_by_heart(task: str, kind: str) -> None:
    torch.manual_seed(0)
    features = [(patches.detach(), cls.detach()) for patches, cls in random_features(4, batch=3)]
    head = build(Options(kind=kind), task).train()
    output = head(features)
    assert output.ndim == (2 if task == "classification" else 4)
    targets = targets_by_heart(task, output.shape[-2:])

    def loss() -> torch.Tensor:
        return F.l1_loss(head(features), targets) if task == "depth" else F.cross_entropy(head(features), targets)

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
    recorder = Recorder(Options(kind=kind))
    build(recorder, task)
    assert recorder.read - {"kind"} == HEAD_OPTIONS[task][kind]


CHANGES: dict[str, Any] = {
    "pooling": "mean",
    "standardize": True,
    "per_part": True,
    "hidden_dim": 64,
    "channels": 64,
    "dropout": 0.5,
    "class_token": True,
    "output_stride": 14,
    "upsample": 4,
    "num_bins": 8,
    "bins": "SID",
    "norm_strategy": "softmax",
    "depth_activation": "sigmoid",
    "min_depth": 1.0,
    "max_depth": 9.0,
}


@pytest.mark.parametrize(
    ("task", "kind", "name"), [(task, kind, name) for task, kind in KINDS for name in sorted(HEAD_OPTIONS[task][kind])]
)
def test_every_option_that_is_read_changes_the_head(task: str, kind: str, name: str) -> None:
    features = random_features(4)
    options = Options(kind=kind)

    def facts(chosen: Options) -> tuple[Any, ...]:
        torch.manual_seed(0)
        head = build(chosen, task)
        shapes = [(key, tuple(tensor.shape)) for key, tensor in head.state_dict().items()]
        torch.manual_seed(1)
        return shapes, tuple(head(features).shape), head(features).sum().item()

    assert facts(options) == facts(options)
    assert facts(replace(options, **{name: CHANGES[name]})) != facts(options)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_photos_are_joined_over_parts_when_asked(kind: str) -> None:
    head = build(Options(kind=kind, per_part=True), "classification")
    assert isinstance(head, PartClassifier)
    assert head(random_features(4, batch=6), torch.ones(2, 3, dtype=torch.bool)).shape == (2, 3)


@pytest.mark.parametrize("kind", ["linear_bins", "dpt", "conv_decoder"])
@pytest.mark.parametrize("activation", DEPTH_ACTIVATIONS)
def test_depth_keeps_to_the_range_asked_for(kind: str, activation: str) -> None:
    torch.manual_seed(0)
    options = Options(kind=kind, depth_activation=activation, min_depth=0.4, max_depth=0.6)
    head = build(options, "depth").eval()
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=2.0)
    depth = head(random_features(4))
    assert depth.min() >= 0.4
    assert depth.max() <= 0.6
    assert depth.std() > 0


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"'pose'.*classification, segmentation, depth"):
        build(Options(kind="linear"), "pose")
    with pytest.raises(ValueError, match=r"'linear' for depth.*linear_bins, dpt, conv_decoder"):
        build(Options(kind="linear"), "depth")
    with pytest.raises(ValueError, match="must be 1 for depth; got 2"):
        build(Options(kind="dpt"), "depth", num_outputs=2)
    with pytest.raises(ValueError, match="got 0 for segmentation"):
        build(Options(kind="bn_linear"), "segmentation", num_outputs=0)
    with pytest.raises(ValueError, match="4 blocks, got 1"):
        build(Options(kind="dpt"), "depth", num_blocks=1)
    with pytest.raises(ValueError, match=r"depth_activation 'exp'.*softplus, sigmoid, relu"):
        build(Options(kind="dpt", depth_activation="exp"), "depth")
