"""Measures how fast exported files predict, beside the network in torch, and what they score."""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinov2.config.command_line import option, parse
from dinov2.data.datasets.base import ImageDataset
from dinov2.deploy.artefact import is_artefact
from dinov2.deploy.deployed import RUNTIMES, load_deployed, open_model
from dinov2.deploy.export import TARGETS, ExportSettings, export_model
from dinov2.deploy.parity import Metric, open_set, record
from dinov2.deploy.runtimes import is_installed
from dinov2.logging import logging_to
from dinov2.logging.plots import Chart, Curve, draw_charts, save_png
from dinov2.predict.model import Model
from dinov2.run.launch import exit_with

logger = logging.getLogger("dinov2")

EAGER = "torch"
Predict = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class BenchmarkOptions:
    """Options of the command."""

    model: str = option(help="best.pth, or weights of a backbone", positional=True)
    on: str = option(help="dataset string of real images, with labels where the model has a task")
    output_dir: Path = option(help="folder for files, table and plot")
    calibration: str = option("", help="dataset string of images that ranges of int8 are made for")
    precisions: tuple[str, ...] = option(("fp32", "fp16", "int8"), help="that are exported")
    keep: tuple[str, ...] = option((), help="int8: layers that stay in float32")
    batch_sizes: tuple[int, ...] = option((1,), help="images at once")
    rounds: int = option(5, help="of all contenders, one after the other; the median over rounds is told")
    seconds: float = option(2.0, help="that a contender computes in a round")
    threads: int = option(0, help="of the processor; 0: as many as torch uses")
    compiled: bool = option(False, help="also torch.compile")
    device: str = option("auto", help="where to compute", choices=("auto", "cpu", "cuda"))
    metric_images: int = option(0, help="images that are scored; 0: all")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is measured.

    Attributes:
        name: runtime and precision.
        predict: computes a normalised batch ``[B, 3, H, W]``.
        score: of the task's metric; None for a backbone.
    """

    name: str
    predict: Predict
    score: float | None


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One row of the table; times in milliseconds of a batch."""

    name: str
    batch_size: int
    median: float
    p90: float
    p99: float
    images_per_second: float
    ratio: float
    score: float | None


def contenders(model: Model, dataset: ImageDataset, options: BenchmarkOptions) -> list[Contender]:
    """The network in torch, and every export of it in every runtime that is here."""
    metric = None if model.package is None else Metric.measure(model.package, dataset, options.metric_images)
    network: Any = model.backbone if model.package is None else model.package.model

    def run(batch: torch.Tensor, function: Any = network) -> None:
        with torch.inference_mode():
            function(batch.to(model.device))
            if model.device.type == "cuda":
                torch.cuda.synchronize()

    found = [Contender(name=EAGER, predict=run, score=None if metric is None else metric.value)]
    if options.compiled:
        found.append(Contender(name="torch.compile", predict=partial(run, function=torch.compile(network)), score=None))
    calibration = None
    if options.calibration:
        calibration = open_set(options.calibration, model)
    for precision in options.precisions:
        for target, suffix in TARGETS.items():
            if target == "openvino" or (target == "tensorrt" and not torch.cuda.is_available()):
                continue  # OpenVINO reads ONNX
            path = options.output_dir / f"{target}_{precision}{suffix}"  # beside an engine lies its own graph
            if not path.exists():
                settings = ExportSettings(
                    to=target, precision=precision, batch_size=0, metric_images=options.metric_images, keep=options.keep
                )
                try:
                    export_model(model, dataset, path, settings, calibration)
                except (ValueError, RuntimeError) as error:
                    logger.warning("%s in %s is left out: %s", target, precision, error)
                    continue
            for runtime in filter(is_installed, RUNTIMES[suffix]):
                device = "cpu" if runtime == "openvino" else options.device
                try:
                    exported = load_deployed(path, device, runtime=runtime, threads=torch.get_num_threads())
                    exported.warm_up()
                except (ValueError, RuntimeError) as error:
                    logger.warning("%s in %s is left out: %s", runtime, precision, str(error).splitlines()[0])
                    continue
                score = None
                if metric is not None and exported.package is not None:
                    score = metric.of(exported.package, dataset)
                found.append(Contender(name=f"{exported.runtime} {precision}", predict=exported.network, score=score))
    return found


