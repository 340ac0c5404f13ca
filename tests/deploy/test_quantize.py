"""INT8: ranges against their definitions, what is quantised, and that the gate catches ranges that clip."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dinov2.deploy import export, quantize
from dinov2.deploy.deployed import load_deployed
from dinov2.deploy.export import Exporter, ExportSettings, export_model
from dinov2.deploy.graph import module_of
from dinov2.deploy.parity import GateError
from dinov2.deploy.runtimes import OnnxRuntimeSession, Session
from tests.deploy.deploy_stand_ins import open_parts, tiny_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

LAYERS = [
    f"backbone.blocks.{block}.{layer}"
    for block in range(4)
    for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
]


@pytest.fixture(scope="module")
def exporter(parts: Path) -> Exporter:
    model = tiny_model(parts, "segmentation")
    return Exporter(model, open_parts(parts), ExportSettings(precision="int8", images=4, metric_images=2))


@pytest.fixture(scope="module")
def graph(exporter: Exporter) -> "onnx.ModelProto":
    return exporter.graph("fp32")[0]


@pytest.fixture(scope="module")
def batches(exporter: Exporter) -> list[dict[str, NDArray[np.float32]]]:
    return [{"image": image[None]} for image in exporter.expected.inputs["image"]]


def open_session(data: bytes) -> Session:
    return OnnxRuntimeSession(data)


def test_linear_layers_of_blocks_are_quantised_and_nothing_else(
    graph: "onnx.ModelProto", batches: list[dict[str, NDArray[np.float32]]]
) -> None:
    assert [product.layer for product in quantize.linear_products(graph)] == LAYERS
    largest = quantize.calibrate(graph, open_session, batches, "minmax")
    keep = ["backbone.blocks.0", "backbone.blocks.3.mlp.fc2"]
    made = quantize.quantize(graph, largest, keep)
    touched = {module_of(node.name) for node in made.graph.node if node.op_type == "DequantizeLinear"}
    assert touched == set(LAYERS[4:-1])
    assert {output.name for output in made.graph.output} == {"logits"}
    assert len(made.SerializeToString()) < 0.9 * len(graph.SerializeToString())
    with pytest.raises(ValueError, match=r"keep=backbone\.blocks\.9: no quantised layer"):
        quantize.linear_products(graph, ["backbone.blocks.9"])


def test_joined_heads_are_quantised_by_the_same_names_and_int8_of_nothing_is_refused(parts: Path) -> None:
    joint = Exporter(tiny_model(parts, "joint"), open_parts(parts), ExportSettings(batch_size=0, images=2))
    graph = joint.graph("fp32")[0]
    assert [product.layer for product in quantize.linear_products(graph)] == LAYERS
    with pytest.raises(ValueError, match="keep=backbone leaves no linear layer to be int8"):
        quantize.linear_products(graph, ["backbone"])


def test_the_largest_of_all_images_is_kept(
    graph: "onnx.ModelProto", batches: list[dict[str, NDArray[np.float32]]], exporter: Exporter
) -> None:
    largest = quantize.calibrate(graph, open_session, batches, "minmax")
    package = exporter.model.package
    assert package is not None
    seen: list[float] = []
    layer = package.model.get_submodule(LAYERS[2])
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(float(given[0].abs().max())))
    quantised = package.model.get_submodule(LAYERS[0])
    import torch

    package.model(torch.from_numpy(exporter.expected.inputs["image"]))
    handle.remove()
    assert largest[LAYERS[2]] == pytest.approx(max(seen), rel=1e-5)
    assert largest.keys() == set(LAYERS)
    assert quantised is not layer


def test_ranges_of_a_known_spread() -> None:
    """Of a few far outliers: all but 0.01 % are below the percentile, and entropy leaves out those, but no others."""
    values = np.abs(np.random.default_rng(0).standard_normal(200_000))
    values[:5] = 100
    counts, edges = np.histogram(values, bins=2048, range=(0, 100))
    kept = edges[quantize._percentile_bin(counts)]
    assert kept == pytest.approx(np.quantile(values, 0.9999), abs=0.1)
    by_entropy = edges[quantize._entropy_bin(counts)]
    assert 3 < by_entropy < 20
    even, _ = np.histogram(np.linspace(0, 1, 200_000), bins=2048, range=(0, 1))
    assert quantize._entropy_bin(even) > 2000, "nothing to leave out"


@pytest.mark.parametrize("ranges", quantize.RANGES)
def test_an_int8_graph_says_nearly_the_same(
    ranges: str, graph: "onnx.ModelProto", batches: list[dict[str, NDArray[np.float32]]]
) -> None:
    largest = quantize.calibrate(graph, open_session, batches, ranges)
    expected = open_session(graph.SerializeToString()).run(batches[0])["logits"]
    found = open_session(quantize.quantize(graph, largest).SerializeToString()).run(batches[0])["logits"]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.98
    assert not np.array_equal(found, expected)


def test_smoothing_changes_nothing_but_how_values_are_spread(
    graph: "onnx.ModelProto", batches: list[dict[str, NDArray[np.float32]]]
) -> None:
    factors = quantize.smoothing_factors(graph, open_session, batches)
    assert factors.keys() == {layer for layer in LAYERS if layer.endswith(("qkv", "fc1"))}
    smoothed = quantize.smooth(graph, factors)
    expected = open_session(graph.SerializeToString()).run(batches[0])["logits"]
    found = open_session(smoothed.SerializeToString()).run(batches[0])["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert max(float(factor.max()) for factor in factors.values()) > 1.2


def test_what_a_layer_costs_is_found_out(
    graph: "onnx.ModelProto", batches: list[dict[str, NDArray[np.float32]]]
) -> None:
    largest = quantize.calibrate(graph, open_session, batches, "minmax")
    largest[LAYERS[5]] /= 50  # which clips
    found = quantize.sensitivity(graph, largest, open_session, batches[0])
    assert {layer for layer, _ in found} == set(LAYERS)
    assert found[0][0] == LAYERS[5]
    assert found[0][1] > 2 * found[1][1]


@pytest.mark.parametrize("clip", [1, 60])
def test_the_gate_lets_int8_through_unless_its_ranges_clip(
    clip: float, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dataset = tiny_model(parts, "classification"), open_parts(parts)
    original: Callable[..., dict[str, float]] = quantize.calibrate

    def clipped(*given: object) -> dict[str, float]:
        return {name: value / clip for name, value in original(*given).items()}

    monkeypatch.setattr(export, "calibrate", clipped)
    settings = ExportSettings(precision="int8", batch_size=0, images=4, metric_images=2, ranges="minmax")
    path = tmp_path / "model.onnx"
    if clip == 1:
        reports = export_model(model, dataset, path, settings)
        assert [report.precision for report in reports[:2]] == ["fp32", "int8"]
        assert load_deployed(path).artefact.precision == "int8"
        return
    with pytest.raises(GateError, match="does not say what the network says"):
        export_model(model, dataset, path, settings)
    assert not path.exists()
