"""The supervised loop: what a run leaves behind, exact resume, early stopping, and runs that must come out alike."""

import errno
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fine_tune_stand_ins import (
    BACKBONE,
    KINDS,
    assert_same_weights,
    finetune,
    make_small,
    metrics_of,
    newest_weights,
    pairs_of,
)
from PIL import Image

from dinov2.checkpoint import checkpointer
from dinov2.config import load_config
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import BadTargetError
from dinov2.data.loaders import make_dataset
from dinov2.data.preprocessing import Chain
from dinov2.data.value_range import ValueRange
from dinov2.eval.metrics.classification import LevelScores, MetricValue, Scores
from dinov2.eval.metrics.detection import match_boxes
from dinov2.logging import metrics_file
from dinov2.models.heads.depth import SigmoidDepth
from dinov2.models.task_model import TaskModel
from dinov2.predict.images import main as infer_images
from dinov2.predict.model import load_model
from dinov2.predict.predictor import Predictor
from dinov2.tasks import engine as fine_tune
from dinov2.tasks import load_task_config
from dinov2.tasks.dry_run import _describe_set
from dinov2.tasks.evaluation import BestSoFar, Case, headline, worst_of_parts
from dinov2.tasks.networks import DeadHeadWatch, Learner
from dinov2.tasks.package import load_backbone_config, load_task_package
from dinov2.tasks.training_data import TrainingData, check_classes, name_preprocessing, open_task_sets
from dinov2.utils.errors import RESUME_EXIT_CODE, RunError
from dinov2.utils.files import LostFolderError, write_with_checksum
from dinov2.utils.interruption import Interruption

Array = npt.NDArray[np.uint8]

EVERYTHING_RANDOM = (
    *("backbone.mode=full", "backbone.drop_path_rate=0.3", "head.dropout=0.2", "train.ema_momentum=0.9"),
    *("augmentation.rotation=20", "augmentation.noise=0.1", "augmentation.vflip=0.5", "data.balance_classes=true"),
    *("loss.class_weights=inverse", "train.accumulate_steps=2"),
)


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
    metric = {"classification": "image_auroc", "segmentation": "defect_iou", "depth": "abs_rel", "detection": "ap50"}[
        task
    ]
    figures = [record["evaluation"][metric] for record in evaluations]
    best = min(figures) if task == "depth" else max(figures)
    assert results["val"]["extra"]["figures"][metric] == pytest.approx(best, rel=1e-6)
    assert results["test"]["settings"]["metric"] == metric
    assert results["val"]["weights"]["sha256"] == results["test"]["weights"]["sha256"]

    package = load_task_package(tmp_path / "best.pth")
    assert package.task.name == task
    assert package.settings["figures"][metric] == pytest.approx(best)
    # What is shipped predicts what was evaluated.
    val: Any = make_dataset(dataset_str=f"GroupedJSON:split=VAL:root={parts}")
    predictions: list[Any] = Predictor.of(package).predict([val.get_image(index) for index in range(len(val))])
    if task == "detection":
        assert set(package.thresholds) <= set(package.task.classes)
        missed = 0
        for index, one in enumerate(predictions):
            truth = val.get_boxes(index)
            hits = match_boxes(one.boxes, one.labels, *truth, val.get_crowd(index), 0.5)
            missed += len(truth[0]) - int((hits >= 0).sum())
        misses = results["val"]["scores"]["boxes"]["image"]["figures"]["misses"]["value"]
        assert misses * len(val) == pytest.approx(missed)
    if task == "classification":
        rows = (tmp_path / "val" / "predictions.csv").read_text().splitlines()[1:]
        shown = [float(row.split(",")[-1]) for row in rows]
        np.testing.assert_allclose([one.probabilities[1] for one in predictions], shown, rtol=1e-4)
    elif task == "segmentation":
        hits = sum((one.labels == val.get_mask(index)).sum() for index, one in enumerate(predictions))
        pixels = sum(one.labels.size for one in predictions)
        assert hits / pixels == pytest.approx(results["val"]["extra"]["figures"]["pixel_accuracy"], rel=1e-6)


