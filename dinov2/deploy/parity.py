"""The gate: whether an exported model says what the network says, on real images, and where the two part."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.references import References
from dinov2.data.loaders import make_dataset
from dinov2.data.preprocessing import Chain
from dinov2.data.transforms import channel_statistics
from dinov2.deploy.artefact import describe_model, has_task
from dinov2.deploy.deployed import DeployedModel
from dinov2.deploy.graph import module_of, with_outputs
from dinov2.deploy.runtimes import Session
from dinov2.deploy.standalone import LIMITS, compare
from dinov2.eval.features import make_eval_transform
from dinov2.predict.model import Model
from dinov2.predict.predictor import Predictor
from dinov2.tasks.evaluation import evaluate_set
from dinov2.tasks.inference import Inference
from dinov2.tasks.package import TaskPackage
from dinov2.tasks.task import spread_evenly
from dinov2.utils.errors import RunError
from dinov2.utils.files import write_atomically

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger("dinov2")

Arrays = dict[str, NDArray[np.float32]]

MOST_LOST = 0.01  # of the task's metric: a point; of an error a hundredth of it


class GateError(RunError):
    """An exported model does not say what the network says."""


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """What the gate found.

    Attributes:
        runtime: that computed the exported model.
        precision: whose limits hold.
        images: number of them that were compared.
        outputs: what `dinov2.deploy.standalone.compare` found, by output.
        metric: of the task; empty where none was computed.
        before: of the network.
        after: of the exported model.
        faults: what is wrong, in a sentence each; empty where it passed.
        parts_at: the first module whose output is beyond the limits; empty where that was not looked for.
    """

    runtime: str
    precision: str
    images: int = 0
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metric: str = ""
    before: float | None = None
    after: float | None = None
    faults: Sequence[str] = ()
    parts_at: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        lines = [
            f"gate, {self.runtime}, {self.precision}, {self.images} images: {'passed' if self.passed else 'FAILED'}"
        ]
        for name, found in self.outputs.items():
            if "fault" in found:
                continue
            spread = found["max_difference"] / max(found["standard_deviation"], 1e-12)
            lines.append(f"  {name}: cosine {found['cosine']:.7f}, largest difference {spread:.2e} standard deviations")
        if self.before is not None and self.after is not None:
            lines.append(f"  {self.metric}: {self.before:.4f} before, {self.after:.4f} after")
        lines += [f"  {fault}" for fault in self.faults]
        if self.parts_at:
            lines.append(f"  outputs part at {self.parts_at}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Recording:
    """What a model was given and said, image by image: all of one shape.

    Attributes:
        inputs: normalised images ``[n, 3, H, W]`` by name.
        outputs: by name.
    """

    inputs: Arrays
    outputs: Arrays

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


class _Recorder(Inference):
    """Keeps what the model is given and says."""

    def __init__(self, predictor: Predictor, *, keep_outputs: bool) -> None:
        super().__init__(
            predictor.model,
            predictor.task,
            # The set itself prepares the light of its images, and all before it.
            replace(predictor.preprocessing, light="original", chain=Chain()),
            device=predictor.device,
            batch_size=4,
            thresholds=predictor.thresholds,
        )
        self.keep_outputs = keep_outputs
        self.batches: list[tuple[Arrays, Arrays]] = []

    def forward(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Any]:
        outputs = super().forward(inputs)
        names = [output.name for output in self.task.export_outputs()] if self.keep_outputs else []
        self.batches.append((_arrays(inputs), _arrays({name: outputs[name] for name in names})))
        return outputs


def open_set(dataset_str: str, model: Model) -> ImageDataset:
    """Images of a dataset string, read as a model's own were: range of values, preprocessing and light."""
    dataset = make_dataset(dataset_str=dataset_str, value_range=model.value_range, preprocessing=model.preprocessing)
    dataset.light = model.light
    return dataset


