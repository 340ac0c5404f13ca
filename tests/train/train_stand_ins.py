"""A tiny run of the real pretraining command, and what tests look at afterwards."""

import json
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import torch
from torch import Tensor

from dinov2.data.collate import PretrainingBatch
from dinov2.models import build
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.train import train
from dinov2.train.command import main
from dinov2.train.monitors import CollapseDetector, Monitors, ProbeSet
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.target_measures import TargetMeasures

NETWORKS = [
    f"compute_precision.{network}.{part}"
    for network in ("student", "teacher")
    for part in ("backbone", "dino_head", "ibot_head")
]
# Two epochs of three iterations; everything random is on.
OPTIONS = (
    *(
        f"{head}.{option}"
        for head in ("dino", "ibot")
        for option in ("head_n_prototypes=64", "head_hidden_dim=32", "head_bottleneck_dim=16")
    ),
    *("student.arch=vit_tiny", "student.patch_size=8", "student.drop_path_rate=0.2", "student.layerscale=0.1"),
    *("crops.global_crops_size=32", "crops.local_crops_size=16", "crops.local_crops_number=2"),
    *("optim.epochs=2", "optim.warmup_epochs=0", "optim.freeze_last_layer_epochs=0"),
    *("train.batch_size_per_gpu=4", "train.OFFICIAL_EPOCH_LENGTH=3", "train.saveckp_freq=1"),
    *("train.num_workers=0", "train.log_period=1", "train.device=cpu"),
    *(f"{network}.mixed_precision.param_dtype=fp32" for network in NETWORKS),  # the same numbers on any processor
)
ALL_BF16 = [f"{network}.mixed_precision.param_dtype=bf16" for network in NETWORKS]
AUTO = (
    *(f"teacher.{name}=auto" for name in ("momentum_teacher", "final_momentum_teacher", "teacher_temp")),
    *("teacher.warmup_teacher_temp_epochs=auto", "optim.base_lr=auto"),
    *("optim.warmup_epochs=auto", "optim.freeze_last_layer_epochs=auto"),
)
DOOR = "run/train/train.py"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", DOOR)
LAST = 5  # number of the last iteration
EVERY_TWO = "evaluation.eval_period_iterations=2"

REPOSITORY = Path(__file__).resolve().parents[2]

Train = Callable[..., int]


