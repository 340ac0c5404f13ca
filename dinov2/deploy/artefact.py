"""What an exported file says about itself, and whether that is true of what it holds.

An ONNX file carries its description as metadata, OpenVINO's as runtime information, and an engine, which can carry
nothing, in a JSON file beside it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from dinov2.config import render_config
from dinov2.data.photometric import LIGHTS
from dinov2.data.preprocessing import Chain
from dinov2.data.task_transforms import RESIZE_MODES
from dinov2.data.transforms import IMAGENET_MEAN, IMAGENET_STD, MAX_CHANNELS, channel_statistics
from dinov2.data.value_range import ValueRange
from dinov2.deploy.graph import OPSETS, PRECISIONS
from dinov2.deploy.runtimes import import_runtime
from dinov2.predict.model import Model
from dinov2.tasks import TASKS
from dinov2.tasks.joint import check_head_names
from dinov2.tasks.package import Preprocessing
from dinov2.tasks.task import Task
from dinov2.utils.files import file_digest, is_plain_name, shown_fault

if TYPE_CHECKING:
    import onnx

KEY = "dinov2"  # of the description among a file's metadata
FORMAT_VERSION = 1
SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".engine": "tensorrt"}
READABLE_OPSETS = range(17, 24)
_HEAD_KEYS = {"task", "classes", "unit", "config"}
_OF_THE_MODEL = (
    "fingerprint", "heads", "thresholds", "image_size", "resize", "light", "value_range", "preprocessing", "mean",
    "std", "outputs",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """What an exported file is, enough to use it without the checkpoint.

    Attributes:
        fingerprint: of the weights that were exported, see `dinov2.models.description.fingerprint`.
        precision: one of `PRECISIONS`.
        opset: of the ONNX graph that it is or was made from.
        inputs: shapes by name, in order, ``[B, C, H, W]``; a batch of 0 may have any size.
        outputs: the same of the outputs.
        meanings: of the outputs, in a sentence each.
        pixels: whether inputs are values in 0..255; else they are normalised by ``mean`` and ``std``.
        mean: per channel, of values in 0..1.
        std: per channel.
        heads: by name, the task of each (``task``, ``classes``, ``unit``, and its options as YAML, ``config``). The
            only head of a model has no name; a backbone has none.
        thresholds: of scores, by name.
        image_size: height and width that images are brought to.
        resize: how; of a backbone ``stretch`` (the whole image) or ``crop`` (its middle).
        light: ``original`` or ``standardized``.
        value_range: values that become black and white; None where images are of 8 bits.
        preprocessing: steps that images go through after that and before the light, see `Chain.to_values`.
        build: how an engine was made: versions, GPU, profile, SHA-256 of the ONNX file beside it, and which layers
            were fused in which precision.
        version: of the package that wrote it.
        checked: runtimes in which it has passed the gate, with what was found.
        format_version: of this description.
    """

    fingerprint: str
    precision: str
    opset: int
    inputs: Mapping[str, Sequence[int]]
    outputs: Mapping[str, Sequence[int]]
    meanings: Mapping[str, str] = field(default_factory=dict)
    pixels: bool = False
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    image_size: Sequence[int]
    resize: str
    light: str = "original"
    value_range: Sequence[float] | None = None
    preprocessing: Sequence[Any] = ()
    build: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""
    checked: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def batch(self) -> int:
        """Images that it takes at once; 0 for any number."""
        return int(next(iter(self.inputs.values()))[0])

    @property
    def most(self) -> int:
        """Images that it takes at once at most; 0 for no bound."""
        profile = self.build.get("profile")
        return int(next(iter(profile.values()))[-1][0]) if profile else self.batch

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its inputs, in pixels."""
        height, width = next(iter(self.inputs.values()))[-2:]
        return int(height), int(width)

    @property
    def rounds(self) -> bool:
        """Whether it is a graph of float32 that its runtime computes in bfloat16."""
        return self.precision == "bf16" and self.opset < OPSETS["bf16"]

    @property
    def preparation(self) -> Preprocessing:
        """Of a task's images."""
        return Preprocessing(
            image_size=(self.image_size[0], self.image_size[1]),
            resize=self.resize,
            light=self.light,
            value_range=ValueRange.of(self.value_range),
            chain=Chain.parse(self.preprocessing),
        )

    def to_inputs(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images ``[B, C, H, W]``, normalised as the package does it, as the file takes them."""
        ours, own = channel_statistics(images.shape[1]), (tuple(self.mean), tuple(self.std))
        if not self.pixels and ours == own:
            return np.ascontiguousarray(images, dtype=np.float32)
        mean, std, own_mean, own_std = (np.array(value, np.float32).reshape(-1, 1, 1) for value in (*ours, *own))
        shares = images * std + mean  # in 0..1
        return np.ascontiguousarray(shares * 255 if self.pixels else (shares - own_mean) / own_std, dtype=np.float32)

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False, sort_keys=True)

    @classmethod
    def of_text(cls, text: str, source: str) -> Self:
        """Reads `to_text`.

        Raises:
            ValueError: naming the source, for anything else, or for values that cannot be.
        """
        try:
            values = json.loads(text)
            if not isinstance(values, dict):
                raise ValueError("it is no object")
            if values.get("format_version") != FORMAT_VERSION:
                raise ValueError(
                    f"format {values.get('format_version')}; this version of dinov2 reads {FORMAT_VERSION}"
                )
            unknown = values.keys() - {entry.name for entry in fields(cls)}
            if unknown:
                raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
            found = cls(**values)
            found._check()
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{source}: its description is damaged or was changed: {error}") from error
        return found

    def _check(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}; allowed: {', '.join(PRECISIONS)}")
        if not (isinstance(self.opset, int) and self.opset in READABLE_OPSETS):
            raise ValueError(f"opset {self.opset}; allowed are {READABLE_OPSETS[0]} to {READABLE_OPSETS[-1]}")
        for name, shape in {**self.inputs, **self.outputs}.items():
            if not shape or not all(isinstance(length, int) and length >= 0 for length in shape) or 0 in shape[1:]:
                raise ValueError(f"{name} has the shape {shape}")
        if not self.inputs or not self.outputs:
            raise ValueError("no inputs or outputs")
        for name, shape in self.inputs.items():
            if len(shape) != 4 or shape[1] > MAX_CHANNELS or tuple(shape) != tuple(next(iter(self.inputs.values()))):
                raise ValueError(
                    f"{name} has the shape {list(shape)}, images are [B, C, H, W], C at most {MAX_CHANNELS}, all alike"
                )
            statistics = *self.mean, *self.std
            if not len(self.mean) == len(self.std) == shape[1] or not all(0 < value <= 1 for value in statistics):
                raise ValueError(
                    f"mean {self.mean} and std {self.std} are not {shape[1]} values in (0, 1] each, one per channel"
                )
        if len(self.image_size) != 2 or not all(isinstance(side, int) and side > 0 for side in self.image_size):
            raise ValueError(f"image_size {self.image_size}")
        if list(self.heads) != [""]:
            check_head_names(self.heads)
        for head in self.heads.values():
            if head.keys() != _HEAD_KEYS:
                raise ValueError(f"a head is described by {sorted(head)}, expected are {sorted(_HEAD_KEYS)}")
            if len(set(head["classes"])) < len(head["classes"]):
                raise ValueError(f"classes {list(head['classes'])}, of which some have one name")
        known: set[str] = set()
        for name, head in self.heads.items():
            labels = TASKS.get(head["task"], Task).threshold_names(head["classes"])
            known.update(f"{name}/{label}".lstrip("/") for label in labels)
        if strangers := {name for name in self.thresholds if not {name, name.partition(".")[0]} & known}:
            raise ValueError(f"thresholds of {sorted(strangers)}, and the classes are {sorted(known)}")
        for name, value in self.thresholds.items():
            if not np.isfinite(value):
                raise ValueError(f"the threshold of {name} is {value}")
        if self.light not in LIGHTS or self.resize not in (*RESIZE_MODES, "crop"):
            raise ValueError(f"light {self.light!r} or resize {self.resize!r}")
        if not isinstance(self.fingerprint, str):
            raise ValueError(f"fingerprint {self.fingerprint}")
        ValueRange.of(self.value_range)
        Chain.parse(self.preprocessing)

    def differences(self, other: "Artefact") -> list[str]:
        """What the two say differently about the model and its images, in a sentence each."""
        mine, theirs = (json.loads(one.to_text()) for one in (self, other))
        found = []
        for name in _OF_THE_MODEL:
            ours, other_value = mine[name], theirs[name]
            if name == "outputs":  # of any batch
                ours, other_value = ({key: shape[1:] for key, shape in one.items()} for one in (ours, other_value))
            if name == "heads":
                found += _differences_of_heads(ours, other_value)
            elif ours != other_value:
                found.append(f"{name} differs: {ours} and {other_value}")
        return found


def _differences_of_heads(ours: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    if ours.keys() != others.keys():
        return [f"heads differ: {sorted(ours)} and {sorted(others)}"]
    return [
        f"{key} differs{f' of {name}' if name else ''}"
        + ("" if key == "config" else f": {head[key]} and {others[name][key]}")
        for name, head in ours.items()
        for key in sorted(head)
        if head[key] != others[name][key]
    ]


def describe_model(model: Model, **more: Any) -> Artefact:
    """The description of a loaded model's export; ``more`` are the fields that the model does not decide."""
    mean, std = channel_statistics(model.preprocessing.num_channels)
    given: dict[str, Any] = {
        "mean": mean,
        "std": std,
        "fingerprint": model.fingerprint,
        "image_size": list(model.image_size),
        "light": model.light,
        "value_range": None if model.value_range is None else model.value_range.ends,
        "preprocessing": model.preprocessing.to_values(),
    }
    given["version"] = _version()
    if not has_task(model):
        return Artefact(resize="stretch" if model.whole_image else "crop", **given, **more)
    tasks = {name: package.task for name, package in model.heads.items()}
    if model.package is not None:
        tasks = {"": model.package.task}
    return Artefact(
        resize=model.predictor.preprocessing.resize,
        heads={
            name: {
                "task": task.name,
                "classes": list(task.classes),
                "unit": task.unit,
                "config": render_config(task.config),
            }
            for name, task in tasks.items()
        },
        thresholds=dict(model.predictor.thresholds),
        **given,
        **more,
    )


def _version() -> str:
    try:
        return metadata.version("dinov2")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return ""


def has_task(model: Model) -> bool:
    """Whether a model predicts, and is no backbone alone."""
    return model.package is not None or bool(model.heads)


def is_artefact(path: str | PathLike[str]) -> bool:
    """Whether a name is that of an exported file."""
    return Path(path).suffix.lower() in SUFFIXES


def read_artefact(path: str | Path) -> Artefact:
    """The description of an exported file, compared with its graph.

    Raises:
        FileNotFoundError: there is no such file, or one that belongs to it is missing.
        ValueError: it is damaged, was not written by ``dinov2 export``, or does not hold what it says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} is no exported model: its name ends in none of {', '.join(SUFFIXES)}")
    for part in companions(path):
        if part.exists() and (fault := shown_fault(part)):
            raise ValueError(f"{part} {fault}; export it again, or copy it again with the files beside it")
    match SUFFIXES[path.suffix.lower()]:
        case "onnx":
            return _read_onnx(path)
        case "openvino":
            return _read_openvino(path)
    beside = description_beside(path)
    if not beside.is_file():
        raise FileNotFoundError(f"{path} has no {beside.name} beside it, which says what it is: copy both")
    return Artefact.of_text(beside.read_text(encoding="utf-8"), str(beside))


def companions(path: Path) -> tuple[Path, ...]:
    """The files that an exported model consists of, itself the first; not all need exist."""
    match SUFFIXES[path.suffix.lower()]:
        case "openvino":
            return path, path.with_suffix(".bin")
        case "tensorrt":
            return path, description_beside(path)
    return path, path.with_name(path.name + ".data")


def record_beside(path: Path) -> Path:
    """Where ``dinov2 verify`` writes what it found."""
    return path.with_suffix(".verified.json")


def verified_here(path: Path) -> dict[str, bool]:
    """Whether exactly this file has passed ``dinov2 verify`` here, by the runtime that was checked; empty for none."""
    try:
        found = json.loads(record_beside(path).read_text(encoding="utf-8"))
        return {found["runtime"]: found["passed"] is True} if found["sha256"] == file_digest(path) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def description_beside(path: Path) -> Path:
    """Where the description of an engine lies."""
    return path.with_name(path.name + ".json")


def load_onnx(path: Path, *, weights: bool = True) -> "onnx.ModelProto":
    """An ONNX file whose weights, where they lie in other files, lie in its own folder.

    Raises:
        ValueError: it is no ONNX file, or names weights elsewhere.
    """
    import_runtime("onnx")
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
        opsets = {entry.domain: entry.version for entry in model.opset_import}
    except Exception as error:  # protobuf has several
        raise ValueError(f"{path} is no ONNX file, or a damaged one ({type(error).__name__})") from None
    if not model.graph.node or "" not in opsets:
        raise ValueError(f"{path} is no ONNX file: it holds no graph")
    nodes = chain(model.graph.node, *(function.node for function in model.functions))
    for tensor in chain(model.graph.initializer, _tensors_of(nodes)):
        for entry in tensor.external_data:
            place = entry.value
            if entry.key == "location" and (not is_plain_name(place) or (path.parent / place).is_symlink()):
                raise ValueError(f"{path}: weights of {tensor.name} lie in {place!r}, outside of its folder: refused")
    return onnx.load(str(path)) if weights else model


def _tensors_of(nodes: Iterable["onnx.NodeProto"]) -> "Iterator[onnx.TensorProto]":
    """Tensors that nodes hold themselves, such as constants, and those of graphs inside them."""
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from graph.initializer
                yield from _tensors_of(graph.node)


def set_description(model: "onnx.ModelProto", artefact: Artefact) -> None:
    """Puts a description into an ONNX model, in place of one that is there."""
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, artefact.to_text()
    model.producer_name, model.producer_version = KEY, artefact.version


def _read_onnx(path: Path) -> Artefact:
    model = load_onnx(path, weights=False)
    texts = [entry.value for entry in model.metadata_props if entry.key == KEY]
    if not texts:
        raise ValueError(f"{path} does not say what it holds: dinov2 export did not write it")
    artefact = Artefact.of_text(texts[0], str(path))
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset != artefact.opset:
        raise ValueError(f"{path} has opset {opset}, and says {artefact.opset}: it was changed after its export")

    def shapes(values: Any) -> dict[str, list[int]]:
        return {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in values}

    _compare_shapes(artefact, shapes(model.graph.input), shapes(model.graph.output), path)
    return artefact


def _read_openvino(path: Path) -> Artefact:
    openvino = import_runtime("openvino")
    if not path.with_suffix(".bin").is_file():
        raise FileNotFoundError(f"{path} has no {path.stem}.bin beside it, which holds its weights: copy both")
    try:
        model = openvino.Core().read_model(path)
    except RuntimeError as error:
        raise ValueError(f"{path} is no model of OpenVINO, or a damaged one: {str(error).splitlines()[0]}") from None
    if not model.has_rt_info([KEY]):
        raise ValueError(f"{path} does not say what it holds: dinov2 export did not write it")
    artefact = Artefact.of_text(model.get_rt_info([KEY]).astype(str), str(path))

    def shapes(ports: Any) -> dict[str, list[int]]:
        return {
            port.any_name: [0 if axis.is_dynamic else axis.get_length() for axis in port.partial_shape]
            for port in ports
        }

    _compare_shapes(artefact, shapes(model.inputs), shapes(model.outputs), path)
    return artefact


def _compare_shapes(
    artefact: Artefact, inputs: Mapping[str, list[int]], outputs: Mapping[str, list[int]], path: Path
) -> None:
    for said, found in ((artefact.inputs, inputs), (artefact.outputs, outputs)):
        expected = {name: list(shape) for name, shape in said.items()}
        if expected != dict(found):
            raise ValueError(
                f"{path} takes or gives {dict(found)}, and says {expected}: it was changed after its export"
            )
