"""Heads on one frozen backbone: the same predictions as of separate models, by one pass of the backbone."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dinov2
from dinov2.data.value_range import ValueRange
from dinov2.models import build
from dinov2.models.description import fingerprint
from dinov2.models.task_model import TaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.predict.predictor import Predictor
from dinov2.tasks.joint import join_heads
from dinov2.tasks.package import TaskPackage, load_task_package
from dinov2.tasks.predictions import (
    ClassPrediction,
    DepthPrediction,
    DetectionPrediction,
    NamedPredictions,
    Prediction,
    SaveOptions,
    SegmentationPrediction,
)
from tests.tasks.predictor_stand_ins import make_package, plain_image, write_package

TASKS = {"classes": "classification", "masks": "segmentation", "depth": "depth"}


def very_small_vit(**options: Any) -> DinoVisionTransformer:
    return DinoVisionTransformer(embed_dim=16, depth=4, num_heads=2, **options)


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "ARCHITECTURES", {"vit_tiny": very_small_vit})
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of three heads on the same backbone."""
    folder = tmp_path_factory.mktemp("heads")
    return {name: write_package(folder / f"{name}.pth", task) for name, task in TASKS.items()}


@pytest.fixture
def packages(files: dict[str, Path]) -> dict[str, TaskPackage]:
    return {name: load_task_package(path) for name, path in files.items()}


@pytest.fixture
def images() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((40, 50), (32, 32))]


def values(prediction: Prediction) -> list[np.ndarray]:
    return [value for value in vars(prediction).values() if isinstance(value, np.ndarray)]


def test_joined_heads_say_the_same_as_separate_models(files: dict[str, Path], images: list[np.ndarray]) -> None:
    model = dinov2.load(list(files.values()))
    found = model.predict(images)
    for name, path in files.items():
        for ours, alone in zip(found, dinov2.load(path).predict(images), strict=True):
            assert list(ours) == list(TASKS)
            for one, other in zip(values(ours[name]), values(alone), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
    assert dinov2.load(dict(files)).fingerprint == model.fingerprint
    assert len({model.fingerprint, *(dinov2.load(path).fingerprint for path in files.values())}) == 4


def test_thresholds_and_mirrored_images_reach_their_head(
    packages: dict[str, TaskPackage], images: list[np.ndarray]
) -> None:
    limits = {"crack": 0.9, "background": 0.1}
    alone = {
        name: replace(package, thresholds=limits if name == "classes" else {}) for name, package in packages.items()
    }
    expected = {name: Predictor.of(package, flips=True).predict(images) for name, package in alone.items()}
    network, task, thresholds = join_heads(alone)
    assert thresholds == {"classes/crack": 0.9, "classes/background": 0.1}
    preparation = alone["masks"].preprocessing
    joined = Predictor(network, task, preparation, flips=True, thresholds=thresholds).predict(images)
    for place, found in enumerate(joined):
        for name, prediction in found.items():
            for one, other in zip(values(prediction), values(expected[name][place]), strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)
    outputs = network(torch.zeros(1, 3, 32, 32))
    assert list(outputs) == [output.name for output in task.export_outputs()]


def test_each_image_passes_the_backbone_once(packages: dict[str, TaskPackage], images: list[np.ndarray]) -> None:
    network, task, _ = join_heads(packages)
    rows: list[int] = []
    network.backbone.patch_embed.register_forward_hook(lambda module, given, output: rows.append(len(output)))
    Predictor(network, task, packages["masks"].preprocessing).predict(images)
    assert rows == [2]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    heads = sum(sum(p.numel() for p in package.model.head.parameters()) for package in packages.values())
    assert parameters == heads + sum(parameter.numel() for parameter in network.backbone.parameters())


def change(package: TaskPackage, **fields: Any) -> TaskPackage:
    return replace(package, preprocessing=replace(package.preprocessing, **fields))


def of_another_backbone(package: TaskPackage) -> TaskPackage:
    assert isinstance(package.model, TaskModel)
    package.model.backbone.cls_token.data += 1
    return package


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (of_another_backbone, "classes and masks cannot be joined: their backbones have different weights"),
        (lambda package: change(package, image_size=(64, 64)), "masks cannot be joined: their image_size differs"),
        (lambda package: change(package, light="standardized"), "their light differs \\(original and standardized"),
        (lambda package: change(package, value_range=ValueRange(0, 4095)), "their value_range differs \\(None and"),
        (lambda package: change(package, resize="original"), "masks cannot be joined: with data.resize=original"),
        (lambda package: make_package(torch.nn.Identity()), "masks cannot be joined: only heads over single images"),
    ],
    ids=["backbone", "size", "light", "range", "windows", "kind"],
)
def test_what_does_not_go_together_is_refused_by_name(
    packages: dict[str, TaskPackage], spoil: Any, message: str
) -> None:
    packages["masks"] = spoil(packages["masks"])
    with pytest.raises(ValueError, match=message):
        join_heads(packages)


