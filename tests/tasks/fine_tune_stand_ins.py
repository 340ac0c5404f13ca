"""What tests of the supervised loop share: a tiny backbone, a small drawn set, and the command in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dinov2.data.prepare.demo_parts import make_demo_parts
from dinov2.models import build
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.tasks import engine
from dinov2.tasks.engine import main

BACKBONE = """\
student: {arch: vit_tiny, patch_size: 8, drop_path_rate: 0.0, layerscale: 1.0}
crops: {global_crops_size: 32, local_crops_size: 16}
"""
KINDS = {
    "classification": (),
    "segmentation": ("head.kind=conv_decoder", "head.channels=16", "head.output_stride=1", "loss.dice=1.0"),
    "depth": (
        *("head.kind=conv_decoder", "head.channels=16", "head.output_stride=1"),
        *("head.min_depth=100", "head.max_depth=3000", "loss.silog=0", "loss.gradient=0", "loss.mse=1e-6"),
    ),
    "detection": ("head.channels=16", "head.output_stride=4"),
}


def small_vit(**options: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(**{"embed_dim": 24, "depth": 2, "num_heads": 2, **options})


def make_small(monkeypatch: pytest.MonkeyPatch, *, plots: bool = False) -> None:
    """Lets ``vit_tiny`` name a still smaller network, and leaves out the drawing of plots, which takes seconds."""
    monkeypatch.setattr(build, "ARCHITECTURES", {"vit_tiny": small_vit})
    if not plots:
        monkeypatch.setattr(engine, "draw_end", lambda *arguments, **settings: [])


def make_parts(folder: Path) -> Path:
    """Twelve drawn plates of two images each, and the config of the backbone beside them."""
    make_demo_parts(folder / "parts", parts=12, photos=2, image_size=64)
    (folder / "backbone.yaml").write_text(BACKBONE, encoding="utf-8")
    return folder / "parts"


def pairs_of(parts: Path, task: str = "classification") -> list[str]:
    """Options that name the sets and the backbone, and make a run short."""
    return [
        f"task={task}",
        *KINDS[task],
        *(f"data.{split}_dataset_path=GroupedJSON:split={split.upper()}:root={parts}" for split in ("train", "val")),
        f"backbone.config_file={parts.parent / 'backbone.yaml'}",
        "data.image_size=32",
        "data.num_workers=0",
        "optim.epochs=2",
        "train.batch_size_per_gpu=4",
        "train.log_period=1",
        "evaluation.num_pictures=0",
    ]


def finetune(parts: Path, output: Path, *pairs: str, task: str = "classification") -> int:
    """The command in this process; later pairs override earlier ones."""
    given = dict(pair.split("=", 1) for pair in [*pairs_of(parts, task), *pairs] if not pair.startswith("--"))
    flags = [pair for pair in pairs if pair.startswith("--")]
    return main([f"--output-dir={output}", *flags, *(f"{name}={value}" for name, value in given.items())])


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Lines of the metrics file without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


def newest_weights(output: Path) -> dict[str, torch.Tensor]:
    path = sorted(output.glob("model_*.rank_0.pth"))[-1]
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    return state


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different, f"these differ: {different[:5]}"
