"""The command ``dinov2 verify``: whether an exported file says on this machine what the network says."""

import json
import logging
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.base import ImageDataset
from dinov2.deploy import standalone
from dinov2.deploy.artefact import record_beside
from dinov2.deploy.deployed import DeployedModel, load_deployed
from dinov2.deploy.parity import GateError, GateReport, Metric, gate, open_set, record
from dinov2.logging import logging_to
from dinov2.predict.model import Model, load_model
from dinov2.utils.files import file_digest, write_text_atomically

logger = logging.getLogger("dinov2")

_VERSIONS = ("torch", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "dinov2")


def verify(
    exported: DeployedModel,
    dataset: ImageDataset | None = None,
    *,
    against: Model | None = None,
    images: int = 16,
    metric_images: int = 0,
) -> GateReport:
    """Compares an exported model with its network, or without one with the reference file beside it.

    What was found is written beside it as ``NAME.verified.json``; `dinov2.load` takes a runtime that has passed here.

    Args:
        exported: as it runs on this machine.
        dataset: real images, with labels where it has a task; needed with ``against``.
        against: the network, in float32.
        images: that are compared.
        metric_images: that the task's metric is computed on; 0 for all.

    Raises:
        FileNotFoundError: there is no reference file.
        ValueError: there are no images to compare the network on.
    """
    if against is None:
        report = _against_reference(exported)
    elif dataset is None:
        raise ValueError("--on is needed with --against: real images on which the two are compared")
    else:
        expected = record(against, dataset, images)
        package = against.package
        metric = None if package is None else Metric.measure(package, dataset, metric_images)
        report = gate(against, exported, dataset, expected=expected, count=images, metric=metric)
    path = exported.path
    content = {
        "artefact": path.name,
        "sha256": file_digest(path),
        "fingerprint": exported.fingerprint,
        "runtime": exported.network.session.runtime,
        "machine": f"{platform.machine()} {platform.system()}, {exported.runtime}",
        "versions": {name: version for name in _VERSIONS if (version := _version(name))},
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "against": "the network" if against is not None else "the reference file",
        "passed": report.passed,
        "gate": report.to_dict(),
    }
    write_text_atomically(record_beside(path), json.dumps(content, indent=2, default=str) + "\n")
    return report


def _against_reference(exported: DeployedModel) -> GateReport:
    path = exported.path.with_suffix(".reference.npz")
    if not path.is_file():
        raise FileNotFoundError(f"no {path}, which dinov2 export writes: copy it too, or name the model by --against")
    description: dict[str, Any] = json.loads(exported.artefact.to_text())
    for shape in description["inputs"].values():
        shape[0] = exported.artefact.most  # an engine of any batch has a largest
    with np.load(path) as reference:
        found = standalone.check(description, reference, exported.network.session.run)
    return GateReport(
        runtime=exported.runtime,
        precision=exported.artefact.precision,
        images=found["images"],
        outputs=found["outputs"],
        faults=found["faults"],
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class VerifyOptions:
    """Options of the command."""

    artefact: Path = option(help="file of dinov2 export: .onnx, .xml or .engine", positional=True)
    against: tuple[str, ...] | None = option(
        None,
        help="model that it was exported from, once for each of joined heads; none: the reference file beside it",
        repeated=True,
    )
    on: str = option("", help="dataset string of real images, with labels where the model has a task")
    device: str = option("auto", help="where it is computed", choices=("auto", "cpu", "cuda"))
    runtime: str = option("auto", help="what computes it", choices=("auto", "onnxruntime", "openvino", "tensorrt"))
    images: int = option(16, help="images that are compared")
    metric_images: int = option(0, help="images that the task's metric is computed on; 0: all")


def main(argv: Sequence[str] | None = None) -> int:
    """Verifies and says what was found; returns the exit code."""
    options = parse(
        VerifyOptions,
        argv,
        description="Compares an exported model, as this machine computes it, with the network that it was made from.",
        example="dinov2 verify best.onnx --against best.pth --on GroupedJSON:split=VAL:root=/data/cracks",
    )
    with logging_to(None):
        exported = load_deployed(options.artefact, options.device, runtime=options.runtime)
        dataset = None
        if options.on:
            dataset = open_set(options.on, exported)
        against = None
        if options.against is not None:
            against = load_model(options.against if len(options.against) > 1 else options.against[0])
            if against.image_size != exported.image_size:
                sizes = [" x ".join(map(str, model.image_size)) for model in (exported, against)]
                logger.info("compared at %s pixels, the size of the export (height x width); trained at %s", *sizes)
                against = against.resized(exported.image_size)
        elif dataset is not None:
            logger.warning("--on has no effect without --against: the images of the reference file are compared")
        report = verify(exported, dataset, against=against, images=options.images, metric_images=options.metric_images)
    if not report.passed:
        raise GateError(f"{options.artefact} does not say here what the network says\n{report}")
    sys.stdout.write(f"{report}\n{record_beside(options.artefact)} says so\n")
    return 0


if __name__ == "__main__":
    run_as("verify")