def test_a_range_of_values_is_that_of_training_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Dark parts are good, bright ones defective; val alone, all dark, would tell another range."""
    (tmp_path / "backbone.yaml").write_text(BACKBONE, encoding="utf-8")
    for split, levels in (("train", (40, 50, 290, 300)), ("val", (45, 55, 40, 50))):
        for number, level in enumerate(levels):
            folder = tmp_path / "parts" / split / ("dark" if level < 100 else "bright")
            folder.mkdir(parents=True, exist_ok=True)
            values = np.linspace(0, level, 32 * 32, dtype=np.float32).reshape(32, 32)
            values[0, 1] = 1e6 if split == "train" else 0
            Image.fromarray(values).save(folder / f"{number}.tif")
    (tmp_path / "parts" / "val" / "bright").mkdir()
    Image.fromarray(np.full((32, 32), 280, np.float32)).save(tmp_path / "parts" / "val" / "bright" / "x.tif")
    sets = [f"data.{name}_dataset_path=ImageFolder:root={tmp_path / 'parts'}:split={name}" for name in ("train", "val")]
    output = tmp_path / "run"
    assert finetune(tmp_path / "parts", output, *sets, "optim.epochs=1") == 0
    content = torch.load(output / "best.pth", weights_only=True)
    low, high = content["value_range"]
    assert low == 0
    assert 295 < high < 305
    data = load_task_config(output / "config.yaml", ()).data
    for path in (data.train_dataset_path, data.val_dataset_path):
        assert path.endswith(f":range={ValueRange(low, high)}")
    package = load_task_package(output / "best.pth")
    assert package.preprocessing.value_range == ValueRange(low, high)
    assert checkpoint_value_range(output) == [low, high]

    # The same command goes on with the range that is stored, whatever the images tell by now.
    with monkeypatch.context() as context:
        context.setattr(ImageDataset, "estimate_value_range", lambda *_: ValueRange(0, 9))
        assert finetune(tmp_path / "parts", output, *sets, "optim.epochs=2") == 0
    assert checkpoint_value_range(output) == [low, high]
    assert "range=0,9" not in (output / "config.yaml").read_text()
    assert "THE RANGE OF VALUES CHANGES" not in capfd.readouterr().err
    assert finetune(tmp_path / "parts", output, f"{sets[0]}:range=0,500", sets[1], "optim.epochs=3") == 0
    assert "THE RANGE OF VALUES CHANGES from here on: 0,500" in capfd.readouterr().err


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_model_prepares_images_as_in_training_and_answers_in_their_coordinates(
    parts: Path, tmp_path: Path, task: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One answer from the evaluation, from arrays, from files and from the command; what was cut off is background."""
    steps = [{"clahe": {"tiles": 2}}, {"crop": {"top": 4, "left": 10, "height": 30, "width": 20}}]
    options = (f"data.preprocessing={json.dumps(steps)}", "optim.epochs=1")
    assert finetune(parts, tmp_path / "run", *options, task=task) == 0
    weights, chain = tmp_path / "run" / "best.pth", Chain.parse(steps)
    assert torch.load(weights, weights_only=True)["preprocessing"] == chain.to_values()
    package = load_task_package(weights)
    assert package.preprocessing.chain == chain
    val: Any = make_dataset(dataset_str=f"GroupedJSON:split=VAL:root={parts}")
    paths = [str(val.get_image_path(index)) for index in range(len(val))]
    from_arrays: list[Any] = Predictor.of(package).predict(
        [np.array(val.get_image(index)) for index in range(len(val))]
    )
    from_files: list[Any] = load_model(weights).predict(paths)
    command = ("--weights", str(weights), "--input", *paths, "--output-dir", str(tmp_path / "out"))
    assert infer_images([*command, "--device", "cpu"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    figures = json.loads((tmp_path / "run" / "val" / "results.json").read_text())["extra"]["figures"]
    hits = 0
    for index, (one, other, line) in enumerate(zip(from_arrays, from_files, lines, strict=True)):
        assert one.to_dict() == other.to_dict() == {name: line[name] for name in one.to_dict()}
        if task == "segmentation":
            assert one.labels.shape == val.get_mask(index).shape
            outside = np.ones(one.labels.shape, dtype=bool)
            outside[4:34, 10:30] = False
            assert not one.defect[outside].any()
            assert one.defect[~outside].any()
            hits += int((one.labels == val.get_mask(index)).sum())
        else:
            assert one.size == val.get_image_size(index)
            seen = one if one.doubtful is None else one.joined(one.doubtful)
            assert (seen.boxes >= [10, 4, 10, 4]).all()
            assert (seen.boxes <= [30, 34, 30, 34]).all()
    if task == "segmentation":
        pixels = sum(one.labels.size for one in from_arrays)
        assert hits / pixels == pytest.approx(figures["pixel_accuracy"], rel=1e-6)
    capfd.readouterr()
    more = ("optim.epochs=2", "data.preprocessing=[]")
    assert finetune(parts, tmp_path / "run", *more, task=task) == 0
    assert re.search(r"resumed with other options: .*preprocessing: \[\]", capfd.readouterr().err)


def test_steps_are_those_of_the_backbone_unless_others_are_named(
    parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = Chain.parse(["median"])
    config = load_task_config(None, pairs_of(parts))
    assert name_preprocessing(config, trained).data.preprocessing == tuple(trained.to_values())
    config = load_task_config(None, (*pairs_of(parts), "data.preprocessing=[]"))
    assert name_preprocessing(config, trained).data.preprocessing == ()
    assert "takes the place" not in caplog.text
    config = replace(config, backbone=replace(config.backbone, pretrained_weights="teacher.pth"))
    assert name_preprocessing(config, trained).data.preprocessing == ()
    assert "data.preprocessing takes the place of the steps that the backbone was trained with: none" in caplog.text


def checkpoint_value_range(output: Path) -> list[float]:
    path = sorted(output.glob("model_*.rank_0.pth"))[-1]
    found: list[float] = torch.load(path, weights_only=True)["value_range"]
    return found


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

        def stop_then(learner: Any, batches: Any, step: int, *, stop: bool, **rates: float) -> Any:
            return taken(learner, batches, step, stop=stop or step == stop_at, **rates)

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


def test_a_stop_whose_save_failed_says_from_where_it_goes_on(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Learner.step

    def stop(learner: Any, batches: Any, step: int, *, stop: bool, **rates: float) -> Any:
        if step == 5:
            monkeypatch.setattr(checkpointer, "write_with_checksum", full)
        return taken(learner, batches, step, stop=stop or step == 5, **rates)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Learner, "step", stop)
    assert finetune(parts, tmp_path, "train.max_save_failures=2") != 0
    log = (tmp_path / "log" / "log.txt").read_text()
    assert "since the newest checkpoint is not saved, and will be done again" in log
    assert "stopped after step 5 of 8; the same command goes on from the newest checkpoint" in log


def test_records_that_waited_for_room_on_the_disk_are_kept_by_checkpoints(
    parts: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        taken = Learner.step

        def stop_then(learner: Any, batches: Any, step: int, *, stop: bool, **rates: float) -> Any:
            if step == 1:
                patch.setattr(metrics_file, "_write_all", full)
            return taken(learner, batches, step, stop=stop or step == 2, **rates)

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


def test_of_equal_epochs_the_second_metric_and_then_the_later_one_is_the_best() -> None:
    best = BestSoFar("iou", higher_is_better=True, patience=3, second="error", second_higher=False)
    epochs = [(0.0, 5.0), (0.0, 4.0), (0.0, 6.0), (0.0, 4.0), (0.0, math.nan), (-1.0, 0.0)]
    kept = [best.update({"iou": iou, "error": error}, epoch) for epoch, (iou, error) in enumerate(epochs, start=1)]
    assert kept == [True, True, False, True, True, False]
    assert best.epoch == 5
    assert best.is_stale  # what was equal is no improvement
    again = BestSoFar("iou", higher_is_better=True, patience=3, second="error", second_higher=False)
    again.load_state_dict(best.state_dict())
    assert again.state_dict() == pytest.approx(best.state_dict(), nan_ok=True)
    assert best.update({"iou": 0.5}, 7)
    assert not best.is_stale


def test_a_run_of_before_goes_on_by_the_metric_of_now(parts: Path, tmp_path: Path) -> None:
    before = ("optim.epochs=1", "optim.schedule=constant", "evaluation.metric=mean_iou")
    assert finetune(parts, tmp_path, *before, task="segmentation") == 0
    for path in tmp_path.glob("model_*.rank_0.pth"):
        content = torch.load(path, weights_only=True)
        for name in ("metric", "second", "improved"):
            del content["best"][name]
        write_with_checksum(path, lambda file, content=content: torch.save(content, file))
    figures = metrics_of(tmp_path)[-1]["evaluation"]
    later = ("optim.epochs=2", "optim.schedule=constant")
    assert finetune(parts, tmp_path, *later, task="segmentation") == 0
    log = (tmp_path / "log" / "log.txt").read_text()
    assert f"from here on defect_iou chooses, then {figures['defect_iou']:.4f}" in log


def test_a_run_ends_when_val_stops_improving(parts: Path, tmp_path: Path) -> None:
    stuck = ("optim.lr=1e-12", "optim.epochs=9", "train.early_stopping_epochs=2")
    assert finetune(parts, tmp_path, *stuck) == 0
    epochs = [record for record in metrics_of(tmp_path) if "evaluation" in record]
    assert len(epochs) == 3  # the first is the best, two more do not beat it


def test_a_dead_head_is_said_at_once(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SigmoidDepth, "read", lambda output, scores: 0 * scores + output.max_depth)
    assert finetune(parts, tmp_path, task="depth") == 0
    log = (tmp_path / "log" / "log.txt").read_text()
    assert log.count("DEAD HEAD: for 3 steps its gradients are exactly 0, while the loss is") == 1
    told = {record["iteration"]: record["warnings"] for record in metrics_of(tmp_path) if "warnings" in record}
    assert [step for step, warnings in told.items() if "DEAD" in warnings[0]] == [2]
    constant = "CONSTANT DEPTH: every pixel of every image is taken for 3000 um"
    assert told[3] == told[7] == [constant]
    assert json.loads((tmp_path / "val" / "results.json").read_text())["extra"]["warnings"] == [constant]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.6, 0.9, ""), (0.4, 0.6, "  not distinguishable from chance, 0.5"), (0.1, 0.4, "  worse than chance, 0.5")],
)
def test_the_table_of_a_set_says_what_does_not_beat_chance(low: float, high: float, said: str) -> None:
    level = LevelScores(count=9, metrics={"auroc": MetricValue(value=0.5, low=low, high=high)})
    stand_in: Any = SimpleNamespace(headline=(), values={"image_auroc": 0.5}, metrics=range(9))
    table = headline("val", stand_in, stand_in, {"k": Scores(image=level, part=level)})
    assert table.splitlines()[1] == f"  image_auroc     0.5000  [{low:.4f}, {high:.4f}]{said}"


def test_a_dry_run_describes_a_set_whose_first_image_cannot_be_read(own_parts: Path) -> None:
    dataset = make_dataset(dataset_str=f"GroupedJSON:split=VAL:root={own_parts}")
    Path(dataset.get_image_path(0)).write_bytes(b"")
    assert _describe_set(dataset).endswith("of which the first cannot be read")


def test_of_every_part_the_worst_image_is_shown() -> None:
    prediction: Any = None
    parts = ["a", "a", "b", "c", "b"]
    cases = [Case(error, index, prediction) for index, error in enumerate((0.5, 0.9, 0.1, 0.7, 0.8))]
    assert [case.index for case in worst_of_parts(cases, parts, 2)] == [1, 4]
    assert [case.index for case in worst_of_parts(cases, parts, 9)] == [1, 4, 3]
    assert worst_of_parts(cases, parts, 0) == []


def test_what_a_dead_head_is_and_what_not() -> None:
    alive, dead, none = torch.rand(2, 3, 4, 4), torch.ones(2, 3, 4, 4), {"total_loss": 0.0}
    loss, norms = {"total_loss": 1.0}, {"head": torch.tensor(1.0), "backbone": torch.tensor(0.0)}
    for outputs, losses, gradients in (
        ({"logits": alive}, loss, norms),
        ({"logits": dead}, none, {"head": torch.tensor(0.0)}),  # nothing was labelled
        ({"logits": dead[:1, :, 0, 0]}, loss, norms),  # one image alone
        ({"boxes": [dead], "count": torch.ones(2)}, loss, norms),
    ):
        watch = DeadHeadWatch()
        for _ in range(4):
            watch.look(outputs)
            assert watch.warning(losses, gradients) == ""
    watch, said = DeadHeadWatch(), []
    for _ in range(5):
        watch.look({"logits": dead})
        said.append(watch.warning(loss, norms))
    for outputs in (alive, *[dead] * 4):  # it has come back, and dies again
        watch.look({"logits": outputs})
        said.append(watch.warning(loss, norms))
    assert [step for step, words in enumerate(said) if words] == [2, 8]
    assert "it says the same of all images and pixels, while the loss is 1" in said[2]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_only_background_and_only_one_class_are_said(
    parts: Path, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = TaskModel.forward

    def biased(model: Any, *inputs: Any) -> Any:
        outputs = forward(model, *inputs)
        bias = torch.zeros_like(outputs["logits"])
        bias[:, 0] = 50.0
        return {"logits": outputs["logits"] + bias}

    monkeypatch.setattr(TaskModel, "forward", biased)
    assert finetune(parts, tmp_path, "optim.epochs=1", "data.balance_classes=true", task=task) == 0
    words = {"classification": "ONE CLASS ONLY: every image", "segmentation": "NOTHING FOUND: every pixel"}[task]
    log = (tmp_path / "log" / "log.txt").read_text()
    assert log.count(words) == 2  # after the epoch and at the end
    assert metrics_of(tmp_path)[-1]["warnings"][0].startswith(words)
    assert ("try loss.class_weights=sqrt_inverse, more epochs" in log) == (task == "segmentation")
    assert json.loads((tmp_path / "val" / "results.json").read_text())["extra"]["warnings"][0].startswith(words)


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "classification",
            {"classes": ["defective", "good"]},
            r"holds a run with classes \['good', .*has classes \['def",
        ),
        ("depth", {"depth_unit": "mm"}, "holds a run with values in 'um', .* has values in 'mm'"),
    ],
)
def test_a_run_of_other_classes_or_units_is_not_gone_on_with(
    own_parts: Path, tmp_path: Path, task: str, change: dict[str, Any], message: str
) -> None:
    assert finetune(own_parts, tmp_path / "out", "optim.epochs=1", task=task) == 0
    for split in ("train", "val"):
        edit(own_parts, split, lambda content: content["metainfo"].update(change))
    with pytest.raises(ValueError, match=message):
        finetune(own_parts, tmp_path / "out", task=task)