def small_vit(**options: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(embed_dim=24, depth=2, num_heads=2, **options)


def make_small(monkeypatch: pytest.MonkeyPatch, *, plots: bool = False) -> None:
    """Lets ``vit_tiny`` name a still smaller network, and leaves out the drawing of plots, which takes seconds."""
    monkeypatch.setattr(build, "ARCHITECTURES", {"vit_tiny": small_vit, "vit_small": partial(small_vit)})
    if not plots:
        monkeypatch.setattr(train, "plot_training", lambda *args: [])


def run_command(parts: Path, output: Path, *pairs: str) -> int:
    """The command in this process; pairs may override those above and may hold flags."""
    dataset = f"train.dataset_path=GroupedJSON:split=TRAIN:root={parts}"
    return main([dataset, f"train.output_dir={output}", *OPTIONS, *pairs])


def run_python(*words: str, timeout: float = 240, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs Python in a process of its own, in the root of the checkout."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_forking(script: str, *words: str, timeout: float = 600) -> str:
    """Runs a script that forks, which this process, having used torch, must not; returns what it prints."""
    done = run_python(script, *words, timeout=timeout, PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def shared_run(factory: pytest.TempPathFactory, parts: Path, *pairs: str, plots: bool = False) -> Path:
    """Folder of a whole run for many tests."""
    output = factory.mktemp("shared") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch, plots=plots)
        assert run_command(parts, output, *pairs) == 0
    return output


def evaluation_pairs(parts: Path) -> tuple[str, ...]:
    return tuple(
        f"evaluation.{name}_dataset_path=GroupedJSON:split={split}:root={parts}"
        for name, split in (("train", "TRAIN"), ("val", "VAL"))
    )


def monitors(output: Path, *, start: int, probe: ProbeSet | None = None) -> Monitors:
    """Of a run that starts at an iteration; without a probe set they need no model."""
    return Monitors(
        model=cast(SSLMetaArch, None),
        output_dir=output,
        device=torch.device("cpu"),
        probe=probe,
        detector=CollapseDetector(1, 9, 24),
        targets=TargetMeasures(0.1),
        start=start,
        best_metric="",
        batch_size=4,
        num_workers=0,
    )


def poison(
    monkeypatch: pytest.MonkeyPatch,
    bad: Any,
    what: str = "pixel",
    value: float = math.nan,
    before: Callable[[int, SSLMetaArch], object] = lambda number, model: None,
) -> list[PretrainingBatch]:
    """Spoils a pixel, gradient or loss of the batches whose number (over all runs) ``bad`` holds.

    ``before`` is called before each batch.

    Returns:
        All batches that were trained on; grows with the run.
    """
    real = SSLMetaArch.forward_backward
    seen: list[PretrainingBatch] = []

    def forward_backward(self: SSLMetaArch, batch: Any, **keywords: Any) -> dict[str, Tensor]:
        is_bad = len(seen) in bad
        before(len(seen), self)
        seen.append(batch)
        if is_bad and what == "pixel":
            batch.global_crops[0, 0, 0, 0] = value
        losses = real(self, batch, **keywords)
        if is_bad and what == "gradient":
            next(self.student["backbone"].parameters()).grad.fill_(value)
        elif is_bad and what != "pixel":
            losses |= {what: torch.tensor(value), "total_loss": torch.tensor(value)}
        return losses

    monkeypatch.setattr(SSLMetaArch, "forward_backward", forward_backward)
    return seen


def before_step(monkeypatch: pytest.MonkeyPatch, what: Mapping[int, Callable[[], object]]) -> None:
    """Does something in the middle of iterations, by number: weights have moved, and the teacher has not."""
    real, number = train.update_teacher, iter(range(1000))

    def update(*arguments: Any) -> None:
        what.get(next(number), lambda: None)()
        real(*arguments)

    monkeypatch.setattr(train, "update_teacher", update)


class Crash(Exception):
    """Stands for a power cut."""


def crash() -> None:
    raise Crash


def crashed_run(train: Train, output: Path, *pairs: str, at: int) -> None:
    """Lets the run die in the middle of an iteration."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        before_step(monkeypatch, {at: crash})
        with pytest.raises(Crash):
            train(output, *pairs)


def no_space(*_: Any, **__: Any) -> NoReturn:
    """Stands for a full disk."""
    raise OSError(28, "No space left on device")


def damaged(content: bytes) -> Iterator[bytes]:
    """The content cut at 20 places, and with one of 100 random bits flipped."""
    for cut in range(20):
        yield content[: len(content) * cut // 20]
    for position in random.Random(0).sample(range(8 * len(content)), 100):
        flipped = bytes([content[position // 8] ^ (1 << position % 8)])
        yield content[: position // 8] + flipped + content[position // 8 + 1 :]


def checkpoint(folder: Path, step: int = LAST, rank: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / f"model_{step:07d}.rank_{rank}.pth", weights_only=True)
    return content


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[6:13]) for path in folder.glob("model_*.rank_0.pth"))


def records(folder: Path) -> list[dict[str, Any]]:
    """Lines of the metrics file, without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    return {record["iteration"]: record["evaluation"] for record in records(folder) if "evaluation" in record}


def iterations(folder: Path) -> list[int]:
    return [record["iteration"] for record in records(folder) if "evaluation" not in record]


def losses(folder: Path) -> list[float]:
    return [record["total_loss"] for record in records(folder) if "total_loss" in record]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def assert_identical(ours: Any, expected: Any, where: str = "") -> None:
    """Bit for bit equal, however nested."""
    assert type(ours) is type(expected), where
    if isinstance(expected, Mapping):
        assert ours.keys() == expected.keys(), where
        for key in expected:
            assert_identical(ours[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, Tensor):
        assert torch.equal(ours, expected), where
    else:
        assert ours == expected, where


def assert_same_run(ours: Path, expected: Path) -> None:
    """Both ended with the same weights, moments, random states and records."""
    states = [checkpoint(folder) for folder in (ours, expected)]
    for state in states:
        state["progress"].pop("seconds")
        state.pop("metrics_bytes")  # lines hold timings of more and fewer digits
    assert_identical(*states)
    assert records(ours) == records(expected)
