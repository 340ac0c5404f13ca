"""A task of one's own, a prediction and a metric, in 82 lines: engine and predictor need to know nothing else."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fine_tune_stand_ins import make_small, pairs_of
from PIL import Image, ImageStat
from torch import Tensor, nn

import dinov2
from dinov2.config.schema import leaf
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.task_dataset import TaskSample
from dinov2.predict.images import ResultFiles, find_inputs, infer_images
from dinov2.predict.predictor import Predictor
from dinov2.tasks import TASKS, load_task_config
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.predictions import Prediction
from dinov2.tasks.task import ExportOutput, Head, Outputs, PreparedImage, Task, TaskFacts, TaskMetrics


def brightness(image: Image.Image | str) -> float:
    if isinstance(image, str):
        with Image.open(image) as opened:
            return brightness(opened.convert("RGB"))
    return ImageStat.Stat(image.convert("L")).mean[0] / 255


@dataclass(frozen=True, kw_only=True)
class BrightnessOptions:
    weight: float = leaf(1.0, "Weight of the squared error.", above=0)


@dataclass(frozen=True)
class BrightnessPrediction(Prediction):
    value: float

    def to_dict(self) -> dict[str, Any]:
        return {"brightness": round(self.value, 6)}

    def table_row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(values)

    def describe(self, *, scores: bool = True) -> str:
        return f"brightness {self.value:.2f}"


class BrightnessHead(nn.Module):
    def __init__(self, embed_dim: int, num_outputs: int, *, num_blocks: int) -> None:
        super().__init__()
        self.layer = nn.Linear(embed_dim, num_outputs)

    def forward(self, features: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        patches, _ = features[-1]
        return torch.as_tensor(self.layer(patches.mean(dim=(2, 3))))


class BrightnessMetrics(TaskMetrics):
    def __init__(self, dataset: ImageDataset) -> None:
        super().__init__(dataset)
        self.errors: list[float] = []

    def update(self, index: int, prediction: BrightnessPrediction) -> float:
        self.errors.append(abs(prediction.value - brightness(self.dataset.get_image(index))))
        return self.errors[-1]

    def ground_truth(self, index: int) -> BrightnessPrediction:
        return BrightnessPrediction(brightness(self.dataset.get_image(index)))

    def merge_processes(self) -> None:
        pass

    def compute(self) -> dict[str, float]:
        return {"absolute_error": sum(self.errors) / max(len(self.errors), 1)}


class Brightness(Task):
    name = "brightness"
    options = BrightnessOptions
    heads = MappingProxyType({"linear": Head.of(BrightnessHead)})
    output = "brightness"
    is_error = ("absolute_error",)
    metric = "absolute_error"

    @classmethod
    def read_facts(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> TaskFacts:
        return TaskFacts()

    def read_targets(self, dataset: ImageDataset) -> Callable[[int], TaskSample]:
        return lambda index: {"brightness": torch.tensor([brightness(dataset.get_image(index))])}

    def loss(self, outputs: Outputs, targets: Any) -> Outputs:
        weight = self.config.brightness.weight
        return {"squared": weight * F.mse_loss(outputs["brightness"], targets["brightness"])}

    def postprocess(self, outputs: Outputs, prepared: Sequence[PreparedImage]) -> list[BrightnessPrediction]:
        return [BrightnessPrediction(value) for value in outputs["brightness"][:, 0].tolist()]

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        return (ExportOutput(name="brightness", meaning="[B, 1], mean brightness in 0..1"),)

    def metrics(self, dataset: ImageDataset) -> BrightnessMetrics:
        return BrightnessMetrics(dataset)


def test_a_toy_task_is_learnt_evaluated_predicted_and_drawn(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch, plots=True)
    tasks = {**TASKS, "brightness": Brightness}
    pairs = [*pairs_of(parts), "task=brightness", "brightness.weight=2", "evaluation.num_pictures=2"]
    out = tmp_path / "out"
    pairs += ["optim.lr=0.05", "backbone.mode=full", f"train.output_dir={out}"]
    assert dinov2.finetune(load_task_config(None, pairs, tasks), tasks=tasks) == out

    results = json.loads((out / "val" / "results.json").read_text())
    error = results["extra"]["figures"]["absolute_error"]
    assert results["settings"]["metric"] == "absolute_error"
    assert (out / "plots" / "absolute_error.png").exists()
    assert (out / "valid_preds" / "epoch_0002.png").exists()

    predictor = Predictor.load(out / "best.pth", tasks=tasks)
    images = find_inputs([str(parts / "val")], tmp_path / "found")
    with ResultFiles(tmp_path / "found") as files:
        assert infer_images(predictor, images, files) == 0
    lines = [json.loads(line) for line in (tmp_path / "found" / "predictions.jsonl").read_text().splitlines()]
    found = [abs(line["brightness"] - brightness(line["image"])) for line in lines]
    assert sum(found) / len(found) == pytest.approx(error, abs=1e-4)
    assert (tmp_path / "found" / "predictions.csv").read_text().startswith("image,brightness\n")
    with Image.open(tmp_path / "found" / lines[0]["overlay"]) as drawn:
        assert drawn.height > drawn.width  # the legend lies below

    with pytest.raises(ValueError, match=r"best.pth is of task=brightness; known are classification, segmentation"):
        Predictor.load(out / "best.pth")