def test_a_run_of_another_task_or_head_is_not_gone_on_with(parts: Path, tmp_path: Path) -> None:
    assert finetune(parts, tmp_path, "optim.epochs=1") == 0
    for task, more in (("segmentation", ()), ("classification", ("head.kind=mlp",))):
        with pytest.raises(ValueError, match="holds a run of another task, head, backbone or set of classes: give"):
            finetune(parts, tmp_path, *more, task=task)


def test_a_val_set_without_labels_is_an_error_before_training(own_parts: Path, tmp_path: Path) -> None:
    edit(own_parts, "val", lambda content: [row.pop("gt_label") for row in content["data_list"]])
    with pytest.raises(ValueError, match=r"split=VAL.* \(val\): no image has a label to evaluate"):
        finetune(own_parts, tmp_path / "out")


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


def test_parts_are_classified_as_a_whole(parts: Path, tmp_path: Path) -> None:
    assert finetune(parts, tmp_path, "head.per_part=true", "data.max_photos=2", "train.batch_size_per_gpu=2") == 0
    rows = (tmp_path / "val" / "predictions.csv").read_text().splitlines()[1:]
    val = make_dataset(dataset_str=f"GroupedJSON:split=VAL:root={parts}")
    assert len(rows) == len(set(val.get_group_ids())) < len(val)


