"""What computes an exported model: ONNX Runtime, OpenVINO, TensorRT; each the same function from arrays to arrays."""

import importlib
import importlib.util
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dinov2.utils.errors import RunError

Arrays = Mapping[str, NDArray[np.float32]]


class Session(ABC):
    """A loaded model in one runtime. `run` may be called by several threads at once.

    Attributes:
        runtime: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        name: of the runtime and its device, for people.
    """

    runtime: ClassVar[str]
    name: str

    @abstractmethod
    def run(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        """Outputs by name, of float32, for inputs by name."""


class OnnxRuntimeSession(Session):
    """ONNX Runtime, on a GPU where it was installed for one."""

    runtime = "onnxruntime"
    providers: ClassVar[Mapping[str, str]] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

    def __init__(self, model: Path | bytes, device: str = "cpu", threads: int = 0) -> None:
        runtime = import_runtime("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        provider = self.providers[device]
        if provider not in runtime.get_available_providers():
            raise ValueError(f"this ONNX Runtime has no {provider}; install onnxruntime-gpu, or use device=cpu")
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session = runtime.InferenceSession(source, options, providers=[provider])
        except Exception as error:  # it has a class of its own for every reason, and none for all
            raise RunError(f"ONNX Runtime does not compute this graph: {str(error).splitlines()[0]}") from error
        if provider not in self._session.get_providers():  # it goes on without, and only prints why
            raise ValueError(f"ONNX Runtime could not start {provider}, whose libraries miss here; use device=cpu")
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.name = f"ONNX Runtime on {device}"

    def run(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(inputs)), strict=True))


class OpenVinoSession(Session):
    """OpenVINO on the processor.

    It computes in float32 what is written in float32: left to itself, it rounds to bfloat16 where a processor has that.

    Args:
        model: file, or its content.
        rounds: whether it is to round a graph of float32 to bfloat16. Graphs that are in bfloat16 themselves come out
            wrong so (the patch embedding has a cosine of 0.8), and right in float32.
        threads: 0 for what it thinks best.
    """

    runtime = "openvino"

    def __init__(self, model: Path | bytes, rounds: bool = False, threads: int = 0) -> None:
        openvino = import_runtime("openvino")
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "bf16" if rounds else "f32",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            settings["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        self._compiled = core.compile_model(core.read_model(model), "CPU", settings)
        self._outputs = [output.any_name for output in self._compiled.outputs]
        self._own = threading.local()
        self.name = "OpenVINO on cpu"

    def run(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        found = self._own.request.infer(dict(inputs), share_inputs=True)
        return {name: np.array(found[name]) for name in self._outputs}


def import_runtime(name: str) -> Any:
    """A runtime's module.

    Raises:
        ValueError: it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "tensorrt" if name.startswith("tensorrt") else "deploy"
        raise ValueError(f"{name} is not installed ({error}): pip install 'dinov2[{extra}]'") from error


def is_installed(name: str) -> bool:
    """Whether a runtime can be imported."""
    return importlib.util.find_spec(name) is not None
