"""The table of anomaly detection over backbones, preprocessing and classes."""

from pathlib import Path

import pytest
import torch
from eval_stand_ins import TINY, dataset_string, make_parts

from dinov2.config import load_config, render_config
from dinov2.eval.command import build_random_backbone
from tools import benchmark_anomaly_sets


def test_the_table_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = load_config(None, TINY)
    (tmp_path / "tiny.yaml").write_text(render_config(config))
    backbone = build_random_backbone(config, torch.device("cpu"), seed=1)
    torch.save({"teacher": backbone.state_dict()}, tmp_path / "weights.pth")
    (tmp_path / "gamma.yaml").write_text("[{gamma: {gamma: 0.5}}]")
    root = make_parts(tmp_path / "set")
    words = [
        f"--weights={tmp_path / 'weights.pth'}",
        f"--config-file={tmp_path / 'tiny.yaml'}",
        *(f"--{split}-dataset={dataset_string(root, split)}" for split in ("train", "val", "test")),
        f"--preprocessing={tmp_path / 'gamma.yaml'}",
        f"--output-dir={tmp_path / 'out'}",
        *("--image-size=28", "--num-workers=0", "--num-resamples=20"),
    ]
    assert benchmark_anomaly_sets.main(words) == 0
    lines = (tmp_path / "out" / "anomaly.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert {(row[0], row[1]) for row in rows} == {("good", "val"), ("good", "test")}
    sources = {row[3] for row in rows}
    assert sources == {"pretrained backbone", "chance", "patch statistics", "random backbone"}
    assert len(rows) == (2 + 1) * len(sources)
    monkeypatch.setattr(benchmark_anomaly_sets, "evaluate", None)
    capsys.readouterr()
    assert benchmark_anomaly_sets.main(words) == 0
    assert capsys.readouterr().out.splitlines() == lines
