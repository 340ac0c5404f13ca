"""Exports models in every precision, for every runtime that is here, and tells as a table what passes the gate."""

import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.deploy.deployed import open_model
from dinov2.deploy.engine import EngineSettings
from dinov2.deploy.export import TARGETS, ExportSettings, export_model
from dinov2.deploy.graph import PRECISIONS
from dinov2.deploy.parity import open_set
from dinov2.logging import logging_to
from dinov2.run.launch import exit_with


@dataclass(frozen=True)
class CheckOptions:
    """Options of the command."""

    on: str = option(help="dataset string of real images, with labels for the models' tasks")
    output_dir: Path = option(help="folder for the table and the log")
    models: tuple[str, ...] = option(help="best.pth, or weights of backbones", positional=True)
    precisions: tuple[str, ...] = option(PRECISIONS, help="that are exported")
    targets: tuple[str, ...] = option(tuple(TARGETS), help="that files are made for")
    batch_sizes: tuple[int, ...] = option((1, 0), help="images at once; 0: any number")
    image_size: int = option(0, help="square images, in pixels; 0: as trained")
    images: int = option(8, help="that are compared")
    metric_images: int = option(64, help="that the task's metric is computed on; 0: all")


def main() -> int:
    """Exports, and writes the table; the exit code is 1 where anything failed."""
    options = parse(
        CheckOptions,
        description="Exports models in every precision, for every runtime, and tells which pass the gate.",
        example="python tools/check_exports.py outputs/cracks/best.pth --on GroupedJSON:split=VAL:root=/data/cracks "
        "--output-dir outputs/exports",
    )
    lines = [
        "| model | target | precision | batch | runtimes: least cosine | metric before, after |",
        "|---|---|---|---|---|---|",
    ]
    failed = 0
    with logging_to(options.output_dir):
        for name in options.models:
            model = open_model(name)
            if options.image_size:
                model = model.resized((options.image_size, options.image_size))
            dataset = open_set(options.on, model)
            shown = "/".join(Path(name).with_suffix("").parts[-2:])
            for target, precision, batch in itertools.product(options.targets, options.precisions, options.batch_sizes):
                settings = ExportSettings(
                    to=target, precision=precision, batch_size=batch, images=options.images,
                    metric_images=options.metric_images, engine=EngineSettings(optimization=0),
                )  # fmt: skip
                row = f"| {shown} | {target} | {precision} | {batch or 'any'} |"
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        reports = export_model(model, dataset, Path(folder) / f"model{TARGETS[target]}", settings)
                    except (ValueError, RuntimeError) as error:
                        failed += 1
                        _tell(options, lines, f"{row} failed: {' '.join(str(error).split())[:200]} | |")
                        continue
                found = [
                    f"{report.runtime} {min(value['cosine'] for value in report.outputs.values()):.6f}"
                    for report in reports
                    if report.passed and report.precision == precision
                ]
                scores = [
                    f"{report.before:.4f}, {report.after:.4f}"
                    for report in reports
                    if report.before is not None and report.after is not None
                ]
                _tell(options, lines, f"{row} {'; '.join(found) or 'built'} | {scores[-1] if scores else ''} |")
    print("\n".join(lines))
    return int(failed > 0)


def _tell(options: CheckOptions, lines: list[str], line: str) -> None:
    """Adds a line to the table, which is kept at once: a long run may be ended."""
    lines.append(line)
    (options.output_dir / "exports.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    exit_with(main)
