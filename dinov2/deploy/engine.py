"""TensorRT engines: built from a verified ONNX graph, described by a JSON file beside them, and run.

What is used is common to TensorRT 10.6 and later, 11, and TensorRT for RTX, which builds without a GPU: strongly typed
networks, the ONNX parser, optimisation profiles, and engines in serialised form.
"""

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dinov2.deploy.runtimes import Arrays, Session, import_runtime, is_installed

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger("dinov2")

ENGINE_LIBRARIES = ("tensorrt", "tensorrt_rtx")
OLDEST = (10, 6)  # 10.3 and 10.4 compute such transformers wrongly, and say nothing
WORKSPACE = 4 << 30
_LOGGED = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.DEBUG}


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How an engine is built.

    Attributes:
        max_batch: largest batch that it takes, where the graph takes any.
        optimization: how long the builder looks for the fastest kernels, 0 to 5.
        portable: whether it also runs in later versions of TensorRT and on other GPUs (of Ampere and later), slower.
        timing_cache: file that remembers what was measured; None for none.
    """

    max_batch: int = 8
    optimization: int = 3
    portable: bool = False
    timing_cache: Path | None = None


def import_builder() -> Any:
    """TensorRT, or TensorRT for RTX where only that is installed.

    Raises:
        ValueError: neither is installed; or the driver finds no GPU, without which TensorRT ends the process.
    """
    if is_installed("tensorrt"):
        if not torch.cuda.is_available():
            raise ValueError("TensorRT needs an NVIDIA GPU, and the driver finds none: build on the machine of the GPU")
        library = import_runtime("tensorrt")
        version = tuple(int(part) for part in library.__version__.split(".")[:2])
        if version < OLDEST:
            logger.warning(
                "TensorRT %s is older than %s: such networks came out wrong in 10.3 and 10.4; trust what the gate says",
                library.__version__, ".".join(map(str, OLDEST)),
            )  # fmt: skip
        return library
    return import_runtime("tensorrt_rtx")


def check_traps(graph: "onnx.ModelProto") -> list[str]:
    """What is known to fail in TensorRT, or to come out wrong, found before a build of minutes; empty for nothing."""
    faults = []
    kinds = {tensor.name: tensor.data_type for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type == "Resize" and any(
            attribute.name == "antialias" and attribute.i for attribute in node.attribute
        ):
            faults.append(f"{node.name}: resizing with antialias has no form in TensorRT")
        if node.op_type == "Attention" and kinds.get(node.input[0], 1) == 1:
            faults.append(f"{node.name}: Attention of float32 does not build; write it out")
        if node.op_type == "ConvTranspose" and kinds.get(node.input[1]) == 16:
            faults.append(f"{node.name}: ConvTranspose of bfloat16 does not build")
        if node.op_type == "DequantizeLinear" and kinds.get(node.input[0]) == 6:
            faults.append(f"{node.name}: biases of int32 are refused")
    if not any(node.op_type == "LayerNormalization" for node in graph.graph.node) and any(
        "norm" in node.name for node in graph.graph.node
    ):
        faults.append("norms are written out, whose variance overflows in half precision")
    return faults


def build_engine(
    graph: "onnx.ModelProto", inputs: Mapping[str, Sequence[int]], settings: EngineSettings
) -> tuple[bytes, dict[str, Any]]:
    """Builds an engine from a graph.

    Args:
        graph: typed: its precisions are those of the engine.
        inputs: shapes by name; a batch of 0 may be any up to ``settings.max_batch``.
        settings: how.

    Returns:
        The engine, and how it was built, for JSON.

    Raises:
        ValueError: TensorRT is not installed, has no GPU, or does not take the graph; with what it says.
    """
    if faults := check_traps(graph):
        raise ValueError("TensorRT does not take this graph: " + "; ".join(faults))
    library = import_builder()
    log = _log_of(library)
    builder = library.Builder(log)
    typed = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    # TensorRT 11 knows no others and may drop the flag.
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = library.OnnxParser(network, log)
    if not parser.parse(graph.SerializeToString()):
        told = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise ValueError(f"TensorRT {library.__version__} does not take this graph: {told[:1000]}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.builder_optimization_level = settings.optimization
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    if settings.portable:
        config.set_flag(library.BuilderFlag.VERSION_COMPATIBLE)
        config.hardware_compatibility_level = library.HardwareCompatibilityLevel.AMPERE_PLUS
    profile = {}
    if any(shape[0] == 0 for shape in inputs.values()):
        chosen = builder.create_optimization_profile()
        for name, shape in inputs.items():
            sizes = [(batch, *shape[1:]) for batch in (1, max(settings.max_batch // 2, 1), settings.max_batch)]
            chosen.set_shape(name, *sizes)
            profile[name] = [list(size) for size in sizes]
        config.add_optimization_profile(chosen)
    cache = None
    if settings.timing_cache is not None:
        known = settings.timing_cache.read_bytes() if settings.timing_cache.exists() else b""
        cache = config.create_timing_cache(known)
        config.set_timing_cache(cache, ignore_mismatch=False)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise ValueError(f"TensorRT {library.__version__} could not build an engine; its log says why")
    if settings.timing_cache is not None and cache is not None:
        settings.timing_cache.write_bytes(bytes(cache.serialize()))
    engine = bytes(built)
    is_there = torch.cuda.is_available()
    record = {
        "library": library.__name__,
        "version": library.__version__,
        "gpu": torch.cuda.get_device_name() if is_there else "",
        "capability": list(torch.cuda.get_device_capability()) if is_there else [],
        "portable": settings.portable,
        "profile": profile,
        "layers": _layers(library, log, engine, settings.portable) if is_there else [],
    }
    return engine, record


def _runtime_of(library: Any, log: Any, portable: bool) -> Any:
    """What loads engines; a portable one brings code of the TensorRT that built it, which is run only if allowed."""
    runtime = library.Runtime(log)
    if portable:
        runtime.engine_host_code_allowed = True
    return runtime


def _layers(library: Any, log: Any, engine: bytes, portable: bool) -> list[Any]:
    """Which layers were fused, in which precision."""
    runtime = _runtime_of(library, log, portable)
    opened = runtime.deserialize_cuda_engine(engine)
    text = opened.create_engine_inspector().get_engine_information(library.LayerInformationFormat.JSON)
    found = json.loads(text).get("Layers", [])
    return list(found)


def _log_of(library: Any) -> Any:
    class Log(library.ILogger):  # type: ignore[misc]  # of a library that is imported here
        """Passes on what the library says."""

        def __init__(self) -> None:
            library.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            logger.log(_LOGGED.get(getattr(severity, "name", ""), logging.DEBUG), "TensorRT: %s", message)

    return Log()


class EngineSession(Session):
    """An engine on the GPU that it was built for; one batch at a time.

    Args:
        path: of the engine.
        build: how it was built, as `build_engine` says it.

    Raises:
        ValueError: there is no GPU, the engine is for another one or another version, or what built it is none of
            `ENGINE_LIBRARIES`.
    """

    runtime = "tensorrt"

    def __init__(self, path: Path, build: Mapping[str, Any]) -> None:
        library = build.get("library")
        if library not in ENGINE_LIBRARIES:  # never import what a file names
            raise ValueError(f"{path} says that {library!r} built it; allowed: {', '.join(ENGINE_LIBRARIES)}")
        if not torch.cuda.is_available():
            raise ValueError(f"{path} needs an NVIDIA GPU, and the driver finds none")
        self._library = import_runtime(library)
        self._log = _log_of(self._library)
        self._runtime = _runtime_of(self._library, self._log, build.get("portable") is True)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ValueError(
                f"{path} is not for this GPU or this version of {library} ({self._library.__version__}): build it here"
            )
        self._context = self._engine.create_execution_context()
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        kind = self._library.TensorIOMode.OUTPUT
        self._outputs = [name for name in names if self._engine.get_tensor_mode(name) == kind]
        self._lock = threading.Lock()
        self.name = f"{library} {self._library.__version__} on {torch.cuda.get_device_name()}"

    def run(self, inputs: Arrays) -> dict[str, NDArray[np.float32]]:
        with self._lock:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                given = {name: torch.from_numpy(value).cuda().contiguous() for name, value in inputs.items()}
                for name, value in given.items():
                    self._context.set_input_shape(name, tuple(value.shape))
                    self._context.set_tensor_address(name, value.data_ptr())
                found = {}
                for name in self._outputs:
                    shape = tuple(self._context.get_tensor_shape(name))
                    found[name] = torch.empty(shape, dtype=torch.float32, device="cuda")
                    self._context.set_tensor_address(name, found[name].data_ptr())
                if not self._context.execute_async_v3(stream.cuda_stream):
                    raise RuntimeError(f"{self.name} could not compute a batch; the log says why")
                arrays = {name: value.cpu().numpy() for name, value in found.items()}
            stream.synchronize()
        return arrays
