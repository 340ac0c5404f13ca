"""The C++ sample, compiled here, says of an OpenVINO file what Python says."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dinov2.deploy.export import ExportSettings, export_model
from tests.deploy.deploy_stand_ins import open_parts, tiny_model

for _module in ("onnx", "onnxscript", "openvino"):
    pytest.importorskip(_module)

ROOT = Path(__file__).parents[2]
HAS_COMPILER = shutil.which("cmake") and (shutil.which("g++") or shutil.which("clang++"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from openvino.utils import get_cmake_path

    build = tmp_path_factory.mktemp("build")
    where = f"-DOpenVINO_DIR={get_cmake_path()}"
    for words in (["-S", str(ROOT / "tools" / "cpp"), "-B", str(build), where], ["--build", str(build)]):
        done = subprocess.run(["cmake", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stdout + done.stderr
    return build / "run_openvino"


@pytest.fixture
def write_raw() -> str:
    """The lines of the documents that write images and outputs without headers."""
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n((?:(?!```).)*tofile.*?)```", text, re.DOTALL)
    return str(lines)


@pytest.mark.skipif(not HAS_COMPILER, reason="needs cmake and a compiler of C++")
@pytest.mark.slow  # compiles
@pytest.mark.parametrize(
    ("task", "precision", "batch", "pixels"),
    [("segmentation", "fp32", 3, False), ("joint", "fp16", 0, True), ("", "int8", 1, False)],
)
def test_cpp_and_python_agree(
    task: str, precision: str, batch: int, pixels: bool,
    program: Path, write_raw: str, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    settings = ExportSettings(
        to="openvino", precision=precision, batch_size=batch, pixels=pixels, images=4, metric_images=2
    )
    reports = export_model(tiny_model(parts, task), open_parts(parts), tmp_path / "cracks.xml", settings)
    monkeypatch.chdir(tmp_path)
    exec(write_raw, {})

    def run() -> "subprocess.CompletedProcess[str]":
        return subprocess.run([program, "cracks.xml", "cracks_raw"], capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(re.findall(r"^(\S+): cosine ([\d.]+),", done.stdout, re.MULTILINE))
    outputs = reports[-1].outputs
    assert found.keys() == outputs.keys()
    for name, value in found.items():
        assert float(value) == pytest.approx(outputs[name]["cosine"], abs=1e-4)

    name = next(iter(outputs))
    expected = np.fromfile(f"cracks_raw/{name}.f32", np.float32)
    (expected + np.linspace(0, 4 * expected.std(), len(expected), dtype=np.float32)).tofile(f"cracks_raw/{name}.f32")
    done = run()
    assert (done.returncode, "FAILED" in done.stdout) == (1, True)
    expected[1:].tofile(f"cracks_raw/{name}.f32")
    done = run()
    assert done.returncode == 2
    assert f"error: {name} has {len(expected)} values, and its file {len(expected) - 1}" in done.stderr
