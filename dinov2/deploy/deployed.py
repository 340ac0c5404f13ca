"""An exported model in use: `dinov2.load` of an ONNX file, an OpenVINO model or a TensorRT engine."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.config import Config
from dinov2.deploy.artefact import Artefact, is_artefact, read_artefact, verified_here
from dinov2.deploy.engine import EngineSession
from dinov2.deploy.runtimes import OnnxRuntimeSession, OpenVinoSession, Session, import_runtime, is_installed
from dinov2.predict.model import Model, load_model
from dinov2.predict.predictor import Predictor
from dinov2.tasks import TASKS, Tasks, parse_task_config
from dinov2.tasks.joint import JointTask
from dinov2.tasks.package import TaskPackage
from dinov2.tasks.task import PreparedImage, Task, TaskFacts, TaskOutputs

logger = logging.getLogger("dinov2")

BACKBONE_OUTPUTS = ("cls", "patches")
RUNTIMES = {  # which of them compute which files, the fastest first
    ".onnx": ("openvino", "onnxruntime"),
    ".xml": ("openvino",),
    ".engine": ("tensorrt",),
}


class RuntimeNetwork(nn.Module):
    """A session as a network of torch without parameters, from normalised images to outputs by name.

    Args:
        session: computes.
        artefact: says what it takes.
    """

    def __init__(self, session: Session, artefact: Artefact) -> None:
        super().__init__()
        self.session = session
        self.artefact = artefact

    def forward(self, *images: Tensor) -> dict[str, Tensor]:
        """Outputs by name, float32 in the processor's memory.

        Args:
            images: ``[B, 3, H, W]``, one per input of the artefact.

        Raises:
            ValueError: for another number of inputs, or images of another size than the artefact takes.
        """
        names = tuple(self.artefact.inputs)
        if len(images) != len(names):
            raise ValueError(f"the exported model takes {', '.join(names)}; it was given {len(images)} inputs")
        arrays = {name: self._values(image) for name, image in zip(names, images, strict=True)}
        count, batch = len(images[0]), self.artefact.most
        if batch in (0, count) or (self.artefact.batch == 0 and count < batch):
            found = self.session.run(arrays)
        else:
            pieces = [self._run_piece(arrays, start, batch) for start in range(0, count, batch)]
            found = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        return {name: torch.from_numpy(np.asarray(value, np.float32)) for name, value in found.items()}

    def _run_piece(self, arrays: Mapping[str, Any], start: int, batch: int) -> dict[str, Any]:
        """A part of a batch; the last is filled up with images of zeros."""
        pieces = {name: array[start : start + batch] for name, array in arrays.items()}
        count = len(next(iter(pieces.values())))
        if count < batch:
            empty = {name: np.zeros((batch - count, *piece.shape[1:]), np.float32) for name, piece in pieces.items()}
            pieces = {name: np.concatenate([piece, empty[name]]) for name, piece in pieces.items()}
        return {name: value[:count] for name, value in self.session.run(pieces).items()}

    def _values(self, image: Tensor) -> Any:
        self.check_size(image.shape[-2:])
        return self.artefact.to_inputs(image.detach().cpu().float().numpy())

    def check_size(self, size: Sequence[int]) -> None:
        """Raises a ValueError for another height and width than the artefact takes."""
        height, width = self.artefact.size
        if tuple(size) != (height, width):
            raise ValueError(
                f"the exported model takes images of {height} x {width} pixels (height x width), prepared as the model "
                f"was trained this one has {' x '.join(map(str, size))}: export another file for this size"
            )


class _FixedSizePredictor(Predictor):
    """Refuses an image of another size than the file takes while it is prepared, before it is among others."""

    @property
    def input_size(self) -> tuple[int, int]:
        return self._network.artefact.size

    @property
    def _network(self) -> RuntimeNetwork:
        assert isinstance(self.model, RuntimeNetwork)
        return self.model

    def prepare(self, *given: Any, **more: Any) -> PreparedImage:
        prepared = super().prepare(*given, **more)
        size = prepared.inputs["image"].shape[-2:]
        if self._keeps_size:  # larger ones are seen window by window
            size = torch.Size(map(min, size, self.preprocessing.image_size))
        self._network.check_size(size)
        return prepared


class RuntimeBackbone(nn.Module):
    """An exported backbone, called as one of torch."""

    def __init__(self, network: RuntimeNetwork) -> None:
        super().__init__()
        self.network = network
        self.embed_dim = int(network.artefact.outputs[BACKBONE_OUTPUTS[0]][1])

    def forward(self, images: Tensor, is_training: bool = False) -> Any:
        """The class token ``[B, D]``, or a dict of it and the patch tokens."""
        cls, patches = (self.network(images)[name] for name in BACKBONE_OUTPUTS)
        return {"x_norm_clstoken": cls, "x_norm_patchtokens": patches} if is_training else cls


class _NoBackbone(nn.Module):
    embed_dim = 0

    def forward(self, *images: Tensor, **options: Any) -> Any:
        """Raises a ValueError."""
        raise ValueError("this file holds what a head gives, and no features: export the backbone for those")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DeployedModel(Model):
    """An exported model; what is said of `Model` holds.

    Attributes:
        path: of the file.
        artefact: what it says about itself.
        network: computes it.
    """

    path: Path = field(default_factory=Path)
    artefact: Artefact
    network: RuntimeNetwork

    def __repr__(self) -> str:
        tasks = [head["task"] for head in self.artefact.heads.values()]
        return f"DeployedModel({self.path.name!r}, {tasks}, {self.artefact.precision}, {self.runtime})"

    @property
    def device(self) -> torch.device:
        """Where it takes its images."""
        return torch.device("cpu")

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights that were exported."""
        return self.artefact.fingerprint

    @cached_property
    def predictor(self) -> Predictor:
        """As of `Model`; heads that were joined are computed by one network, and batches are as large as the file's."""
        if not self.heads and self.package is None:
            return super().predictor  # which says why there is none
        tasks = {name: package.task for name, package in self.heads.items()}
        task: TaskOutputs = JointTask(tasks) if self.package is None else self.package.task
        return _FixedSizePredictor(
            self.network, task, self.artefact.preparation,
            batch_size=self.artefact.most or None, thresholds=self.artefact.thresholds,
        )  # fmt: skip

    @property
    def runtime(self) -> str:
        """What computes it, and where."""
        return self.network.session.name

    def warm_up(self, times: int = 3) -> None:
        """Computes images of zeros, so that the first real one does not wait for what a runtime does only once."""
        _, *shape = next(iter(self.artefact.inputs.values()))
        empty = torch.zeros(max(self.artefact.batch, 1), *shape)
        for _ in range(times):
            self.network(*(empty for _ in self.artefact.inputs))


