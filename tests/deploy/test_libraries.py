"""An exported backbone computes the same in the real library, by the loaders that its users call."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel

import dinov2
from dinov2.config import load_config, render_config
from dinov2.data.value_range import ValueRange
from dinov2.deploy import export
from dinov2.deploy.libraries import LIBRARIES, WEIGHTS_NAME, export_backbone
from dinov2.eval.features import make_eval_transform
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.predict.model import Model

IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"num_register_tokens": 3},
    "gated": {"ffn_layer": "swiglufused"},
    "gated with registers": {"ffn_layer": "swiglufused", "num_register_tokens": 4},
    "other hidden layers": {"ffn_hidden_dim": 96},
    "gated, both halves four times the width": {"ffn_layer": "swiglufused", "ffn_hidden_dim": 144},
    "no layer scale, no biases": {"init_values": None, "qkv_bias": False, "proj_bias": False, "ffn_bias": False},
}


def make(**options: Any) -> Model:
    shape: dict[str, Any] = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
    backbone = DinoVisionTransformer(**shape | {"init_values": 0.5} | options)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Model(backbone.eval().requires_grad_(False), (28, 28))


def tokens(backbone: DinoVisionTransformer, images: Tensor = IMAGES) -> Tensor:
    found = backbone.forward_features(images)
    parts = [found["x_norm_clstoken"][:, None], found["x_norm_regtokens"], found["x_norm_patchtokens"]]
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_timm_computes_the_same(kind: str, tmp_path: Path) -> None:
    model = make(**KINDS[kind])
    exported = export_backbone(model, "timm", tmp_path / "new" / "timm")
    assert exported.usage.format(folder="F") == "timm.create_model('local-dir:F', pretrained=True)"
    theirs = timm.create_model(f"local-dir:{tmp_path / 'new' / 'timm'}", pretrained=True).eval()
    torch.testing.assert_close(theirs.forward_features(IMAGES), tokens(model.backbone), rtol=1e-5, atol=1e-5)
    config = exported.files["config.json"]
    other = timm.create_model(
        config["architecture"], checkpoint_path=tmp_path / "new" / "timm" / WEIGHTS_NAME, **config["model_args"]
    )
    torch.testing.assert_close(other.eval()(IMAGES), model.backbone(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_hugging_face_computes_the_same_and_what_is_written_comes_back(kind: str, tmp_path: Path) -> None:
    model = make(**KINDS[kind])
    export_backbone(model, "huggingface", tmp_path)
    theirs, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = tokens(model.backbone)
    torch.testing.assert_close(theirs.eval()(IMAGES).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    back = make(**{name: value for name, value in KINDS[kind].items() if "bias" not in name} | {"init_values": 1.0})
    load_pretrained_backbone(back.backbone, tmp_path)
    torch.testing.assert_close(tokens(back.backbone), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("whole_image", [False, True])
def test_images_are_prepared_alike(whole_image: bool, tmp_path: Path) -> None:
    model = Model(make().backbone, (28, 28), whole_image)
    ramp = np.add.outer(np.arange(80), np.arange(100)).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1))
    expected = make_eval_transform(28, whole_image=whole_image)(image)
    export_backbone(model, "huggingface", tmp_path / "hf")
    export_backbone(model, "timm", tmp_path / "timm")
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "hf")(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(theirs, expected, rtol=0, atol=0.06)
    network = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    transform = create_transform(**resolve_data_config({}, model=network), is_training=False)
    torch.testing.assert_close(transform(image), expected, rtol=0, atol=0.06)


@pytest.mark.parametrize("to", LIBRARIES)
@torch.no_grad()
def test_another_image_size_is_resized_for_as_here(to: str, tmp_path: Path) -> None:
    model = make(num_register_tokens=4)
    exported = export_backbone(model, to, tmp_path, image_size=42)
    assert (exported.image_size, model.backbone.grid_size) == ((42, 42), (4, 4))
    images = torch.randn(1, 3, 42, 42)
    if to == "timm":
        found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval().forward_features(images)
    else:
        found = AutoModel.from_pretrained(tmp_path).eval()(images).last_hidden_state
    torch.testing.assert_close(found, tokens(model.backbone, images), rtol=1e-5, atol=1e-5)


def test_the_command_writes_a_teacher_and_refuses_to_write_over_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"student": {"arch": "vit_tiny", "patch_size": 16, "layerscale": 1.0}, "crops": {}}
    config = load_config(options | {"crops": {"global_crops_size": 32, "local_crops_size": 16}})
    source = DinoVisionTransformer(img_size=32, embed_dim=192, num_heads=3, init_values=1.0)
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": source.state_dict(), "config": render_config(config)}, path)
    words = [str(path), "--to", "timm", "--output", str(tmp_path / "out")]
    assert export.main(words) == 0
    printed = capsys.readouterr().out
    assert "for images of 32 x 32 pixels. Load it with" in printed
    theirs = timm.create_model(printed.split("create_model('")[1].split("'")[0], pretrained=True).eval()
    with torch.no_grad():
        images = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(theirs(images), source.eval()(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(FileExistsError, match=r"out holds model\.safetensors already"):
        export.main(words)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file; name a folder"):
        export.main([*words[:-1], str(tmp_path / "file")])
    assert dinov2.load(tmp_path / "out").backbone.embed_dim == 192


def test_preparation_that_the_folder_does_not_hold_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = replace(make(), value_range=ValueRange(0.0, 4095.0))
    export_backbone(model, "timm", tmp_path / "out")
    assert "was trained on images of more than 8 bits" in caplog.text


def test_what_a_library_has_no_network_for_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"square patches and a square position embedding.*\(4, 2\): use --to timm"):
        export_backbone(make(img_size=(28, 14)), "huggingface", tmp_path / "out")
    with pytest.raises(ValueError, match="to='onnx' is unknown; allowed: timm, huggingface"):
        export_backbone(make(), "onnx", tmp_path / "out")
    model = make(ffn_hidden_dim=100)
    with pytest.raises(ValueError, match=r"4 units are left over: prune depth alone, or use --to timm"):
        export_backbone(model, "huggingface", tmp_path / "out")
    assert export_backbone(model, "timm", tmp_path / "timm").files["config.json"]["model_args"]["mlp_ratio"] > 100 / 48
    for library in LIBRARIES:
        with pytest.raises(ValueError, match=r"no network whose 2 heads are 32 wide together beside tokens of 48"):
            export_backbone(make(num_heads=2, head_dim=16), library, tmp_path / "out")
    with pytest.raises(ValueError, match=r"30"):
        export_backbone(make(), "timm", tmp_path / "out", image_size=30)
    assert not (tmp_path / "out").exists()
