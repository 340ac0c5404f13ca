"""``--overfit 8`` learns eight images by heart for every task, and says so when it does not."""

from pathlib import Path

import pytest
from fine_tune_stand_ins import KINDS, finetune, make_parts, make_small


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("set"))


@pytest.mark.parametrize("task", KINDS)
def test_eight_images_are_learnt_by_heart(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    make_small(monkeypatch)
    fast = ("--overfit=8", "backbone.mode=full", "optim.lr=0.01", "optim.backbone_lr_mult=0.3")
    assert finetune(parts, tmp_path / "none", *fast, task=task) == 0
    assert not (tmp_path / "none").exists()  # a check leaves nothing behind


def test_it_says_when_they_are_not(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr("dinov2.tasks.engine.MAX_OVERFIT_STEPS", 3)
    with pytest.raises(RuntimeError, match=r"--overfit 8: the loss fell from .* only, in 3 steps.*optim.lr=1e-06"):
        finetune(parts, tmp_path, "--overfit=8", "optim.lr=1e-6")
