"""Two whole optimisation steps of the method against reference values, and truths about the method's parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from dinov2.config import Config, as_pair, load_config
from dinov2.data.collate import PretrainingBatch
from dinov2.loop.optimization import Optimization
from dinov2.models.layouts import unchunk_block_name
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.setup import build_optimizer
from dinov2.train.ssl_meta_arch import SSLMetaArch, update_teacher
from dinov2.train.target_measures import TargetMeasures


def config_of(variant: dict[str, Any]) -> Config:
    values = {section: dict(options) for section, options in variant["config"].items() if section != "centering"}
    del values["student"]["arch"]
    return load_config(values | {"train": values.get("train", {}) | {"centering": variant["config"]["centering"]}})


def small_backbone(config: Config, drop_path_rate: float) -> DinoVisionTransformer:
    student = config.student
    return DinoVisionTransformer(
        img_size=98,
        patch_size=14,
        embed_dim=64,
        depth=2,
        num_heads=2,
        init_values=student.layerscale,
        ffn_layer=student.ffn_layer,
        drop_path_rate=drop_path_rate,
        drop_path_uniform=student.drop_path_uniform,
        num_register_tokens=student.num_register_tokens,
        interpolate_antialias=student.interpolate_antialias,
        interpolate_offset=student.interpolate_offset,
    )


def our_name(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{part}.{unchunk_block_name(rest)}"


def build(variant: dict[str, Any], init: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> SSLMetaArch:
    config = config_of(variant)
    backbones = small_backbone(config, config.student.drop_path_rate), small_backbone(config, 0.0)
    model = SSLMetaArch(config, backbones)
    for network, state in ((model.student, init["student"]), (model.teacher, init["teacher"])):
        network.load_state_dict({our_name(name): tensor for name, tensor in state.items()})
    return model.to(dtype).train()


def make_batch(values: dict[str, Any], dtype: torch.dtype) -> PretrainingBatch:
    return PretrainingBatch(
        global_crops=values["collated_global_crops"].to(dtype),
        local_crops=values["collated_local_crops"].to(dtype),
        masks=values["collated_masks"],
        mask_indices=values["mask_indices_list"],
        mask_weights=values["masks_weight"],
        num_masked=int(values["n_masked_patches"]),
        upperbound=values["upperbound"],
        names=("a", "b", "c", "d"),
        unreadable=(),
    )


def named(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.named_parameters())


def replay(monkeypatch: pytest.MonkeyPatch, permutations: list[Any]) -> list[Tensor]:
    """Makes ``torch.randperm`` return the recorded permutations; the returned list shrinks as they are used."""
    pending = [torch.as_tensor(permutation) for permutation in permutations]

    def randperm(count: int, **_: Any) -> Tensor:
        permutation = pending.pop(0)
        assert len(permutation) == count
        return permutation

    if pending:
        monkeypatch.setattr(torch, "randperm", randperm)
    return pending


def listen(model: SSLMetaArch, upperbound: int, num_masked: int) -> dict[str, tuple[float, float]]:
    """Sum and sum of absolute values of what each head says last, filled in as they speak.

    The reference pads the masked patches with zeros up to ``upperbound`` before a head; what a head makes of the
    missing rows is added.
    """
    said: dict[str, tuple[float, float]] = {}

    def hear(name: str, padding: int) -> Any:
        def hook(head: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            with torch.no_grad():
                row = head.forward(torch.zeros_like(inputs[0][:1])).double()
            values = output.detach().double()
            said[name] = (
                values.sum().item() + padding * row.sum().item(),
                values.abs().sum().item() + padding * row.abs().sum().item(),
            )

        return hook

    for network in ("student", "teacher"):
        for head, module in getattr(model, network).items():
            if head != "backbone":
                padded = head == "ibot_head" or not model.separate_head
                module.register_forward_hook(hear(f"{network}.{head}", (upperbound - num_masked) * padded))
    return said


def assert_close(ours: float, expected: float, *, relative: float = 0.0, absolute: float = 0.0) -> None:
    assert ours == pytest.approx(expected, rel=relative, abs=absolute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("index", range(5))
def test_two_steps_reproduce_the_reference(
    reference: Any, monkeypatch: pytest.MonkeyPatch, index: int, dtype: torch.dtype
) -> None:
    fixture = reference("ssl_step_fixture.pt")
    name, variant = list(fixture["variants"].items())[index]
    model = build(variant, fixture["init"][variant["init"]], dtype)
    optimizer = build_optimizer(config_of(variant), model.student, torch.device("cpu"))
    for step, (expected, exact) in enumerate(
        zip(variant[str(dtype).removeprefix("torch.")], variant["float64"], strict=True)
    ):
        hyper = expected["hyper"]
        optimization = Optimization(
            model.student, optimizer, torch.amp.GradScaler("cpu", enabled=False), hyper["clip_grad"]
        )
        pending = replay(monkeypatch, expected["randperms"])
        batch = make_batch(fixture["batches"][step], dtype)
        said = listen(model, batch.upperbound, batch.num_masked)
        losses = model.forward_backward(batch, teacher_temp=hyper["teacher_temp"])
        monkeypatch.undo()
        assert not pending, "every recorded permutation is drawn"
        assert said.keys() == expected["head_outputs"].keys()
        for head, (total, absolute) in said.items():
            sums = expected["head_outputs"][head]
            assert_close(absolute, sums["abs_sum"], relative=1e-5)
            assert_close(total, sums["sum"], absolute=1e-5 * sums["abs_sum"])

        for term, value in expected["losses"].items():
            # KoLeo near zero is a difference of logarithms: the reference's own float32 value is 1.4e-4 off its
            # float64 value there, and which way rounding falls depends on the processor's instruction set.
            own_error = abs(value - exact["losses"][term]) / abs(value)
            assert_close(losses[term].item(), value, relative=1e-5 + own_error)
        assert_close(losses["total_loss"].item(), expected["backprop_total"], relative=1e-5)
        assert_close(sum(losses[term].item() for term in expected["losses"]), expected["logged_total"], relative=1e-5)
        tolerance = 2e-4 if step == 1 and expected["randperms"] else 1e-5
        gradients = {key: parameter.grad for key, parameter in named(model.student).items()}
        for key, value in expected["grad_norms"].items():
            gradient = gradients[our_name(key)]
            assert gradient is not None
            assert_close(gradient.norm().item(), value, relative=tolerance, absolute=1e-9)
            # The sum of numbers of both signs: judged against how large sums of such numbers are.
            assert_close(
                gradient.sum().item(),
                expected["grad_sums"][key],
                absolute=tolerance * (value * gradient.numel() ** 0.5),
            )
        norms = optimization.clip()
        for key, value in expected["clip_total_norms"].items():
            assert_close(norms[key].item(), value, relative=tolerance)
        optimization.step(lr=hyper["lr"], weight_decay=hyper["wd"], last_layer_lr=hyper["last_layer_lr"])
        update_teacher(model.student, model.teacher, hyper["momentum"])
        for network, after in ((model.student, "student_after"), (model.teacher, "teacher_after")):
            for key, sums in expected[after].items():
                tensor = named(network)[our_name(key)].double()
                # A bias of the keys shifts all logits of a query alike: its true gradient is zero, and Adam turns
                # the rounding noise in its place into steps of full size.
                noisy = dtype == torch.float32 and key.endswith("attn.qkv.bias")
                assert_close(tensor.abs().sum().item(), sums["abs_sum"], relative=3e-4 if noisy else 1e-4)
                assert_close(tensor.sum().item(), sums["sum"], absolute=5e-3 if noisy else 2e-3)
        for network, after in ((model.student, "student_probe_after"), (model.teacher, "teacher_probe_after")):
            for key, numbers in expected.get(after, {}).items():
                difference = (named(network)[our_name(key)].flatten()[: len(numbers)] - numbers).abs()
                # Where a gradient is rounding noise, Adam may go either way, by the learning rate at most.
                assert difference.max() <= 2 * (step + 1) * hyper["lr"]
                assert difference.median() <= 1e-5, key
        for loss, key in ((model.dino_loss, "dino_center_buffer"), (model.ibot_loss, "ibot_center_buffer")):
            if expected[key] is not None:
                assert "centering" in name
                torch.testing.assert_close(
                    loss.center.flatten(), expected[key].flatten().to(dtype), rtol=1e-4, atol=1e-6
                )


DEVICE = torch.device("cuda", 0)
IMAGES = 4


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, tensors are fake, and new ones lie on the GPU."""
    # Drawing initial weights needs numbers; a real run draws them before the model moves to the GPU.
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, *_, **__: tensor)
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device(DEVICE):
        yield


def fake_batch(config: Config) -> PretrainingBatch:
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
        ("vitl16_short", ("student.arch=vit_tiny",)),
        ("vitg14", ("student.arch=vit_tiny",)),
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
        batch = fake_batch(config)
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