def measure(found: Sequence[Contender], images: torch.Tensor, options: BenchmarkOptions) -> list[Timing]:
    """Times all of them in turns, so that what else the machine does hits each alike."""
    rows = []
    for batch_size in options.batch_sizes:
        batch = images[torch.arange(batch_size) % len(images)]
        times: dict[str, list[float]] = {one.name: [] for one in found}
        medians: dict[str, list[float]] = {one.name: [] for one in found}
        for one in found:
            one.predict(batch)
        for _ in range(options.rounds):
            for one in found:
                own: list[float] = []
                end = time.perf_counter() + options.seconds
                while time.perf_counter() < end or not own:
                    start = time.perf_counter()
                    one.predict(batch)
                    own.append(1000 * (time.perf_counter() - start))
                times[one.name] += own
                medians[one.name].append(float(np.median(own)))
        eager = float(np.median(medians[EAGER]))
        for one in found:
            median = float(np.median(medians[one.name]))
            rows.append(
                Timing(
                    name=one.name,
                    batch_size=batch_size,
                    median=median,
                    p90=float(np.percentile(times[one.name], 90)),
                    p99=float(np.percentile(times[one.name], 99)),
                    images_per_second=1000 * batch_size / median,
                    ratio=median / eager,
                    score=one.score,
                )
            )
    return rows


def table(rows: Sequence[Timing], metric: str) -> str:
    """The rows as Markdown."""
    lines = [
        f"| runtime and precision | batch | median ms | p90 | p99 | images/s | of torch | {metric or 'score'} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        score = "" if row.score is None else f"{row.score:.4f}"
        lines.append(
            f"| {row.name} | {row.batch_size} | {row.median:.2f} | {row.p90:.2f} | {row.p99:.2f} | "
            f"{row.images_per_second:.1f} | {row.ratio:.2f} | {score} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Timing], path: Path) -> None:
    """Ratios to torch over the size of the batch."""
    by_name: Mapping[str, list[Timing]] = {row.name: [] for row in rows}
    for row in rows:
        by_name[row.name].append(row)
    curves = [
        Curve(name, np.array([row.batch_size for row in own], float), np.array([row.ratio for row in own]))
        for name, own in by_name.items()
    ]
    chart = Chart(title="time of a batch, torch = 1", curves=curves, x_label="batch size", from_zero=True)
    save_png(draw_charts([chart]), path)


def main() -> int:
    """Measures, prints the table, and writes it with a plot."""
    options = parse(
        BenchmarkOptions,
        description="Times a model in torch and in every runtime that is installed, in turns, and scores each.",
        example="python tools/benchmark_inference.py outputs/cracks/best.pth --output-dir outputs/speed "
        "--on GroupedJSON:split=VAL:root=/data/cracks",
    )
    if is_artefact(options.model):
        raise ValueError(f"{options.model} is an exported file: name the model that it was made from")
    if options.threads:
        torch.set_num_threads(options.threads)
    with logging_to(options.output_dir):
        model = open_model(options.model, device=options.device)
        dataset = open_set(options.on, model)
        images = torch.from_numpy(record(model, dataset, max(options.batch_sizes)).inputs["image"])
        rows = measure(contenders(model, dataset, options), images, options)
        name = "" if model.package is None else model.package.task.metric
        content = {"threads": torch.get_num_threads(), "rows": [asdict(row) for row in rows]}
        (options.output_dir / "speed.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        text = table(rows, name)
        (options.output_dir / "speed.md").write_text(text + "\n", encoding="utf-8")
        plot(rows, options.output_dir / "speed.png")
    print(text)
    return 0


if __name__ == "__main__":
    exit_with(main)
