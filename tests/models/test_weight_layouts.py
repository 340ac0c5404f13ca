"""Networks of timm, Hugging Face, Lightning and LightlyTrain give the same features here; their options are told."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from dinov2.config import load_config
from dinov2.models.description import config_of_weights
from dinov2.models.layouts import extract_backbone
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.models.released import RELEASED_BACKBONES
from dinov2.models.vision_transformer import DinoVisionTransformer

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
HUGGING_FACE: dict[str, Any] = SHAPE | {"image_size": 28, "patch_size": 7}


def draw(model: Any) -> Any:
    """Values that show every exchanged or forgotten parameter."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def ours(**options: Any) -> DinoVisionTransformer:
    shape: dict[str, Any] = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return draw(DinoVisionTransformer(**shape | {"init_values": 0.5} | options))


@torch.no_grad()
def tokens(model: DinoVisionTransformer, images: Tensor) -> Tensor:
    found = model.forward_features(images)
    parts = [found["x_norm_clstoken"][:, None], found["x_norm_regtokens"], found["x_norm_patchtokens"]]
    return torch.cat(parts, dim=1)


IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["folder", "sharded", "bin", "sharded bin"])
@pytest.mark.parametrize("kind", ["dinov2", "registers", "swiglu"])
def test_networks_of_hugging_face(kind: str, form: str, tmp_path: Path) -> None:
    source = {
        "dinov2": lambda: Dinov2Model(Dinov2Config(**HUGGING_FACE)),
        "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**HUGGING_FACE, num_register_tokens=3)),
        "swiglu": lambda: Dinov2Model(Dinov2Config(**HUGGING_FACE, use_swiglu_ffn=True)),
    }[kind]()
    path = tmp_path
    if form in ("folder", "sharded"):
        draw(source).save_pretrained(tmp_path, max_shard_size="20KB" if form == "sharded" else "1GB")
        path = tmp_path / "model.safetensors.index.json" if form == "sharded" else tmp_path
    else:
        state = draw(source).state_dict()
        path = tmp_path / "pytorch_model.bin"
        torch.save(state, path)
        if form == "sharded bin":
            path.unlink()
            names = list(state)
            halves = {"a.bin": names[::2], "b.bin": names[1::2]}
            for file, part in halves.items():
                torch.save({name: state[name] for name in part}, tmp_path / file)
            index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
            path = tmp_path
    model = ours(num_register_tokens=3 if kind == "registers" else 0, ffn_layer="swiglu" if kind == "swiglu" else "mlp")
    report = load_pretrained_backbone(model, str(path))
    with torch.no_grad():
        expected = source(IMAGES).last_hidden_state
    torch.testing.assert_close(tokens(model, IMAGES), expected, rtol=1e-4, atol=1e-5)
    assert not report.missing
    assert not report.ignored
    if form == "sharded":
        next(tmp_path.glob("model-00001-*")).unlink()
        with pytest.raises(FileNotFoundError, match=r"names model-00001-\S+\.safetensors, which is not beside it"):
            load_pretrained_backbone(model, path)


def test_a_classifier_of_hugging_face(tmp_path: Path) -> None:
    source = draw(Dinov2ForImageClassification(Dinov2Config(**HUGGING_FACE, num_labels=3)))
    source.save_pretrained(tmp_path)
    model = ours()
    assert load_pretrained_backbone(model, tmp_path).ignored == ("classifier.bias", "classifier.weight")
    with torch.no_grad():
        expected = source.dinov2(IMAGES).last_hidden_state
    torch.testing.assert_close(tokens(model, IMAGES), expected, rtol=1e-4, atol=1e-5)


