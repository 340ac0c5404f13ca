"""A pruned backbone in a folder loads by the ordinary doors, and a short training goes on from it."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_stand_ins import SIZE, draw_parts, tiny_vit
from torch import Tensor, nn

import dinov2
from dinov2.config import Config, load_config, render_config
from dinov2.data.loaders import make_dataset
from dinov2.deploy import prune
from dinov2.deploy.libraries import export_backbone
from dinov2.deploy.prune import PruneSettings, prune_model
from dinov2.eval.command import build_frozen_backbone
from dinov2.models import build
from dinov2.models.build import build_backbone
from dinov2.models.description import config_of_weights
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.distillation import load_frozen_teacher
from dinov2.train.setup import load_pretrained_student
from dinov2.train.ssl_meta_arch import SSLMetaArch, make_network

PAIRS = (
    *("student.arch=vit_tiny", "student.patch_size=8", "student.layerscale=1.0", "crops.global_crops_size=32"),
    *(f"dino.{name}" for name in ("head_n_prototypes=16", "head_hidden_dim=16", "head_bottleneck_dim=8")),
    *(f"evaluation.image_size={SIZE}", "evaluation.whole_image=true", "crops.local_crops_size=16"),
)


def narrow_vit(**options: Any) -> DinoVisionTransformer:
    return tiny_vit(**{"num_heads": 3, "head_dim": 8} | options)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_parts(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A teacher's file as a run writes it."""
    monkeypatch.setattr(build, "ARCHITECTURES", {"vit_tiny": narrow_vit})
    torch.manual_seed(0)
    config = load_config(None, PAIRS)
    network = make_network(config, build_backbone(config.student, img_size=32))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": network.state_dict(), "config": render_config(config), "light": "standardized"}, path)
    return path


def heads_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("dino_head.")}


@pytest.mark.parametrize(("by", "part", "size"), [
    ("activation", "heads mlp", (4, 2, 56)),
    ("magnitude", "depth", (2, 3, 96)),
])  # fmt: skip
def test_what_is_written_loads_as_any_backbone_does(
    by: str, part: str, size: tuple[int, int, int], teacher: Path, parts: Path, tmp_path: Path
) -> None:
    output, on = tmp_path / "new" / "pruned", f"GroupedJSON:split=TRAIN:root={parts}"
    settings = PruneSettings(flops=0.7, parts=part.split(), by=by, images=9)
    report = prune_model(str(teacher), output, settings, on=on, device="cpu")
    assert report == json.loads((output / "pruning.json").read_text())
    assert 0.4 < report["flops"]["fraction"] <= 0.7
    assert tuple(report["size"]["after"].values()) == size
    assert len(report["blocks_kept"]) == len(report["heads_kept"]) == size[0]

    written = output / "teacher_checkpoint.pth"
    model = dinov2.load(written)
    assert (model.backbone.n_blocks, model.backbone.num_heads, model.light) == (*size[:2], "standardized")
    assert (model.image_size, model.whole_image) == ((SIZE, SIZE), True)
    image = make_dataset(dataset_str=on).get_image(0)
    embedded = model.embed(image)
    assert np.abs(embedded - dinov2.load(teacher).embed(image)).max() > 1e-3
    for config in (config_of_weights(written), load_config(output / "config.yaml")):
        again = build_frozen_backbone(config, str(written), "cpu")
        assert all(
            torch.equal(again.state_dict()[name], tensor) for name, tensor in model.backbone.state_dict().items()
        )
    with pytest.raises(FileExistsError, match=r"holds teacher_checkpoint\.pth already"):
        prune_model(str(teacher), output, settings, on=on)
    if part != "depth":
        with pytest.raises(ValueError, match="timm has no network whose 2 heads are 16 wide"):
            export_backbone(model, "timm", tmp_path / "timm")
    smaller = prune_model(str(written), tmp_path / "twice", PruneSettings(flops=0.8, parts=["mlp"], by="magnitude"))
    assert smaller["flops"]["before"] == report["flops"]["after"]


