"""The command that writes what is known of a run into one HTML file."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.config.command_line import option, parse
from dinov2.eval.report import write_report


@dataclass(frozen=True)
class ReportOptions:
    """Options of the command."""

    output_dir: Path = option(help="folder of the run", positional=True)
    output: Path | None = option(None, help="HTML file to write (usually report.html in that folder)")
    results: tuple[Path, ...] = option((), help="further folders with results of evaluators, at any depth")
    pictures: tuple[Path, ...] = option((), help="pictures, or folders of PNG files, besides those in plots/")
    num_mistakes: int = option(12, help="photos shown per kind of mistake")


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report and names it; returns the exit code."""
    options = parse(
        ReportOptions,
        argv,
        description=(
            "Writes options, curves, results of evaluators, pictures, warnings and worst mistakes of a run into one "
            "HTML file that can be read offline."
        ),
        example="python tools/report_run.py outputs/vits14 --results outputs/knn outputs/linear",
    )
    path = write_report(
        options.output_dir,
        options.output,
        results=options.results,
        pictures=options.pictures,
        num_mistakes=options.num_mistakes,
    )
    sys.stdout.write(f"{path}\n")
    return 0