def test_a_network_of_hugging_face_without_layer_scale(tmp_path: Path) -> None:
    source = draw(ViTModel(ViTConfig(**HUGGING_FACE, intermediate_size=128, layer_norm_eps=1e-12)))
    source.save_pretrained(tmp_path)
    model = ours()
    load_pretrained_backbone(model, tmp_path)
    with torch.no_grad():
        expected = source(IMAGES).last_hidden_state
    torch.testing.assert_close(tokens(model, IMAGES), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 4), ("layer_norm_eps", 1e-3), ("hidden_act", "relu"), ("model_type", "dinov3_vit")],
)
def test_what_only_the_config_of_hugging_face_tells_is_compared(key: str, value: Any, tmp_path: Path) -> None:
    draw(Dinov2Model(Dinov2Config(**HUGGING_FACE))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=rf"config\.json: {key}={value}"):
        load_pretrained_backbone(ours(), tmp_path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {"num_register_tokens": 4}),
        ("vit_giant_patch14_dinov2", {"ffn_layer": "swiglufused"}),
        ("vit_giant_patch14_reg4_dinov2", {"ffn_layer": "swiglufused", "num_register_tokens": 4}),
        ("vit_tiny_patch16_224", {"init_values": None}),
    ],
)
@pytest.mark.parametrize("size", [(28, 28), (14, 21)])
def test_networks_of_timm(name: str, options: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
    shape = {"img_size": size, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 2}
    source = draw(timm.create_model(name, **shape))
    torch.save({"state_dict": source.state_dict()}, tmp_path / "timm.pth")
    model = ours(img_size=size, embed_dim=48, **options)
    report = load_pretrained_backbone(model, tmp_path / "timm.pth")
    images = IMAGES[:, :, : size[0], : size[1]]
    with torch.no_grad():
        expected = source.forward_features(images)
    torch.testing.assert_close(tokens(model, images), expected, rtol=1e-4, atol=1e-5)
    assert set(report.missing) == {"mask_token"}


def test_a_timm_network_with_registers_is_resized(tmp_path: Path) -> None:
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    source = draw(timm.create_model("vit_small_patch14_reg4_dinov2", **shape))
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    model, same = (ours(img_size=size, num_register_tokens=4, interpolate_offset=0.0) for size in (14, 28))
    report = load_pretrained_backbone(model, tmp_path / "timm.pth")
    load_pretrained_backbone(same, tmp_path / "timm.pth")
    images = IMAGES[:, :, :14, :14]
    torch.testing.assert_close(tokens(model, images), tokens(same, images))
    assert report.resized == {"pos_embed": ((1, 16, 32), (1, 5, 32))}


def test_a_square_number_of_positions_is_not_taken_for_a_square_of_patches(tmp_path: Path) -> None:
    torch.save(ours(img_size=(14, 28)).state_dict(), tmp_path / "w.pth")  # 2 x 4 patches and the class token
    with pytest.raises(ValueError, match=r"8 patches, which is not a grid of 2 x 2; pass"):
        load_pretrained_backbone(ours(img_size=21), tmp_path / "w.pth")


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def test_wrappers_of_training_programs(tmp_path: Path) -> None:
    source, other = ours(), ours()
    state, others = source.state_dict(), other.state_dict()
    path = tmp_path / "weights.ckpt"
    for content in (
        {"state_dict": prefixed("model.backbone.", state), "optimizer_states": [{"state": {0: {"exp_avg": state}}}]},
        {"state_dict": prefixed("model.backbone.", state), "optimizer": prefixed("model.backbone.", others)},
        {
            "state_dict": prefixed("student_embedding_model.wrapped_model._model.", others)
            | prefixed("teacher_embedding_model.wrapped_model._model.", state)
        },
        {"state_dict": prefixed("student_backbone.vit.", others) | prefixed("teacher_backbone.vit.", state)},
        {"model": others, "model_ema": state},
        {"net": prefixed("encoder.", state) | {"decoder.blocks.0.norm1.weight": torch.zeros(3)}},
        {"teacher": prefixed("module.backbone.", state), "epoch": 100},
    ):
        torch.save(content, path)
        model = ours()
        load_pretrained_backbone(model, path)
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), content.keys()


def test_a_prefix_chooses_where_the_names_do_not(tmp_path: Path) -> None:
    left, right = ours().state_dict(), ours().state_dict()
    torch.save({"state_dict": prefixed("left.vit.", left) | prefixed("right.vit.", right)}, tmp_path / "two.pth")
    model = ours()
    with pytest.raises(ValueError, match=r"two\.pth: it holds 2 backbones, under 'left\.vit\.' .*:prefix=left\.vit"):
        load_pretrained_backbone(model, tmp_path / "two.pth")
    for prefix, expected in (("left.vit", left), ("right.vit.", right)):
        load_pretrained_backbone(model, f"{tmp_path}/two.pth:prefix={prefix}")
        assert torch.equal(model.state_dict()["norm.weight"], expected["norm.weight"])
    with pytest.raises(ValueError, match=r"no parameter begins with the prefix 'up\.'; there are left\.vit\.cls_token"):
        load_pretrained_backbone(model, f"{tmp_path}/two.pth:prefix=up")


def test_the_namespace_of_a_published_training_is_read_and_runs_nothing(tmp_path: Path) -> None:
    import argparse

    source, model = ours(), ours()
    torch.save({"teacher": source.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "full.pth")
    load_pretrained_backbone(model, tmp_path / "full.pth")
    torch.save({"teacher": source.state_dict(), "args": Path("x")}, tmp_path / "full.pth")
    with pytest.raises(ValueError, match=r"objects other than tensors and plain values \(pathlib\.\w+\).*state_dict"):
        load_pretrained_backbone(model, tmp_path / "full.pth")


@pytest.mark.parametrize("name", [name for name in RELEASED_BACKBONES if "vitg" not in name and "vitl" not in name])
def test_options_are_told_from_parameters(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        from dinov2.hub.backbones import make_backbone

        state = make_backbone(name, pretrained=False).state_dict()
    state = {key: torch.zeros(1).expand(tensor.shape) for key, tensor in state.items()}
    torch.save(state, tmp_path / "w.pth")
    found, expected = config_of_weights(tmp_path / "w.pth"), config_of_weights(name)
    assert found.student == expected.student
    assert (found.crops.global_crops_size, found.evaluation.image_size) == ((518, 518), 224)
    assert extract_backbone(state).prefix == ""


def test_what_is_no_known_architecture_is_said(tmp_path: Path) -> None:
    torch.save(ours().state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"no known architecture \(none of ours: width 32, 2 blocks\)\. Name "):
        config_of_weights(tmp_path / "w.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not say which backbone it holds"):
        config_of_weights(tmp_path / "w.pth")
    assert load_config().student.arch == "vit_large"


def test_what_stands_before_the_names_tells_the_network_too(tmp_path: Path) -> None:
    names = ("patch_embed.proj.weight", *(f"layers.2.blocks.{index}.attn.qkv.weight" for index in range(3)))
    torch.save({name: torch.zeros(3) for name in names}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"hierarchical network, as Swin"):
        config_of_weights(tmp_path / "w.pth")
