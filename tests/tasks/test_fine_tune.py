"""The supervised loop: what a run leaves behind, exact resume, early stopping, and runs that must come out alike."""

import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tune_stand_ins import (
    KINDS,
    assert_same_weights,
    finetune,
    make_parts,
    make_small,
    metrics_of,
    newest_weights,
)

from dinov2.data.loaders import make_dataset
from dinov2.logging import metrics_file
from dinov2.predict.predictor import Predictor
from dinov2.tasks.networks import Learner
from dinov2.tasks.package import load_task_package
from dinov2.utils.errors import RESUME_EXIT_CODE
from dinov2.utils.interruption import Interruption

EVERYTHING_RANDOM = (
    *("backbone.mode=full", "backbone.drop_path_rate=0.3", "head.dropout=0.2", "train.ema_momentum=0.9"),
    *("augmentation.rotation=20", "augmentation.noise=0.1", "augmentation.vflip=0.5", "data.balance_classes=true"),
    *("loss.class_weights=inverse", "train.accumulate_steps=2"),
)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("set"))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


@pytest.mark.parametrize("task", KINDS)
def test_a_run_leaves_the_best_weights_and_its_scores(parts: Path, tmp_path: Path, task: str) -> None:
    test_set = f"data.test_dataset_path=GroupedJSON:split=TEST:root={parts}"
    assert finetune(parts, tmp_path, test_set, task=task) == 0
    records = metrics_of(tmp_path)
    assert [record["iteration"] for record in records if "evaluation" not in record] == list(range(8))
    evaluations = [record for record in records if "evaluation" in record]
    assert [record["iteration"] for record in evaluations] == [3, 7]
    results = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in ("val", "test")}
    metric = {"classification": "image_auroc", "segmentation": "mean_iou", "depth": "abs_rel"}[task]
    figures = [record["evaluation"][metric] for record in evaluations]
    best = min(figures) if task == "depth" else max(figures)
    assert results["val"]["extra"]["figures"][metric] == pytest.approx(best, rel=1e-6)
    assert results["test"]["settings"]["metric"] == metric
    assert results["val"]["weights"]["sha256"] == results["test"]["weights"]["sha256"]

    package = load_task_package(tmp_path / "best.pth")
    assert package.task.name == task
    assert package.settings["figures"][metric] == pytest.approx(best)
    # What is shipped predicts what was judged.
    val: Any = make_dataset(dataset_str=f"GroupedJSON:split=VAL:root={parts}")
    predictions: list[Any] = Predictor.of(package).predict([val.get_image(index) for index in range(len(val))])
    if task == "classification":
        rows = (tmp_path / "val" / "predictions.csv").read_text().splitlines()[1:]
        shown = [float(row.split(",")[-1]) for row in rows]
        np.testing.assert_allclose([one.probabilities[1] for one in predictions], shown, rtol=1e-4)
    elif task == "segmentation":
        hits = sum((one.labels == val.get_mask(index)).sum() for index, one in enumerate(predictions))
        pixels = sum(one.labels.size for one in predictions)
        assert hits / pixels == pytest.approx(results["val"]["extra"]["figures"]["pixel_accuracy"], rel=1e-6)


