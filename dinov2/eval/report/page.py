"""Puts a run's report together and writes it as one HTML file that loads nothing."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dinov2.eval.report.curves import ChartGroup, chart_groups
from dinov2.eval.report.figures import MEANINGS
from dinov2.eval.report.images import EmbeddedImage, ImageShelf
from dinov2.eval.report.log import MOST_MESSAGES, LogMessage, count_warnings, log_span, read_warnings
from dinov2.eval.report.mistakes import MistakesView, view_mistakes
from dinov2.eval.report.options import CONFIG_FILE, Option, RunOptions, read_options
from dinov2.eval.report.results import (
    Comparison,
    FoundResults,
    ResultView,
    compare_results,
    find_results,
    main_results,
    view_results,
)
from dinov2.eval.report.style import STYLE
from dinov2.eval.report.template import TEMPLATE
from dinov2.eval.results import RESULTS_FILE
from dinov2.logging import read_metrics
from dinov2.utils.files import write_text_atomically

METRICS_FILE = "metrics.jsonl"
MOST_PICTURES = 24
MOST_IMAGE_BYTES = 40_000_000
REDRAWN = ("losses", "schedules", "throughput", "knn", "monitors")  # plots of a run that the page draws by itself

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page; ``tone`` is good, warn, bad, or empty."""

    label: str
    value: str
    remark: str = ""
    tone: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the page shows; names are those of the template."""

    title: str
    folder: str
    status: str
    written: str
    tiles: tuple[Tile, ...]
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[LogMessage, ...]
    num_warnings: int
    num_warnings_left_out: int
    no_warnings: str
    comparisons: tuple[Comparison, ...]
    results: tuple[ResultView, ...]
    unreadable_results: tuple[tuple[str, str], ...]
    glossary: tuple[tuple[str, str], ...]
    mistakes: tuple[MistakesView, ...]
    curves: tuple[ChartGroup, ...]
    metrics_problem: str
    pictures: tuple[tuple[str, EmbeddedImage], ...]
    num_pictures_left_out: int
    options: RunOptions
    changed: tuple[Option, ...]


def write_report(
    run_dir: str | Path,
    output: str | Path | None = None,
    *,
    results: Sequence[str | Path] = (),
    pictures: Sequence[str | Path] = (),
    num_mistakes: int = 12,
) -> Path:
    """Writes what is known of a run into one HTML file; what is missing in the folder is missing in the report.

    Args:
        run_dir: folder of a run, or of an evaluator's results.
        output: file to write; by default ``report.html`` in that folder.
        results: further folders in which results of evaluators are sought, at any depth.
        pictures: further pictures, or folders of PNG files, besides those in the run's folder ``plots``.
        num_mistakes: photos shown per kind of mistake.

    Returns:
        The file.

    Raises:
        FileNotFoundError: when a folder or a picture does not exist.
        ValueError: when the folder is no run's, or ``num_mistakes`` is negative.
    """
    folder, others = Path(run_dir), [Path(path) for path in results]
    if num_mistakes < 0:
        raise ValueError(f"num_mistakes must be at least 0, found {num_mistakes}")
    for path in (folder, *others):
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is not a folder")
    known = (CONFIG_FILE, METRICS_FILE, RESULTS_FILE)
    if not any((folder / name).is_file() for name in known):
        raise ValueError(f"{folder} is not the folder of a run: it holds none of {', '.join(known)}")
    path = folder / "report.html" if output is None else Path(output)
    page = render(gather(folder, others, [Path(picture) for picture in pictures], num_mistakes))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, page)
    return path


def gather(folder: Path, others: Sequence[Path], pictures: Sequence[Path], num_mistakes: int) -> Report:
    """Reads everything that the page shows."""
    shelf = ImageShelf(MOST_IMAGE_BYTES)
    options = read_options(folder)
    records, metrics_problem = _read_metrics(folder)
    found = find_results(folder, others)
    detailed = main_results(found)
    warnings = read_warnings([folder, *others])
    drawn = _pictures(folder, pictures)
    mistakes = [view for entry in detailed for view in view_mistakes(entry, shelf, num_mistakes)]
    return Report(
        title=folder.resolve().name or str(folder),
        folder=str(folder),
        status=_status(records, options),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        tiles=tuple(_tiles(records, options, warnings, found)),
        facts=tuple(_facts(folder, options)),
        warnings=tuple(warnings[:MOST_MESSAGES]),
        num_warnings=count_warnings(warnings),
        num_warnings_left_out=max(len(warnings) - MOST_MESSAGES, 0),
        no_warnings=_no_warnings([folder, *others]),
        comparisons=compare_results(found),
        results=tuple(view_results(entry) for entry in detailed),
        unreadable_results=tuple((entry.name, entry.problem) for entry in found if entry.results is None),
        glossary=tuple(MEANINGS.values()),
        mistakes=tuple(mistakes),
        curves=tuple(chart_groups(records)),
        metrics_problem=metrics_problem,
        pictures=tuple((name, shelf.picture(path)) for name, path in drawn[:MOST_PICTURES]),
        num_pictures_left_out=max(len(drawn) - MOST_PICTURES, 0),
        options=options,
        changed=tuple(option for option in options.options if option.changed),
    )


def render(report: Report) -> str:
    """The page as text; names of files that are no text are shown with their bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE).render(report=report, style=Markup(STYLE)).strip() + "\n"
    return _UNPRINTABLE.sub("\ufffd", page).encode("utf-8", "backslashreplace").decode("utf-8")


