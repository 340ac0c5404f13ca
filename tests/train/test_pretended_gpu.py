"""The method on a pretended GPU: torch's fake tensors know devices and shapes, but hold no numbers and need no GPU.

They raise where tensors of two devices meet, and where a number is read from the device: each such place stalls a GPU
in every step. Backward passes and FSDP need a real one.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dinov2.config import Config, as_pair, load_config
from dinov2.data.collate import PretrainingBatch
from dinov2.loop.optimization import Optimization
from dinov2.train.setup import build_optimizer
from dinov2.train.ssl_meta_arch import SSLMetaArch, update_teacher
from dinov2.train.target_measures import TargetMeasures

DEVICE = torch.device("cuda", 0)
IMAGES = 4


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, tensors are fake, and new ones lie on the GPU."""
    # Drawing initial weights needs numbers; a real run draws them before the model moves to the GPU.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device(DEVICE):
        yield


def make_batch(config: Config) -> PretrainingBatch:
    (height, width), local = as_pair(config.crops.global_crops_size), as_pair(config.crops.local_crops_size)
    rows, columns = as_pair(config.student.patch_size)
    patches = (height // rows) * (width // columns)
    masked = IMAGES * patches // 4
    return PretrainingBatch(
        global_crops=torch.randn(2 * IMAGES, 3, height, width),
        local_crops=torch.randn(config.crops.local_crops_number * IMAGES, 3, *local),
        masks=torch.zeros(2 * IMAGES, patches, dtype=torch.bool),
        mask_indices=torch.zeros(masked, dtype=torch.int64),
        mask_weights=torch.ones(masked),
        num_masked=masked,
        upperbound=masked,
        names=tuple(f"{number}.png" for number in range(IMAGES)),
        unreadable=(),
    )


def test_fake_tensors_find_what_they_are_to_find(gpu: None) -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.ones(2) + torch.ones(2, device="cpu")
    with pytest.raises(DataDependentOutputException):
        torch.ones(2).sum().item()


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("magnetic_tile_cpu", ()),  # separate heads, Sinkhorn-Knopp
        ("magnetic_tile_cpu", ("train.centering=centering", "ibot.separate_head=false", "student.drop_path_rate=0.3")),
        ("magnetic_tile_cpu", ("student.ffn_layer=swiglufused", "student.num_register_tokens=4")),
        ("magnetic_tile_cpu", ("ibot.loss_weight=0", "dino.koleo_half_precision=true")),
        ("vitl16_short", ()),
        ("vitg14", ()),
    ],
)
def test_a_step_stays_on_the_gpu_and_waits_for_nothing(
    gpu: None, repository: Path, name: str, pairs: tuple[str, ...]
) -> None:
    config = load_config(repository / "configs" / "train" / f"{name}.yaml", pairs)
    model = SSLMetaArch(config).train()
    optimizer = build_optimizer(config, model.student, DEVICE)
    assert optimizer.defaults["fused"]
    optimization = Optimization(model.student, optimizer, torch.amp.GradScaler("cpu", enabled=False), 3.0)
    measures = TargetMeasures(student_temp=0.1)
    for _ in range(2):  # what the first step leaves behind meets the second
        batch = make_batch(config)
        targets = model.teacher_targets(batch, teacher_temp=0.04)
        predictions = model.student_predictions(batch)
        losses, objective = model.losses(batch, targets, predictions)
        measures.observe(targets, predictions)
        for parameter in model.student.parameters():
            parameter.grad = torch.randn_like(parameter)
        norms = optimization.clip()
        found = {"objective": objective, **losses, **norms, **measures.step}
        assert {key for key, value in found.items() if value.device != DEVICE} == set()
        optimization.step(lr=1e-4, weight_decay=0.04)
        update_teacher(model.student, model.teacher, 0.99)
    devices = {tensor.device for state in optimizer.state.values() for tensor in state.values()}
    assert devices == {DEVICE}