def open_model(
    path_or_name: str | PathLike[str] | Sequence[str | PathLike[str]] | Mapping[str, str | PathLike[str]],
    config: str | Path | Mapping[str, Any] | Config | None = None,
    device: str | torch.device | None = "cpu",
    *,
    tasks: Tasks | None = None,
) -> Model:
    """What `dinov2.load` opens: a file for a runtime, or whatever `load_model` does.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: see `dinov2.load`.
    """
    if isinstance(path_or_name, str | PathLike) and is_artefact(path_or_name):
        if config is not None:
            raise ValueError(f"{path_or_name} was exported and describes itself: leave config out")
        return load_deployed(path_or_name, device, tasks=tasks)
    return load_model(path_or_name, config, device, tasks=tasks)


def load_deployed(
    path: str | PathLike[str],
    device: str | torch.device | None = "auto",
    *,
    runtime: str = "auto",
    tasks: Tasks | None = None,
    threads: int = 0,
) -> DeployedModel:
    """Loads an exported file into the fastest runtime here in which it has passed the gate; the log says which.

    Args:
        path: ``.onnx``, ``.xml`` (OpenVINO) or ``.engine`` (TensorRT).
        device: ``cpu``, ``cuda`` (of which an engine always is), or ``auto``, which takes the processor for all else.
        runtime: ``onnxruntime``, ``openvino`` or ``tensorrt``; ``auto`` chooses.
        tasks: by name.
        threads: of the processor that compute one batch; 0 for what the runtime thinks best.

    Raises:
        FileNotFoundError: there is no such file, or one that belongs to it is missing.
        ValueError: it is damaged, was changed after its export, or nothing here can compute it.
    """
    path = Path(path).expanduser()
    artefact = read_artefact(path)
    session = _open_session(path, artefact, "auto" if device is None else str(device), runtime, threads)
    return deployed_model(path, artefact, session, TASKS if tasks is None else tasks)


