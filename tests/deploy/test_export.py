"""An exported file says what the network says, in every runtime that is here; one that does not is not handed over."""

import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import dinov2
from dinov2.deploy import export, graph
from dinov2.deploy.deployed import DeployedModel, RuntimeNetwork, load_deployed
from dinov2.deploy.export import Exporter, ExportSettings, export_model, export_static
from dinov2.deploy.graph import ExportNetwork, write_graph
from dinov2.deploy.parity import GateError, open_set
from dinov2.deploy.runtimes import OnnxRuntimeSession
from dinov2.models import build
from dinov2.predict.model import Model
from tests.deploy.deploy_stand_ins import open_parts, tiny_model, tiny_vit, write_model

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

REGISTERS: dict[str, Any] = {"num_register_tokens": 4, "interpolate_antialias": True, "interpolate_offset": 0.0}
# Each head, and each pair of task and precision, of precision and batch, and of precision and registers occurs.
CASES = [
    ("", "auto", "fp32", 1, {}),
    ("classification", "linear", "fp16", 0, REGISTERS),
    ("classification", "mlp", "int8", 1, REGISTERS),
    ("segmentation", "bn_linear", "fp16", 1, {}),
    ("segmentation", "multi_scale", "fp32", 1, REGISTERS),
    ("segmentation", "conv_decoder", "fp32", 0, REGISTERS),
    ("segmentation", "pyramid", "int8", 0, {}),
    ("depth", "linear_bins", "fp32", 0, {}),
    ("depth", "conv_decoder", "int8", 0, REGISTERS),
    ("depth", "dpt", "fp16", 2, {}),
    ("detection", "yolo", "fp32", 1, REGISTERS),
    ("detection", "detr", "fp16", 1, {}),
    ("anomaly", "memory", "fp32", 0, {}),
    ("anomaly", "reconstruction", "fp16", 0, REGISTERS),
    ("joint", "auto", "fp32", 2, {}),
    ("joint", "auto", "fp16", 0, REGISTERS),
]


def settings(**more: Any) -> ExportSettings:
    return ExportSettings(images=3, metric_images=2, **more)


@pytest.mark.parametrize(("task", "head", "precision", "batch", "options"), CASES)
def test_an_exported_file_says_what_the_network_says(
    task: str, head: str, precision: str, batch: int, options: dict[str, Any], parts: Path, tmp_path: Path
) -> None:
    model, dataset = tiny_model(parts, task, head, **options), open_parts(parts)
    path = tmp_path / "model.onnx"
    reports = export_model(model, dataset, path, settings(precision=precision, batch_size=batch))
    assert all(report.passed for report in reports)
    images = [dataset.get_image(index) for index in range(3)]  # not what a fixed batch divides
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
        exported = load_deployed(path, runtime=runtime)
        tolerance = {"fp32": 1e-5, "fp16": 0.02, "int8": 0.1}[precision]
        if not task:
            found = exported.embed(images, features="cls_patch_mean")
            np.testing.assert_allclose(found, model.embed(images, features="cls_patch_mean"), atol=tolerance)
            continue
        for one, other in zip(exported.predict(images), model.predict(images), strict=True):
            assert type(one) is type(other)
            _assert_alike(one.to_dict(), other.to_dict(), tolerance)


def _assert_alike(one: Any, other: Any, tolerance: float) -> None:
    if isinstance(other, Mapping):
        assert one.keys() == other.keys()
        for name in other:
            _assert_alike(one[name], other[name], tolerance)
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=max(tolerance, 1e-3), abs=tolerance)


@pytest.fixture(scope="module")
def classifier(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model with registers, whose embedding is resampled, and its file with the pixels' normalisation outside."""
    model = tiny_model(parts, "classification", **REGISTERS)
    path = tmp_path_factory.mktemp("classifier") / "model.onnx"
    export_model(model, open_parts(parts), path, settings())
    return model, path


def test_the_file_stands_alone(classifier: tuple[Model, Path], parts: Path) -> None:
    _, path = classifier
    names = {file.name for file in path.parent.iterdir()}
    assert names >= {"model.onnx", "model.onnx.sha256", "model.gate.json", "model.reference.npz", "verify.py"}
    exported = dinov2.load(path)
    assert isinstance(exported, DeployedModel)
    assert exported.package is not None
    assert exported.package.task.classes == ("good", "defective")
    assert exported.artefact.checked.keys() == {"onnxruntime", "openvino"}
    assert str(parts) not in path.read_bytes().decode("latin-1"), "names of this machine"
    assert str(Path(dinov2.__file__).parent) not in path.read_bytes().decode("latin-1")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "verify.py", path.name], cwd=path.parent, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["passed"]


def test_images_are_read_in_the_light_of_the_model(parts: Path) -> None:
    model = replace(tiny_model(parts, "classification"), light="standardized")
    assert open_set(f"GroupedJSON:split=VAL:root={parts}", model).light == "standardized"


