"""The command ``dinov2 export``: a trained network for other libraries, or as a verified file for a runtime."""

import functools
import hashlib
import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.base import ImageDataset
from dinov2.deploy import standalone, static_file
from dinov2.deploy.artefact import (
    KEY,
    Artefact,
    describe_model,
    description_beside,
    has_task,
    set_description,
)
from dinov2.deploy.deployed import RUNTIMES, DeployedModel, deployed_model, make_session
from dinov2.deploy.engine import EngineSettings, build_engine
from dinov2.deploy.graph import OPSETS, PRECISIONS, ExportNetwork, write_graph
from dinov2.deploy.libraries import LIBRARIES, export_backbone
from dinov2.deploy.parity import (
    GateError,
    GateReport,
    Metric,
    backbone_outputs,
    find_divergence,
    gate,
    open_set,
    record,
    write_reference,
    write_report,
)
from dinov2.deploy.quantize import (
    ENOUGH_IMAGES,
    RANGES,
    calibrate,
    linear_products,
    quantize,
    sensitivity,
    smooth,
    smoothing_factors,
)
from dinov2.deploy.runtimes import Arrays, Session, import_runtime, is_installed
from dinov2.logging import logging_to
from dinov2.predict.model import Model, load_model
from dinov2.tasks import TASKS, Tasks
from dinov2.utils.files import write_atomically, write_with_checksum

if TYPE_CHECKING:
    import onnx

logger = logging.getLogger("dinov2")

