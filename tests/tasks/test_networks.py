"""What of a network is trained, averaged and shipped."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fine_tune_stand_ins import make_small

from dinov2.tasks import load_task_config
from dinov2.tasks.classification import ClassificationTask
from dinov2.tasks.networks import TaskNetworks
from dinov2.tasks.package import load_backbone_config
from dinov2.tasks.task import TaskFacts

BACKBONE = "student: {arch: vit_tiny, patch_size: 8, layerscale: 1.0}\ncrops: {global_crops_size: 32}\n"
CPU = torch.device("cpu")

Build = Callable[..., TaskNetworks]


@pytest.fixture
def networks_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    make_small(monkeypatch)
    (tmp_path / "backbone.yaml").write_text(BACKBONE)

    def build(*pairs: str) -> TaskNetworks:
        config = load_task_config(None, [f"backbone.config_file={tmp_path / 'backbone.yaml'}", *pairs])
        return TaskNetworks(
            ClassificationTask(config, TaskFacts(classes=("a", "b"))),
            load_backbone_config(config),
            num_outputs=2,
            device=CPU,
        )

    return build


def move(networks: TaskNetworks, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Stands for a step of the optimiser; returns the weights and running statistics after it."""
    with torch.no_grad():
        for tensor in networks.trained.parameters():
            if tensor.requires_grad:
                tensor.add_(torch.randn(tensor.shape, generator=generator))
        for buffer in networks.trained.buffers():
            buffer.copy_(torch.rand(buffer.shape, generator=generator).to(buffer.dtype))
    return {name: tensor.clone() for name, tensor in networks.trained.state_dict().items()}


def test_the_average_follows_its_formula_and_is_what_is_shipped(networks_with: Build) -> None:
    networks = networks_with("backbone.mode=last_blocks", "backbone.last_blocks=1", "train.ema_momentum=0.6")
    expected = {name: tensor.double() for name, tensor in networks.trained.state_dict().items()}
    buffers = {name for name, _ in networks.trained.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        after = move(networks, generator)
        networks.update_average(step)
        momentum = min(0.6, (1 + step) / (10 + step))  # 0.1 at first, 0.6 from step 13 on
        for name, tensor in after.items():
            old = 0 if name in buffers else momentum
            expected[name] = old * expected[name] + (1 - old) * tensor
    shipped = networks.whole().state_dict()
    assert shipped.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(shipped[name].double(), tensor, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(shipped["head.weight"], networks.trained["head"].weight)


@pytest.mark.parametrize(
    ("pairs", "trained"),
    [
        (["backbone.mode=frozen"], ()),
        (["backbone.mode=last_blocks", "backbone.last_blocks=1"], ("blocks.1.", "norm.")),
        (["backbone.mode=lora"], ("lora_a", "lora_b")),
        (["backbone.mode=full"], ("",)),
    ],
)
def test_a_backward_pass_reaches_what_the_mode_trains_and_nothing_else(
    networks_with: Build, pairs: list[str], trained: tuple[str, ...]
) -> None:
    networks = networks_with(*pairs)
    networks.set_training()
    torch.nn.init.normal_(networks.model.head.weight)
    networks.model(torch.randn(2, 3, 32, 32))["logits"].square().sum().backward()
    for name, parameter in networks.model.backbone.named_parameters():
        wanted = name != "mask_token" and any(part in name for part in trained)
        assert (parameter.grad is not None) == wanted, name


def test_computing_in_bf16_keeps_weights_and_gradients_in_single_precision(networks_with: Build) -> None:
    networks = networks_with("backbone.mode=full", "train.precision=bf16")
    exact = copy.deepcopy(networks.model)
    images = torch.randn(4, 3, 32, 32)
    torch.nn.init.normal_(networks.model.head.weight)
    exact.head.load_state_dict(networks.model.head.state_dict())
    with torch.autocast("cpu", networks.dtype):
        outputs = networks.model(images)["logits"]
    assert outputs.dtype == torch.bfloat16
    outputs.float().sum().backward()
    expected = exact(images)["logits"]
    assert not torch.equal(outputs.float(), expected)
    torch.testing.assert_close(outputs.float(), expected, rtol=0.1, atol=0.1 * float(expected.detach().abs().max()))
    assert {p.grad.dtype for p in networks.trained.parameters() if p.grad is not None} == {torch.float32}
