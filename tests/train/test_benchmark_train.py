"""The measurement of training and saving measures something, and leaves nothing behind."""

from pathlib import Path

import pytest
import torch
from train_stand_ins import OPTIONS, make_small

from dinov2.config import load_config
from dinov2.distributed import distributed_session
from tools.benchmark_train import ASYNCHRONOUS, MODES, NOT_SAVING, SYNCHRONOUS, TrainSpeed, benchmark_train


def test_blocks_are_measured_and_shown(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    config = load_config(None, [*OPTIONS, f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"])
    with distributed_session("cpu"):
        speed = benchmark_train(config, torch.device("cpu"), tmp_path, save_every=2, rounds=2)
    assert speed.images == 8
    assert all(len(speed.seconds[mode]) == 2 and min(speed.seconds[mode]) > 0 for mode in MODES)
    assert speed.checkpoint_bytes > 10_000
    assert not list(tmp_path.glob("model_*"))
    assert str(speed).count("\n") == 3


def test_the_share_lost_is_that_of_throughput() -> None:
    speed = TrainSpeed(100, 50, {NOT_SAVING: [9.0, 10.0], SYNCHRONOUS: [10.0, 10.0], ASYNCHRONOUS: [9.0, 8.0]}, 1)
    assert speed.shares_lost(SYNCHRONOUS) == pytest.approx([0.1, 0.0])
    assert speed.shares_lost(ASYNCHRONOUS) == pytest.approx([0.0, -0.25])
    assert speed.images_per_second(SYNCHRONOUS) == pytest.approx(10)


def test_numbers_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_every and rounds must be at least 1"):
        benchmark_train(load_config(None, []), torch.device("cpu"), tmp_path, save_every=0)
