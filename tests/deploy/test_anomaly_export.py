"""An anomaly model is one exported file, memory and all, that passes the gate."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from dinov2.deploy.deployed import load_deployed
from dinov2.deploy.export import ExportSettings, export_model
from dinov2.models.heads.anomaly import MemoryHead
from dinov2.models.task_model import TaskModel
from tests.deploy.deploy_stand_ins import open_parts, tiny_model

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(("batch", "precision", "masked"), [(1, "fp32", True), (0, "fp16", False)])
def test_the_file_holds_the_memory_and_the_thresholds(
    batch: int, precision: str, masked: bool, parts: Path, tmp_path: Path
) -> None:
    model, dataset = tiny_model(parts, "anomaly", "memory"), open_parts(parts)
    assert model.package is not None
    assert isinstance(model.package.model, TaskModel)
    head = model.package.model.head
    assert isinstance(head, MemoryHead)
    foreground = torch.cat([normalize(torch.randn(4 * 24), dim=0), torch.zeros(1)]) if masked else None
    head.remember(normalize(torch.randn(50, 4 * 24), dim=1), radius=0.5, num_patches=500, foreground=foreground)
    thresholds = {"image": 0.5, "image.false_alarm_rate": 0.01, "pixel": 0.6}
    model = replace(model, package=replace(model.package, thresholds=thresholds))
    path = tmp_path / "model.onnx"
    reports = export_model(
        model, dataset, path, ExportSettings(batch_size=batch, precision=precision, images=3, metric_images=4)
    )
    assert all(report.passed for report in reports)
    exported = load_deployed(path)
    images = [dataset.get_image(index) for index in range(3)]
    for ours, theirs in zip(model.predict(images), exported.predict(images), strict=True):
        assert theirs.to_dict()["label"] == ours.to_dict()["label"]
        assert dict(theirs.thresholds) == thresholds
        np.testing.assert_allclose(theirs.map, ours.map, atol=1e-4 if precision == "fp32" else 0.02)
