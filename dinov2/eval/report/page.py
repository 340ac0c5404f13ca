"""Puts a run's report together and writes it as one HTML file that loads nothing."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dinov2.config import Config, ConfigError, as_pair, load_config
from dinov2.config.command_line import option, parse, run_as
from dinov2.eval.learning import Learning, did_it_learn, finite_number
from dinov2.eval.report.mistakes import ImageShelf, view_mistakes
from dinov2.eval.report.results import (
    FoundResults,
    compare_results,
    compared_results,
    describe_metric,
    find_results,
    main_results,
)
from dinov2.eval.results import RESULTS_FILE
from dinov2.logging import read_metrics
from dinov2.logging.plots import PALETTE, short, svg_of_chart, svg_of_interval
from dinov2.logging.training_plots import GROUP_NAMES, chart_groups
from dinov2.utils.files import write_text_atomically

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
MAX_VARIANTS = 60  # in a table of all
MAX_MESSAGES = 60
MAX_PICTURES = 24
MAX_IMAGE_BYTES = 40_000_000
_SHEETS = ("worst_cases", "confusion_matrix")  # ends of the names of plots that are no charts

_LINE = re.compile(r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ (?P<level>[A-Z]+)\s+(?P<source>\S+:\d+) (?P<text>.*)")
_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?", re.IGNORECASE)
_ALARM = re.compile(r"[A-Z]{6,}: ")
_LOUD = ("WARNING", "ERROR", "CRITICAL")
_MAX_MESSAGE_LENGTH = 4000
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")


PRETRAINING, FINE_TUNING, EVALUATION = "pretraining", "fine-tuning", "evaluation"


class RunKind(NamedTuple):
    """What a folder holds: the name of the kind, empty where that cannot be told, and in words what it is."""

    name: str
    words: str


class Option(NamedTuple):
    """One option: dotted name, value and default as text, and its one-line meaning; of task heads the value alone."""

    name: str
    value: str
    default: str
    meaning: str


def _read_options(run_dir: Path) -> tuple[Config | None, str, list[Option], str, str]:
    """The config of a pretraining run, or the task of another, and the options; else the text and what is wrong."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return None, "", [], "", f"There is no {CONFIG_FILE} in the folder."
    try:
        config = load_config(path)
    except (ConfigError, OSError) as error:
        raw = "" if isinstance(error, OSError) else path.read_bytes().decode("utf-8", "replace")
        values = _read_mapping(raw)
        if isinstance(values.get("task"), str):  # what follows is an option of a floor above
            options = [Option(name, _show(value), "", "") for name, value in _flat(values, "")]
            return None, values["task"], options, "", ""
        return None, "", [], raw, f"The file could not be understood by this version: {error}"
    pairs = zip(_leaves(config, ""), _leaves(Config(), ""), strict=True)
    options = [Option(name, value, default, help) for (name, value, help), (_, default, _) in pairs]
    return config, "", options, "", ""


def _read_mapping(text: str) -> dict[str, Any]:
    """The entries of a YAML file; none where it is no mapping."""
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            return {}  # no run writes one, and a few of them can stand for more than there is memory
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return {str(name): value for name, value in values.items()} if isinstance(values, dict) else {}


