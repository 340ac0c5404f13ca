"""A file that was changed after its export, or was never one, is refused; a good one is used as it says."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dinov2
from dinov2.config import render_config
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from dinov2.deploy.artefact import KEY, Artefact, read_artefact, set_description
from dinov2.deploy.deployed import RuntimeNetwork, load_deployed
from dinov2.deploy.runtimes import OnnxRuntimeSession
from dinov2.deploy.standalone import compare
from dinov2.tasks import load_task_config
from dinov2.utils.files import file_digest, write_with_checksum

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def described(**more: Any) -> Artefact:
    config = render_config(load_task_config(None, ["task=classification", "data.image_size=8", "data.resize=stretch"]))
    head = {
        "task": "classification",
        "classes": ["good", "bad"],
        "unit": "",
        "config": config,
    }
    given: dict[str, Any] = {
        "fingerprint": "f" * 64,
        "precision": "fp32",
        "opset": 20,
        "inputs": {"image": [2, 3, 8, 8]},
        "outputs": {"logits": [2, 2]},
        "heads": {"": head},
        "image_size": [8, 8],
        "resize": "stretch",
        "checked": {"onnxruntime": {}},
    }
    return Artefact(**given | more)


def mean_colours(artefact: Artefact, opset: int = 20) -> "onnx.ModelProto":
    """A graph whose logits are the means of red and of green."""
    weight = onnx.numpy_helper.from_array(np.eye(3, 2, dtype=np.float32), "weight")
    axes = onnx.numpy_helper.from_array(np.array([2, 3]), "axes")
    make, float32 = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("ReduceMean", ["image", "axes"], ["means"], keepdims=0),
            onnx.helper.make_node("MatMul", ["means", "weight"], ["logits"]),
        ],
        "graph",
        [make("image", float32, [2, 3, 8, 8])],
        [make("logits", float32, [2, 2])],
        [weight, axes],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    set_description(model, artefact)
    return model


def write(path: Path, model: "onnx.ModelProto", artefact: Artefact | None = None) -> Path:
    if artefact is not None:
        set_description(model, artefact)
    data = model.SerializeToString()
    write_with_checksum(path, lambda file: file.write(data))
    return path


def text_changed(**change: Any) -> Callable[["onnx.ModelProto"], None]:
    def act(model: "onnx.ModelProto") -> None:
        values = json.loads(model.metadata_props[0].value)
        model.metadata_props[0].value = json.dumps(values | change)

    return act


def outside(place: str) -> Callable[["onnx.ModelProto"], None]:
    def act(model: "onnx.ModelProto") -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=place)

    return act


def outside_in_a_constant(model: "onnx.ModelProto") -> None:
    tensor = onnx.numpy_helper.from_array(np.zeros(4, np.float32), "constant")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights.bin")
    branch = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["unused"], value=tensor)], "inner", [], [])
    model.graph.node.add(op_type="If", name="inner").attribute.append(onnx.helper.make_attribute("then_branch", branch))


def _called(name: str) -> Callable[["onnx.ModelProto"], None]:
    head = described().heads[""]
    return text_changed(heads={"masks": head, name: head})


def _no_description(model: "onnx.ModelProto") -> None:
    del model.metadata_props[:]


def _other_opset(model: "onnx.ModelProto") -> None:
    model.opset_import[0].version = 21


def _other_shape(model: "onnx.ModelProto") -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16


def _other_text(model: "onnx.ModelProto") -> None:
    model.metadata_props[0].value = "{"


TAMPERED: dict[str, tuple[Callable[["onnx.ModelProto"], None], str]] = {
    "no description": (_no_description, "does not say what it holds"),
    "no JSON": (_other_text, "description is damaged or was changed"),
    "another format": (text_changed(format_version=7), "format 7; this version of dinov2 reads 1"),
    "an unknown key": (text_changed(code="import os"), "unknown keys code"),
    "a precision": (text_changed(precision="fp4"), "precision 'fp4'; allowed: fp32, fp16, bf16, int8"),
    "a class twice": (
        text_changed(heads={"": {**described().heads[""], "classes": ["good", "good"]}}),
        "of which some have one name",
    ),
    "thresholds": (text_changed(thresholds={"ugly": 0.5}), r"thresholds of \['ugly'\], and the classes are"),
    "a standard deviation": (text_changed(std=[0.2, 0.2, 0]), "3 values in"),
    "shapes": (text_changed(outputs={"logits": [2, 5]}), "was changed after its export"),
    "the opset": (_other_opset, "has opset 21, and says 20"),
    "the input's shape": (_other_shape, r"takes or gives .*16, 8.*was changed after its export"),
    "weights above the folder": (outside("../weights.bin"), "outside of its folder: refused"),
    "weights of the system": (outside("/etc/hostname"), "outside of its folder: refused"),
    "weights of a constant inside": (outside_in_a_constant, "outside of its folder: refused"),
    "a head that leads elsewhere": (_called("../other"), r"a head is called '\.\./other'"),
    "a head of Windows": (_called("C:other"), "a head is called 'C:other'"),
    "a head without a name among several": (_called(""), "a head is called ''"),
    "the light": (text_changed(light="dim"), "light 'dim'"),
    "the resizing": (text_changed(resize="cut"), "resize 'cut'"),
    "a threshold": (text_changed(thresholds={"bad": "0.5"}), "description is damaged or was changed"),
    "the fingerprint": (text_changed(fingerprint=7), "fingerprint 7"),
    "weights of Windows": (outside("..\\weights.bin"), "outside of its folder: refused"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_file_that_was_changed_is_refused(what: str, tmp_path: Path) -> None:
    change, message = TAMPERED[what]
    model = mean_colours(described())
    change(model)
    path = write(tmp_path / "model.onnx", model)
    with pytest.raises(ValueError, match=message):
        dinov2.load(path)


def test_what_is_no_exported_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(pickle.dumps({"weights": [1.0]}))
    with pytest.raises(ValueError, match="is no ONNX file"):
        dinov2.load(path)
    torch.save({"model": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is no ONNX file"):
        dinov2.load(path)
    write(path, mean_colours(described()))
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="do not have the SHA-256"):
        dinov2.load(path)
    with pytest.raises(FileNotFoundError, match=r"no file .*absent\.onnx"):
        dinov2.load(tmp_path / "absent.onnx")
    (tmp_path / "model.engine").touch()
    with pytest.raises(FileNotFoundError, match=r"model\.engine has no model\.engine\.json beside it"):
        dinov2.load(tmp_path / "model.engine")
    with pytest.raises(ValueError, match="leave config out"):
        dinov2.load(path, "dinov2_vits14")


def test_a_description_comes_back(tmp_path: Path) -> None:
    artefact = described(value_range=[0.0, 4095.0], thresholds={"bad": 0.25}, preprocessing=[{"gamma": {"gamma": 0.8}}])
    read = read_artefact(write(tmp_path / "model.onnx", mean_colours(artefact)))
    assert read.to_text() == artefact.to_text()
    model = load_deployed(tmp_path / "model.onnx", runtime="onnxruntime")
    assert model.package is not None
    assert model.preprocessing.to_values() == list(artefact.preprocessing)
    assert model.predictor.batch_size == 2, "as many as the file takes"
    assert (model.package.thresholds, model.value_range) == ({"bad": 0.25}, artefact.preparation.value_range)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, lambda pixels: (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD),
        ({"pixels": True}, lambda pixels: pixels),
        ({"mean": [0.5, 0.4, 0.3], "std": [0.5, 1, 1]}, lambda pixels: (pixels / 255 - [0.5, 0.4, 0.3]) / [0.5, 1, 1]),
    ],
)
def test_a_file_gets_its_batches_and_values(change: dict[str, Any], expected: Callable[..., Any]) -> None:
    """Three images, two at a time: the last batch is filled up, and what fills it is not seen."""
    artefact = described(**change)
    network = RuntimeNetwork(OnnxRuntimeSession(mean_colours(artefact).SerializeToString()), artefact)
    colours = np.array([[255, 0, 0], [10, 200, 30], [0, 100, 255]], dtype=np.float64)
    normalised = (colours / 255 - IMAGENET_MEAN) / IMAGENET_STD
    images = torch.from_numpy(normalised)[:, :, None, None].expand(3, 3, 8, 8)
    found = network(images)["logits"].numpy()
    np.testing.assert_allclose(found, expected(colours)[:, :2], atol=1e-4)


def test_an_image_smaller_than_a_window_is_refused_while_it_is_prepared(tmp_path: Path) -> None:
    config = load_task_config(None, ["task=segmentation", "data.image_size=8", "data.resize=original"])
    head = {**described().heads[""], "task": "segmentation", "config": render_config(config)}
    model = dinov2.load(write(tmp_path / "model.onnx", mean_colours(described(heads={"": head}, resize="original"))))
    for height in (8, 20):
        model.predictor.prepare(np.zeros((height, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"takes images of 8 x 8 pixels.* this one has 7 x 8"):
        model.predictor.prepare(np.zeros((7, 9, 3), np.uint8))
    # Exported for a set whose images are all smaller than the window.
    small = described(heads={"": head}, resize="original", image_size=[16, 16])
    blank = dinov2.load(write(tmp_path / "small.onnx", mean_colours(small))).predictor.prepare_blank()
    assert blank.inputs["image"].shape == (3, 8, 8)


def test_a_runtime_that_has_passed_is_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("openvino")
    write(tmp_path / "one.onnx", mean_colours(described()))
    assert load_deployed(tmp_path / "one.onnx").runtime == "ONNX Runtime on cpu"
    write(tmp_path / "two.onnx", mean_colours(described(checked={"onnxruntime": {}, "openvino": {}})))
    two = load_deployed(tmp_path / "two.onnx")
    assert two.runtime == "OpenVINO on cpu"
    two.warm_up()
    assert not caplog.records
    path = write(tmp_path / "none.onnx", mean_colours(described(checked={})))
    load_deployed(path)
    assert "has not passed the gate in openvino or onnxruntime: run dinov2 verify" in caplog.text
    with pytest.raises(ValueError, match="is not for tensorrt, it is for openvino or onnxruntime"):
        load_deployed(path, runtime="tensorrt")
    with pytest.raises(ValueError, match=r"'cuda:1'.*the first GPU that CUDA_VISIBLE_DEVICES shows"):
        load_deployed(path, "cuda:1")
    record = {"runtime": "openvino", "passed": False, "sha256": file_digest(tmp_path / "two.onnx")}
    (tmp_path / "two.verified.json").write_text(json.dumps(record))
    assert load_deployed(tmp_path / "two.onnx").runtime == "ONNX Runtime on cpu", "OpenVINO failed on this machine"


def test_a_model_with_a_head_has_no_features(tmp_path: Path) -> None:
    model = dinov2.load(write(tmp_path / "model.onnx", mean_colours(described())))
    with pytest.raises(ValueError, match="export the backbone for those"):
        model.embed(np.zeros((8, 8, 3), np.uint8))


def test_a_batch_is_no_larger_than_the_engines_profile() -> None:
    sizes: list[int] = []

    class Session:
        name = runtime = "tensorrt"

        def run(self, inputs: Any) -> Any:
            sizes.append(len(inputs["image"]))
            return {"logits": inputs["image"][:, :2, 0, 0]}

    profile = {"image": [[1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8]]}
    shapes = {"inputs": {"image": [0, 3, 8, 8]}, "outputs": {"logits": [0, 2]}}
    network = RuntimeNetwork(Session(), described(**shapes, build={"profile": profile}))
    for count in (3, 4, 6):
        images = torch.arange(count).float().view(-1, 1, 1, 1).expand(count, 3, 8, 8)
        assert network(images)["logits"][:, 0].tolist() == list(range(count))
    assert sizes == [3, 4, 4, 4]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_outputs_that_do_not_vary_pass_where_they_are_equal(precision: str) -> None:
    same = np.full((2, 3), 4.0, np.float32)
    assert compare(same, same, precision)["passed"]
    assert not compare(same, same + 1, precision)["passed"]


def test_predictions_of_two_threads_do_not_mix(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    path = write(tmp_path / "model.onnx", mean_colours(described(pixels=True)))
    images = [np.full((8, 8, 3), (number, 255 - number, 0), np.uint8) for number in range(0, 255, 5)]
    for runtime in ("onnxruntime", "openvino"):
        pytest.importorskip(runtime)
        model = load_deployed(path, runtime=runtime)
        expected = [model.predict(image)[0].to_dict() for image in images]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda image: model.predict(image)[0].to_dict(), images))  # noqa: B023
        assert found == expected


def test_differences_are_named() -> None:
    one = described()
    other = replace(one, heads={"": {**one.heads[""], "classes": ["bad", "good"]}}, light="standardized")
    assert one.differences(one) == []
    assert one.differences(other) == [
        "classes differs: ['good', 'bad'] and ['bad', 'good']",
        "light differs: original and standardized",
    ]
    assert KEY == "dinov2", "under which other programs find the description"
