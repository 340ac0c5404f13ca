"""The measurement of the data path measures something."""

from pathlib import Path

from train_stand_ins import OPTIONS

from dinov2.config import load_config
from tools.benchmark_data import benchmark_data


def test_times_are_measured_and_shown(parts: Path) -> None:
    config = load_config(None, [*OPTIONS, f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"])
    speed = benchmark_data(config, num_images=5, seconds=0.2)
    assert speed.decode_ms > 0
    assert speed.augment_ms > 0
    assert speed.sample_ms > 0
    assert speed.loader_images_per_second > 1
    assert str(speed).count("\n") == 1