def test_images_of_several_classes_are_learnt(parts: Path, tmp_path: Path) -> None:
    several = tmp_path / "several"
    shutil.copytree(parts, several)
    for path in (several / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        content["metainfo"]["classes"] = ["defective", "first image", "second image"]
        for row in content["data_list"]:
            image = 1 + int(row["img_path"].endswith("-1.jpeg"))
            row["gt_labels"] = [0, image] if row.pop("gt_label") else [image]
        path.write_text(json.dumps(content))
    pairs = [
        f"data.{split}_dataset_path=GroupedJSON:split={split.upper()}:root={several}" for split in ("train", "val")
    ]
    assert finetune(parts, tmp_path / "out", *pairs, "data.multi_label=true", "data.balance_classes=true") == 0
    figures = json.loads((tmp_path / "out" / "val" / "results.json").read_text())["extra"]["figures"]
    assert {"mean_average_precision", "macro_f1", "average_precision/first image"} <= figures.keys()
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
    assert ("val_precision_recall.png" in drawn) == (task == "classification")
    assert {path.name for path in (tmp_path / "valid_preds").iterdir()} == {"epoch_0001.png", "epoch_0002.png"}


@pytest.mark.parametrize("task", KINDS)
def test_eight_images_are_learnt_by_heart(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, task: str
) -> None:
    make_small(monkeypatch)
    caplog.set_level("INFO", "dinov2")
    fast = ("--overfit=8", "backbone.mode=full", "optim.lr=0.01", "optim.backbone_lr_mult=0.3")
    assert finetune(parts, tmp_path / "none", *fast, task=task) == 0
    metric = {"classification": "image_auroc", "segmentation": "defect_iou", "detection": "ap50", "depth": "abs_rel"}
    ended = caplog.messages[-1]
    assert re.match(
        rf"overfit 8: ({metric[task]} \d\.\d+ on these images, )?the loss fell from .*: all is wired up", ended
    )
    assert task != "detection" or "ap50" in ended
    assert not (tmp_path / "none").exists()  # a check leaves nothing behind


@pytest.mark.parametrize("task", KINDS)
def test_a_dry_run_says_what_a_run_would_do_and_writes_nothing(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    assert finetune(parts, tmp_path / "out", "--dry-run", "head.num_bins=7", task=task) == 0
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().out
    shares = {"classification": "good 71.43%, defective 28.57%", "segmentation": "background 99", "depth": "none"}
    shares["detection"] = r"[a-z]+ \d"
    for line in (
        r"train +14 images of 7 parts, the first 64 x 64 pixels",
        r"val +4 images of 2 parts",
        rf"classes +.*{shares[task]}",
        r"batch +4 x 1 \(accumulate_steps\) x 1 process\(es\) on cpu, inputs \[4, 3, 32, 32\]",
        r"schedule +2 epochs = passes over the set x 4 steps = 8 steps = 32 samples",
        r"losses +total_loss \d",
        r"memory +\d+\.\d\d GiB",
        r"time +\d+\.\d\d s per step, so about 0:00:\d\d without evaluations",
        r"start +anew",
        r"warning +head.num_bins has no effect",
        r"next +.*task=" + task,
    ):
        assert re.search(rf"^  {line}", said, re.MULTILINE), line
    assert "--dry-run" not in said.split("next")[-1]
    assert "python run/train/finetune.py" in said.split("next")[-1]
    assert ("rare: defect" in said) == (task == "segmentation")


def test_a_dry_run_of_a_run_that_has_begun_changes_nothing(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune(parts, tmp_path, "optim.epochs=1") == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert finetune(parts, tmp_path, "--dry-run") == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "holds model_0000003: it goes on at step 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="two checks"):
        finetune(parts, tmp_path, "--dry-run", "--overfit=3")


def test_it_says_when_they_are_not(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr("dinov2.tasks.dry_run.MAX_OVERFIT_STEPS", 3)
    with pytest.raises(RunError, match=r"--overfit 8: the loss fell from .* only, in 3 steps.*optim.lr=1e-06"):
        finetune(parts, tmp_path, "--overfit=8", "optim.lr=1e-6")
    monkeypatch.setattr("dinov2.tasks.dry_run._OVERFIT_LOG_PERIOD", 2)
    with pytest.raises(RunError, match=r"--overfit 8: ap50 0\.\d+ on these images, the loss fell from .* only"):
        finetune(parts, tmp_path, "--overfit=8", "optim.lr=1e-6", task="detection")


@pytest.fixture
def own_parts(parts: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(parts.parent, tmp_path / "set")
    return tmp_path / "set" / "parts"


def edit(parts: Path, split: str, change: object) -> None:
    path = parts / "annotations" / f"{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(("split", "found"), [("train", ""), ("val", ".*7")])
def test_a_mask_of_another_size_or_with_an_unknown_value_names_its_file(
    own_parts: Path, tmp_path: Path, split: str, found: str
) -> None:
    mask = next((own_parts / "masks").rglob(f"{split}/**/*.png"))
    bad = np.zeros((5, 7)) if split == "train" else np.full(np.asarray(Image.open(mask)).shape, 7)
    Image.fromarray(bad.astype(np.uint8)).save(mask)
    with pytest.raises(BadTargetError, match=mask.name + found):
        finetune(own_parts, tmp_path / "out", task="segmentation")


@pytest.mark.parametrize(
    ("split", "task", "change", "message"),
    [
        ("val", "classification", lambda c: c["data_list"][3].update(gt_label=9), r"val.json.*data_list\[3\].*9"),
        ("val", "classification", lambda c: c["metainfo"].update(classes=["ok", "bad"]), r"disagree.*ok.*good"),
        ("train", "depth", lambda c: [row.pop("height_path") for row in c["data_list"]], r"train.json.*height_path"),
    ],
)
def test_wrong_annotations_are_found_when_the_set_is_opened(
    own_parts: Path, tmp_path: Path, split: str, task: str, change: object, message: str
) -> None:
    edit(own_parts, split, change)
    with pytest.raises(ValueError, match=message):
        finetune(own_parts, tmp_path / "out", task=task)


@pytest.mark.parametrize(("split", "value"), [("train", 0.0), ("val", math.nan)])
def test_depths_that_teach_nothing_are_an_error(own_parts: Path, tmp_path: Path, split: str, value: float) -> None:
    def spoil(content: dict[str, list[dict[str, str]]]) -> None:
        for row in content["data_list"]:
            height, width = np.asarray(Image.open(own_parts / row["height_path"])).shape
            row["height_path"] = row["height_path"].replace(".png", ".npy")
            np.save(own_parts / row["height_path"], np.full((height, width), value, dtype=np.float32))

    edit(own_parts, split, spoil)
    found = "not a single known depth" if math.isnan(value) else "depths of 0 to 0"
    message = rf"split={split.upper()}.*head.min_depth=100 and head.max_depth=3000.*{split}/part.*jpeg, hold {found}"
    with pytest.raises(ValueError, match=message):
        finetune(own_parts, tmp_path / "out", task="depth")


def test_a_wrong_unit_is_told(own_parts: Path, tmp_path: Path) -> None:
    metres = ("head.min_depth=0.001", "head.max_depth=10", "optim.epochs=1")  # of micrometres
    assert finetune(own_parts, tmp_path / "out", *metres, task="depth") == 0
    log = (tmp_path / "out" / "log" / "log.txt").read_text()
    assert re.search(r"split=TRAIN.*only 0.\d+% of the depths \(0 to \d+\) lie between head.min_depth=0.001 and", log)
    assert finetune(own_parts, tmp_path / "right", "optim.epochs=1", task="depth") == 0
    assert "of the depths" not in (tmp_path / "right" / "log" / "log.txt").read_text()


def test_an_unreadable_image_is_replaced_in_training_and_an_error_in_val(own_parts: Path, tmp_path: Path) -> None:
    image = next((own_parts / "train").rglob("*.jpeg"))
    image.write_bytes(b"")
    assert finetune(own_parts, tmp_path / "out", "data.max_bad_fraction=0.5") == 0
    with pytest.raises(RuntimeError, match=r"data.max_bad_fraction"):
        finetune(own_parts, tmp_path / "strict", "data.max_bad_fraction=0")
    image = next((own_parts / "val").rglob("*.jpeg"))
    image.write_bytes(b"")
    with pytest.raises(OSError, match=image.name):
        finetune(own_parts, tmp_path / "val", "data.max_bad_fraction=0.5")


def test_sets_and_metrics_that_are_not_there_are_errors(own_parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.train_dataset_path is empty"):
        finetune(own_parts, tmp_path / "out", "data.train_dataset_path=")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        finetune(own_parts, tmp_path / "out", "data.train_dataset_path=GroupedJSON:split=TRAIN:root=nowhere")
    with pytest.raises(ValueError, match="no such metric; there are image_accuracy"):
        finetune(own_parts, tmp_path / "out", "evaluation.metric=mean_iou")


def test_what_is_damaged_foreign_or_for_another_backbone_is_no_task_model(
    own_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finetune(own_parts, tmp_path / "out", "optim.epochs=1") == 0
    monkeypatch.undo()  # now vit_tiny is wider than what was trained
    with pytest.raises(ValueError, match=r"best.pth: the weights do not fit the options beside them"):
        load_task_package(tmp_path / "out" / "best.pth")
    checkpoint = next((tmp_path / "out").glob("model_*.rank_0.pth"))
    with pytest.raises(ValueError, match="rank"):
        load_task_package(checkpoint)
    best = tmp_path / "out" / "best.pth"
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    best.write_bytes(content)
    with pytest.raises(ValueError, match=r"best.pth"):
        load_task_package(best)


def test_idle_options_of_the_head_and_parts_in_train_and_val_are_warned_of(own_parts: Path, tmp_path: Path) -> None:
    val = f"data.val_dataset_path=GroupedJSON:split=TRAIN:root={own_parts}"
    assert finetune(own_parts, tmp_path / "out", "optim.epochs=1", "head.channels=7", val) == 0
    log = (tmp_path / "out" / "log" / "log.txt").read_text()
    assert "head.channels has no effect on a linear head for classification" in log
    assert "parts are in both train and val" in log


@pytest.mark.parametrize("task", ["classification", "segmentation", "depth"])
def test_a_figure_that_does_not_exist_is_an_error_before_training(own_parts: Path, tmp_path: Path, task: str) -> None:
    real = {"classification": "part_auroc", "segmentation": "mean_dice", "depth": "rmse"}[task]
    with pytest.raises(ValueError, match=rf"evaluation\.metric={real}s: .* no such metric \(did you mean {real}\?\)"):
        finetune(own_parts, tmp_path / "out", f"evaluation.metric={real}s", task=task)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert finetune(own_parts, tmp_path / "out", f"evaluation.metric={real}", "optim.epochs=1", task=task) == 0


def test_a_val_set_of_one_class_is_an_error_before_training(own_parts: Path, tmp_path: Path) -> None:
    def all_good(content: dict[str, list[dict[str, object]]]) -> None:
        for row in content["data_list"]:
            row["gt_label"] = 0

    edit(own_parts, "val", all_good)
    with pytest.raises(ValueError, match=r"split=VAL.*: no image is of the class defective, so image_auroc, .*cannot"):
        finetune(own_parts, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert finetune(own_parts, tmp_path / "out", "evaluation.metric=image_accuracy", "optim.epochs=1") == 0
    assert "MISSING CLASS: GroupedJSON:split=VAL" in (tmp_path / "out" / "log" / "log.txt").read_text()


def write_masks(parts: Path, split: str, value: Callable[[Array], Array]) -> None:
    """Draws the masks of a split anew, as ``value`` says from zeros; all its images get one."""

    def name(content: dict[str, Any]) -> None:
        content["metainfo"]["mask_classes"] = ["background", "scratch", "dent"]
        for row in content["data_list"]:
            row["mask_path"] = f"new_masks/{Path(row['img_path']).stem}.png"
            (parts / "new_masks").mkdir(exist_ok=True)
            with Image.open(parts / row["img_path"]) as image:
                mask = np.zeros((image.height, image.width), dtype=np.uint8)
            Image.fromarray(value(mask)).save(parts / row["mask_path"])

    edit(parts, split, name)


def painted(*values: int) -> Callable[[Array], Array]:
    def paint(mask: Array) -> Array:
        mask[: len(values)] = np.array(values)[:, None]
        return mask

    return paint


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_set_that_shows_one_class_only_is_refused(own_parts: Path, tmp_path: Path, task: str) -> None:
    for split in ("train", "val"):
        edit(own_parts, split, lambda content: [row.update(gt_label=0) for row in content["data_list"]])
        write_masks(own_parts, split, painted(0))
    counted, left = ("image", "good") if task == "classification" else ("pixel", "background")
    with pytest.raises(ValueError, match=rf"split=TRAIN.*: no {counted} is of the class .* nothing but {left} is left"):
        finetune(own_parts, tmp_path / "out", task=task)


def test_a_class_that_is_never_there_is_warned_of(own_parts: Path, tmp_path: Path) -> None:
    write_masks(own_parts, "train", painted(1, 255))
    write_masks(own_parts, "val", painted(1, 2))
    assert finetune(own_parts, tmp_path / "out", "optim.epochs=1", task="segmentation") == 0
    log = (tmp_path / "out" / "log" / "log.txt").read_text()
    assert re.search(
        r"MISSING CLASS: .*split=TRAIN.* no pixel is of the class dent, which is never learnt .*mask_val", log
    )
    assert "split=VAL" not in "".join(line for line in log.splitlines() if "MISSING CLASS" in line)


def test_of_a_rare_defect_few_masks_are_read(own_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_task_config(None, pairs_of(own_parts, "segmentation"))
    sets = open_task_sets(config)
    read: list[int] = []
    monkeypatch.setattr(sets.train, "get_mask", lambda index: read.append(index) or np.eye(9, dtype=np.uint8))
    data = TrainingData(config.task_class(config, sets.facts), sets.train)
    assert check_classes(data, None) == {"train": ()}
    assert len(read) == 1
    assert sets.train.get_target(read[0]) == 1  # a defective one comes first


def test_where_the_folder_is_lost_nothing_is_made_and_the_run_fails(
    own_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real, calls = tmp_path / "run", Learner.step, iter(range(1000))

    def lose(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) == 1:
            run.rename(tmp_path / "moved")
            run.mkdir()
        return real(*arguments, **keywords)

    monkeypatch.setattr(Learner, "step", lose)
    with pytest.raises(LostFolderError, match="run was moved or replaced, or its disk is gone"):
        finetune(own_parts, run)
    assert not list(run.iterdir())


def test_a_signal_before_training_ends_it_with_the_code_to_start_again(own_parts: Path, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the preparation went on")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fine_tune, "prepare_run", interrupted)
        assert finetune(own_parts, tmp_path / "out") == RESUME_EXIT_CODE
    assert "the same command starts again" in (tmp_path / "out" / "log" / "log.txt").read_text()
    assert finetune(own_parts, tmp_path / "out") == 0


def test_without_a_file_the_backbone_is_that_of_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no checkout is near, as after an installation as a package."""
    monkeypatch.chdir(tmp_path)
    assert load_backbone_config(load_task_config()) == load_config()
