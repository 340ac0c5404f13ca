"""What of a network is trained, averaged and shipped."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fine_tune_stand_ins import make_small
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2.data.task_dataset import TaskSample
from dinov2.models.heads.segmentation import BNHead, ConvDecoder
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.tasks import TASKS, load_task_config
from dinov2.tasks.classification import ClassificationTask
from dinov2.tasks.networks import TaskNetworks, build_task_optimizer, learning_rates
from dinov2.tasks.package import build_task_model, load_backbone_config
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


DEPTH = 3


def backbone() -> DinoVisionTransformer:
    return DinoVisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=DEPTH, num_heads=2, init_values=1.0)


def optimised(trained: nn.ModuleDict, *pairs: str) -> dict[str, SimpleNamespace]:
    """Multipliers of every parameter by name, as the optimiser has them."""
    optimizer = build_task_optimizer(load_task_config(None, list(pairs)), trained, torch.device("cpu"))
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter, said in zip(group["params"], group["param_names"], strict=True):
            assert names[id(parameter)] == said
            assert said not in found
            found[said] = SimpleNamespace(lr=group["lr_multiplier"], wd=group["wd_multiplier"])
    return found


@pytest.mark.parametrize("head", [ConvDecoder(24, 2, num_blocks=1, patch_size=8, channels=32), BNHead(24, 2)])
def test_biases_and_norms_of_head_and_backbone_do_not_decay_and_all_else_does(head: nn.Module) -> None:
    trained = nn.ModuleDict({"backbone": backbone(), "head": head})
    found = optimised(trained)
    assert found.keys() == dict(trained.named_parameters()).keys()
    for name, parameter in trained.named_parameters():
        # Of these networks, biases, norms and LayerScale are the vectors.
        assert found[name].wd == float(parameter.ndim > 1), name


def test_the_head_learns_at_the_rate_and_blocks_ever_slower_towards_the_input() -> None:
    trained = nn.ModuleDict({"backbone": backbone(), "head": BNHead(24, 2)})
    found = optimised(trained, "optim.backbone_lr_mult=0.5", "optim.layerwise_decay=0.8")
    assert found["head.conv_seg.weight"].lr == 1
    assert found["backbone.norm.weight"].lr == 0.5
    for block in range(DEPTH):
        for name in ("attn.qkv.weight", "norm1.bias", "ls1.gamma"):
            assert found[f"backbone.blocks.{block}.{name}"].lr == pytest.approx(0.5 * 0.8 ** (DEPTH - block))
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        assert found[f"backbone.{name}"].lr == pytest.approx(0.5 * 0.8 ** (DEPTH + 1))


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_the_optimiser_is_the_one_asked_for(kind: str) -> None:
    trained = nn.ModuleDict({"head": BNHead(4, 2)})
    config = load_task_config(None, [f"optim.optimizer={kind}", "optim.momentum=0.7"])
    optimizer = build_task_optimizer(config, trained, torch.device("cpu"))
    assert type(optimizer).__name__.lower() == kind
    defaults = optimizer.defaults
    assert (defaults["momentum"] if kind == "sgd" else defaults["betas"][0]) == 0.7


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_the_rate_rises_linearly_and_then_falls_or_stays(kind: str) -> None:
    pairs = [f"optim.schedule={kind}", "optim.lr=0.4", "optim.warmup_epochs=0.5", "optim.min_lr=0.1"]
    schedule = learning_rates(load_task_config(None, pairs), total_steps=24, steps_per_epoch=8)
    rates = [schedule[step] for step in range(24)]
    assert rates[:4] == pytest.approx([0.4 * step / 3 for step in range(4)])
    fallen = [0.1 + 0.3 * (1 + math.cos(math.pi * step / 20)) / 2 for step in range(20)]
    assert rates[4:] == pytest.approx([0.4] * 20 if kind == "constant" else fallen)


DEVICE = torch.device("cuda", 0)
IMAGES, SIDE = 3, 64
CLASSES = ("good", "scratch", "dent")


def make_sample(task: str, *, multi_label: bool) -> TaskSample:
    sample = TaskSample(image=torch.randn(IMAGES, 3, SIDE, SIDE))
    if task == "classification":
        sample["label"] = torch.ones(IMAGES, len(CLASSES)) if multi_label else torch.ones(IMAGES, dtype=torch.int64)
    elif task == "segmentation":
        sample["mask"] = torch.zeros(IMAGES, SIDE, SIDE, dtype=torch.int64)
    else:
        sample["depth"] = torch.ones(IMAGES, SIDE, SIDE)
    return sample


@pytest.mark.parametrize(
    ("task", "pairs"),
    [
        ("classification", ("head.kind=linear",)),
        ("classification", ("head.kind=mlp", "head.dropout=0.1", "loss.label_smoothing=0.1")),
        ("classification", ("data.multi_label=true",)),
        ("segmentation", ("head.kind=bn_linear", "head.class_token=true")),
        ("segmentation", ("head.kind=multi_scale", "backbone.blocks=[1,3,5,7]", "loss.dice=1", "loss.focal=1")),
        ("segmentation", ("head.kind=conv_decoder", "loss.dice=1")),
        ("segmentation", ("head.kind=pyramid", "backbone.blocks=[3,7]", "loss.dice=1")),
        ("depth", ("head.kind=linear_bins", "loss.silog=1", "loss.gradient=0.5")),
        ("depth", ("head.kind=dpt", "backbone.blocks=[1,3,5,7]", "loss.silog=1", "loss.gradient=0.5")),
        ("depth", ("head.kind=conv_decoder", "loss.silog=0", "loss.gradient=0.5", "loss.l1=1", "loss.mse=1")),
        ("depth", ("head.kind=conv_decoder", "loss.silog=0", "loss.l1=1", "loss.depth_alignment=least_squares")),
    ],
)
def test_losses_stay_on_the_gpu_and_wait_for_nothing(
    task: str, pairs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tmp_path / "backbone.yaml"
    backbone.write_text("student: {arch: vit_tiny, patch_size: 16}\ncrops: {global_crops_size: 64}\n")
    config = load_task_config(None, [f"task={task}", f"backbone.config_file={backbone}", "backbone.mode=full", *pairs])
    facts = TaskFacts(unit="m") if task == "depth" else TaskFacts(classes=CLASSES)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device(DEVICE):
        made = TASKS[task](config, facts)
        model = build_task_model(made, load_backbone_config(config), num_outputs=facts.num_outputs).train()
        made.prepare_loss((), DEVICE)
        sample = make_sample(task, multi_label=config.data.multi_label)
        outputs = model(sample["image"])
        terms = made.loss(outputs, sample)
        assert {term.device for term in terms.values()} == {DEVICE}
        optimizer = build_task_optimizer(
            config, nn.ModuleDict({"backbone": model.backbone, "head": model.head}), DEVICE
        )
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