def _flat(values: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _kind_of(
    config: Config | None, task: str, records: Sequence[Mapping[str, Any]], found: Sequence[FoundResults], folder: Path
) -> RunKind:
    if task:
        return RunKind(FINE_TUNING, f"a fine-tuning run: {task}")
    own = [one for one in found if one.folder == folder]
    if own and not records:
        return RunKind(EVALUATION, f"an evaluation: {own[0].evaluator}")
    if config is not None or any("teacher_temp" in record for record in records):
        return RunKind(PRETRAINING, "a pretraining run")
    return RunKind("", "a run")


def _leaves(options: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Dotted name, value as text and meaning of every option."""
    for field in fields(options):
        # `vars` and not attributes: showing an option does not count as using it.
        value = vars(options)[field.name]
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, _show(value), field.metadata["help"]


def _show(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value not in ("", None) else "(empty)"


@dataclass
class LogMessage:
    """Messages of one level and wording in one file, whatever numbers they hold.

    Attributes:
        level: ``WARNING``, ``ERROR`` or ``CRITICAL``; ``ALARM`` for a warning with a name, such as ``COLLAPSE: …``.
        file: the log, relative to the folder that was searched.
        first: when it was logged first.
        text: the first one.
        last: when it was logged last.
        latest: the last one.
        count: how often it was logged.
    """

    level: str
    file: str
    first: str
    text: str
    last: str = ""
    latest: str = ""
    count: int = 0


def _read_warnings(folders: Sequence[Path]) -> tuple[list[LogMessage], str]:
    """What is above INFO in the ``log/*.txt`` files, plain warnings last, and a sentence for the case of none."""
    found: dict[tuple[Path, str, str], LogMessage] = {}
    seen: set[Path] = set()
    for folder in folders:
        for path in sorted(folder.rglob("log/*.txt")):
            if path.resolve() in seen or not path.is_file():
                continue
            seen.add(path.resolve())
            for level, time, text in _loud_entries(path):
                key = path, level, _NUMBER.sub("#", text.split("\n", 1)[0])
                shown = "ALARM" if level == "WARNING" and _ALARM.match(text) else level
                message = found.setdefault(key, LogMessage(shown, str(path.relative_to(folder)), time, text))
                message.last, message.latest, message.count = time, text, message.count + 1
    nothing = (
        "The logs hold no warnings and no errors." if seen else "No logs were found, so nothing is known of warnings."
    )
    return sorted(found.values(), key=lambda message: (message.level == "WARNING", message.first)), nothing


def _loud_entries(path: Path) -> Iterator[tuple[str, str, str]]:
    """Level, time and text of the loud messages of a log, each with the lines that follow it up to the next message."""
    entry: tuple[str, str, str] | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            match = _LINE.match(line)
            if match is None:
                if entry is not None and len(entry[2]) < _MAX_MESSAGE_LENGTH:
                    entry = (*entry[:2], f"{entry[2]}\n{line.rstrip()}"[:_MAX_MESSAGE_LENGTH])
                continue
            if entry is not None:
                yield entry
            text = match["text"].rstrip()[:_MAX_MESSAGE_LENGTH]
            entry = (match["level"], match["time"], text) if match["level"] in _LOUD else None
    if entry is not None:
        yield entry


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
        results: further folders in which results of evaluators are sought, and in all below them; ``results.json``
            stands for its folder.
        pictures: further pictures, or folders of PNG files, besides those in the run's folder ``plots``.
        num_mistakes: images shown per kind of mistake.

    Returns:
        The file.

    Raises:
        FileNotFoundError: when a folder or a picture does not exist.
        ValueError: when the folder is no run's, or ``num_mistakes`` is negative.
    """
    folder = Path(run_dir)
    others = [path.parent if path.name == RESULTS_FILE else path for path in map(Path, results)]
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


def render(values: Mapping[str, Any]) -> str:
    """The page as text; names of files that are no text are shown with their bytes."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {
        "describe": describe_metric,
        "short": short,
        "svg_of_chart": svg_of_chart,
        "svg_of_interval": svg_of_interval,
        "num_colours": len(PALETTE),
        "style": Markup(_read("style.css")),
    }
    page = environment.from_string(_read("template.html")).render(values).strip() + "\n"
    return _UNPRINTABLE.sub("\ufffd", page).encode("utf-8", "backslashreplace").decode("utf-8")


def _read(name: str) -> str:
    return resources.files("dinov2.eval.report").joinpath(name).read_text(encoding="utf-8")


def gather(folder: Path, others: Sequence[Path], pictures: Sequence[Path], num_mistakes: int) -> dict[str, Any]:
    """Reads everything that the page shows; the names are those of the template."""
    shelf = ImageShelf(MAX_IMAGE_BYTES)
    config, task, options, raw_config, config_problem = _read_options(folder)
    planned = None if config is None else config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH
    batch_size = None if config is None else config.train.batch_size_per_gpu
    records, metrics_problem = _read_metrics(folder)
    found, unreadable = find_results(folder, others)
    kind = _kind_of(config, task, records, found, folder)
    fine_tuning = kind.name == FINE_TUNING
    detailed = main_results(found)
    warnings, no_warnings = _read_warnings([folder, *others])
    drawn = _find_pictures(folder, pictures, fine_tuning=fine_tuning)
    done = max((record["iteration"] + 1 for record in records if isinstance(record.get("iteration"), int)), default=0)
    mistakes = [view for one in detailed for view in view_mistakes(one, shelf, num_mistakes)]
    return {
        "title": folder.resolve().name or str(folder),
        "folder": str(folder),
        "kind": kind.words,
        "fine_tuning": fine_tuning,
        "is_evaluation": kind.name == EVALUATION,
        "status": _status(kind, folder, done, planned),
        "learning": _learning(config, records, planned, compared_results(found, folder))
        if kind.name == PRETRAINING
        else None,
        "alarms": _alarms(found, records if fine_tuning else ()),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "tiles": _tiles(kind, records, done, planned, warnings, len(found)),
        "facts": _facts(folder, options),
        "warnings": warnings[:MAX_MESSAGES],
        "num_warnings": sum(message.count for message in warnings),
        "num_warnings_left_out": max(len(warnings) - MAX_MESSAGES, 0),
        "no_warnings": no_warnings,
        "comparisons": compare_results(found),
        "results": detailed,
        "max_variants": MAX_VARIANTS,
        "unreadable_results": unreadable,
        "glossary": _glossary(detailed),
        "mistakes": mistakes,
        "chart_groups": chart_groups(records, batch_size=batch_size, fine_tuning=fine_tuning),
        "metrics_problem": metrics_problem,
        "pictures": [(name, shelf.picture(path)) for name, path in drawn[:MAX_PICTURES]],
        "num_pictures_left_out": max(len(drawn) - MAX_PICTURES, 0),
        "options": options,
        "changed_options": [option for option in options if option.value != option.default],
        "config_problem": config_problem,
        "raw_config": raw_config,
    }


def _glossary(found: Sequence[FoundResults]) -> list[tuple[str, str]]:
    """Names and meanings of the metrics that results have."""
    names = dict.fromkeys(
        name for one in found for variant in one.shown_variants for name, *_ in one.metrics_of(variant)
    )
    return [described for described in map(describe_metric, names) if described[1]]


def _read_metrics(folder: Path) -> tuple[list[dict[str, Any]], str]:
    path = folder / METRICS_FILE
    if not path.is_file():
        return [], f"There is no {METRICS_FILE} in the folder: training has not started here."
    try:
        records = read_metrics(path)
        damaged = path.read_bytes().count(b"\n") - len(records)
    except OSError as error:
        return [], f"The curves cannot be drawn: {error}"
    if damaged > 0:
        return records, f"{damaged} damaged line(s) of {METRICS_FILE} are left out of the curves."
    return records, "" if records else f"{METRICS_FILE} holds no numbers yet."


def _status(kind: RunKind, folder: Path, done: int, planned: int | None) -> str:
    if kind.name == EVALUATION:
        return "Results of an evaluator; nothing was trained here."
    if done == 0:
        return "No training is recorded in this folder."
    if kind.name == FINE_TUNING:
        scored = [name for name in ("val", "test") if (folder / name / RESULTS_FILE).is_file()]
        if not scored:
            return f"Stopped, or still running: {done} steps are recorded, and the best weights are not scored yet."
        return f"Finished: the best weights of {done} steps are scored on {' and '.join(scored)}."
    if planned is None:
        return f"{done} iterations are recorded; how many were planned is not known."
    if done >= planned:
        return f"Finished: all {planned} iterations are done."
    return f"Stopped, or still running: {done} of {planned} iterations are recorded."


def _learning(
    config: Config | None, records: Sequence[Mapping[str, Any]], planned: int | None, compared: Sequence[dict[str, Any]]
) -> Learning | None:
    """The same answer as at the end of the log, and what evaluators have found since."""
    if config is None:
        return did_it_learn(records, compared=compared)
    return did_it_learn(
        records,
        batch_size=config.train.batch_size_per_gpu,
        total_iterations=planned,
        best_metric=config.evaluation.best_metric,
        from_pretrained=bool(config.student.pretrained_weights),
        patch_size=max(as_pair(config.student.patch_size)),
        compared=compared,
    )


def _alarms(found: Sequence[FoundResults], records: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What results say of themselves, such as NOTHING FOUND, and where; without results, what the last epoch said."""
    alarms = [(one.name, text) for one in found for text in as_texts(one.content.extra.get("warnings"))]
    if not found:
        evaluated = [record for record in records if "evaluation" in record]
        alarms = [("val", text) for record in evaluated[-1:] for text in as_texts(record.get("warnings"))]
    return alarms


def as_texts(value: Any) -> list[str]:
    """The texts of a list; of anything else none."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list | tuple) else []


class Tile(NamedTuple):
    """A number at the top of the page; ``tone`` is good, warn, bad, or empty."""

    label: str
    value: str
    remark: str = ""
    tone: str = ""


def _tiles(
    kind: RunKind,
    records: Sequence[Mapping[str, Any]],
    done: int,
    planned: int | None,
    warnings: Sequence[LogMessage],
    num_results: int,
) -> list[Tile]:
    tiles = []
    if done:
        tone = "" if not planned else "good" if done >= planned else "warn"
        name = "steps" if kind.name == FINE_TUNING else "iterations"
        tiles.append(Tile(name, f"{done}", "" if planned is None else f"of {planned}", tone))
    losses = [record["total_loss"] for record in records if "total_loss" in record]
    if losses:
        last = finite_number({"loss": losses[-1]}, "loss")
        broken = last is None
        value = "not finite" if last is None else f"{last:.4g}"
        tiles.append(Tile("last total loss", value, tone="bad" if broken else ""))
    count = sum(message.count for message in warnings)
    num_errors = sum(message.count for message in warnings if message.level != "WARNING")
    remark = f"{num_errors} of them errors or alarms" if num_errors else ""
    tiles.append(Tile("warnings in the logs", str(count), remark, "bad" if num_errors else "warn" if count else "good"))
    tiles.append(Tile("sets scored" if kind.name == FINE_TUNING else "results of evaluators", str(num_results)))
    return tiles


def _facts(folder: Path, options: Sequence[Option]) -> list[tuple[str, str]]:
    facts = [("folder", str(folder.resolve()))]
    if options:
        values = {option.name: option.value for option in options}
    if options and "task" in values:
        names = {
            "task": "task",
            "data.train_dataset_path": "images to learn from",
            "data.val_dataset_path": "images to choose the best weights by",
            "data.test_dataset_path": "images to test on",
            "backbone.config_file": "backbone",
            "backbone.pretrained_weights": "weights of the backbone",
            "backbone.mode": "what of the backbone is trained",
            "head.kind": "head",
        }
        facts += [(words, values[name]) for name, words in names.items() if values.get(name, "(empty)") != "(empty)"]
    elif options:
        facts.append(("images", values["train.dataset_path"]))
        backbone = f"{values['student.arch']}, patches of {values['student.patch_size']} pixels"
        facts.append(("backbone", f"{backbone}, global crops of {values['crops.global_crops_size']} pixels"))
        facts.append(("started from", values["student.pretrained_weights"].replace("(empty)", "random weights")))
    log = folder / "log" / "log.txt"
    try:
        with log.open(encoding="utf-8", errors="replace") as file:
            times = [match["time"] for line in file if (match := _LINE.match(line))]
        facts.append(("first and last line of the log", f"{times[0]} and {times[-1]}" if times else ""))
    except FileNotFoundError:
        pass
    except OSError as error:
        facts.append(("log", f"log.txt cannot be read: {error.strerror}"))
    try:
        best = json.loads((folder / "eval" / "best" / "best.json").read_text(encoding="utf-8"))
        score = f"{str(best['metric']).replace('_', ' ')} {float(best['score']):.3f}"
        facts.append(("best teacher kept", f"{best['teacher']}: {score} after iteration {int(best['iteration'])}"))
    except FileNotFoundError:
        pass  # the run kept none
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        facts.append(
            ("best teacher kept", f"best.json is damaged ({type(error).__name__}); the run's next start mends it")
        )
    return [(name, value) for name, value in facts if value]


def _find_pictures(folder: Path, given: Sequence[Path], *, fine_tuning: bool) -> list[tuple[str, Path]]:
    """Pictures with the names that they have in the page, which draws the run's charts by itself."""
    drawn = [path for path in sorted((folder / "plots").glob("*.png")) if path.stem not in GROUP_NAMES]
    if fine_tuning:  # the other plots are charts; of the epochs the last one shows what came out
        drawn = [path for end in _SHEETS for path in drawn if path.stem.endswith(end)]
        drawn += sorted((folder / "valid_preds").glob("*.png"))[-1:]
    found = {path.resolve(): (path.relative_to(folder).as_posix(), path) for path in drawn}
    for place in given:
        if not place.exists():
            raise FileNotFoundError(f"there is no picture or folder {place}")
        for path in sorted(place.glob("*.png")) if place.is_dir() else [place]:
            found.setdefault(path.resolve(), (str(path), path))
    return list(found.values())


@dataclass(frozen=True)
class ReportOptions:
    """Options of the command."""

    output_dir: Path = option(help="folder of the run", positional=True)
    output: Path | None = option(None, help="HTML file to write (usually report.html in that folder)")
    results: tuple[Path, ...] = option((), help="further folders with results of evaluators, also in folders below")
    pictures: tuple[Path, ...] = option((), help="pictures, or folders of PNG files, besides those in plots/")
    num_mistakes: int = option(12, help="images shown per kind of mistake")


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


if __name__ == "__main__":
    run_as("report_run")