TARGETS = {"onnx": ".onnx", "openvino": ".xml", "tensorrt": ".engine"}


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How a file for a runtime is made.

    Attributes:
        to: one of `TARGETS`.
        precision: one of `PRECISIONS`.
        batch_size: images that the file takes at once; 0 for any number.
        pixels: whether it takes values in 0..255 and normalises them itself.
        images: that the gate compares.
        metric_images: that the task's metric is computed on; 0 for all of the set.
        ranges: of int8: one of `dinov2.deploy.quantize.RANGES`.
        keep: of int8: layers that keep their precision, by the beginning of their names.
        smooth: of int8: whether large channels of activations are made smaller first, see `smooth`.
        sensitivity: of int8: whether it is found out what each layer costs, which the log and the report then say.
        engine: how that is built.
    """

    to: str = "onnx"
    precision: str = "fp32"
    batch_size: int = 1
    pixels: bool = False
    images: int = 16
    metric_images: int = 0
    ranges: str = "percentile"
    keep: Sequence[str] = ()
    smooth: bool = False
    sensitivity: bool = False
    engine: EngineSettings = field(default_factory=EngineSettings)


class Exporter:
    """Makes an exported file of a network, step by step, with the gate after each.

    Args:
        model: of torch; what is compared with.
        dataset: real images of its own, with labels where it has a task.
        settings: what is made.
        calibration: images whose ranges int8 is made for; by default ``dataset``.
        tasks: by name.

    Attributes:
        sensitivity: of layers to int8, where it was asked for.

    Raises:
        ValueError: the network or the set does not go with an exported file, see `record`; or a library is missing.
    """

    def __init__(
        self,
        model: Model,
        dataset: ImageDataset,
        settings: ExportSettings,
        calibration: ImageDataset | None = None,
        tasks: Tasks = TASKS,
    ) -> None:
        for library in ("onnx", "onnxscript"):
            import_runtime(library)
        self.model, self.dataset, self.settings, self.tasks = model, dataset, settings, tasks
        self.calibration = calibration
        self.sensitivity: list[tuple[str, float]] = []
        self.expected = record(model, dataset, settings.images)
        self.metric: Metric | None = None
        if model.package is not None:
            self.metric = Metric.measure(model.package, dataset, settings.metric_images)
        self.reports: list[GateReport] = []

    @property
    def network(self) -> nn.Module:
        """What is exported."""
        return cast(nn.Module, self.model.predictor.model) if has_task(self.model) else self.model.backbone

    def run(self, network: nn.Module, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Outputs of the network, or of a copy of it, for images by name."""
        if not has_task(self.model):
            return backbone_outputs(network, inputs)
        outputs: Mapping[str, Tensor] = self.model.predictor.task.forward(network, inputs)
        return outputs

    @property
    def outputs(self) -> dict[str, str]:
        """Meanings of the outputs by name."""
        if not has_task(self.model):
            return {"cls": "[B, D]: class token, normed", "patches": "[B, N, D]: patch tokens, normed, row by row"}
        return {output.name: output.meaning for output in self.model.predictor.task.export_outputs()}

    def make(self) -> "tuple[onnx.ModelProto, Artefact]":
        """The network as a graph in the precision that was asked for, and its description.

        Raises:
            GateError: the graph in float32, which int8 is made from, does not say what the network says.
        """
        if self.settings.precision == "bf16" and self.settings.to == "openvino":  # which rounds as it computes
            graph, artefact = self.graph("fp32")
            return graph, replace(artefact, precision="bf16")
        if self.settings.precision != "int8":
            return self.graph(self.settings.precision)
        graph, artefact = self.graph("fp32")
        runtime = "onnxruntime" if is_installed("onnxruntime") else "openvino"
        report = self.check_graph(graph, artefact, runtime)
        if not report.passed:
            raise GateError(f"the graph in float32 does not say what the network says: nothing was written\n{report}")

        def open_session(data: bytes) -> Session:
            return make_session(data, runtime, artefact)

        linear_products(graph, self.settings.keep)  # complains of names now
        batches = self._calibration_batches(artefact)
        factors = smoothing_factors(graph, open_session, batches) if self.settings.smooth else {}
        graph = smooth(graph, factors) if factors else graph
        largest = calibrate(graph, open_session, batches, self.settings.ranges)
        if self.settings.sensitivity:
            self.sensitivity = sensitivity(graph, largest, open_session, batches[0])
            for layer, moved in self.sensitivity[:10]:
                logger.info("%s in int8 alone moves outputs by %.4f of their standard deviation", layer, moved)
        if self.settings.to == "tensorrt":  # whose other layers are fastest in half precision
            graph, artefact = self.graph("fp16")
            graph = smooth(graph, factors) if factors else graph
        return quantize(graph, largest, self.settings.keep), replace(artefact, precision="int8")

    def _calibration_batches(self, artefact: Artefact) -> list[Arrays]:
        if self.calibration is None:
            logger.warning("ranges are those of the images that are compared: name others by --calibration")
            inputs = self.expected.inputs
        else:
            inputs = record(self.model, self.calibration, ENOUGH_IMAGES, keep_outputs=False).inputs
        count = len(next(iter(inputs.values())))
        if count < ENOUGH_IMAGES:
            logger.warning("ranges come of %d images, %d or more are advised", count, ENOUGH_IMAGES)
        arrays = {name: artefact.to_inputs(value) for name, value in inputs.items()}
        size = artefact.batch or 8
        starts = range(0, count - size + 1, size) if count >= size else [0]
        rows = [np.arange(start, start + size) % count for start in starts]
        return [{name: value[chosen] for name, value in arrays.items()} for chosen in rows]

    def graph(self, precision: str, opset: int = 0) -> "tuple[onnx.ModelProto, Artefact]":
        """The network as a graph, and its description; an opset of 0 is what the precision needs."""
        opset = opset or OPSETS[precision]
        batch = self.settings.batch_size
        rows = torch.arange(max(batch, 1)) % len(self.expected)
        images = {name: torch.from_numpy(value)[rows] for name, value in self.expected.inputs.items()}
        network = ExportNetwork(
            self.network, self.run, images, tuple(self.outputs), precision=precision, pixels=self.settings.pixels
        )
        graph = write_graph(network, images, opset=opset, dynamic_batch=batch == 0)
        expected = self.expected.outputs
        artefact = describe_model(
            self.model,
            precision=precision,
            opset=opset,
            inputs={name: [batch, *value.shape[1:]] for name, value in images.items()},
            outputs={name: [batch, *expected[name].shape[1:]] for name in self.outputs},
            meanings=self.outputs,
            pixels=self.settings.pixels,
        )
        return graph, artefact

    def check(self, exported: DeployedModel, *, metric: bool = False) -> GateReport:
        """The gate on an exported model; its report is kept."""
        report = gate(
            self.model,
            exported,
            self.dataset,
            expected=self.expected,
            count=self.settings.images,
            metric=self.metric if metric else None,
        )
        self.reports.append(report)
        logger.info("%s", report)
        return report

    def check_graph(
        self, graph: "onnx.ModelProto", artefact: Artefact, runtime: str, *, metric: bool = False
    ) -> GateReport:
        """The gate on a graph in a runtime, with the first module at which outputs part where it fails."""
        set_description(graph, artefact)
        session = make_session(graph.SerializeToString(), runtime, artefact)
        report = self.check(deployed_model(Path("graph.onnx"), artefact, session, self.tasks), metric=metric)
        if report.passed:
            return report
        rows = np.arange(artefact.batch or 2) % len(self.expected)
        where = find_divergence(
            self.network,
            self.run,
            graph,
            lambda data: make_session(data, runtime, artefact),
            {name: value[rows] for name, value in self.expected.inputs.items()},
            artefact.precision,
            artefact.to_inputs,
        )
        self.reports[-1] = replace(report, parts_at=where)
        return self.reports[-1]


