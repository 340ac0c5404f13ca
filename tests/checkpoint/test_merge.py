"""Rank files as one file: the same values, readable by everything that reads weights."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoint_stand_ins import in_processes

from dinov2.checkpoint.checkpointer import FSDPCheckpointer
from dinov2.checkpoint.integrity import DamagedCheckpointError
from dinov2.checkpoint.merge import extract_teacher, merge_checkpoint
from dinov2.config import load_config
from dinov2.models.pretrained import load_pretrained_backbone, read_checkpoint
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.evaluation import save_teacher
from dinov2.train.setup import parallelize
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import checksum_fault
from dinov2.utils.seeds import seed_everything

safetensors = pytest.importorskip("safetensors.torch")
CPU = torch.device("cpu")


def vit() -> DinoVisionTransformer:
    return DinoVisionTransformer(
        img_size=32, patch_size=8, embed_dim=36, depth=3, num_heads=2, init_values=0.1, num_register_tokens=1
    )


def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def build_method() -> SSLMetaArch:
    seed_everything(0)
    values: dict[str, Any] = {
        f"{head}.{name}": value
        for head in ("dino", "ibot")
        for name, value in (("head_n_prototypes", 64), ("head_hidden_dim", 48), ("head_bottleneck_dim", 16))
    }
    config = load_config({**values, "ibot.separate_head": True, "crops.global_crops_size": 32})
    model = SSLMetaArch(config, (vit(), vit())).train()
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for buffer in model.buffers():
            buffer.add_(torch.randn_like(buffer))
    parallelize(model, config, CPU)
    return model


def write_run(folder: Path) -> None:
    """A step, the teacher as an evaluation writes it, and the live teacher's features."""
    model = build_method()
    optimizer = torch.optim.AdamW(model.student.parameters())
    FSDPCheckpointer(model, folder, optimizer=optimizer, asynchronous=False).save("model_0000007", iteration=7)
    save_teacher(model, folder / "eval" / "training_7")
    with torch.no_grad():
        features = model.teacher_backbone.eval()(images(), is_training=True)
    if dist.get_rank() == 0:
        torch.save({name: value for name, value in features.items() if value is not None}, folder / "features.pth")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    in_processes(2, folder, write_run)
    return folder


def plain_values() -> dict[str, torch.Tensor]:
    """The networks and losses of the run, never sharded."""
    model = build_method()
    return dict([*model.named_parameters(), *model.named_buffers()])


def assert_same_features(weights: Path, run: Path) -> None:
    backbone = vit()
    report = load_pretrained_backbone(backbone, weights, log=False)
    assert not report.missing + report.unexpected
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        features = backbone.eval()(images(), is_training=True)
    torch.set_num_threads(threads)
    expected = torch.load(run / "features.pth", weights_only=True)
    assert {"x_norm_clstoken", "x_norm_patchtokens"} <= expected.keys()
    for name, value in expected.items():
        assert torch.equal(features[name], value), name


@pytest.mark.slow
def test_the_merged_teacher_is_the_live_teacher_bit_for_bit(run: Path, tmp_path: Path) -> None:
    merged = merge_checkpoint(run, tmp_path / "teacher.pth")
    assert checksum_fault(merged.path) == ""
    ours = torch.load(merged.path, weights_only=True)
    expected = torch.load(run / "eval" / "training_7" / "teacher_checkpoint.pth", weights_only=True)
    assert list(ours) == list(expected) == ["teacher"]
    assert ours["teacher"].keys() == expected["teacher"].keys()
    for name, tensor in expected["teacher"].items():
        assert torch.equal(ours["teacher"][name], tensor), name
    assert_same_features(merged.path, run)
    assert_same_features(run / "eval" / "training_7" / "teacher_checkpoint.pth", run)
    assert (merged.iteration, merged.tensors) == (7, len(expected["teacher"]))
    assert merged.nbytes == sum(tensor.nbytes for tensor in expected["teacher"].values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher.pth", "teacher.pth.sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["teacher", "student", "all"])
