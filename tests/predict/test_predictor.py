"""Prediction for users: a file, or any callable with a task; nothing of the engine, no metrics."""

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dinov2.eval.sliding_window import Tile
from dinov2.predict.predictor import Predictor
from dinov2.tasks import load_task_config
from dinov2.tasks.package import Preprocessing
from dinov2.tasks.predictions import ClassPrediction
from dinov2.tasks.segmentation import SegmentationTask
from dinov2.tasks.task import Outputs, PreparedImage, TaskFacts
from tests.tasks.predictor_stand_ins import (
    BLUE,
    COLOUR_CLASSES,
    GREY,
    RED,
    ColourModel,
    halves,
    make_package,
    plain_image,
    write_package,
)

FACTS = TaskFacts(classes=COLOUR_CLASSES)
WINDOWS = Preprocessing(image_size=(16, 16), resize="original")


def test_predicting_imports_neither_the_engine_nor_metrics(tmp_path: Path) -> None:
    weights = write_package(tmp_path / "best.pth", "segmentation")
    code = (
        "import sys, numpy\n"
        "import dinov2.predict.images, dinov2.predict.video\n"
        "from dinov2.predict.predictor import Predictor\n"
        f"(found,) = Predictor.load({str(weights)!r}).predict([numpy.zeros((40, 50, 3), numpy.uint8)])\n"
        "found.draw(numpy.zeros((40, 50, 3), numpy.uint8)); found.to_dict()\n"
        "print([name for name in ('dinov2.tasks.engine', 'dinov2.tasks.evaluation', 'torchmetrics')"
        " if name in sys.modules])\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize("preprocessing", [WINDOWS, Preprocessing(image_size=(16, 16), resize="stretch")])
def test_another_runtime_answers_in_arrays(preprocessing: Preprocessing) -> None:
    model, image = ColourModel(), halves(40, 50)

    def run(images: Tensor) -> Mapping[str, Any]:
        return {name: value.numpy() for name, value in model(images).items()}

    task = SegmentationTask(load_task_config(None, ["task=segmentation"]), FACTS)
    (expected,), (found,) = (Predictor(each, task, preprocessing, flips=True).predict([image]) for each in (model, run))
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.scores, expected.scores)


class Difference(SegmentationTask):
    """Compares an image with a reference; what differs is red."""

    inputs = ("image", "reference")


@pytest.mark.parametrize("size", [(12, 16), (40, 50)])
def test_a_task_may_look_at_two_images_also_through_windows(size: tuple[int, int]) -> None:
    task = Difference(load_task_config(None, ["task=segmentation"]), TaskFacts(classes=("same", "different")))

    def run(images: Tensor, references: Tensor) -> Outputs:
        far = (images - references).abs().sum(dim=1, keepdim=True)
        return {"logits": torch.cat([torch.full_like(far, 0.5), far], dim=1)}

    predictor = Predictor(run, task, WINDOWS)
    prepared = predictor.prepare(halves(*size, GREY, RED), reference=plain_image(*size, GREY))
    (found,) = predictor.predict_prepared([prepared])
    assert (found.labels[:, size[1] // 2 :] == 1).all()
    assert (found.labels[:, : size[1] // 2] == 0).all()


class Areas(SegmentationTask):
    """Answers per window, not per pixel, and joins windows in its own way."""

    dense = False

    def merge_windows(self, tiles: Iterable[Tile], size: tuple[int, int]) -> Outputs:
        covered = torch.zeros(size)
        red = torch.zeros(1)
        for tile in tiles:
            covered[tile.top : tile.top + tile.size[0], tile.left : tile.left + tile.size[1]] += 1
            red = torch.maximum(red, tile.outputs["probabilities"][0, 1].max())
        assert (covered >= 1).all()
        return {"probabilities": torch.stack([1 - red, red], dim=1)}

    def postprocess(self, outputs: Outputs, prepared: Sequence[PreparedImage]) -> list[Any]:
        return (
            [ClassPrediction(row.numpy()) for row in outputs["probabilities"].flatten(2).amax(dim=2)]
            if (outputs["probabilities"].ndim == 4)
            else [ClassPrediction(row.numpy()) for row in outputs["probabilities"]]
        )


def test_a_task_that_is_not_dense_gets_its_windows_one_by_one() -> None:
    task = Areas(load_task_config(None, ["task=segmentation"]), FACTS)
    image = plain_image(50, 41, BLUE)
    image[45:, 30:] = RED
    model = ColourModel()
    (found,) = Predictor(model, task, WINDOWS, batch_size=5).predict([image])
    assert found.probabilities[1] > 0.9
    assert max(shape[0] for shape in model.batches) == 5


def test_parts_are_thinned_out_and_classified_as_a_whole() -> None:
    class Parts(ColourModel):
        def forward(self, images: Tensor) -> Outputs:
            self.batches.append(tuple(images.shape))
            return {"logits": images.mean(dim=(1, 3, 4))}

    model = Parts()
    package = make_package(
        model, "classification", "head.per_part=true", "data.max_photos=2", classes=("red", "green", "blue")
    )
    parts = [[plain_image(9, 9, colour) for colour in colours] for colours in ([RED] * 5, [BLUE], [BLUE, BLUE])]
    found = Predictor.of(package).predict_parts(parts)
    assert [one.describe(scores=False) for one in found] == ["red", "blue", "blue"]
    assert sorted(shape[:2] for shape in model.batches) == [(1, 1), (2, 2)]
    with pytest.raises(ValueError, match="a part needs at least one image"):
        Predictor.of(package).predict_parts([[]])
    with pytest.raises(ValueError, match=r"takes single images; train with head\.per_part=true"):
        Predictor.of(make_package(ColourModel())).predict_parts([[plain_image(9, 9, RED)]])


def test_a_prepared_image_knows_the_way_back() -> None:
    task = ("classification", "head.pooling=cls")
    squeezed = Predictor.of(make_package(ColourModel(dense=False), *task)).prepare(plain_image(32, 64, RED))
    assert (squeezed.size, squeezed.scale, squeezed.padding) == ((32, 64), (0.5, 0.25), (0, 0))
    cut = Predictor.of(make_package(ColourModel(dense=False), *task, resize="shorter_side"))
    prepared = cut.prepare(plain_image(32, 64, RED))
    assert (prepared.scale, prepared.padding) == ((0.5, 0.5), (0, -8))