def test_values_of_pixels_are_normalised_inside(parts: Path, tmp_path: Path) -> None:
    model, dataset = tiny_model(parts), open_parts(parts)
    export_model(model, dataset, tmp_path / "model.onnx", settings(pixels=True))
    exported = load_deployed(tmp_path / "model.onnx", runtime="onnxruntime")
    image = dataset.get_image(0).resize((40, 40))
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    (found,) = exported.network.session.run({"image": pixels})["cls"]
    np.testing.assert_allclose(found, model.embed([image])[0], atol=1e-5)


# What the gate is for.


def _unbaked(network: ExportNetwork, original: nn.Module) -> None:
    """As if the embedding were resampled by the exported file, in a way of its own."""
    backbone = network.network.get_submodule("backbone")
    bare = original.get_submodule("backbone")
    positions = bare.get_parameter("pos_embed")[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(positions, (5, 5), mode="bicubic").flatten(2).transpose(1, 2)
    backbone.get_parameter("pos_embed").data[:, 1:] = resized


def _swapped(network: ExportNetwork, original: nn.Module) -> None:
    network.pixels = True
    network.scale, network.shift = network.shift.clone(), network.scale.clone()


def _other_weights(network: ExportNetwork, original: nn.Module) -> None:
    network.network.get_parameter("backbone.blocks.2.mlp.fc1.weight").data.mul_(1.05)


FAULTS = {
    "an unbaked embedding": (_unbaked, False, "backbone.patch_embed|backbone.blocks.0"),
    "swapped mean and std": (_swapped, True, "backbone.patch_embed.proj"),
    "other weights": (_other_weights, False, "backbone.blocks.2.mlp.fc1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_catches(fault: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, pixels, where = FAULTS[fault]
    model = tiny_model(parts, "classification", **REGISTERS)

    class Changed(ExportNetwork):
        def __init__(self, network: nn.Module, *given: Any, **more: Any) -> None:
            super().__init__(network, *given, **more)
            change(self, network)

    monkeypatch.setattr(export, "ExportNetwork", Changed)
    with pytest.raises(GateError, match="does not say what the network says"):
        # A batch of more images than are compared.
        export_model(model, open_parts(parts), tmp_path / "model.onnx", settings(pixels=pixels, batch_size=4))
    assert [path.name for path in tmp_path.iterdir()] == ["model.gate.json"]
    found = json.loads((tmp_path / "model.gate.json").read_text())["gates"][0]["parts_at"].split(" ")[0]
    assert found.startswith(tuple(where.split("|"))), found


@pytest.mark.parametrize(
    "change",
    [{"classes": ["defective", "good"]}, {"mean": [0.5, 0.5, 0.5]}, {"fingerprint": "0"}, {"light": "standardized"}],
)
def test_the_gate_reads_the_description(
    change: dict[str, Any], classifier: tuple[Model, Path], parts: Path, tmp_path: Path
) -> None:
    model, path = classifier
    exported = load_deployed(path, runtime="onnxruntime")
    name = next(iter(change))
    if name == "classes":
        change = {"heads": {"": {**exported.artefact.heads[""], **change}}}
    network = RuntimeNetwork(exported.network.session, replace(exported.artefact, **change))
    changed = replace(exported, artefact=network.artefact, network=network)
    assert changed.package is not None
    changed = replace(changed, package=replace(changed.package, model=network))
    exporter = Exporter(model, open_parts(parts), settings())
    report = exporter.check(changed)
    assert not report.passed
    assert f"{name} differs" in report.faults[0]
    assert report.outputs["logits"]["passed"] == ("mean" not in change), "which acts on what the network is given"


def test_sizes_and_names_that_cannot_be_are_refused(
    classifier: tuple[Model, Path], parts: Path, tmp_path: Path
) -> None:
    model, path = classifier
    dataset = open_parts(parts)
    with pytest.raises(FileExistsError, match="is there already"):
        export_model(model, dataset, path, settings())
    with pytest.raises(FileExistsError, match=r"model\.onnx is there already"):  # which an engine brings of its own
        export_model(model, dataset, path.with_suffix(".engine"), settings(to="tensorrt"))
    with pytest.raises(ValueError, match=r"a file for openvino ends in \.xml"):
        export_model(model, dataset, tmp_path / "model.onnx", settings(to="openvino"))
    network = load_deployed(path).network
    with pytest.raises(ValueError, match=r"takes images of 40 x 40 pixels.*this one has 48 x 40"):
        network(torch.zeros(1, 3, 48, 40))
    assert not list(tmp_path.iterdir())


class _NextImages:
    """Compares every image with the next."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def read(self, index: int, size: tuple[int, int] | None = None) -> Any:
        return self.dataset.get_image((index + 1) % len(self.dataset))


def test_a_reference_is_a_second_input(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("dinov2.deploy.parity", "dinov2.tasks.evaluation"):
        monkeypatch.setattr(f"{module}.References", _NextImages)
    model, dataset = tiny_model(parts, "segmentation", reference=True), open_parts(parts)
    export_model(model, dataset, tmp_path / "model.onnx", settings(batch_size=0))
    exported = load_deployed(tmp_path / "model.onnx")
    assert list(exported.artefact.inputs) == ["image", "reference"]
    images = [dataset.get_image(index) for index in range(2)]
    found, expected = (one.predict(images, images[::-1])[0].to_dict() for one in (exported, model))
    _assert_alike(found, expected, 1e-4)
    assert expected != model.predict(images, images)[0].to_dict(), "the reference matters"


def test_a_static_file_has_one_input_and_one_output(parts: Path, tmp_path: Path) -> None:
    model, dataset = tiny_model(parts, "segmentation"), open_parts(parts)
    written = export_static(model, dataset, tmp_path / "model.onnx", settings(pixels=True))
    import onnx

    graph = onnx.load(str(written))
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    assert shapes == {"input": [1, 3, 40, 40], "output": [1, 2, 40, 40]}
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == 17
    kinds = {tensor.data_type for tensor in graph.graph.initializer if "blocks.2.mlp" in tensor.name}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert yaml.safe_load((tmp_path / "model_fp16.yaml").read_text()) == {
        "model": "model_fp16.onnx",
        "inputs": {"input": [1, 3, 40, 40]},
        "backend": {"type": "tvm_vacc", "dtype": "fp16"},
    }
    assert not (tmp_path / "model.onnx").exists()
    with pytest.raises(FileExistsError, match=r"model_fp16\.onnx is there already"):
        export_static(model, dataset, tmp_path / "model.onnx", settings())


def test_the_commands_export_and_verify(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dinov2.deploy import verify

    monkeypatch.setattr(build, "ARCHITECTURES", {"vit_tiny": tiny_vit})
    write_model(tmp_path / "best.pth", tiny_model(parts, "classification"))
    on = f"GroupedJSON:split=VAL:root={parts}"
    words = [str(tmp_path / "best.pth"), "--to", "onnx", "--output", str(tmp_path / "best.onnx"), "--image-size", "48"]
    with pytest.raises(ValueError, match="--on is needed"):
        export.main(words)
    with pytest.raises(ValueError, match="--static-fp16 writes an ONNX file, found --to openvino"):
        export.main([*words, "--on", on, "--to", "openvino", "--static-fp16"])
    assert export.main([*words, "--on", on]) == 0
    assert "image_auroc" in capsys.readouterr().out
    assert verify.main([str(tmp_path / "best.onnx")]) == 0
    record = json.loads((tmp_path / "best.verified.json").read_text())
    assert (record["passed"], record["against"]) == (True, "the reference file")
    assert verify.main([str(tmp_path / "best.onnx"), "--on", on]) == 0
    assert "--on has no effect without --against" in capsys.readouterr().err
    words = [str(tmp_path / "best.onnx"), "--on", on, "--against"]
    assert verify.main([*words, str(tmp_path / "best.pth")]) == 0
    assert "compared at 48 x 48 pixels, the size of the export (height x width); trained at 40 x 40" in (
        capsys.readouterr().err
    )
    write_model(tmp_path / "other.pth", tiny_model(parts, "classification", "mlp"))
    with pytest.raises(GateError, match="fingerprint differs"):
        verify.main([*words, str(tmp_path / "other.pth")])
    assert not json.loads((tmp_path / "best.verified.json").read_text())["passed"]


def test_joined_heads_are_exported_and_verified_by_their_files(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinov2.deploy import verify

    monkeypatch.setattr(build, "ARCHITECTURES", {"vit_tiny": tiny_vit})
    files = [str(tmp_path / name) for name in ("classes.pth", "masks.pth")]
    for file, task in zip(files, ("classification", "segmentation"), strict=True):
        write_model(Path(file), tiny_model(parts, task))
    on, exported = f"GroupedJSON:split=VAL:root={parts}", str(tmp_path / "both.onnx")
    words = ["--on", on, "--images", "3"]
    assert export.main([*files, "--to", "onnx", "--output", exported, "--batch-size", "0", *words]) == 0
    assert verify.main(["--against", files[0], "--against", files[1], exported, *words]) == 0
    with pytest.raises(GateError, match="heads differ"):
        verify.main([exported, "--against", files[0], *words])


def test_weights_that_no_onnx_file_holds_are_told_before_they_are_traced(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinov2.deploy.graph.MOST_BYTES", 10_000)
    exporter = Exporter(tiny_model(parts), open_parts(parts), settings())
    with pytest.raises(ValueError, match=r"the weights have .* GiB, and an ONNX file at most .* half precision"):
        exporter.graph("fp32")


def test_group_norms_of_large_maps_lose_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, image = nn.Sequential(nn.GroupNorm(1, 3)).eval(), torch.full((1, 3, 256, 256), 2.0)
    image[..., ::3] = -1  # what is added one by one is rounded the same way again and again
    expected = copy.deepcopy(norm).double()(image.double()).detach().numpy()

    def error() -> float:
        network = ExportNetwork(norm, lambda net, images: {"out": net(images["image"])}, {"image": image}, ["out"])
        session = OnnxRuntimeSession(write_graph(network, {"image": image}).SerializeToString())
        return float(np.abs(session.run({"image": image.numpy()})["out"] - expected).max())

    assert error() < 2e-6
    monkeypatch.setattr(graph, "WrittenOutGroupNorm", lambda norm: norm)
    assert error() > 2e-5, "what runtimes lose by themselves"
