"""``--dry-run`` says what a run would do, in true numbers, and leaves no trace."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from train_stand_ins import OPTIONS, Train, evaluation_pairs, files

from dinov2.config import ConfigError, load_config
from dinov2.train.dry_run import estimate_memory
from dinov2.train.ssl_meta_arch import SSLMetaArch

CPU = torch.device("cpu")


def described(train: Train, capsys: pytest.CaptureFixture[str], output: Path, *pairs: str) -> dict[str, str]:
    """What is printed, by the name in front."""
    assert train(output, "--dry-run", *pairs) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert "nothing is trained" in title
    return {line[2:20].strip(): line[20:] for line in lines}


def test_the_schedule_is_told_in_images_and_passes(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = described(train, capsys, tmp_path / "run", "optim.epochs=5", "train.OFFICIAL_EPOCH_LENGTH=7")
    assert "14 images, one batch of 4 read" in lines["data"]
    assert "5 epochs x 7 iterations = 35 iterations = 140 images = 10.0 passes" in lines["schedule"]
    assert "2 x 32x32 (4x4 patches), 2 x 16x16" in lines["crops"]
    assert "every 7 iterations, 3 kept" in lines["checkpoints"]
    assert not files(tmp_path), "nothing is written"
    assert not (tmp_path / "run").exists()


def test_parameters_and_learning_rate_are_those_of_the_run(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = described(train, capsys, tmp_path, "ibot.separate_head=true", "optim.lr=0.5", "optim.min_lr=0.25")
    model = SSLMetaArch(load_config(None, [*OPTIONS, "ibot.separate_head=true"]))
    for name, part in model.student.items():
        count = sum(parameter.numel() for parameter in part.parameters())
        assert lines[f"student {name}"] == f"{count:,} parameters"
    assert re.search(r"0\.5 .*0\.25$", lines["learning rate"])


def test_evaluation_sets_are_named_and_checked(
    train: Train, tmp_path: Path, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no k-NN" in described(train, capsys, tmp_path)["evaluation"]
    pairs = evaluation_pairs(parts)
    assert str(parts) in described(train, capsys, tmp_path, *pairs)["evaluation"]
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        train(tmp_path, "--dry-run", pairs[0], pairs[1].replace(str(parts), "/nowhere"))


def test_the_probe_set_is_read(train: Train, tmp_path: Path, parts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = described(train, capsys, tmp_path / "run")["probe set"]
    assert line == f"14 images of GroupedJSON:split=TRAIN:root={parts}, all of them read"
    sets = evaluation_pairs(parts)
    line = described(train, capsys, tmp_path / "run", *sets)["probe set"]
    assert re.fullmatch(r"\d+ images of GroupedJSON:split=VAL:root=.*, all of them read", line)

    shutil.copytree(parts, tmp_path / "parts")
    images = sorted((tmp_path / "parts" / "val").rglob("*.jpeg"))
    images[0].write_bytes(b"")
    images[1].unlink()
    os.mkfifo(images[1])  # which nobody writes to
    own = f"evaluation.probe_dataset_path=GroupedJSON:split=VAL:root={tmp_path / 'parts'}"
    more = ("evaluation.probe_images=4", "data.read_timeout_seconds=0.5")
    line = described(train, capsys, tmp_path / "run", *sets, own, *more)["probe set"]
    assert line.startswith(f"4 images of {own.partition('=')[2]}, ")
    assert re.search(r", [12] of them cannot be read, such as .*(the file is empty|given up after 0\.5 s)", line)
    assert described(train, capsys, tmp_path / "run", "evaluation.probe_images=0")["probe set"] == (
        "features are not watched"
    )
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        train(tmp_path, "--dry-run", "evaluation.probe_dataset_path=GroupedJSON:split=VAL:root=/nowhere")
    with pytest.raises(ConfigError, match=r"evaluation\.best_metric='nonsense'"):
        train(tmp_path, "--dry-run", "evaluation.best_metric=nonsense")
    assert not (tmp_path / "run").exists()


def test_wrong_data_is_found(train: Train, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="/nowhere"):
        train(tmp_path, "--dry-run", "train.dataset_path=GroupedJSON:split=TRAIN:root=/nowhere")
    with pytest.raises(ValueError, match="fewer than one batch of 64"):
        train(tmp_path, "--dry-run", "train.batch_size_per_gpu=64")


def test_memory_grows_with_the_batch_and_shrinks_with_processes_and_recomputation(train: Train) -> None:
    def estimate(*pairs: str, processes: int = 1) -> tuple[int, int]:
        config = load_config(None, [*OPTIONS, *pairs])
        with torch.device("meta"):
            memory = estimate_memory(config, SSLMetaArch(config), CPU, processes)
        return memory.states, memory.activations

    states, activations = estimate()
    config = load_config(None, OPTIONS)
    model = SSLMetaArch(config)
    student = sum(parameter.numel() for parameter in model.student.parameters())
    assert states == 4 * 5 * student, "student and teacher are equally large"
    assert estimate("train.batch_size_per_gpu=8") == (states, 2 * activations)
    assert estimate(processes=2) == (states // 2, activations)
    replicated = [f"compute_precision.{name}.backbone.sharding_strategy=NO_SHARD" for name in ("student", "teacher")]
    assert estimate(*replicated, processes=2) == (states, activations)
    assert estimate("train.activation_checkpointing=true")[1] < activations