def export_model(
    model: Model,
    dataset: ImageDataset,
    output: str | Path,
    settings: ExportSettings,
    calibration: ImageDataset | None = None,
    tasks: Tasks = TASKS,
) -> list[GateReport]:
    """Writes a network as a file for a runtime, if it says there what the network says.

    Beside the file come ``NAME.sha256``, ``NAME.gate.json`` (what the gate found), ``NAME.reference.npz`` and
    ``verify.py``, which check it on a machine without torch.

    Args:
        model: of `dinov2.load`.
        dataset: real images of its own, with labels where it has a task.
        output: the file, ending as its target asks for.
        settings: what is made.
        calibration: images whose ranges int8 is made for; by default ``dataset``.
        tasks: by name.

    Returns:
        What the gate found, step by step.

    Raises:
        ValueError: an option does not fit, or the network or the set do not go with an exported file.
        FileExistsError: there is such a file.
        GateError: it says something else; there is no such file then, and ``NAME.gate.json`` says where they part.
    """
    output = Path(output).expanduser()
    check_output(output, settings)
    exporter = Exporter(model, dataset, settings, calibration, tasks)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        graph, artefact = exporter.make()
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.stem}.") as folder:
            made = _TARGETS[settings.to](exporter, graph, artefact, Path(folder) / output.name)
            for part in sorted(Path(folder).iterdir(), key=lambda part: part == made):  # itself the last
                write_with_checksum(output.with_name(part.name), functools.partial(_copy, part))
    finally:
        write_report(
            output.with_suffix(".gate.json"), exporter.reports, artefact=output.name, sensitivity=exporter.sensitivity
        )
    write_reference(output.with_suffix(".reference.npz"), artefact.fingerprint, exporter.expected)
    script = Path(standalone.__file__).read_bytes()
    write_atomically(output.with_name("verify.py"), lambda file: file.write(script))
    return exporter.reports


def _copy(source: Path, file: Any) -> None:
    with source.open("rb") as opened:
        shutil.copyfileobj(opened, file)


