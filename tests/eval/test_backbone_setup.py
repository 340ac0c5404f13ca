from pathlib import Path

import pytest
import torch

from dinov2.config import load_config
from dinov2.eval.command import build_frozen_backbone

CONFIG = load_config(
    None,
    [
        "student.arch=vit_tiny",
        "student.patch_size=14",
        "student.num_register_tokens=2",
        "crops.global_crops_size=28",
        "crops.local_crops_size=14",
    ],
)


def test_saved_weights_come_back_frozen(tmp_path: Path) -> None:
    source = build_frozen_backbone(CONFIG, "", "cpu", seed=3)
    torch.save(
        {"teacher": {f"backbone.{name}": value for name, value in source.state_dict().items()}}, tmp_path / "t.pth"
    )
    loaded = build_frozen_backbone(CONFIG, str(tmp_path / "t.pth"), "cpu")
    images = torch.rand(2, 3, 28, 28)
    assert torch.equal(loaded(images), source(images))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_random_weights_follow_the_seed_and_leave_the_generator_alone(caplog: pytest.LogCaptureFixture) -> None:
    before = torch.get_rng_state()
    first, again, other = (build_frozen_backbone(CONFIG, "", "cpu", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.blocks[0].attn.qkv.weight, again.blocks[0].attn.qkv.weight)
    assert not torch.equal(first.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    assert "the backbone is random" in caplog.text


def test_weights_that_leave_a_part_random(tmp_path: Path) -> None:
    weights = build_frozen_backbone(CONFIG, "", "cpu").state_dict()
    del weights["mask_token"]
    torch.save(weights, tmp_path / "no_mask.pth")
    build_frozen_backbone(CONFIG, str(tmp_path / "no_mask.pth"), "cpu")
    del weights["register_tokens"]
    torch.save(weights, tmp_path / "no_registers.pth")
    with pytest.raises(ValueError, match=r"no_registers.pth lacks 1 parameters .*: register_tokens$"):
        build_frozen_backbone(CONFIG, str(tmp_path / "no_registers.pth"), "cpu")


def test_weights_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build_frozen_backbone(CONFIG, str(tmp_path / "nowhere.pth"), "cpu")