def test_a_run_goes_on_from_it_with_its_heads_and_the_whole_network_as_teacher(teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "pruned"
    prune_model(str(teacher), output, PruneSettings(by="magnitude"))
    config = load_config(output / "config.yaml")
    assert config.train.output_dir == str(output / "recovered")
    torch.manual_seed(1)
    model = SSLMetaArch(config)
    assert load_pretrained_student(config, model, log=False)
    whole = torch.load(teacher, weights_only=True)["teacher"]
    mine = heads_of(model.student.state_dict())
    assert mine.keys() == heads_of(whole).keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in mine.items())
    frozen = load_frozen_teacher(config, log=False)
    assert frozen is not None
    assert all(torch.equal(tensor, whole[name]) for name, tensor in frozen.state_dict().items())

    other = load_config(output / "config.yaml", ["dino.head_n_prototypes=32"])
    with pytest.raises(ValueError, match=r"its dino_head is not as its options say; give dino and ibot the head_"):
        load_pretrained_student(other, SSLMetaArch(other), log=False)
    bare = {name.removeprefix("backbone."): tensor for name, tensor in whole.items() if name.startswith("backbone.")}
    torch.save(bare, tmp_path / "bare.pth")
    pairs = [*PAIRS, f"student.pretrained_weights={tmp_path / 'bare.pth'}", "student.pretrained_heads=true"]
    config = load_config(None, pairs)
    with pytest.raises(ValueError, match=r"holds no dino_head, and student\.pretrained_heads=true asks for it"):
        load_pretrained_student(config, SSLMetaArch(config), log=False)
    (tmp_path / "described.yaml").write_text(render_config(load_config(None, PAIRS)))
    torch.save({"teacher": whole}, tmp_path / "silent.pth")  # says nothing of itself
    named = tmp_path / "described.yaml"
    prune_model(str(tmp_path / "silent.pth"), tmp_path / "named", PruneSettings(by="magnitude"), config=named)
    assert load_config(tmp_path / "named" / "config.yaml").distillation.teacher_config == str(named)
    report = prune_model(str(tmp_path / "bare.pth"), tmp_path / "bare", PruneSettings(by="magnitude"))
    assert report["flops"]["fraction"] <= 0.7
    going_on = load_config(tmp_path / "bare" / "config.yaml")
    assert (going_on.student.pretrained_heads, going_on.distillation.teacher_weights) == (False, "")
    assert Config().student.pretrained_heads is False


def test_the_command_says_what_is_wrong_and_what_was_written(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = [str(teacher), "--output-dir", str(tmp_path / "pruned"), "--device", "cpu"]
    with pytest.raises(ValueError, match="--on is needed"):
        prune.main(words)
    with pytest.raises(ValueError, match="--on is needed"):
        prune.main([*words, "--by", "magnitude", "--parts", "depth"])
    with pytest.raises(ValueError, match=r"'size' is unknown; allowed: magnitude, activation"):
        prune_model(str(teacher), tmp_path, PruneSettings(by="size"))
    with pytest.raises(ValueError, match="--images must be at least 1, found 0"):
        prune_model(str(teacher), tmp_path, PruneSettings(images=0), on="X:root=/none")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("of a run")
    with pytest.raises(FileExistsError, match=r"holds config\.yaml already"):
        prune_model(str(teacher), run, PruneSettings(by="magnitude"))
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    with caplog.at_level(logging.WARNING):
        assert prune.main([*words, "--by", "magnitude", "--on", "X:root=/none", "--images", "5"]) == 0
    said, errors = capsys.readouterr()
    assert "scored by their weights: --on and --images" in errors + caplog.text
    assert "4 blocks of 3 heads and 96 hidden units became 4 blocks of 2 heads and 56 hidden units" in said
    assert f"--config {tmp_path / 'pruned' / 'config.yaml'}" in said