def export_static(model: Model, dataset: ImageDataset, output: str | Path, settings: ExportSettings) -> Path:
    """Writes ``NAME_fp16.onnx`` with a YAML file beside it, see `static_file`, if the gate lets it through.

    Args:
        model: of `dinov2.load`.
        dataset: real images of its own, with labels where it has a task.
        output: ``NAME.onnx``.
        settings: ``precision`` is fp16 and ``to`` onnx whatever they say.

    Raises:
        ValueError, FileExistsError, GateError: see `export_model`.
    """
    output = Path(output).expanduser()
    output = output.with_name(f"{output.stem}_fp16{output.suffix}")
    settings = replace(settings, to="onnx", precision="fp16")
    check_output(output, settings)
    exporter = Exporter(model, dataset, settings)
    graph, artefact = exporter.graph("fp16", static_file.TRACED_OPSET)
    static = static_file.make_static(graph, artefact)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        _check_in_runtimes(exporter, graph, artefact, RUNTIMES[".onnx"])
        session = make_session(static.SerializeToString(), "onnxruntime", artefact)
        name, expected = next(iter(exporter.expected.outputs.items()))
        (images,) = exporter.expected.inputs.values()
        inputs = artefact.to_inputs(images)
        rows = [session.run({static_file.INPUT: image[None]})[static_file.OUTPUT] for image in inputs]
        found = standalone.compare(expected, np.concatenate(rows), "fp16")
        exporter.reports.append(
            GateReport(
                runtime=session.name,
                precision="fp16",
                images=len(inputs),
                outputs={name: found},
                faults=[] if found["passed"] else [f"the static file's output is not {name} of the network"],
            )
        )
        if not found["passed"]:
            raise GateError(f"the static file does not say what the network says\n{exporter.reports[-1]}")
    finally:
        write_report(output.with_suffix(".gate.json"), exporter.reports, artefact=output.name)
    static_file.write_static(static, output)
    return output


def check_output(output: Path, settings: ExportSettings) -> None:
    """Raises a ValueError or FileExistsError for a name or settings that cannot be."""
    suffix = TARGETS[settings.to]
    if output.suffix.lower() != suffix:
        raise ValueError(f"--output {output}: a file for {settings.to} ends in {suffix}")
    for part in (output, *([output.with_suffix(".onnx")] if settings.to == "tensorrt" else [])):
        if part.exists():
            raise FileExistsError(f"{part} is there already; name another file, or delete it")
    if settings.precision not in PRECISIONS:
        raise ValueError(f"precision {settings.precision!r}; allowed: {', '.join(PRECISIONS)}")
    if settings.batch_size < 0 or settings.images < 1 or settings.metric_images < 0:
        raise ValueError("batch_size and metric_images must be 0 or more, images 1 or more")


def _check_in_runtimes(
    exporter: Exporter, graph: "onnx.ModelProto", artefact: Artefact, runtimes: Sequence[str]
) -> dict[str, Any]:
    """The gate in every runtime that is here and computes the graph; those in which it passed.

    Raises:
        GateError: it passes in none of those that compute it.
    """
    checked: dict[str, Any] = {}
    failed = []
    for runtime in filter(is_installed, runtimes):
        try:
            # The metric takes long: it is computed by the runtime that will be taken.
            report = exporter.check_graph(graph, artefact, runtime, metric=not checked)
        except RuntimeError as error:
            if isinstance(error, GateError):
                raise
            logger.warning("%s does not compute %s: %s", runtime, artefact.precision, str(error).splitlines()[0][:200])
            continue
        if report.passed:
            checked[runtime] = {name: found["cosine"] for name, found in report.outputs.items()}
        else:
            failed.append(report)
    if failed and not checked:
        raise GateError(f"the exported model does not say what the network says, so nothing was written\n{failed[0]}")
    for report in failed:
        logger.warning("not to be used in %s:\n%s", report.runtime, report)
    if not checked:
        logger.warning(
            "no runtime here computes %s: run dinov2 verify on the machine that does before it is used",
            artefact.precision,
        )
    return checked


def _to_onnx(exporter: Exporter, graph: "onnx.ModelProto", artefact: Artefact, path: Path) -> Path:
    if not any(map(is_installed, RUNTIMES[".onnx"])):
        import_runtime("onnxruntime")
    checked = _check_in_runtimes(exporter, graph, artefact, RUNTIMES[".onnx"])
    set_description(graph, replace(artefact, checked=checked))
    path.write_bytes(graph.SerializeToString())
    return path


