"""Results of evaluators for the reader: one table of all, and everything that is known of each."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from dinov2.eval.metrics import Figure
from dinov2.eval.report.figures import EVALUATORS, FIGURE_GROUPS, KEY_FIGURES, MOST_FIGURES, meaning_of, name_of
from dinov2.eval.report.svg import draw_interval
from dinov2.eval.results import RESULTS_FILE, EvaluationResults
from dinov2.eval.scoring import LevelScores, Scores

TEACHER_FILE = "teacher_checkpoint.pth"
MOST_VARIANTS = 60
_MOST_CLASSES = 12  # of a confusion table
_MOST_ROWS_PER_RESULT = 8
_LONGEST_FACT = 400  # characters
FEW_SHOT = "few_shot"  # of a result's extra values, see `summarise_tries`
_TRAINING = re.compile(r"training_(\d+)")


@dataclass(frozen=True)
class FoundResults:
    """A results file: its folder, what it is called in the report, and its content; or why it cannot be read."""

    folder: Path
    name: str
    results: EvaluationResults | None
    problem: str = ""

    @property
    def training_iteration(self) -> int | None:
        """Iteration of the teacher that a run judged by itself; None for any other result."""
        match = _TRAINING.fullmatch(self.folder.name)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Cell:
    """A figure as text with its interval and a drawing of both; empty where it does not apply."""

    value: str = ""
    interval: str = ""
    drawing: Markup | None = None


@dataclass(frozen=True)
class FigureRow:
    """One figure over images and over parts."""

    name: str
    meaning: str
    image: Cell
    part: Cell


@dataclass(frozen=True)
class Confusion:
    """How many of each class were called what: rows of (class, counts), rightly classified ones on the diagonal."""

    level: str
    classes: tuple[str, ...]
    rows: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class ResultDetails:
    """All that is known of one variant."""

    title: str
    figures: tuple[FigureRow, ...]
    confusions: tuple[Confusion, ...]


@dataclass(frozen=True)
class Spread:
    """What became of several few-shot tries: a row per variant, cells of mean, deviation and range."""

    level: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True)
class ResultView:
    """One results file for the reader; ``variants`` and ``rows`` are cells of tables with a header each."""

    title: str
    name: str
    counts: str
    details: tuple[ResultDetails, ...]
    variants_header: tuple[str, ...]
    variants: tuple[tuple[str, ...], ...]
    num_variants: int
    spreads: tuple[Spread, ...]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ComparisonRow:
    """One line of the table of all results."""

    evaluator: str
    variant: str
    name: str
    weights: str
    counted: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Comparison:
    """A table of results of one kind; its figures are per part where a part has several photos, else per photo."""

    header: tuple[tuple[str, str], ...]
    rows: tuple[ComparisonRow, ...]


def find_results(run_dir: Path, others: Sequence[Path]) -> list[FoundResults]:
    """Reads every results file in the run's folder and in other folders, at any depth, each once.

    Those that a run wrote about itself while training stand in the order of their iterations, before all others.
    """
    found: dict[Path, FoundResults] = {}
    for root in (run_dir, *others):
        for path in sorted(root.rglob(RESULTS_FILE)):
            if path.resolve() in found or not path.is_file():
                continue
            inside = path.parent.relative_to(root).as_posix()
            name = inside if root == run_dir and inside != "." else (root / inside).as_posix()
            found[path.resolve()] = _read(path, name)
    return sorted(found.values(), key=_order)


def main_results(found: Sequence[FoundResults]) -> list[FoundResults]:
    """Those that the reader wants in detail: of the teachers that a run judged by itself only the last."""
    iterations = [entry.training_iteration for entry in found if entry.results is not None]
    last = max((iteration for iteration in iterations if iteration is not None), default=None)
    return [entry for entry in found if entry.results is not None and entry.training_iteration in (None, last)]


def compare_results(found: Sequence[FoundResults]) -> tuple[Comparison, ...]:
    """The tables of all results: one for those of each kind, as a table with a column for everything does not fit."""
    scored: dict[tuple[str, ...], list[tuple[FoundResults, str]]] = {group: [] for group in (*FIGURE_GROUPS, ())}
    for entry in found:
        for variant in [] if entry.results is None else _variants_to_compare(entry.results):
            _, level = _level_of(entry, variant)
            group = next((group for group in FIGURE_GROUPS if not level.figures.keys().isdisjoint(group)), ())
            scored[group].append((entry, variant))
    return tuple(_compare(entries, group) for group, entries in scored.items() if entries)


def _compare(scored: Sequence[tuple[FoundResults, str]], group: Sequence[str]) -> Comparison:
    """The table of some variants, with those figures of the group that there are, and with the first of all of none."""
    levels = [_level_of(entry, variant) for entry, variant in scored]
    there = dict.fromkeys(name for _, level in levels for name in level.figures)
    names = [name for name in group if name in there] if group else list(there)[:MOST_FIGURES]
    rows = []
    for (entry, variant), (counted, level) in zip(scored, levels, strict=True):
        assert entry.results is not None
        rows.append(
            ComparisonRow(
                evaluator=EVALUATORS.get(entry.results.evaluator, entry.results.evaluator),
                variant=variant,
                name=entry.name,
                weights=weights_name(entry.results.weights),
                counted=counted,
                cells=tuple(_cell(level.figures.get(name)) for name in names),
            )
        )
    return Comparison(tuple((name_of(name), meaning_of(name)) for name in names), tuple(rows))


def _level_of(entry: FoundResults, variant: str) -> tuple[str, LevelScores]:
    assert entry.results is not None
    return _telling_level(entry.results.scores[variant])


def view_results(entry: FoundResults) -> ResultView:
    """Everything that is known of one result."""
    results = entry.results
    assert results is not None
    variants = _variants_to_compare(results)
    header, rows = _variant_table(results)
    return ResultView(
        title=f"{EVALUATORS.get(results.evaluator, results.evaluator)}, {weights_name(results.weights)}",
        name=entry.name,
        counts=", ".join(_counts(name, values) for name, values in results.datasets.items()),
        details=tuple(_details(results, variant) for variant in variants),
        variants_header=header,
        variants=rows[:MOST_VARIANTS],
        num_variants=len(rows),
        spreads=tuple(_spreads(results.extra.get(FEW_SHOT, {}))),
        facts=tuple(_facts(results)),
    )


def weights_name(weights: Mapping[str, Any]) -> str:
    """Short name of the weights that were judged."""
    path = str(weights.get("path", ""))
    if not path:
        return "random weights" if weights.get("random") else "weights not named"
    if Path(path).name == TEACHER_FILE:  # all teachers of a run have this name
        return f"teacher of {Path(path).parent.name}"
    return "/".join(Path(path).parts[-2:]).removesuffix(".pth")


def _read(path: Path, name: str) -> FoundResults:
    try:
        results = EvaluationResults.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return FoundResults(path.parent, name, None, f"{type(error).__name__}: {error}")
    return FoundResults(path.parent, name, results)


def _order(entry: FoundResults) -> tuple[bool, int, str]:
    iteration = entry.training_iteration
    return iteration is None, iteration or 0, entry.name


def _variants_to_compare(results: EvaluationResults) -> list[str]:
    """The chosen variant and what it scored on further sets; some of all where none was chosen."""
    if not results.chosen:
        return list(results.scores)[:_MOST_ROWS_PER_RESULT]
    further = [name for name in results.scores if name.startswith(f"{results.chosen} on ")]
    return [results.chosen, *further]


def _telling_level(scores: Scores) -> tuple[str, LevelScores]:
    """What was counted, and the scores that decide about parts: those of parts, where a part has several photos."""
    if scores.part.count != scores.image.count and scores.part.figures:
        return f"{scores.part.count} parts", scores.part
    return f"{scores.image.count} photos", scores.image


def _details(results: EvaluationResults, variant: str) -> ResultDetails:
    scores = results.scores[variant]
    names = list(dict.fromkeys([*scores.image.figures, *scores.part.figures]))
    rows = [
        FigureRow(
            name_of(name), meaning_of(name), _cell(scores.image.figures.get(name)), _cell(scores.part.figures.get(name))
        )
        for name in names
    ]
    levels = {"photos": scores.image, "parts": scores.part}
    same = scores.image.count == scores.part.count and scores.image.confusion == scores.part.confusion
    confusions = [
        Confusion(level, results.classes, tuple(zip(results.classes, scored.confusion, strict=True)))
        for level, scored in levels.items()
        if not (same and level == "parts") and 0 < len(scored.confusion) == len(results.classes) <= _MOST_CLASSES
    ]
    why = f" (chosen by {results.settings['chosen_by']})" if results.settings.get("chosen_by") else ""
    return ResultDetails(f"{variant}{why if variant == results.chosen else ''}", tuple(rows), tuple(confusions))


def _variant_table(results: EvaluationResults) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Key figures of all variants, per photo and, where they differ, per part."""
    by_level = {"photo": {name: scores.image for name, scores in results.scores.items()}}
    if any(scores.part.count != scores.image.count for scores in results.scores.values()):
        by_level["part"] = {name: scores.part for name, scores in results.scores.items()}
    columns = [
        (level, figure)
        for level, scored in by_level.items()
        for figure in KEY_FIGURES
        if any(figure in level_scores.figures for level_scores in scored.values())
    ]
    rows = []
    for variant in results.scores:
        figures = [_cell(by_level[level][variant].figures.get(figure)).value or "-" for level, figure in columns]
        rows.append((f"{variant} (chosen)" if variant == results.chosen else variant, *figures))
    return ("variant", *(f"{name_of(figure)} per {level}" for level, figure in columns)), tuple(rows)