def record(model: Model, dataset: ImageDataset, count: int, *, keep_outputs: bool = True) -> Recording:
    """Runs a model on images spread over a set, prepared as the model prepares them.

    Args:
        model: of torch or exported.
        dataset: labelled as its task needs it.
        count: images; of those that are seen window by window there are more windows.
        keep_outputs: whether outputs are wanted; those of many images take much memory.

    Raises:
        ValueError: images come to the network in different sizes.
        OSError: naming an image that cannot be read.
    """
    if not has_task(model):
        indices = spread_evenly(range(len(dataset)), count)
        transform = make_eval_transform(model.image_size, whole_image=model.whole_image)
        pixels = torch.stack([transform(dataset.get_image(index)) for index in indices])
        outputs: Mapping[str, Tensor] = {}
        if keep_outputs:
            with torch.inference_mode():
                outputs = backbone_outputs(model.backbone, {"image": pixels.to(model.device)})
        return Recording({"image": pixels.numpy()}, _arrays(outputs))
    recorder = _Recorder(model.predictor, keep_outputs=keep_outputs)
    metrics = None if model.package is None else model.package.task.metrics(dataset)
    references = References(dataset) if recorder.compares else None
    samples: Sized = dataset if metrics is None else metrics
    for index in spread_evenly(range(len(samples)), count):
        given: dict[str, Any] = {"image": dataset.get_placed_image(index)}
        if metrics is not None:
            given = metrics.read_inputs(index)
        if references is not None:
            given["reference"] = references.read(index, given["image"].full_size)
        recorder.predict_prepared([recorder.prepare(**given)])
    shapes = {tuple(value.shape[1:]) for inputs, _ in recorder.batches for value in inputs.values()}
    if len(shapes) > 1:
        sizes = sorted(f"{shape[-2]} x {shape[-1]}" for shape in shapes)
        raise ValueError(
            f"images of this set come to the network in {len(sizes)} sizes ({', '.join(sizes[:4])}), and an exported "
            "file has one: use a model with data.resize=stretch, or name a set whose images are alike, a file each"
        )
    (shape,) = shapes
    if len(shape) != 3:
        raise ValueError("a model of parts (head.per_part) takes any number of images, which no exported file does yet")
    return Recording(_joined(batch for batch, _ in recorder.batches), _joined(batch for _, batch in recorder.batches))


