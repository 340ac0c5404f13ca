"""Eight real boards are learnt by heart by both heads of boxes: the command says so, and its exit code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = {
    "yolo": ("optim.lr=0.005",),
    "detr": (
        *("optim.lr=0.004", "head.channels=32", "head.num_queries=40", "head.num_layers=2", "head.num_denoising=20"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_eight_boards_are_learnt_by_heart(repository: Path, deep_pcb: Path, tmp_path: Path, kind: str) -> None:
    """On a frozen random backbone and small images, so that one core needs minutes."""
    words = [
        *(sys.executable, "run/train/finetune.py", "--overfit", "8"),
        *("--config", f"configs/task/detection_deep_pcb_{kind}_cpu.yaml", f"train.output_dir={tmp_path / 'out'}"),
        *(f"data.train_dataset_path=CocoDetection:split=TRAIN:root={deep_pcb}", "data.val_dataset_path="),
        *("data.num_workers=0", "data.image_size=256", "backbone.mode=frozen", "train.device=cpu", *SETTINGS[kind]),
    ]
    ended = subprocess.run(words, cwd=repository, capture_output=True, text=True, timeout=3600, check=False)
    last = ended.stdout.splitlines()[-1]
    assert ended.returncode == 0, ended.stderr
    found = re.match(r"overfit 8: ap50 (\d\.\d+) on these images, the loss fell .*: all is wired up", last)
    assert found, last
    assert float(found[1]) > 0.95
    assert not (tmp_path / "out").exists()
