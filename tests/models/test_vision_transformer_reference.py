"""The vision transformer against reference values: outputs, position embeddings, gradients, stochastic depth."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2.models.pretrained import extract_backbone, unchunk_block_name
from dinov2.models.vision_transformer import DinoVisionTransformer, drop_path_rates

Reference = Callable[[str], Any]
NAMES = (
    "p14_mlp_r0_c0_off01",
    "p14_mlp_r4_ls1e5_c0_off0_aa",
    "p14_swiglu_r0_ls1e5_c2_off01",
    "img224_p16_mlp_r0_c2_off01",
    "img224_p14_mlp_r4_c2_off01_aa",
    "p14_mlp_r0_c0_off01_nols_nobias",
)
TOLERANCES = {torch.float32: 2e-5, torch.float64: 1e-10}


def build(fixture: dict[str, Any], dtype: torch.dtype = torch.float32, **changes: Any) -> DinoVisionTransformer:
    options = {name: value for name, value in fixture["config"].items() if name != "block_chunks"} | changes
    model = DinoVisionTransformer(**options)
    state = extract_backbone(fixture["state_dict"]).tensors
    if options["init_values"] is None:
        state = {name: tensor for name, tensor in state.items() if "gamma" not in name}
    model.load_state_dict(state)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs(name: str, dtype: torch.dtype, reference: Reference) -> None:
    fixture = reference(f"vit_fixture_{name}.pt")
    model = build(fixture, dtype).eval()
    tolerance = {"atol": TOLERANCES[dtype], "rtol": 0.0}
    for case in fixture["cases"]:
        images = case["input"].to(dtype)
        expected = case["out32" if dtype == torch.float32 else "out64"]
        output = model(images, case["mask"], is_training=True)
        for key in ("x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"):
            torch.testing.assert_close(output[key], expected[key], **tolerance)
        assert output["masks"] is case["mask"]
        torch.testing.assert_close(model(images, case["mask"]), expected["forward_eval"], **tolerance)
        grid = (case["size"][0] // model.patch_size[0], case["size"][1] // model.patch_size[1])
        position = model.interpolate_pos_encoding(grid)
        torch.testing.assert_close(position.float(), case["pos_embed_interp"], atol=1e-6, rtol=0.0)

    images = fixture["cases"][-1]["input"].to(dtype)
    expected = fixture["cases"][-1]["out32" if dtype == torch.float32 else "out64"]
    pairs = model.get_intermediate_layers(images, n=2, return_class_token=True)
    for (patches, cls), (expected_patches, expected_cls) in zip(pairs, expected["inter_n2_norm"], strict=True):
        torch.testing.assert_close(patches, expected_patches, **tolerance)
        torch.testing.assert_close(cls, expected_cls, **tolerance)
    pairs = model.get_intermediate_layers(images, n=[0, 2], return_class_token=True, norm=False)
    for pair, expected_pair in zip(pairs, expected["inter_list02_nonorm"], strict=True):
        expected_tensors = expected_pair if isinstance(expected_pair, list | tuple) else [expected_pair]
        for tensor, expected_tensor in zip(pair, expected_tensors, strict=False):
            torch.testing.assert_close(tensor, expected_tensor, **tolerance)
    (maps,) = model.get_intermediate_layers(images, n=1, reshape=True)
    expected_maps = expected["inter_n1_reshape"]
    expected_maps = expected_maps if isinstance(expected_maps, Tensor) else expected_maps[0]
    torch.testing.assert_close(maps, expected_maps, **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str, reference: Reference) -> None:
    fixture = reference(f"vit_fixture_{name}.pt")
    expected = fixture["backward64"]
    case = fixture["cases"][expected["case"]]
    model = build(fixture, torch.float64)
    images = case["input"].double().requires_grad_()
    output = model(images, case["mask"], is_training=True)
    loss = (output["x_norm_clstoken"] * expected["w_cls"]).sum()
    loss = loss + (output["x_norm_patchtokens"] * expected["w_patch"]).sum()
    loss.backward()

    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert images.grad is not None
    assert images.grad.norm().item() == pytest.approx(expected["grad_input_norm"], rel=1e-7)
    torch.testing.assert_close(images.grad[0], expected["grad_input_image0"].double(), atol=1e-6, rtol=1e-6)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {unchunk_block_name(name): norm for name, norm in expected["grad_norms"].items()}
    sums = {unchunk_block_name(name): total for name, total in expected["grad_sums"].items()}
    assert set(gradients) == {name for name, norm in norms.items() if norm is not None}
    for key, gradient in gradients.items():
        assert gradient.norm().item() == pytest.approx(norms[key], rel=1e-7, abs=1e-12)
        # Sums cancel, and the position embedding's gradient comes through a float32 interpolation.
        assert gradient.sum().item() == pytest.approx(sums[key], rel=1e-6, abs=1e-8 + 1e-7 * norms[key])
    for key, gradient in expected["grads"].items():
        torch.testing.assert_close(gradients[unchunk_block_name(key)], gradient.double(), atol=1e-6, rtol=1e-6)


def test_list_of_crops(reference: Reference) -> None:
    fixture = reference("vit_fixture_nested_droppath.pt")
    outputs = build(fixture).eval()([x.float() for x in fixture["inputs"]], fixture["masks"], is_training=True)
    for output, expected in zip(outputs, fixture["out_eval"], strict=True):
        for key in expected.keys() & output.keys() - {"masks"}:
            torch.testing.assert_close(output[key], expected[key], atol=2e-5, rtol=0.0)


@pytest.mark.parametrize(("kind", "number"), [("list", 0), ("list", 1), ("list", 2), ("single", 0), ("single", 1)])
def test_stochastic_depth(kind: str, number: int, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = reference("vit_fixture_nested_droppath.pt")
    run = fixture[f"train_{kind}"][number]
    options = {name: run[name] for name in ("drop_path_rate", "drop_path_uniform", "init_values")}
    model = build(fixture, **options).train()
    assert [block.drop_path_rate for block in model.blocks] == pytest.approx(run["per_block_ratio"])

    recorded: Iterator[Tensor] = iter(run["randperms"])

    def replay(n: int, **_: object) -> Tensor:
        permutation = next(recorded)
        assert len(permutation) == n
        return permutation

    monkeypatch.setattr(torch, "randperm", replay)
    images = [x.float() for x in fixture["inputs"]]
    if kind == "list":
        outputs = model(images, fixture["masks"], is_training=True)
    else:
        outputs = [model(images[0], fixture["masks"][0], is_training=True)]
    assert next(recorded, None) is None

    expected = run["out"] if isinstance(run["out"], list) else [run["out"]]
    weights = [run[key] if isinstance(run[key], list) else [run[key]] for key in ("w_cls", "w_patch")]
    loss = torch.zeros(())
    for output, values, w_cls, w_patch in zip(outputs, expected, *weights, strict=True):
        for key in ("x_norm_clstoken", "x_prenorm"):
            torch.testing.assert_close(output[key], values[key], atol=2e-5, rtol=0.0)
        loss = loss + (output["x_norm_clstoken"] * w_cls).sum() + (output["x_norm_patchtokens"] * w_patch).sum()
    assert loss.item() == pytest.approx(run["loss"], rel=1e-5, abs=1e-4)
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.norm().item() == pytest.approx(run["grad_norms"][key], rel=1e-5)


def test_drop_path_rates(reference: Reference) -> None:
    for row in reference("schedule_fixture.json")["drop_path_per_block"]:
        assert drop_path_rates(row["rate"], row["depth"], uniform=row["uniform"]) == pytest.approx(
            row["rates"], rel=1e-12
        )


def test_initial_statistics(reference: Reference) -> None:
    statistics = reference("schedule_fixture.json")["init_statistics"]
    torch.manual_seed(0)
    parameters = dict(DinoVisionTransformer(**statistics["model"]).named_parameters())
    assert statistics["params"].keys() <= parameters.keys()
    for name, expected in statistics["params"].items():
        parameter = parameters[name].detach().double()
        assert list(parameter.shape) == expected["shape"]
        count = parameter.numel()
        # One draw of a standard deviation has a relative error of 1 / sqrt(2 n).
        assert parameter.std().item() == pytest.approx(expected["std"], rel=0.1 + 4 / count**0.5, abs=1e-11)
        assert parameter.mean().item() == pytest.approx(expected["mean"], abs=6 * expected["std"] / count**0.5 + 1e-11)
        assert parameter.abs().max() <= 1.6 * max(abs(expected["min"]), abs(expected["max"]))