def test_safetensors_and_pth_hold_the_same(run: Path, tmp_path: Path, what: str) -> None:
    source = run / "model_0000007.rank_1.pth"
    merge_checkpoint(source, tmp_path / "a.safetensors", what=what)
    merge_checkpoint(source, tmp_path / "a.pth", what=what)
    expected = {name: value for name, value in plain_values().items() if what in ("all", name.partition(".")[0])}
    flat = safetensors.load_file(tmp_path / "a.safetensors")
    nested = torch.load(tmp_path / "a.pth", weights_only=True)
    unnested = {
        name if part == "other" else f"{part}.{name}": tensor
        for part, state in nested.items()
        for name, tensor in state.items()
    }
    assert flat.keys() == unnested.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(flat[name], value), name
        assert torch.equal(unnested[name], value), name
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "what": what, "iteration": "7"}
    if what == "all":
        assert_same_features(tmp_path / "a.pth", run)


@pytest.mark.slow
@pytest.mark.parametrize("source", [".", "model_0000007.rank_{rank}.pth", "eval/training_7/teacher_checkpoint.pth"])
def test_the_backbone_alone(run: Path, tmp_path: Path, source: str) -> None:
    extract_teacher(run / source, tmp_path / "backbone.pth")
    ours = torch.load(tmp_path / "backbone.pth", weights_only=True)
    assert ours.keys() == vit().state_dict().keys()
    assert_same_features(tmp_path / "backbone.pth", run)
    extract_teacher(run / source, tmp_path / "backbone.safetensors")
    assert safetensors.load_file(tmp_path / "backbone.safetensors").keys() == ours.keys()
    assert_same_features(tmp_path / "backbone.safetensors", run)


@pytest.mark.slow
def test_options_of_the_run_come_along(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("train: {seed: 3}")
    merge_checkpoint(tmp_path / "run", tmp_path / "teacher.pth")
    merge_checkpoint(tmp_path / "run", tmp_path / "teacher.safetensors")
    extract_teacher(tmp_path / "run", tmp_path / "run.safetensors")
    extract_teacher(tmp_path / "teacher.pth", tmp_path / "file.safetensors")
    for name in ("teacher.pth", "teacher.safetensors", "run.safetensors", "file.safetensors"):
        assert read_checkpoint(tmp_path / name)["config"] == "train: {seed: 3}"
        assert_same_features(tmp_path / name, run)


@pytest.mark.slow
def test_damage_and_wishes_that_cannot_be_met(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights\.bin: the new file's name must end in \.pth or \.safetensors"):
        merge_checkpoint(run, tmp_path / "weights.bin")
    with pytest.raises(FileNotFoundError, match=r"the folder .*gone of the new file does not exist"):
        merge_checkpoint(run, tmp_path / "gone" / "a.pth")
    with pytest.raises(ValueError, match="what='head' cannot be merged; choose among teacher, student, all"):
        merge_checkpoint(run, tmp_path / "a.pth", what="head")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        merge_checkpoint(tmp_path, tmp_path / "a.pth")
    for path in run.glob("model_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "model_0000007.rank_1.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model_0000007.rank_1.pth").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"model_0000007\.rank_1\.pth is damaged"):
        merge_checkpoint(tmp_path / "model_0000007.rank_0.pth", tmp_path / "a.pth")
    torch.save({"model": 1}, tmp_path / "no_teacher.pth")
    with pytest.raises(ValueError, match="is no teacher's file: it lacks the key teacher"):
        extract_teacher(tmp_path / "no_teacher.pth", tmp_path / "a.pth")
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.slow
def test_the_doors(run: Path, tmp_path: Path, repository: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(repository)}
    for words in (
        ["merge_checkpoint.py", str(run), str(tmp_path / "s.safetensors"), "--what", "student"],
        ["extract_teacher.py", str(run), str(tmp_path / "t.pth")],
    ):
        done = subprocess.run(
            [sys.executable, str(repository / "tools" / words[0]), *words[1:]],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{words[2]}: ")
        assert Path(words[2]).exists()