def deployed_model(path: Path, artefact: Artefact, session: Session, tasks: Tasks = TASKS) -> DeployedModel:
    """A model around a session."""
    network = RuntimeNetwork(session, artefact)
    heads = {
        name: TaskPackage(
            model=network,
            task=_task_of(head, str(path), tasks),
            preprocessing=artefact.preparation,
            thresholds=artefact.thresholds,
        )
        for name, head in artefact.heads.items()
    }
    backbone: nn.Module = _NoBackbone()
    if not heads and set(artefact.outputs) >= set(BACKBONE_OUTPUTS):
        backbone = RuntimeBackbone(network)
    return DeployedModel(
        backbone=backbone,  # type: ignore[arg-type]  # called alike
        image_size=(artefact.image_size[0], artefact.image_size[1]),
        whole_image=artefact.resize == "stretch",
        package=heads.pop("", None),
        heads=heads,
        value_range=artefact.preparation.value_range,
        light=artefact.light,
        preprocessing=artefact.preparation.chain,
        path=path,
        artefact=artefact,
        network=network,
    )


def _task_of(head: Mapping[str, Any], source: str, tasks: Tasks) -> Task:
    if head["task"] not in tasks:
        raise ValueError(f"{source} is of task={head['task']}; known are {', '.join(tasks)}")
    config = parse_task_config(head["config"], f"{source}: config", tasks)
    return tasks[head["task"]](config, TaskFacts(classes=tuple(head["classes"]), unit=head["unit"]))


def _open_session(path: Path, artefact: Artefact, device: str, runtime: str, threads: int) -> Session:
    if device not in ("auto", "cpu", "cuda", "cuda:0"):
        raise ValueError(
            f"device {device!r}: exported models run on auto, cpu or cuda, which is the first GPU that "
            "CUDA_VISIBLE_DEVICES shows"
        )
    chosen = runtime if runtime != "auto" else _choose(path, artefact, device)
    possible = RUNTIMES[path.suffix.lower()]
    if chosen not in possible:
        raise ValueError(f"{path} is not for {chosen}, it is for {' or '.join(possible)}")
    session = make_session(path, chosen, artefact, device, threads)
    logger.info("%s: computed by %s", path, session.name)
    return session


def make_session(
    model: Path | bytes, runtime: str, artefact: Artefact, device: str = "cpu", threads: int = 0
) -> Session:
    """A session of one runtime.

    Raises:
        ValueError: the runtime is not installed, does not know the file, or does not compute on the device.
    """
    cuda = device.startswith("cuda")
    if runtime == "onnxruntime":
        return OnnxRuntimeSession(model, "cuda" if cuda else "cpu", threads)
    if runtime == "tensorrt":
        assert isinstance(model, Path)
        return EngineSession(model, artefact.build)
    if cuda:
        raise ValueError(f"device={device}: OpenVINO computes on the processor here; use device=cpu, or an engine")
    return OpenVinoSession(model, artefact.rounds, threads)


def _choose(path: Path, artefact: Artefact, device: str) -> str:
    possible: Sequence[str] = RUNTIMES[path.suffix.lower()]
    if device.startswith("cuda"):
        possible = [name for name in possible if name != "openvino"]
    present = [name for name in possible if is_installed(name) or (name == "tensorrt" and is_installed("tensorrt_rtx"))]
    if not present:
        import_runtime(possible[-1] if possible else RUNTIMES[path.suffix.lower()][0])
    here = verified_here(path)
    good = [name for name in present if here.get(name, name in artefact.checked)]
    if not good:
        logger.warning(
            "%s has not passed the gate in %s: run dinov2 verify %s --on DATASET on this machine",
            path, " or ".join(present), path,
        )  # fmt: skip
    return (good or present)[0]
