"""Every file of a checkpoint, cut at many places and with single bits flipped: found, named, and never loaded."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_stand_ins import assert_equal, build, is_equal, states
from torch import nn

from dinov2.checkpoint.integrity import DamagedCheckpointError, check_run
from dinov2.checkpoint.merge import extract_teacher
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.evaluation import save_teacher

CUTS, FLIPS = 20, 100
KINDS = ("model_0000007.rank_0.pth", "model_0000007.rank_0.pth.sha256")


def damaged(content: bytes) -> Iterator[bytes]:
    """The content cut at 20 places, and with one of 100 random bits flipped."""
    for cut in range(CUTS):
        yield content[: len(content) * cut // CUTS]
    chance = random.Random(0)
    for position in chance.sample(range(8 * len(content)), min(FLIPS, 8 * len(content))):
        byte = content[position // 8] ^ (1 << position % 8)
        yield content[: position // 8] + bytes([byte]) + content[position // 8 + 1 :]


def two_steps(folder: Path) -> list[list[torch.Tensor]]:
    """Saves steps 3 and 7 with different values, and returns these."""
    found = []
    for seed, step in enumerate((3, 7)):
        checkpointer = build(folder, seed=seed)
        checkpointer.save(f"model_{step:07d}", iteration=step)
        found.append(states(checkpointer))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_the_older_step_is_loaded_instead(tmp_path: Path, name: str) -> None:
    older, _ = two_steps(tmp_path)
    whole = (tmp_path / name).read_bytes()
    loader = build(tmp_path, seed=5)
    tried = 0
    for content in damaged(whole):
        (tmp_path / name).write_bytes(content)
        assert loader.resume_or_load("")["iteration"] == 3
        assert_equal(states(loader), older)
        tried += 1
    assert tried == CUTS + min(FLIPS, 8 * len(whole))
    (tmp_path / name).write_bytes(whole)
    assert loader.resume_or_load("")["iteration"] == 7


@pytest.mark.parametrize("name", KINDS)
def test_with_no_other_step_it_is_an_error_and_nothing_is_loaded(tmp_path: Path, name: str) -> None:
    build(tmp_path).save("model_0000007", iteration=7)
    loader = build(tmp_path, seed=5)
    before = states(loader)
    for content in damaged((tmp_path / name).read_bytes()):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DamagedCheckpointError, match=r"no checkpoint .*\n  model_0000007: model_0000007\.rank_0"):
            loader.resume_or_load("")
        with pytest.raises(ValueError, match="model_0000007"):
            loader.resume_or_load(str(tmp_path / "model_0000007.rank_0.pth"))
        assert not check_run(tmp_path).good
    assert_equal(states(loader), before)


def test_the_name_of_the_newest_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever its file says, one of the two good steps is loaded whole; the older one never without a word."""
    older, newer = two_steps(tmp_path)
    tag = tmp_path / "last_checkpoint.rank_0"
    loader = build(tmp_path, seed=5)
    for content in damaged(tag.read_bytes()):
        tag.write_bytes(content)
        caplog.clear()
        step = loader.resume_or_load("")["iteration"]
        assert is_equal(states(loader), older if step == 3 else newer)
        assert step == 7 or "WARNING" in {record.levelname for record in caplog.records}, content


def small_vit(seed: int) -> DinoVisionTransformer:
    torch.manual_seed(seed)
    return DinoVisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1)


TEACHER = "teacher_checkpoint.pth"


@pytest.mark.parametrize("name", [TEACHER, f"{TEACHER}.sha256"])
def test_a_teachers_file(tmp_path: Path, name: str) -> None:
    """By whatever reads it: as weights, as the source of a backbone alone, and when a run is checked."""
    folder = tmp_path / "eval" / "training_7"
    method = nn.ModuleDict({"teacher": nn.ModuleDict({"backbone": small_vit(0)})})
    path = save_teacher(method, folder)  # type: ignore[arg-type]
    backbone = small_vit(1)
    load_pretrained_backbone(backbone, path, log=False)
    assert check_run(tmp_path).teachers[0].state == "good"
    before, whole, tried = states_of(backbone), (folder / name).read_bytes(), 0
    for damage in damaged(whole):
        (folder / name).write_bytes(damage)
        with pytest.raises(ValueError, match=r"teacher_checkpoint\.pth (is|has a) damaged"):
            load_pretrained_backbone(backbone, path, log=False)
        with pytest.raises(DamagedCheckpointError, match=r"teacher_checkpoint\.pth"):
            extract_teacher(path, tmp_path / "backbone.pth")
        assert check_run(tmp_path).teachers[0].state == "damaged"
        tried += 1
    assert tried == CUTS + FLIPS
    assert_equal(states_of(backbone), before)
    assert not (tmp_path / "backbone.pth").exists()


def states_of(network: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in network.state_dict().values()]


def test_files_from_before_checksums_are_checked_by_the_sums_of_their_format(tmp_path: Path) -> None:
    """They hold no sum of everything, so that a flip may go unnoticed; but never one in the values."""
    checkpointer = build(tmp_path)
    checkpointer.save("model_0000007", iteration=7)
    path = tmp_path / "model_0000007.rank_0.pth"
    content = torch.load(path, weights_only=True)
    torch.save(content | {"format_version": 1}, path)
    (tmp_path / f"{path.name}.sha256").unlink()
    expected, whole = states(checkpointer), path.read_bytes()
    loader = build(tmp_path, seed=5)
    found = 0
    for damage in damaged(whole):
        path.write_bytes(damage)
        try:
            loader.resume_or_load("")
        except ValueError:
            found += 1
        else:
            assert is_equal(states(loader), expected)
    assert found >= CUTS