def _to_openvino(exporter: Exporter, graph: "onnx.ModelProto", artefact: Artefact, path: Path) -> Path:
    openvino = import_runtime("openvino")
    checked = _check_in_runtimes(exporter, graph, artefact, ("openvino",))
    core = openvino.Core()
    model = core.read_model(graph.SerializeToString())
    model.set_rt_info(replace(artefact, checked=checked).to_text(), [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)
    session = make_session(path, "openvino", artefact)
    report = exporter.check(deployed_model(path, artefact, session, exporter.tasks))
    if not report.passed:
        raise GateError(f"what OpenVINO wrote does not say what the network says, so nothing is kept\n{report}")
    return path


def _to_tensorrt(exporter: Exporter, graph: "onnx.ModelProto", artefact: Artefact, path: Path) -> Path:
    checked = _check_in_runtimes(exporter, graph, artefact, RUNTIMES[".onnx"])
    set_description(graph, replace(artefact, checked=checked))
    data = graph.SerializeToString()
    path.with_suffix(".onnx").write_bytes(data)
    engine, record = build_engine(graph, artefact.inputs, exporter.settings.engine)
    path.write_bytes(engine)
    artefact = replace(artefact, build={**record, "onnx_sha256": hashlib.sha256(data).hexdigest()})
    beside = description_beside(path)
    beside.write_text(artefact.to_text(), encoding="utf-8")
    if not record["gpu"]:
        logger.warning("no GPU is here to check the engine: run dinov2 verify on the machine that will use it")
        return path
    session = make_session(path, "tensorrt", artefact)
    report = exporter.check(deployed_model(path, artefact, session, exporter.tasks), metric=True)
    if not report.passed:
        raise GateError(f"the engine does not say what the network says, so nothing is kept\n{report}")
    found = {name: value["cosine"] for name, value in report.outputs.items()}
    beside.write_text(replace(artefact, checked={"tensorrt": found}).to_text(), encoding="utf-8")
    return path


_TARGETS = {"tensorrt": _to_tensorrt, "onnx": _to_onnx, "openvino": _to_openvino}


@dataclass(frozen=True)
class ExportOptions:
    """Options of the command."""

    model: tuple[str, ...] = option(
        help="best.pth, teacher_checkpoint.pth, any file of weights, or a released name; several best.pth become one "
        "file with all their heads",
        positional=True,
    )
    to: str = option(help="which library or runtime it is for", choices=(*LIBRARIES, *TARGETS))
    output: Path = option(help="file that is written; a folder for a library")
    config: str | None = option(
        None, help="YAML file that describes the backbone; none: told from the weights", aliases=("--config-file",)
    )
    image_size: int = option(0, help="square images, in pixels, that it will get; 0: as trained")
    on: str = option("", help="runtimes: dataset string of real images, with labels where the model has a task")
    precision: str = option("fp32", help="runtimes: what it computes in", choices=PRECISIONS)
    batch_size: int = option(1, help="runtimes: images that it takes at once; 0: any number")
    pixels: bool = option(False, help="runtimes: it takes values in 0..255, and normalises them itself")
    images: int = option(16, help="runtimes: images that are compared")
    metric_images: int = option(0, help="runtimes: images that the task's metric is computed on; 0: all")
    calibration: str = option("", help="int8: dataset string of images (500 or more) that ranges are made for")
    ranges: str = option("percentile", help="int8: how ranges are chosen", choices=RANGES)
    keep: tuple[str, ...] = option((), help="int8: layers that stay in float32, by the beginning of their names")
    smooth: bool = option(False, help="int8: first make large channels of activations smaller (SmoothQuant)")
    sensitivity: bool = option(False, help="int8: find out what each layer costs")
    static_fp16: bool = option(
        False, help="onnx: NAME_fp16.onnx for closed compilers: one input, one output, one image, old operators"
    )
    max_batch_size: int = option(8, help="tensorrt, any batch size: the largest")
    optimization: int = option(3, help="tensorrt: how long the fastest kernels are looked for", choices=range(6))
    portable: bool = option(False, help="tensorrt: also for later versions and other GPUs, slower")
    timing_cache: Path | None = option(None, help="tensorrt: file that remembers what was measured")


def main(argv: Sequence[str] | None = None) -> int:
    """Exports and says how it is loaded; returns the exit code."""
    options = parse(
        ExportOptions,
        argv,
        description="Writes a trained model for a runtime, if it says there what the network says; or its backbone in "
        "the layout of another library.",
        example="python tools/export_onnx.py outputs/cracks/best.pth --to onnx --output outputs/cracks/best.onnx "
        "--on GroupedJSON:split=VAL:root=/data/cracks",
    )
    with logging_to(None):
        model = load_model(options.model if len(options.model) > 1 else options.model[0], options.config)
        if options.to in LIBRARIES:
            return _to_library(model, options)
        if not options.on:
            raise ValueError("--on is needed: real images on which the exported model is compared with the network")
        if options.static_fp16 and options.to != "onnx":
            raise ValueError(f"--static-fp16 writes an ONNX file, found --to {options.to}: use --to onnx")
        if options.image_size:
            model = model.resized((options.image_size, options.image_size))
        dataset = open_set(options.on, model)
        settings = ExportSettings(
            to=options.to,
            precision=options.precision,
            batch_size=options.batch_size,
            pixels=options.pixels,
            images=options.images,
            metric_images=options.metric_images,
            ranges=options.ranges,
            keep=options.keep,
            smooth=options.smooth,
            sensitivity=options.sensitivity,
            engine=EngineSettings(
                max_batch=options.max_batch_size,
                optimization=options.optimization,
                portable=options.portable,
                timing_cache=options.timing_cache,
            ),
        )
        if options.to != "tensorrt":
            _warn_of_idle(
                options, ("max_batch_size", "optimization", "portable", "timing_cache"), "is not for tensorrt"
            )
        calibration = None
        if options.static_fp16 and options.precision != "fp16":
            _warn_of_idle(options, ("precision",), "is in fp16")
        if options.precision != "int8" or options.static_fp16:
            _warn_of_idle(options, ("calibration", "ranges", "keep", "smooth", "sensitivity"), "is not int8")
        elif options.calibration:
            calibration = open_set(options.calibration, model)
        if options.static_fp16:
            written = export_static(model, dataset, options.output, settings)
            sys.stdout.write(f"{written}, with {written.stem}.yaml beside it; untried on such hardware\n")
            return 0
        reports = export_model(model, dataset, options.output, settings, calibration)
    sys.stdout.write("\n".join(map(str, reports)) + "\n")
    sys.stdout.write(f"{options.output}: load it with\n  dinov2.load('{options.output}', device='auto')\n")
    return 0


def _warn_of_idle(options: ExportOptions, names: Sequence[str], why: str) -> None:
    defaults = {entry.name: entry.default for entry in fields(options)}
    if idle := [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != defaults[name]]:
        logger.warning("%s: no effect, as the export %s", ", ".join(idle), why)


def _to_library(model: Model, options: ExportOptions) -> int:
    of_both = ("model", "to", "output", "config", "image_size")
    _warn_of_idle(options, [entry.name for entry in fields(options) if entry.name not in of_both], "is for a library")
    exported = export_backbone(model, options.to, options.output, image_size=options.image_size)
    size = sum(tensor.nbytes for tensor in exported.tensors.values())
    height, width = exported.image_size
    head = "; its head is left out" if model.package is not None else ""
    sys.stdout.write(
        f"{options.output}: backbone of {size / 2**20:.1f} MiB for images of {height} x {width} pixels{head}. Load it "
        f"with\n  {exported.usage.format(folder=options.output)}\n"
    )
    return 0


if __name__ == "__main__":
    run_as("export")