def _read_metrics(folder: Path) -> tuple[list[dict[str, Any]], str]:
    path = folder / METRICS_FILE
    if not path.is_file():
        return [], f"There is no {METRICS_FILE} in the folder: training has not started here."
    try:
        records = read_metrics(path)
    except (OSError, ValueError) as error:
        return [], f"The curves cannot be drawn: {error}"
    return records, "" if records else f"{METRICS_FILE} holds no numbers yet."


def _iterations_done(records: Sequence[Mapping[str, Any]]) -> int:
    return max((record["iteration"] for record in records if isinstance(record.get("iteration"), int)), default=-1) + 1


def _status(records: Sequence[Mapping[str, Any]], options: RunOptions) -> str:
    done, planned = _iterations_done(records), options.num_iterations
    if done == 0:
        return "No training is recorded in this folder."
    if planned is None:
        return f"{done} iterations are recorded; how many were planned is not known."
    if done >= planned:
        return f"Finished: all {planned} iterations are done."
    return f"Stopped, or still running: {done} of {planned} iterations are recorded."


def _tiles(
    records: Sequence[Mapping[str, Any]],
    options: RunOptions,
    warnings: Sequence[LogMessage],
    found: Sequence[FoundResults],
) -> list[Tile]:
    tiles = []
    done, planned = _iterations_done(records), options.num_iterations
    if done:
        complete = planned is not None and done >= planned
        remark = f"of {planned}" if planned is not None else ""
        tiles.append(Tile("iterations", f"{done}", remark, "good" if complete else "warn" if planned else ""))
    losses = [record["total_loss"] for record in records if "total_loss" in record]
    if losses:
        broken = losses[-1] is None
        tiles.append(
            Tile("last total loss", "not finite" if broken else f"{losses[-1]:.4g}", tone="bad" if broken else "")
        )
    num_errors = sum(message.count for message in warnings if message.level != "WARNING")
    count = count_warnings(warnings)
    remark = f"{num_errors} of them errors or alarms" if num_errors else ""
    tiles.append(Tile("warnings in the logs", str(count), remark, "bad" if num_errors else "warn" if count else "good"))
    readable = sum(entry.results is not None for entry in found)
    tiles.append(Tile("results of evaluators", str(readable)))
    return tiles


def _facts(folder: Path, options: RunOptions) -> list[tuple[str, str]]:
    facts = [("folder", str(folder.resolve()))]
    if options.config is not None:
        values = {option.name: option.value for option in options.options}
        facts.append(("photos", values["train.dataset_path"]))
        backbone = f"{values['student.arch']}, patches of {values['student.patch_size']} pixels"
        facts.append(("backbone", f"{backbone}, global crops of {values['crops.global_crops_size']} pixels"))
        facts.append(("started from", values["student.pretrained_weights"].replace("(empty)", "random weights")))
    span = log_span(folder)
    if span is not None:
        facts.append(("first and last line of the log", f"{span[0]} and {span[1]}"))
    best = _best_teacher(folder)
    if best:
        facts.append(("best teacher kept", best))
    return facts


def _best_teacher(folder: Path) -> str:
    """Which teacher the run itself found best; empty where it kept none."""
    try:
        best = json.loads((folder / "eval" / "best" / "best.json").read_text(encoding="utf-8"))
        metric = str(best["metric"]).replace("_", " ")
        return f"{best['teacher']}: {metric} {float(best['score']):.3f} after iteration {int(best['iteration'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _no_warnings(folders: Sequence[Path]) -> str:
    if any(path.is_file() for folder in folders for path in folder.rglob("log/*.txt")):
        return "The logs hold no warnings and no errors."
    return "No logs were found, so nothing is known of warnings."


def _pictures(folder: Path, given: Sequence[Path]) -> list[tuple[str, Path]]:
    """Pictures with the names that they have in the page.

    Raises:
        FileNotFoundError: when one that was named does not exist.
    """
    drawn = [path for path in sorted((folder / "plots").glob("*.png")) if path.stem not in REDRAWN]
    found = {path.resolve(): (path.relative_to(folder).as_posix(), path) for path in drawn}
    for place in given:
        if not place.exists():
            raise FileNotFoundError(f"there is no picture or folder {place}")
        for path in sorted(place.glob("*.png")) if place.is_dir() else [place]:
            found.setdefault(path.resolve(), (str(path), path))
    return list(found.values())