def _spreads(few_shot: Mapping[str, Any]) -> Iterator[Spread]:
    """Key figures of few-shot tries, per photo and, where a part has several photos, per part."""
    levels = ["image", "part"] if any(tries["image"] != tries["part"] for tries in few_shot.values()) else ["image"]
    for level in levels if few_shot else ():
        named = {variant: tries[level] for variant, tries in few_shot.items()}
        figures = [name for name in KEY_FIGURES if any(name in tries for tries in named.values())]
        rows = [(variant, tuple(_spread_cell(tries.get(name)) for name in figures)) for variant, tries in named.items()]
        yield Spread(level.replace("image", "photo"), tuple(map(name_of, figures)), tuple(rows))


def _spread_cell(spread: Mapping[str, Any] | None) -> tuple[str, str]:
    if spread is None:
        return "-", ""
    values = spread["values"]
    return f"{spread['mean']:.3f} ± {spread['std']:.3f}", f"{min(values):.3f} to {max(values):.3f}"


def _cell(figure: Figure | None) -> Cell:
    if figure is None:
        return Cell()
    low, high = figure.low, figure.high
    interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    return Cell(f"{figure.value:.3f}", interval, draw_interval(figure.value, low, high))


def _counts(name: str, values: Mapping[str, Any]) -> str:
    return f"{name}: {values.get('num_images', '?')} photos of {values.get('num_parts', '?')} parts"


def _facts(results: EvaluationResults) -> list[tuple[str, str]]:
    """Everything else that the file says, as text."""
    facts = [("classes", ", ".join(results.classes)), ("revision of the code", results.revision or "not known")]
    facts += [(f"weights: {name}", _plain(value)) for name, value in results.weights.items()]
    facts += [(f"setting: {name}", _plain(value)) for name, value in results.settings.items()]
    for name, values in results.datasets.items():
        facts += [(f"{name} set: {key}", _plain(value)) for key, value in values.items() if key != "classes"]
    facts += [(name.replace("_", " "), _plain(value)) for name, value in results.extra.items() if name != FEW_SHOT]
    return facts


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    if len(text) > _LONGEST_FACT:
        return f"{text[:_LONGEST_FACT]} … (the rest is in {RESULTS_FILE})"
    return text or "(empty)"
