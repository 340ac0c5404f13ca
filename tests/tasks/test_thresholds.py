"""Thresholds of every task: chosen on val for what the options want, kept in the file, and what predictions go by."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fine_tune_stand_ins import finetune, make_small
from predictor_stand_ins import RED, ColourModel, make_package, plain_image
from torch import nn

from dinov2.data.loaders import make_dataset
from dinov2.predict.predictor import Predictor
from dinov2.tasks import load_task_config
from dinov2.tasks.classification import ClassificationTask
from dinov2.tasks.package import load_task_package
from dinov2.tasks.predictions import ClassPrediction, SegmentationPrediction
from dinov2.tasks.task import TaskFacts


class Sure(nn.Module):
    """Gives the same logits for every image, of every pixel if ``dense``."""

    def __init__(self, *logits: float, dense: bool = False) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits), requires_grad=False)
        self.dense = dense

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = self.logits.expand(len(images), -1)
        return {"logits": rows[:, :, None, None].expand(-1, -1, *images.shape[-2:]) if self.dense else rows}


def predict(model: nn.Module, task: str, thresholds: dict[str, float], *pairs: str, classes: Any) -> Any:
    package = make_package(model, task, *pairs, classes=classes)
    predictor = Predictor(model, package.task, package.preprocessing, thresholds=thresholds)
    (prediction,) = predictor.predict([plain_image(16, 16, RED)])
    return prediction


@pytest.mark.parametrize(("threshold", "label"), [(None, "good"), (0.2, "bad"), (0.3, "good")])
def test_of_two_classes_the_second_is_there_from_its_threshold_on(threshold: float | None, label: str) -> None:
    """Its probability is 0.269."""
    thresholds = {} if threshold is None else {"bad": threshold}
    found = predict(Sure(1.0, 0.0), "classification", thresholds, classes=("good", "bad"))
    assert isinstance(found, ClassPrediction)
    assert found.to_dict()["label"] == label
    assert found.to_dict()["score"] == pytest.approx(0.268941 if label == "bad" else 0.731059)
    assert found.legend()[0].text == label


def test_several_classes_are_decided_by_thresholds_of_their_own() -> None:
    """Their probabilities are 0.27, 0.5 and 0.73."""
    model, classes = Sure(-1.0, 0.0, 1.0), ("a", "b", "c")
    for thresholds, labels in (({}, ["b", "c"]), ({"a": 0.2, "b": 0.6}, ["a", "c"]), ({"b": 0.9, "c": 0.9}, [])):
        found = predict(model, "classification", thresholds, "data.multi_label=true", classes=classes)
        assert found.to_dict()["labels"] == labels


def test_pixels_of_one_defect_begin_at_its_threshold() -> None:
    for threshold, share in ((None, 0.0), (0.2, 1.0), (0.3, 0.0)):
        thresholds = {} if threshold is None else {"crack": threshold}
        found = predict(Sure(1.0, 0.0, dense=True), "segmentation", thresholds, classes=("background", "crack"))
        assert isinstance(found, SegmentationPrediction)
        assert found.labels.mean() == share
        np.testing.assert_allclose(found.scores, 0.268941 if share else 0.731059, rtol=1e-5)
    found = predict(ColourModel(), "segmentation", {"red": 0.999}, classes=("grey", "red", "green", "blue"))
    assert found.labels.min() == 1  # of more classes the most probable is taken


@pytest.mark.parametrize(("task", "name"), [("classification", "defective"), ("segmentation", "defect")])
def test_the_threshold_that_val_chose_is_kept_and_finds_what_it_should(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, name: str
) -> None:
    make_small(monkeypatch)
    wanted = ("evaluation.threshold=recall", "evaluation.threshold_recall=1", "evaluation.threshold_level=part")
    assert finetune(parts, tmp_path, *wanted, "optim.epochs=1", task=task) == 0
    package = load_task_package(tmp_path / "best.pth")
    assert list(package.thresholds) == [name]
    assert 0 < package.thresholds[name] < 1
    val: Any = make_dataset(dataset_str=f"GroupedJSON:split=VAL:root={parts}")
    found: list[Any] = Predictor.of(package).predict([val.get_image(index) for index in range(len(val))])
    is_found = [one.present() == [1] if task == "classification" else bool(one.labels.any()) for one in found]
    for part in set(val.get_group_ids()):
        members = [index for index, group in enumerate(val.get_group_ids()) if group == part]
        if any(val.get_target(index) for index in members):
            assert any(is_found[index] for index in members)


def test_more_classes_than_a_threshold_can_tell_apart_are_refused() -> None:
    class Many:
        classes = mask_classes = ("a", "b", "c")

    config = load_task_config(None, ["evaluation.threshold=f1"])
    with pytest.raises(
        ValueError, match=r"evaluation\.threshold=f1 is for two classes, or several per image; set has 3"
    ):
        ClassificationTask.check_dataset(config, Many(), "set")
    ClassificationTask.check_dataset(load_task_config(None, []), Many(), "set")


def test_classes_of_an_image_get_thresholds_one_by_one() -> None:
    class Several:
        """Two images of one part, and one of another."""

        def __len__(self) -> int:
            return 3

        def get_labels(self, index: int) -> tuple[int, ...]:
            return ((0,), (), (1,))[index]

        def get_group_ids(self) -> list[str]:
            return ["x", "x", "y"]

    rows = np.array([[0.8, 0.4], [0.2, 0.3], [0.3, 0.6]], dtype=np.float32)
    for level, expected in (("image", {"a": 0.55, "b": 0.5}), ("part", {"a": 0.55, "b": 0.5})):
        pairs = ["data.multi_label=true", "evaluation.threshold=f1", f"evaluation.threshold_level={level}"]
        task = ClassificationTask(load_task_config(None, pairs), TaskFacts(classes=("a", "b")))
        metrics = task.metrics(Several())
        for index, row in enumerate(rows):
            metrics.update(index, ClassPrediction(row, multi_label=True))
        assert metrics.thresholds() == pytest.approx(expected)
