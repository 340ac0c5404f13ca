"""The vision transformer: properties, recorded values (outputs, gradients, stochastic depth), and timm's features."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2.models.layouts import extract_backbone, unchunk_block_name
from dinov2.models.vision_transformer import (
    DinoVisionTransformer,
    drop_path_rates,
    vit_base,
    vit_giant2,
    vit_large,
    vit_small,
    vit_tiny,
)

SMALL = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2, "init_values": 0.5}


def small(**options: object) -> DinoVisionTransformer:
    torch.manual_seed(0)
    model = DinoVisionTransformer(**SMALL | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_list_forward_equals_separate_forwards() -> None:
    model = small(num_register_tokens=2).double()
    images = [torch.randn(b, 3, h, w, dtype=torch.float64) for b, h, w in ((2, 28, 28), (3, 14, 21), (1, 35, 7))]
    masks = [torch.rand(2, 16) < 0.5, None, torch.rand(1, 5) < 0.5]
    outputs = model(images, masks, is_training=True)
    for x, mask, output in zip(images, masks, outputs, strict=True):
        expected = model(x, mask, is_training=True)
        assert output.keys() == expected.keys()
        assert output["masks"] is mask
        for key in output.keys() - {"masks"}:
            torch.testing.assert_close(output[key], expected[key])
    for cls, output in zip(model(images, masks), outputs, strict=True):
        assert torch.equal(cls, output["x_norm_clstoken"])


def test_per_token_layers_run_once_over_all_sizes() -> None:
    model = small()
    calls: list[tuple[int, ...]] = []
    for module in (model.blocks[0].attn.qkv, model.blocks[0].mlp, model.norm):
        module.register_forward_hook(lambda _, args, __: calls.append(tuple(args[0].shape)))
    model([torch.randn(2, 3, 28, 28), torch.randn(4, 3, 14, 14)])
    assert calls == [(2 * 17 + 4 * 5, 16)] * 3


def test_masked_patches_do_not_reach_the_output() -> None:
    model = small()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 5] = True  # row 1, column 1 of the 4 x 4 grid
    images = torch.randn(2, 3, 28, 28)
    changed = images.clone()
    changed[:, :, 7:14, 7:14] = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(model(images, mask), model(changed, mask))
    assert not torch.allclose(model(images), model(changed))


def test_images_do_not_influence_each_other() -> None:
    model = small(num_register_tokens=1)
    images = torch.randn(3, 3, 28, 14)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]), atol=1e-5, rtol=1e-5)


def test_non_square_image_size_and_tuple_patch_size() -> None:
    model = small(img_size=(24, 30), patch_size=(4, 6))
    assert model.patch_size == (4, 6)
    assert model.pos_embed.shape == (1, 1 + 6 * 5, 16)
    assert model.interpolate_pos_encoding((6, 5)) is model.pos_embed
    assert model.interpolate_pos_encoding((5, 6)) is not model.pos_embed
    (maps,) = model.get_intermediate_layers(torch.randn(2, 3, 12, 18), reshape=True)
    assert maps.shape == (2, 16, 3, 3)


def test_unfit_sizes_and_masks_are_explained() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"30 x 28 pixels.*7 x 7"):
        model(torch.zeros(1, 3, 30, 28))
    with pytest.raises(ValueError, match="30 x 30 pixels"):
        small(img_size=30)
    with pytest.raises(ValueError, match=r"\[2, 16\]; got \[2, 9\]"):
        model(torch.zeros(2, 3, 28, 28), torch.zeros(2, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 batches of images need as many masks"):
        model([torch.zeros(2, 3, 28, 28)] * 2, [None])
    with pytest.raises(ValueError, match=r"drop_path_rate must be in \[0, 1\), got 1.0"):
        small(drop_path_rate=1.0)
    with pytest.raises(ValueError, match=r"interpolate_offset must be in \[0, 1\), got 1"):
        small(interpolate_offset=1)


def test_intermediate_layers_in_the_order_asked_for() -> None:
    model = small(num_register_tokens=2)
    x = torch.randn(2, 3, 14, 21)
    last, first = model.get_intermediate_layers(x, n=[2, 0], return_class_token=True)
    output = model(x, is_training=True)
    assert torch.equal(last[0], output["x_norm_patchtokens"])
    assert torch.equal(last[1], output["x_norm_clstoken"])
    (only_first,) = model.get_intermediate_layers(x, n=[0])
    assert torch.equal(first[0], only_first)
    (maps,) = model.get_intermediate_layers(x, n=1, reshape=True)
    assert torch.equal(maps[:, :, 1, 2], last[0][:, 1 * 3 + 2])


def test_blocks_that_do_not_exist_are_an_error_and_those_after_the_last_one_do_not_run() -> None:
    model = small()
    for n in (4, 0, [3], [-1], []):
        with pytest.raises(ValueError, match="blocks 0 to 2"):
            model.get_intermediate_layers(torch.zeros(1, 3, 14, 14), n=n)
    model.blocks[1].register_forward_hook(lambda *_: pytest.fail("block 1 ran"))
    model.get_intermediate_layers(torch.zeros(1, 3, 14, 14), n=[0])


def test_other_precisions_are_close_to_float32() -> None:
    model = small()
    images = [torch.randn(2, 3, 28, 28), torch.randn(3, 3, 14, 21)]  # the second needs another position embedding
    for dtype in (torch.bfloat16, torch.float64):
        outputs = copy.deepcopy(model).to(dtype)([x.to(dtype) for x in images])
        for output, expected in zip(outputs, model(images), strict=True):
            assert output.dtype == dtype
            assert torch.nn.functional.cosine_similarity(output.float(), expected).min() > 0.99


def test_autocast_forward_in_training_with_stochastic_depth() -> None:
    model = small(drop_path_rate=0.4, drop_path_uniform=True).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model([torch.randn(4, 3, 28, 28), torch.randn(6, 3, 14, 14)])
        single = model(torch.randn(4, 3, 28, 28))
    assert all(output.isfinite().all() for output in [*outputs, single])


def test_materialises_from_the_meta_device_like_a_fresh_model() -> None:
    with torch.device("meta"):
        model = DinoVisionTransformer(**SMALL, num_register_tokens=2)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    fresh = DinoVisionTransformer(**SMALL, num_register_tokens=2)
    for (name, parameter), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert parameter.isfinite().all(), name
        # Drawn values have the same spread; constants are the same.
        assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.7, abs=1e-9), name


@pytest.mark.parametrize(
    ("make", "width", "depth", "heads", "millions"),
    [
        (vit_tiny, 192, 12, 3, 5.7),
        (vit_small, 384, 12, 6, 22),
        (vit_base, 768, 12, 12, 86),
        (vit_large, 1024, 24, 16, 304),
        (vit_giant2, 1536, 40, 24, 1136),
    ],
)
def test_sizes_of_the_family(make: type, width: int, depth: int, heads: int, millions: float) -> None:
    options = {"ffn_layer": "swiglufused"} if make is vit_giant2 else {}
    with torch.device("meta"):
        model = make(14, 4, img_size=518, init_values=1.0, **options)
    assert (model.embed_dim, model.n_blocks, model.num_heads, len(model.blocks)) == (width, depth, heads, depth)
    assert model.num_register_tokens == 4
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


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
def test_outputs(name: str, dtype: torch.dtype, reference) -> None:
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
def test_gradients(name: str, reference) -> None:
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


@pytest.mark.parametrize(("kind", "number"), [("list", 0), ("list", 1), ("list", 2), ("single", 0), ("single", 1)])
def test_stochastic_depth(kind: str, number: int, reference, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert parameter.grad.norm().item() == pytest.approx(run["grad_norms"][key], rel=1e-5)


def test_drop_path_rates(reference) -> None:
    assert (drop_path_rates(0.3, 1, uniform=False), drop_path_rates(0.3, 1, uniform=True)) == ([0.0], [0.3])
    for row in reference("schedule_fixture.json")["drop_path_per_block"]:
        assert drop_path_rates(row["rate"], row["depth"], uniform=row["uniform"]) == pytest.approx(
            row["rates"], rel=1e-12
        )


def test_initial_statistics(reference) -> None:
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


timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "num_registers"), [("vit_small_patch14_dinov2", 0), ("vit_small_patch14_reg4_dinov2", 4)]
)
def test_features_equal_those_of_timm(name: str, num_registers: int) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    torch.manual_seed(0)
    ours = vit_small(14, num_registers, img_size=70, init_values=1.0).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.05)
    theirs = timm.create_model(name, pretrained=False, img_size=70).eval()
    theirs.load_state_dict(checkpoint_filter_fn(dict(ours.state_dict()), theirs), strict=True)

    images = torch.randn(2, 3, 70, 70)
    with torch.inference_mode():
        output = ours(images, is_training=True)
        expected = theirs.forward_features(images)
    tokens = torch.cat(
        [output["x_norm_clstoken"].unsqueeze(1), output["x_norm_regtokens"], output["x_norm_patchtokens"]], 1
    )
    torch.testing.assert_close(tokens, expected, atol=2e-5, rtol=1e-4)
