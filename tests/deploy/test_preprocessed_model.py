"""A model that was trained with preprocessing gives one answer for a raw file, wherever it runs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from dinov2.config import load_config
from dinov2.data.loaders import make_dataset
from dinov2.data.preprocessing import Chain
from dinov2.deploy.deployed import load_deployed
from dinov2.deploy.export import ExportSettings, export_model
from dinov2.models import build
from dinov2.predict.images import main as infer_images
from dinov2.predict.model import load_model
from dinov2.tasks.package import save_task_package
from tests.deploy.deploy_stand_ins import tiny_model, tiny_vit
from tests.deploy.service_stand_ins import served

for _module in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_module)

CHAIN = Chain.parse(
    [
        {"window": {"low": 1, "high": 99}},
        {"clahe": {"tiles": 2}},
        {"crop": {"top": 8, "left": 4, "height": 40, "width": 48}},
    ]
)
BACKBONE = ("student.arch=vit_tiny", "student.patch_size=8", "crops.global_crops_size=32", "student.layerscale=1.0")


def test_python_the_command_onnx_runtime_and_the_service_agree(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "ARCHITECTURES", {"vit_tiny": tiny_vit})
    package = tiny_model(parts, "segmentation", "conv_decoder").package
    assert package is not None
    state, weights = package.model.state_dict(), tmp_path / "best.pth"
    save_task_package(
        weights, state, package.task, load_config(None, BACKBONE), light="original", figures={}, chain=CHAIN
    )
    model = load_model(weights)
    dataset = make_dataset(dataset_str=f"GroupedJSON:split=VAL:root={parts}", preprocessing=model.preprocessing)
    export_model(model, dataset, tmp_path / "model.onnx", ExportSettings(images=2, metric_images=2))

    file = tmp_path / "raw.png"
    grey = cv2.imread(str(dataset.get_image_path(0)), cv2.IMREAD_GRAYSCALE).astype(np.uint16) * 9 + 3000
    cv2.imwrite(str(file), grey)  # of 16 bits, of which it uses a sliver
    (prediction,) = model.predict([file])
    expected = prediction.to_dict()
    assert sum(expected["pixels"].values()) == grey.size
    assert model.predict([grey])[0].to_dict() == expected
    assert infer_images(
        ["--weights", str(weights), "--input", str(file), "--output-dir", str(tmp_path / "out"), "--device", "cpu"]
    ) == 0  # fmt: skip
    line = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())
    assert {name: line[name] for name in expected} == expected
    exported = load_deployed(tmp_path / "model.onnx", runtime="onnxruntime")
    assert exported.preprocessing == CHAIN
    assert_alike(exported.predict([file])[0].to_dict(), expected)
    for one in (model, exported):
        with served(one) as service:
            assert_alike(service.predict(file.read_bytes()).json["prediction"], expected)


def assert_alike(found: Any, expected: Any) -> None:
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_alike(found[name], expected[name])
    else:
        assert found == pytest.approx(expected, rel=1e-3)
