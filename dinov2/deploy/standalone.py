"""Checks an exported model on this machine, with NumPy and the model's runtime alone.

    python verify.py model.onnx

`dinov2 export` leaves this file beside what it writes, with ``model.reference.npz``: a few real images and what the
network said to them in float32, before it was exported. The exit code is 0 where this machine says the same.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
KEY = "dinov2"
BF16_OPSET = 22  # of a graph that is in bfloat16 itself; an older one is rounded to that by OpenVINO
# By precision: least cosine of an output with that of float32, and largest difference in its standard deviations.
LIMITS: Mapping[str, tuple[float, float]] = {
    "fp32": (0.0, 2e-4),
    "fp16": (0.9999, np.inf),
    "bf16": (0.999, np.inf),
    "int8": (0.99, np.inf),
}

_ROUNDINGS = 16  # of the largest value in float32, which values that hardly vary must be allowed


def compare(reference: Array, found: Array, precision: str) -> dict[str, Any]:
    """How an output differs from the reference.

    The mean of the reference is taken out of both before the cosine: values that are all large and alike, such as
    depths, have one near 1 whatever they are.

    Returns:
        ``cosine``, ``max_difference``, ``standard_deviation`` of the reference, and whether that ``passed``.
    """
    if reference.shape != found.shape:
        return {"passed": False, "fault": f"shape {list(found.shape)}, expected {list(reference.shape)}"}
    if not np.isfinite(found).all():
        return {"passed": False, "fault": "values that are not finite"}
    first, second = reference.astype(np.float64), found.astype(np.float64)
    deviation, difference = float(first.std()), float(np.abs(first - second).max())
    mean = first.mean()
    first, second = first - mean, second - mean
    lengths = float(np.sqrt((first**2).sum() * (second**2).sum()))
    least, most = LIMITS[precision]
    rounding = _ROUNDINGS * float(np.finfo(np.float32).eps * np.abs(reference).max(initial=0))
    cosine = float((first * second).sum()) / lengths if lengths > 0 else float(difference <= rounding)
    passed = cosine >= least and (np.isinf(most) or difference <= most * deviation + rounding)
    return {
        "cosine": round(cosine, 9),
        "max_difference": difference,
        "standard_deviation": deviation,
        "passed": bool(passed),
    }


def open_runtime(path: Path) -> tuple[str, str, Callable[[Mapping[str, Array]], dict[str, Array]]]:
    """The runtime's name, the model's description, and a function from inputs to outputs by name."""
    if path.suffix == ".xml":
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        text = model.get_rt_info([KEY]).astype(str)
        told = json.loads(text)
        hint = "bf16" if told["precision"] == "bf16" and told["opset"] < BF16_OPSET else "f32"
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        names = [output.any_name for output in compiled.outputs]
        return (
            f"OpenVINO {openvino.__version__}",
            text,
            lambda inputs: {
                name: np.array(value) for name, value in zip(names, compiled(inputs).values(), strict=True)
            },
        )
    if path.suffix == ".onnx":
        import onnxruntime

        present = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in present]
        session = onnxruntime.InferenceSession(str(path), providers=providers)
        names = [output.name for output in session.get_outputs()]
        text = session.get_modelmeta().custom_metadata_map[KEY]
        return (
            f"ONNX Runtime {onnxruntime.__version__} {session.get_providers()[0]}",
            text,
            lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True)),
        )
    raise SystemExit(f"{path}: for .onnx and .xml; an engine is checked by: dinov2 verify {path}")


def check(
    description: Mapping[str, Any], reference: Mapping[str, Any], run: Callable[[Mapping[str, Array]], dict[str, Array]]
) -> dict[str, Any]:
    """Runs the images of a reference file and compares.

    Args:
        description: of the model, as it is in the file.
        reference: arrays of the reference file by name.
        run: from inputs to outputs.
    """
    faults = []
    if description["fingerprint"] != str(reference["fingerprint"]):
        faults.append("the reference file is of other weights")
    mean, std = (np.array(description[name], np.float32).reshape(-1, 1, 1) for name in ("mean", "std"))
    inputs = {}
    for name in description["inputs"]:
        pixels = np.asarray(reference[f"input/{name}"]).astype(np.float32)
        inputs[name] = pixels if description["pixels"] else ((pixels / 255 - mean) / std).astype(np.float32)
    count = len(next(iter(inputs.values())))
    batch = next(iter(description["inputs"].values()))[0] or count
    pieces = []
    for start in range(0, count, batch):
        piece = {name: values[start : start + batch] for name, values in inputs.items()}
        missing = batch - len(next(iter(piece.values())))
        if missing:
            piece = {name: np.concatenate([value, value[:1].repeat(missing, 0)]) for name, value in piece.items()}
        pieces.append(run(piece))
    outputs = {}
    for name in description["outputs"]:
        found = np.concatenate([piece[name] for piece in pieces])[:count]
        outputs[name] = compare(np.asarray(reference[f"output/{name}"]), found, description["precision"])
    faults += [f"{name}: {value.get('fault') or value}" for name, value in outputs.items() if not value["passed"]]
    return {"images": count, "outputs": outputs, "faults": faults, "passed": not faults}


def main() -> int:
    """Checks the file that is named; returns the exit code."""
    if len(sys.argv) != 2:
        sys.stdout.write("usage: python verify.py MODEL.onnx|MODEL.xml\n")
        return 2
    path = Path(sys.argv[1])
    runtime, text, run = open_runtime(path)
    description = json.loads(text)
    with np.load(path.with_name(path.stem + ".reference.npz")) as reference:
        found = check(description, reference, run)
    record = {
        "artefact": path.name,
        "runtime": runtime,
        "machine": f"{platform.machine()} {platform.system()} {os.cpu_count()} cores",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "fingerprint": description["fingerprint"],
        **found,
    }
    path.with_name(path.stem + ".verified.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
