"""No option is dead: every one is read by some part of the run outside ``dinov2/config``."""

from pathlib import Path
from typing import Any

import pytest
from train_stand_ins import Train, evaluation_pairs

from dinov2.config import Config, leaf_names, load_config
from dinov2.train import command
from tests.option_recorder import recording

SUB_NETWORKS = [
    f"{network}.{part}" for network in ("student", "teacher") for part in ("backbone", "dino_head", "ibot_head")
]


def test_the_recorder_notes_reads_and_nothing_else() -> None:
    seen: list[str] = []
    config = recording(Config(), seen.append)
    assert isinstance(config, Config)
    assert config.optim.epochs == 100
    assert config.compute_precision.student.backbone.mixed_precision.param_dtype == "auto"
    assert seen == ["optim.epochs", "compute_precision.student.backbone.mixed_precision.param_dtype"]


def test_every_option_is_read(train: Train, tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[str] = set()

    def load_recording(*arguments: Any) -> Config:
        config: Config = recording(load_config(*arguments), seen.add)
        return config

    monkeypatch.setattr(command, "load_config", load_recording)
    short = ("optim.epochs=1", "train.OFFICIAL_EPOCH_LENGTH=1")
    train(tmp_path / "shared", *short)
    teacher = tmp_path / "shared" / "eval" / "training_0" / "teacher_checkpoint.pth"
    everything = (
        "ibot.separate_head=true",
        *(f"compute_precision.{name}.mixed_precision.param_dtype=bf16" for name in SUB_NETWORKS),
        f"student.pretrained_weights={teacher}",
        "train.OFFICIAL_EPOCH_LENGTH=1",
        *evaluation_pairs(parts),
    )
    train(tmp_path / "all", *everything, "optim.epochs=1")
    train(tmp_path / "all", *everything, f"train.resume_path={tmp_path / 'all' / 'model_0000000.rank_0.pth'}")
    unread = set(leaf_names()) - seen
    assert not unread, f"options that nothing reads: {', '.join(sorted(unread))}"