@pytest.fixture(scope="module")
def undisturbed(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        assert finetune(parts, output, *EVERYTHING_RANDOM) == 0
    return output


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_a_run_that_was_stopped_goes_on_exactly(
    parts: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    with monkeypatch.context() as patch:
        taken = Learner.step

        def stop_then(learner: Any, batches: Any, step: int, rates: Any, *, stop: bool) -> Any:
            return taken(learner, batches, step, rates, stop=stop or step == stop_at)

        patch.setattr(Learner, "step", stop_then)
        patch.setattr(Interruption, "exit_code", RESUME_EXIT_CODE)
        assert finetune(parts, tmp_path, *EVERYTHING_RANDOM) == RESUME_EXIT_CODE
        assert not (tmp_path / "val").exists()
    torch.rand(3)  # what other code draws in between does not matter
    assert finetune(parts, tmp_path, *EVERYTHING_RANDOM) == 0
    assert metrics_of(tmp_path) == metrics_of(undisturbed)
    assert_same_weights(newest_weights(tmp_path), newest_weights(undisturbed))
    ours, theirs = (load_task_package(folder / "best.pth").model.state_dict() for folder in (tmp_path, undisturbed))
    assert_same_weights(ours, theirs)


def test_records_that_waited_for_room_on_the_disk_are_kept_by_checkpoints(
    parts: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        taken = Learner.step

        def stop_then(learner: Any, batches: Any, step: int, rates: Any, *, stop: bool) -> Any:
            if step == 1:
                patch.setattr(metrics_file, "_write_all", full)
            return taken(learner, batches, step, rates, stop=stop or step == 2)

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Learner, "step", stop_then)
        with pytest.raises(OSError, match=r"its last 3 line\(s\) are lost"):
            finetune(parts, tmp_path, *EVERYTHING_RANDOM)
    assert len(metrics_of(tmp_path)) == 1
    assert finetune(parts, tmp_path, *EVERYTHING_RANDOM) == 0
    assert metrics_of(tmp_path) == metrics_of(undisturbed)


def test_a_complete_run_is_only_scored_again(parts: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = newest_weights(undisturbed)
    monkeypatch.setattr(Learner, "step", None)
    assert finetune(parts, undisturbed, *EVERYTHING_RANDOM) == 0
    assert_same_weights(before, newest_weights(undisturbed))


def test_a_run_ends_when_val_stops_improving(parts: Path, tmp_path: Path) -> None:
    stuck = ("optim.lr=1e-12", "optim.epochs=9", "train.early_stopping_epochs=2")
    assert finetune(parts, tmp_path, *stuck) == 0
    epochs = [record for record in metrics_of(tmp_path) if "evaluation" in record]
    assert len(epochs) == 3  # the first is the best, two more do not beat it


def test_accumulated_gradients_equal_those_of_one_batch(parts: Path, tmp_path: Path) -> None:
    # Standardising looks at one batch at a time, as batch norm does.
    same = ("optim.epochs=1", "augmentation.hflip=0", "optim.warmup_epochs=0", "head.standardize=false")
    assert finetune(parts, tmp_path / "one", *same, "train.batch_size_per_gpu=8") == 0
    assert finetune(parts, tmp_path / "two", *same, "train.accumulate_steps=2") == 0
    one, two = newest_weights(tmp_path / "one"), newest_weights(tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


def test_low_rank_additions_are_merged_in_what_is_shipped(parts: Path, tmp_path: Path) -> None:
    assert finetune(parts, tmp_path, "backbone.mode=lora", "optim.lr=0.01", "optim.backbone_lr_mult=1") == 0
    trained = newest_weights(tmp_path)
    lora = {name for name in trained if "lora_b" in name}
    assert lora
    assert all(trained[name].abs().max() > 0 for name in lora)
    package = load_task_package(tmp_path / "best.pth")
    assert not any("lora" in name for name in package.model.state_dict())
    plain = trained["trained.backbone.blocks.0.attn.qkv.weight"]
    assert not torch.equal(package.model.state_dict()["backbone.blocks.0.attn.qkv.weight"], plain)


def test_a_frozen_backbone_stays_as_it_is_and_is_no_part_of_checkpoints(parts: Path, tmp_path: Path) -> None:
    assert finetune(parts, tmp_path, "train.seed=3") == 0
    assert not any("backbone" in name for name in newest_weights(tmp_path))
    first = load_task_package(tmp_path / "best.pth").model.backbone.state_dict()
    assert finetune(parts, tmp_path / "again", "train.seed=3", "optim.epochs=1") == 0
    assert_same_weights(first, load_task_package(tmp_path / "again" / "best.pth").model.backbone.state_dict())


def test_parts_are_judged_as_a_whole(parts: Path, tmp_path: Path) -> None:
    assert finetune(parts, tmp_path, "head.per_part=true", "data.max_photos=2", "train.batch_size_per_gpu=2") == 0
    rows = (tmp_path / "val" / "predictions.csv").read_text().splitlines()[1:]
    val = make_dataset(dataset_str=f"GroupedJSON:split=VAL:root={parts}")
    assert len(rows) == len(set(val.get_group_ids())) < len(val)


def test_photos_of_several_classes_are_learnt(parts: Path, tmp_path: Path) -> None:
    several = tmp_path / "several"
    shutil.copytree(parts, several)
    for path in (several / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        content["metainfo"]["classes"] = ["defective", "first photo", "second photo"]
        for row in content["data_list"]:
            photo = 1 + int(row["img_path"].endswith("-1.jpeg"))
            row["gt_labels"] = [0, photo] if row.pop("gt_label") else [photo]
        path.write_text(json.dumps(content))
    pairs = [
        f"data.{split}_dataset_path=GroupedJSON:split={split.upper()}:root={several}" for split in ("train", "val")
    ]
    assert finetune(parts, tmp_path / "out", *pairs, "data.multi_label=true", "data.balance_classes=true") == 0
    figures = json.loads((tmp_path / "out" / "val" / "results.json").read_text())["extra"]["figures"]
    assert {"mean_average_precision", "macro_f1", "average_precision/first photo"} <= figures.keys()
    assert load_task_package(tmp_path / "out" / "best.pth").task.config.data.multi_label


def test_a_loss_that_is_not_finite_stops_before_the_step(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"not finite at iteration \d"):
        finetune(parts, tmp_path, "optim.lr=1e38", "optim.clip_grad=0", "optim.warmup_epochs=0", "optim.optimizer=sgd")
    assert all(math.isfinite(record["total_loss"]) for record in metrics_of(tmp_path))


@pytest.mark.parametrize(("task", "curve"), [("classification", "accuracy.png"), ("segmentation", "miou.png")])
def test_plots_and_pictures_are_drawn(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, curve: str
) -> None:
    monkeypatch.undo()
    make_small(monkeypatch, plots=True)
    assert finetune(parts, tmp_path, "evaluation.num_pictures=2", task=task) == 0
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"loss.png", curve, "val_confusion_matrix.png", "val_worst_cases.png"} <= drawn
    assert {path.name for path in (tmp_path / "valid_preds").iterdir()} == {"epoch_0001.png", "epoch_0002.png"}
