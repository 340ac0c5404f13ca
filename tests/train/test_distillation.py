"""A smaller student learns from a larger, frozen teacher, which nothing changes and no checkpoint holds."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from train_stand_ins import NETWORKS, OPTIONS, Train, checkpoint, small_vit

from dinov2.config import Config, load_config, render_config
from dinov2.data.collate import PretrainingBatch
from dinov2.models import build
from dinov2.models.description import fingerprint
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train.distillation import load_frozen_teacher
from dinov2.train.dry_run import estimate_memory
from dinov2.train.ssl_meta_arch import SSLMetaArch, make_network

SHORT = ("optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=2")


def larger_vit(**options: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(embed_dim=40, depth=3, num_heads=4, **options)


@pytest.fixture(autouse=True)
def _sizes(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    # After `train`, which has sizes of its own.
    monkeypatch.setattr(build, "ARCHITECTURES", {"vit_tiny": small_vit, "vit_base": partial(larger_vit)})


def config_of(*pairs: str) -> Config:
    return load_config(None, [*OPTIONS, *pairs])


def make_batch() -> PretrainingBatch:
    generator = torch.Generator().manual_seed(0)
    masks = torch.zeros(4, 16, dtype=torch.bool)
    masks[:2, :6] = True
    indices = masks.flatten().nonzero().flatten()
    return PretrainingBatch(
        global_crops=torch.randn(4, 3, 32, 32, generator=generator),
        local_crops=torch.randn(4, 3, 16, 16, generator=generator),
        masks=masks,
        mask_indices=indices,
        mask_weights=torch.full((len(indices),), 1 / 6),
        num_masked=len(indices),
        upperbound=len(indices),
        names=("a", "b"),
        unreadable=(),
    )


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    """A teacher as a run writes it, of the larger network."""
    torch.manual_seed(1)
    config = config_of("student.arch=vit_base", "student.num_register_tokens=2")
    network = make_network(config, build.build_backbone(config.student, img_size=32))
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": network.state_dict(), "config": render_config(config)}, path)
    return path


def test_targets_come_from_the_frozen_network_and_only_the_student_learns(teacher_file: Path) -> None:
    config = config_of(f"distillation.teacher_weights={teacher_file}")
    torch.manual_seed(0)
    model = SSLMetaArch(config).train()
    parameters = list(model.state_dict())
    frozen = load_frozen_teacher(config, log=True)
    assert frozen is not None
    model.distil_from(frozen)
    before = fingerprint(frozen)
    stored = torch.load(teacher_file, weights_only=True)["teacher"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in frozen.state_dict().items())
    assert list(model.state_dict()) == parameters, "no checkpoint holds it"
    assert not frozen.train().eval().training

    batch = make_batch()
    targets = model.teacher_targets(batch, 0.07)
    assert targets.features.shape == (4, 40)
    logits = frozen["dino_head"](frozen["backbone"](batch.global_crops))
    assert targets.cls is not None
    torch.testing.assert_close(targets.cls.flatten(0, 1), (logits / 0.07).softmax(-1))
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(float(model.forward_backward(batch, teacher_temp=0.07)["dino_global_crops_loss"]))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1, losses
    assert fingerprint(frozen) == before
    assert all(parameter.grad is None for parameter in frozen.parameters())


def test_the_students_own_weights_as_teacher_give_the_targets_of_ordinary_pretraining(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SSLMetaArch(config_of("ibot.separate_head=true")).train()
    batch = make_batch()
    expected = model.teacher_targets(batch, 0.05)
    other = SSLMetaArch(config_of("ibot.separate_head=true")).train()
    other.distil_from(model.teacher)
    found = other.teacher_targets(batch, 0.05)
    for name, value in vars(expected).items():
        assert torch.equal(vars(found)[name], value), name


def test_a_run_distils_resumes_and_notices_another_teacher(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = ("student.arch=vit_base", *(f"{network}.sharding_strategy=NO_SHARD" for network in NETWORKS))
    train(tmp_path / "large", *SHORT, *large)
    teacher = tmp_path / "large" / "eval" / "training_1" / "teacher_checkpoint.pth"
    distilled = f"distillation.teacher_weights={teacher}"
    described = f"distillation.teacher_config={tmp_path / 'large' / 'config.yaml'}"
    train(tmp_path / "whole", *SHORT, distilled)
    assert "targets come from the frozen vit_base" in capsys.readouterr().err
    small = torch.load(tmp_path / "whole" / "eval" / "training_1" / "teacher_checkpoint.pth", weights_only=True)
    assert small["teacher"]["backbone.cls_token"].shape[-1] == 24
    first = checkpoint(tmp_path / "whole", 1)
    train(tmp_path / "again", *SHORT, distilled, described)
    second = checkpoint(tmp_path / "again", 1)
    assert first["distilled_from"] == second["distilled_from"] != ""
    for name, tensor in first["model"].items():
        assert torch.equal(tensor, second["model"][name]), name
    assert train(tmp_path / "again", "--dry-run", *SHORT, distilled) == 0

    content = torch.load(teacher, weights_only=True)
    content["teacher"]["backbone.cls_token"] += 1
    torch.save(content, tmp_path / "other.pth")
    longer = ("optim.epochs=2", "train.OFFICIAL_EPOCH_LENGTH=2")
    capsys.readouterr()
    train(tmp_path / "whole", *longer, f"distillation.teacher_weights={tmp_path / 'other.pth'}")
    assert "distillation.teacher_weights is another network than before" in capsys.readouterr().err


def test_memory_of_the_frozen_network_is_estimated(teacher_file: Path) -> None:
    config = config_of(f"distillation.teacher_weights={teacher_file}")
    with torch.device("meta"):
        model = SSLMetaArch(config)
        without = estimate_memory(config, model, torch.device("cpu"), 1)
        frozen = load_frozen_teacher(config, log=False)
    assert frozen is not None
    model.distil_from(frozen)
    found = estimate_memory(config, model, torch.device("cpu"), 1)
    assert found.states - without.states == 4 * sum(parameter.numel() for parameter in frozen.parameters())
    assert found.checkpoint == without.checkpoint


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("student.patch_size=16", r"student.patch_size=\(16, 16\) of the student is \(8, 8\) in distillation"),
        ("student.in_channels=1", "set student.in_channels=3"),
        ("dino.head_n_prototypes=32", "set dino.head_n_prototypes=64"),
        ("ibot.separate_head=true", "set ibot.separate_head=false"),
        ("distillation.teacher_weights=none.pth", r"none\.pth"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(teacher_file: Path, pair: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_frozen_teacher(config_of(f"distillation.teacher_weights={teacher_file}", pair), log=False)


def test_a_backbone_alone_gives_no_targets(teacher_file: Path) -> None:
    content = torch.load(teacher_file, weights_only=True)
    content["teacher"] = {name: value for name, value in content["teacher"].items() if name.startswith("backbone.")}
    torch.save(content, teacher_file)
    config = config_of(f"distillation.teacher_weights={teacher_file}")
    with pytest.raises(ValueError, match=r"holds no dino_head, and without heads a network gives no targets"):
        load_frozen_teacher(config, log=False)
    assert load_frozen_teacher(config_of(), log=False) is None
