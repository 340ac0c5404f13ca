"""Engines build from exported graphs, without a GPU, by TensorRT for RTX; both generations of the API are covered."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dinov2.deploy import engine
from dinov2.deploy.deployed import load_deployed
from dinov2.deploy.engine import EngineSettings, build_engine, check_traps
from dinov2.deploy.export import ExportSettings, export_model
from tests.deploy.deploy_stand_ins import open_parts, tiny_model

onnx = pytest.importorskip("onnx")


@pytest.mark.tensorrt
@pytest.mark.parametrize(
    ("task", "head", "precision", "batch"),
    [("depth", "dpt", "bf16", 1), ("detection", "detr", "int8", 0), ("segmentation", "auto", "fp16", 2)],
)
def test_engines_build(
    task: str, head: str, precision: str, batch: int, parts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("onnxscript", "openvino", "tensorrt_rtx"):
        pytest.importorskip(name)
    if torch.cuda.is_available():
        pytest.skip("here an engine is checked too, on the weights of a real model: dinov2 export --to tensorrt")
    model, path = tiny_model(parts, task, head), tmp_path / "model.engine"
    settings = ExportSettings(
        to="tensorrt", precision=precision, batch_size=batch, images=2, metric_images=2,
        engine=EngineSettings(optimization=0, max_batch=4),
    )  # fmt: skip
    export_model(model, open_parts(parts), path, settings)
    described = json.loads((tmp_path / "model.engine.json").read_text())
    assert described["precision"] == precision
    assert described["build"]["library"] == "tensorrt_rtx"
    assert bool(described["build"]["profile"]) == (batch == 0)
    assert "no GPU is here to check the engine" in caplog.text
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and the driver finds none"):
        load_deployed(path)


def graph_of(operation: str, weight: np.ndarray, **attributes: Any) -> "onnx.ModelProto":
    make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    node = onnx.helper.make_node(operation, ["weight", "weight"], ["y"], name="norm/Op", **attributes)
    stored = onnx.numpy_helper.from_array(weight, "weight")
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [make("y", kind, None)], [stored]))


@pytest.mark.parametrize(
    ("graph", "fault"),
    [
        (graph_of("Resize", np.zeros(4, np.float32), antialias=1), "antialias has no form in TensorRT"),
        (graph_of("Attention", np.zeros(4, np.float32)), "write it out"),
        (graph_of("DequantizeLinear", np.zeros(4, np.int32)), "biases of int32 are refused"),
        (graph_of("Mul", np.zeros(4, np.float32)), "norms are written out"),
    ],
)
def test_known_traps_are_found_before_a_build(graph: "onnx.ModelProto", fault: str) -> None:
    assert any(fault in found for found in check_traps(graph))
    with pytest.raises(ValueError, match=fault):
        build_engine(graph, {}, EngineSettings())


# Names of the API, as they are in both generations.
BOTH = {
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "OnnxParser": "parse num_errors get_error",
    "BuilderConfig": "set_memory_pool_limit builder_optimization_level profiling_verbosity set_flag "
    "hardware_compatibility_level add_optimization_profile create_timing_cache set_timing_cache",
    "Profile": "set_shape",
}
FLAGS = {"10.7.0": {"STRONGLY_TYPED": 1, "EXPLICIT_BATCH": 0}, "11.0.0": {}}


class Recorded:
    """An object that has the names of a list, and no other."""

    def __init__(self, kind: str, **values: Any) -> None:
        object.__setattr__(self, "_names", {*BOTH[kind].split()})
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise AttributeError(name)
        object.__setattr__(self, name, value)


@pytest.mark.parametrize("version", FLAGS)
def test_both_generations_of_the_api_are_called_as_they_are(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Any] = []
    cache = SimpleNamespace(serialize=lambda: b"measured")
    config = Recorded(
        "BuilderConfig",
        set_memory_pool_limit=lambda pool, size: calls.append((pool, size)),
        set_flag=calls.append,
        add_optimization_profile=lambda profile: calls.append("profile"),
        create_timing_cache=lambda known: cache,
        set_timing_cache=lambda given, ignore_mismatch: calls.append(given),
    )
    builder = Recorded(
        "Builder",
        create_network=lambda flags: calls.append(flags) or "network",
        create_builder_config=lambda: config,
        create_optimization_profile=lambda: Recorded("Profile", set_shape=lambda *given: calls.append(given)),
        build_serialized_network=lambda network, config: bytearray(b"engine"),
    )
    library = SimpleNamespace(
        __name__="tensorrt",
        __version__=version,
        ILogger=type("ILogger", (), {}),
        Builder=lambda log: builder,
        OnnxParser=lambda network, log: Recorded("OnnxParser", parse=lambda data: True, num_errors=0),
        NetworkDefinitionCreationFlag=SimpleNamespace(**FLAGS[version]),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        BuilderFlag=SimpleNamespace(VERSION_COMPATIBLE="portable"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere"),
    )
    monkeypatch.setattr(engine, "import_builder", lambda: library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = EngineSettings(portable=True, timing_cache=tmp_path / "cache", max_batch=4)
    graph = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    built, record = build_engine(graph, {"image": [0, 3, 8, 8]}, settings)
    assert built == b"engine"
    assert calls[0] == (2 if version.startswith("10") else 0), "strongly typed"
    assert ("image", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8)) in calls
    assert "portable" in calls
    assert (config.hardware_compatibility_level, config.builder_optimization_level) == ("ampere", 3)
    assert (tmp_path / "cache").read_bytes() == b"measured"
    assert record["version"] == version


def test_no_module_is_imported_because_a_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'antigravity' built it; allowed: tensorrt, tensorrt_rtx"):
        engine.EngineSession(tmp_path / "model.engine", {"library": "antigravity"})


@pytest.mark.parametrize(("version", "warned"), [("10.3.0.26", True), ("10.13.2", False)])
def test_old_versions_are_warned_of(
    version: str, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "is_installed", lambda name: True)
    with pytest.raises(ValueError, match="the driver finds none"):
        engine.import_builder()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(engine, "import_runtime", lambda name: SimpleNamespace(__version__=version))
    engine.import_builder()
    assert ("came out wrong" in caplog.text) == warned