def test_heads_that_see_another_part_of_the_image_are_refused(packages: dict[str, TaskPackage]) -> None:
    cut = {name: change(package, resize="shorter_side") for name, package in packages.items()}
    with pytest.raises(ValueError, match="train both with data"):
        join_heads(cut)


def test_names_come_from_files_or_their_folders(files: dict[str, Path], tmp_path: Path) -> None:
    paths = []
    for name in ("classes", "masks"):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "best.pth")
        paths[-1].write_bytes(files[name].read_bytes())
    assert list(dinov2.load(paths).heads) == ["classes", "masks"]
    with pytest.raises(ValueError, match="need names"):
        dinov2.load([paths[0], paths[0]])
    with pytest.raises(ValueError, match="leave config out"):
        dinov2.load(paths, "dinov2_vits14")
    with pytest.raises(ValueError, match="no model"):
        dinov2.load([])


def test_a_fingerprint_is_of_the_weights_alone() -> None:
    def layer(seed: int) -> torch.nn.Linear:
        torch.manual_seed(seed)
        return torch.nn.Linear(3, 2)

    assert fingerprint(layer(0)) == fingerprint(layer(0)) != fingerprint(layer(1))
    changed = layer(0)
    changed.bias.data[1] = torch.nextafter(changed.bias[1], torch.tensor(1.0))
    assert fingerprint(changed) != fingerprint(layer(0)) != fingerprint(layer(0).half())


def test_named_predictions_are_drawn_and_saved(files: dict[str, Path], tmp_path: Path) -> None:
    image = plain_image(32, 40, (200, 100, 50))
    (found,) = dinov2.load(dict(files)).predict([image])
    assert isinstance(found, NamedPredictions)
    said = json.loads(json.dumps(found.to_dict()))
    assert list(said) == list(TASKS)
    assert said["masks"] == found["masks"].to_dict()
    assert found.table_row(found.to_dict())["depth unit"] == "mm"
    written = found.save(tmp_path, "a", SaveOptions())
    assert all((tmp_path / path).is_file() for kind, path in written.items() if "step" not in kind)
    single = [prediction.draw(image) for prediction in found.values()]
    assert found.draw(image).width == sum(drawing.width for drawing in single)
    assert found.describe().startswith("classes: ")
    sure = [found[name].certainty() for name in ("classes", "masks")]
    assert found.certainty() == min(known for known in sure if known is not None)


ONE_PIXEL = np.zeros((1, 1), dtype=np.uint8)


def of_score(score: float, label: int = 0) -> SegmentationPrediction:
    score_map = np.full((1, 1), score, dtype=np.float32)
    return SegmentationPrediction(ONE_PIXEL + label, np.maximum(score_map, 1 - score_map), score_map)


def boxes(*scores: float) -> DetectionPrediction:
    count = len(scores)
    return DetectionPrediction(
        np.zeros((count, 4), dtype=np.float32), np.array(scores, dtype=np.float32), np.zeros(count, dtype=np.int64)
    )


def classes(*scores: float, **more: Any) -> ClassPrediction:
    return ClassPrediction(np.array(scores, dtype=np.float32), **more)


@pytest.mark.parametrize(
    ("prediction", "score", "certainty"),
    [
        (classes(0.1, 0.7, 0.2), 0.7, 0.5),
        (classes(0.8, 0.2, thresholds=(0.0, 0.1)), 0.2, 0.1 / 0.9),
        (classes(0.9, 0.1, multi_label=True), 0.9, 0.8),
        (classes(0.9, 0.1, multi_label=True, thresholds=(0.9, 0.5)), 0.9, 0.0),
        (of_score(0.1), 0.1, 0.8),
        (of_score(0.9, 1), 0.9, 0.8),
        (boxes(0.9, 0.6), 0.9, 0.2),
        (boxes(), 0.0, 1.0),
        (DepthPrediction(np.zeros((1, 1), dtype=np.float32)), None, None),
    ],
)
def test_how_sure_a_prediction_is(prediction: Prediction, score: float | None, certainty: float | None) -> None:
    assert prediction.image_score() == (None if score is None else pytest.approx(score))
    assert prediction.certainty() == (None if certainty is None else pytest.approx(certainty, abs=1e-6))
