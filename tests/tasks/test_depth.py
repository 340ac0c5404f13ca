"""Metric and relative depth: what the losses tell decides about unit, figure of choice and worst cases."""

import json
from pathlib import Path

import numpy as np
import pytest
from fine_tune_stand_ins import finetune, make_small

from dinov2.data.loaders import make_dataset
from dinov2.tasks import load_task_config
from dinov2.tasks.depth import DepthTask, unknown_to
from dinov2.tasks.package import load_task_package
from dinov2.tasks.predictions import DepthPrediction
from dinov2.tasks.task import TaskFacts


@pytest.mark.parametrize(
    ("losses", "unit", "metric"),
    [
        ([], "um", "abs_rel"),
        (["loss.silog=0", "loss.mse=1"], "um", "abs_rel"),
        (["loss.l1=1", "loss.depth_alignment=median"], "um", "abs_rel"),  # the logarithmic loss tells the scale
        (["loss.silog=0", "loss.l1=1", "loss.depth_alignment=median"], "", "least_squares/abs_rel"),
        (["loss.silog=0", "loss.mse=1", "loss.depth_alignment=least_squares"], "", "least_squares/abs_rel"),
        (["loss.silog=0"], "", "median/abs_rel"),
    ],
)
def test_depth_is_relative_where_no_loss_tells_its_scale(losses: list[str], unit: str, metric: str) -> None:
    task = DepthTask(load_task_config(None, ["task=depth", *losses]), TaskFacts(unit="um"))
    assert (task.unit, task.metric) == (unit, metric)


@pytest.mark.parametrize(("alignment", "shift"), [("median", 0.0), ("least_squares", 300.0)])
def test_what_the_losses_do_not_tell_makes_no_image_a_bad_one(parts: Path, alignment: str, shift: float) -> None:
    losses = ["loss.silog=0", *(["loss.mse=1", f"loss.depth_alignment={alignment}"] if shift else [])]
    config = load_task_config(None, ["task=depth", "head.min_depth=100", "head.max_depth=3000", *losses])
    assert unknown_to(config.loss) == alignment
    dataset = make_dataset(dataset_str=f"GroupedJSON:split=VAL:root={parts}")
    metrics = DepthTask(config, TaskFacts(unit="um")).metrics(dataset)
    truth = metrics.ground_truth(0)
    assert truth.unit == "um"
    bent = DepthPrediction(np.sqrt(truth.depth))
    moved = DepthPrediction(3 * truth.depth + np.float32(shift))
    assert metrics.update(0, moved) == pytest.approx(0, abs=1e-5)
    assert metrics.update(0, bent) > 0.01


def test_relative_depth_is_learnt_and_shipped_without_a_unit(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    pairs = ("loss.mse=1", "loss.depth_alignment=least_squares", "evaluation.num_pictures=1")
    assert finetune(parts, tmp_path, *pairs, task="depth") == 0
    package = load_task_package(tmp_path / "best.pth")
    assert package.task.unit == ""
    results = json.loads((tmp_path / "val" / "results.json").read_text())
    assert results["settings"]["metric"] == "least_squares/abs_rel"
    assert (tmp_path / "valid_preds" / "epoch_0002.png").exists()