def backbone_outputs(backbone: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is exported of a backbone: the class token ``[B, D]`` and the patch tokens ``[B, N, D]``, normed."""
    found = backbone(inputs["image"], is_training=True)
    return {"cls": found["x_norm_clstoken"], "patches": found["x_norm_patchtokens"]}


def compare_outputs(
    reference: Arrays, found: Arrays, precision: str, unordered: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """`compare` of every output; those in ``unordered`` are sets along axis 1, and matched first."""
    names = [name for name in unordered if name in found and found[name].shape == reference[name].shape]
    if names:
        found = dict(found)
        order = _match([reference[name] for name in names], [found[name] for name in names])
        for name in names:
            found[name] = np.take_along_axis(found[name], order[..., None], axis=1)
    return {
        name: compare(value, found[name], precision) if name in found else {"passed": False, "fault": "is missing"}
        for name, value in reference.items()
    }


def _match(reference: Sequence[NDArray[np.float32]], found: Sequence[NDArray[np.float32]]) -> NDArray[np.int64]:
    """For every entry ``[B, Q]`` of the reference its counterpart, of values ``[B, Q, *]`` in units of their spread."""
    spreads = [max(float(value.std()), 1e-12) for value in reference]
    first, second = (
        np.concatenate([value / spread for value, spread in zip(values, spreads, strict=True)], axis=2)
        for values in (reference, found)
    )
    rows = [
        linear_sum_assignment(np.abs(one[:, None] - other[None]).sum(axis=2))[1]
        for one, other in zip(first, second, strict=True)
    ]
    return np.stack(rows)


def gate(
    model: Model,
    exported: DeployedModel,
    dataset: ImageDataset,
    *,
    expected: Recording,
    count: int,
    metric: "Metric | None" = None,
) -> GateReport:
    """Compares an exported model with the network, both from the images on.

    Args:
        model: of torch, in float32.
        exported: of it.
        dataset: real images.
        expected: `record` of the network.
        count: images that were recorded.
        metric: of the network on the set, which the exported model is then scored by too.
    """
    precision = exported.artefact.precision
    faults = describe_model(
        model, precision=precision, opset=exported.artefact.opset,
        inputs=exported.artefact.inputs, outputs=exported.artefact.outputs,
    ).differences(exported.artefact)  # fmt: skip
    found = record(exported, dataset, count)
    outputs = compare_outputs(expected.outputs, found.outputs, precision, _unordered(model))
    for name, value in outputs.items():
        if not value["passed"]:
            faults.append(f"{name}: {value['fault'] if 'fault' in value else _beyond(value, precision)}")
    after = None
    if metric is not None and exported.package is not None:
        after = metric.of(exported.package, dataset)
        if (lost := metric.lost(after)) > MOST_LOST:
            faults.append(f"{metric.name} was {metric.value:.4f} and is {after:.4f}: {lost:.4f} are lost")
    return GateReport(
        runtime=exported.runtime,
        precision=precision,
        images=len(expected),
        outputs=outputs,
        metric="" if metric is None else metric.name,
        before=None if metric is None else metric.value,
        after=None if after is None or np.isnan(after) else after,
        faults=faults,
    )


def _unordered(model: Model) -> tuple[str, ...]:
    if not has_task(model):
        return ()
    return tuple(output.name for output in model.predictor.task.export_outputs() if output.is_set)


def _beyond(found: Mapping[str, Any], precision: str) -> str:
    least, most = LIMITS[precision]
    if found["cosine"] < least:
        return f"cosine {found['cosine']:.6f} with the network's, at least {least} is asked of {precision}"
    return (
        f"differs by up to {found['max_difference']:.3g}, "
        f"{found['max_difference'] / max(found['standard_deviation'], 1e-12):.2e} of its standard deviation; at most "
        f"{most} is allowed"
    )


@dataclass(frozen=True)
class Metric:
    """The metric of a task that chooses its best weights, on a set.

    Attributes:
        name: of it.
        value: of the network.
        higher_is_better: whether more of it is.
        indices: samples that are looked at; None for all.
    """

    name: str
    value: float
    higher_is_better: bool
    indices: Sequence[int] | None = None

    @classmethod
    def measure(cls, package: TaskPackage, dataset: ImageDataset, most: int = 0) -> "Metric | None":
        """That of a network; None where the set does not give it.

        Args:
            package: the network.
            dataset: with labels.
            most: samples that are looked at, spread over the set; 0 for all.
        """
        task = package.task
        name = task.metric if task.config.evaluation.metric == "auto" else task.config.evaluation.metric
        count = len(task.metrics(dataset))
        indices = spread_evenly(range(count), most) if 0 < most < count else None
        empty = cls(name, np.nan, task.higher_is_better(name), indices)
        value = empty.of(package, dataset)
        if np.isnan(value):
            logger.warning("this set does not give %s, so only outputs are compared", name)
            return None
        return replace(empty, value=value)

    def of(self, package: TaskPackage, dataset: ImageDataset) -> float:
        """The same of another model."""
        options = replace(package.task.config.evaluation, num_pictures=0)
        values = evaluate_set(package, dataset, options, indices=self.indices).values
        return float(values.get(self.name, np.nan))

    def lost(self, after: float) -> float:
        """What was lost of it: at most 1, of an error its share."""
        if np.isnan(after):
            return np.inf
        if self.higher_is_better:
            return self.value - after
        return (after - self.value) / max(abs(self.value), 1e-12)


def find_divergence(
    network: nn.Module,
    run: Callable[[nn.Module, Mapping[str, Tensor]], Any],
    graph: "onnx.ModelProto",
    session_of: Callable[[bytes], Session],
    inputs: Arrays,
    precision: str,
    to_inputs: Callable[[NDArray[np.float32]], NDArray[np.float32]],
) -> str:
    """The first module whose output in a runtime is beyond the limits, in the order in which they are computed.

    Args:
        network: the original, of torch in float32.
        run: calls it with images by name.
        graph: of it, of this or another precision.
        session_of: loads a graph into the runtime.
        inputs: normalised images, of as many images as the graph takes.
        precision: whose limits hold.
        to_inputs: normalised images as the graph takes them.

    Returns:
        Its name and how far its output is off; empty where no module is.
    """
    known: Arrays = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                known[name] = output.detach().float().cpu().numpy()

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in network.named_modules() if name]
    with torch.no_grad():
        run(network, {name: torch.from_numpy(value) for name, value in inputs.items()})
    for handle in handles:
        handle.remove()
    last: dict[str, str] = {}
    for node in graph.graph.node:
        module = module_of(node.name)
        while module:
            if module in known and node.output:
                last[module] = node.output[0]
            module = module.rpartition(".")[0]
    order = {output: place for place, node in enumerate(graph.graph.node) for output in node.output}
    given = {name: to_inputs(value) for name, value in inputs.items()}
    found = session_of(with_outputs(graph, dict.fromkeys(last.values())).SerializeToString()).run(given)
    for module in sorted(last, key=lambda name: order[last[name]]):
        reference, computed = known[module], np.asarray(found[last[module]]).astype(np.float32)
        if reference.shape != computed.shape:  # it has another form in the graph, or ends in a view
            continue
        value = compare(reference, computed, precision)
        if not value["passed"]:
            return f"{module} ({value.get('fault') or _beyond(value, precision)})"
    return ""


def write_reference(path: Path, fingerprint: str, recording: Recording, count: int = 4) -> None:
    """A few images as values in 0..255, and what the network said, for `dinov2.deploy.standalone`."""
    arrays: dict[str, NDArray[Any]] = {"fingerprint": np.array(fingerprint)}
    for name, value in recording.inputs.items():
        mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in channel_statistics(value.shape[1]))
        pixels = (value[:count] * std + mean) * 255
        whole = pixels.round()
        is_whole = bool(np.abs(pixels - whole).max() < 0.01 and whole.min() >= 0 and whole.max() <= 255)
        arrays[f"input/{name}"] = whole.astype(np.uint8) if is_whole else pixels.astype(np.float32)
    arrays |= {f"output/{name}": value[:count] for name, value in recording.outputs.items()}
    write_atomically(path, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))


def write_report(path: Path, reports: Iterable[GateReport], **more: Any) -> None:
    """Everything that gates found, as JSON."""
    content = {**more, "gates": [report.to_dict() for report in reports]}
    text = json.dumps(content, indent=2, allow_nan=False, default=str) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def _arrays(values: Mapping[str, Any]) -> Arrays:
    return {
        name: value.detach().float().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value, np.float32)
        for name, value in values.items()
    }


def _joined(batches: Iterable[Arrays]) -> Arrays:
    pieces = list(batches)
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
