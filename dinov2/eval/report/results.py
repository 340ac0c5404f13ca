"""Results of evaluators for the reader: one table of all, and everything that is known of each."""

import base64
import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

from dinov2.data.decoding import load_image
from dinov2.eval.metrics.classification import LevelScores, MetricValue, Scores
from dinov2.eval.report.curves import draw_interval
from dinov2.eval.results import PREDICTIONS_FILE, RESULTS_FILE, EvaluationResults

_ESCAPES = "share of defects that are missed when {} good ones may be rejected; small is good"
MEANINGS = {
    "accuracy": ("accuracy", "share of all that is classified rightly; says little where defects are rare"),
    "balanced_accuracy": ("balanced accuracy", "mean over the classes of the share that is classified rightly"),
    "precision": ("precision", "share of alarms that are justified (several classes: mean over them)"),
    "recall": ("recall", "share of defects that are found (several classes: mean over them)"),
    "f1": ("F1", "harmonic mean of precision and recall"),
    "auroc": ("AUROC", "chance that a defective one scores higher than a good one; guessing gives 0.5"),
    "average_precision": ("average precision", "mean precision over thresholds; guessing gives the share of defects"),
    "escape_rate_at_0.1": ("escapes at 0.1 % false alarms", _ESCAPES.format("1 in 1000")),
    "escape_rate_at_1": ("escapes at 1 % false alarms", _ESCAPES.format("1 in 100")),
    "escape_rate_at_5": ("escapes at 5 % false alarms", _ESCAPES.format("1 in 20")),
    "top5": ("top 5", "share whose class is among the five most probable"),
    "map": ("mAP", "how far in front the photos that belong together stand when all are ranked"),
}
# What stands side by side in the table of all results: figures of classifications, and those of rankings.
FIGURE_GROUPS = (
    ("balanced_accuracy", "auroc", "average_precision", "escape_rate_at_1", "top5"),
    ("map", "mp@1", "mp@5", "mp@10", "recall@10"),
)
KEY_FIGURES = tuple(name for group in FIGURE_GROUPS for name in group)
MOST_FIGURES = 7  # of results that have none of these
_AT_RANK = re.compile(r"(mp|recall)@(\d+)")
_MEANINGS_AT_RANK = {
    "mp": "share of the nearest photos that belong to the query",
    "recall": "share of the photos which belong to the query that are among the nearest",
}
EVALUATORS = {
    "knn": "k-NN",
    "linear": "linear classifier",
    "log_regression": "logistic regression",
    "retrieval": "retrieval",
}


def name_of(figure: str) -> str:
    """What people call a figure."""
    if figure in MEANINGS:
        return MEANINGS[figure][0]
    if match := _AT_RANK.fullmatch(figure):
        what = "precision" if match[1] == "mp" else "recall"
        return f"{what} of the nearest" + ("" if match[2] == "1" else f" {match[2]}")
    return figure.replace("_", " ")


def meaning_of(figure: str) -> str:
    """One line on what a figure says; empty for an unknown one."""
    if figure in MEANINGS:
        return MEANINGS[figure][1]
    if match := _AT_RANK.fullmatch(figure):
        return _MEANINGS_AT_RANK[match[1]]
    return ""


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
            group = next((group for group in FIGURE_GROUPS if not level.metrics.keys().isdisjoint(group)), ())
            scored[group].append((entry, variant))
    return tuple(_compare(entries, group) for group, entries in scored.items() if entries)


def _compare(scored: Sequence[tuple[FoundResults, str]], group: Sequence[str]) -> Comparison:
    """The table of some variants, with those figures of the group that there are, and with the first of all of none."""
    levels = [_level_of(entry, variant) for entry, variant in scored]
    there = dict.fromkeys(name for _, level in levels for name in level.metrics)
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
                cells=tuple(_cell(level.metrics.get(name)) for name in names),
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
    if scores.part.count != scores.image.count and scores.part.metrics:
        return f"{scores.part.count} parts", scores.part
    return f"{scores.image.count} photos", scores.image


def _details(results: EvaluationResults, variant: str) -> ResultDetails:
    scores = results.scores[variant]
    names = list(dict.fromkeys([*scores.image.metrics, *scores.part.metrics]))
    rows = [
        FigureRow(
            name_of(name), meaning_of(name), _cell(scores.image.metrics.get(name)), _cell(scores.part.metrics.get(name))
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
        if any(figure in level_scores.metrics for level_scores in scored.values())
    ]
    rows = []
    for variant in results.scores:
        figures = [_cell(by_level[level][variant].metrics.get(figure)).value or "-" for level, figure in columns]
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


def _cell(figure: MetricValue | None) -> Cell:
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


THUMBNAIL_PIXELS = 256
PICTURE_PIXELS = 1800
_JPEG_QUALITY = 82


@dataclass(frozen=True)
class EmbeddedImage:
    """An image as a ``data:`` address with its size in pixels, or the reason why it cannot be shown."""

    address: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


@dataclass
class ImageShelf:
    """Turns files into embedded images until the page is full.

    Args:
        most_bytes: of all images together, as they stand in the page.
    """

    most_bytes: int
    num_left_out: int = 0
    _used: int = 0
    _done: dict[tuple[str, int], EmbeddedImage] = field(default_factory=dict)

    def thumbnail(self, path: str | Path) -> EmbeddedImage:
        """A photo as a person would see it, as a JPEG of at most 256 pixels."""
        return self._embed(Path(path), THUMBNAIL_PIXELS)

    def picture(self, path: str | Path) -> EmbeddedImage:
        """A drawing: as it is, or smaller and as a JPEG where it is larger than a screen."""
        return self._embed(Path(path), PICTURE_PIXELS)

    def _embed(self, path: Path, pixels: int) -> EmbeddedImage:
        key = str(path), pixels
        if key not in self._done:
            self._done[key] = self._make(path, pixels)
        image = self._done[key]
        # The same address twice is twice as many bytes.
        if self._used + len(image.address) > self.most_bytes:
            self.num_left_out += 1
            return EmbeddedImage(problem="left out, as the report would become too large")
        self._used += len(image.address)
        return image

    def _make(self, path: Path, pixels: int) -> EmbeddedImage:
        try:
            if not path.is_file():
                return EmbeddedImage(problem="the file is no longer there")
            image = load_image(path)
            if pixels == PICTURE_PIXELS and path.suffix.lower() == ".png" and max(image.size) <= pixels:
                return EmbeddedImage(_address("png", path.read_bytes()), *image.size)
        except (OSError, ValueError) as error:
            return EmbeddedImage(problem=f"the file cannot be read: {error}")
        image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
        return EmbeddedImage(_address("jpeg", _jpeg(image)), *image.size)


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=_JPEG_QUALITY, optimize=True)
    return file.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


PARTS = "parts"  # variant of a retrieval of photos of one part; others name a protocol
_DOUBT = "A label may be wrong, too."
_SPACE = "\u00a0"  # no line ends between a number and its unit
_COLUMNS = ("image", "part", "label", "prediction", "score")
_RANKING_COLUMNS = ("image", "part", "variant", "score", "first_hit", "best_wrong_image")


@dataclass(frozen=True)
class Prediction:
    """One photo that was classified; the score is the probability of class 1, with more classes of the prediction."""

    path: str
    part: str
    label: str
    prediction: str
    score: float


@dataclass(frozen=True)
class Mistake:
    """A photo that was judged wrongly.

    Attributes:
        photo: itself.
        path: its file.
        part: the part that it shows, empty where it is a part of its own.
        verdict: the sentence below it.
        rest_of_part: how the other photos of its part fared.
        instead: the photo that was taken for one of its part, in a retrieval.
        instead_path: the file of that one.
    """

    photo: EmbeddedImage
    path: str
    part: str
    verdict: str
    rest_of_part: str = ""
    instead: EmbeddedImage | None = None
    instead_path: str = ""


@dataclass(frozen=True)
class MistakeGroup:
    """The worst mistakes of one kind, of ``count`` in all."""

    question: str
    explanation: str
    count: int
    mistakes: tuple[Mistake, ...]


@dataclass(frozen=True)
class MistakesView:
    """The mistakes in one file of predictions, or why it cannot be read."""

    title: str
    name: str
    counted: str
    groups: tuple[MistakeGroup, ...]
    problem: str = ""


def view_mistakes(entry: FoundResults, shelf: ImageShelf, most: int) -> list[MistakesView]:
    """Shows the mistakes in the files of predictions beside a results file; there may be one per judged set.

    Args:
        entry: results that could be read.
        shelf: makes the thumbnails.
        most: photos per kind of mistake.
    """
    results = entry.results
    assert results is not None
    base = Path(PREDICTIONS_FILE)
    views = []
    for path in sorted(entry.folder.glob(f"{base.stem}*{base.suffix}")):
        set_name = path.stem.removeprefix(base.stem).strip("_")
        title = f"{EVALUATORS.get(results.evaluator, results.evaluator)}, {weights_name(results.weights)}"
        title += f", on {set_name}" if set_name else ""
        name = f"{entry.name}/{path.name}"
        try:
            if results.evaluator == "retrieval":
                rankings = _read_rows(path, _RANKING_COLUMNS)
                counted, groups = f"{len(rankings)} rankings", _groups_of_rankings(path, rankings, shelf, most)
            else:
                rows = read_predictions(path)
                counted, groups = f"{len(rows)} labelled photos", _groups(rows, results.classes, shelf, most)
        except (OSError, ValueError, csv.Error) as error:
            views.append(MistakesView(title, name, "", (), str(error)))
            continue
        views.append(MistakesView(title, name, counted, tuple(groups)))
    return views


def read_predictions(path: Path) -> list[Prediction]:
    """Reads the rows of a file of predictions that have a label.

    Raises:
        ValueError: when columns are missing or a score is no number.
        OSError: when the file cannot be read.
    """
    rows = []
    for line, (image, part, label, prediction, score) in _read_rows(path, _COLUMNS):
        found = Prediction(image, part, label, prediction, _number(score, path, line))
        if label:
            rows.append(found)
    return rows


def _read_rows(path: Path, columns: Sequence[str]) -> list[tuple[int, list[str]]]:
    """Number of every line of a CSV file below its header, and what it has in some columns."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
        rows = []
        for row in reader:
            values = [row[column] for column in columns]
            if None in values:
                raise ValueError(f"{path}, line {reader.line_num}: the line ends too early")
            rows.append((reader.line_num, values))
    return rows


def _number(text: str, path: Path, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{path}, line {line}: the score {text!r} is no number") from None


def _groups_of_rankings(
    path: Path, rows: Sequence[tuple[int, list[str]]], shelf: ImageShelf, most: int
) -> list[MistakeGroup]:
    """By variant of a retrieval, the queries whose nearest photo does not belong to them; the worst come first."""
    failed: dict[str, list[tuple[float, list[str]]]] = {}
    for line, values in rows:
        score, first_hit = _number(values[3], path, line), _number(values[4], path, line)
        failed.setdefault(values[2], []).extend([(score, values)] if first_hit != 1 else [])
    return [_group_of_rankings(variant, sorted(wrong), shelf, most) for variant, wrong in failed.items()]


def _group_of_rankings(
    variant: str, wrong: Sequence[tuple[float, list[str]]], shelf: ImageShelf, most: int
) -> MistakeGroup:
    mistakes = []
    for score, (image, part, _, _, first_hit, nearest) in wrong[:most]:
        verdict = f"the first photo that belongs to it has rank {first_hit}; average precision {score:.3f}"
        own_part = "" if part == image else part
        instead = shelf.thumbnail(nearest) if nearest else None
        mistakes.append(Mistake(shelf.thumbnail(image), image, own_part, verdict, "", instead, nearest))
    of_what = "of another part" if variant == PARTS else f"that does not show the same ({variant})"
    return MistakeGroup(
        f"To which photos does one {of_what} come nearest?",
        "Left the photo, right the one that looked most alike and is of something else; the worst rankings come first.",
        len(wrong),
        tuple(mistakes),
    )


def _groups(rows: Sequence[Prediction], classes: Sequence[str], shelf: ImageShelf, most: int) -> list[MistakeGroup]:
    wrong = [row for row in rows if row.prediction != row.label]
    if len(classes) != 2:
        said = f"The photos whose wrong class was given with the most confidence come first. {_DOUBT}"
        wrong.sort(key=lambda row: (-row.score, row.path))
        return [_group("Which photos were taken for something else?", said, wrong, rows, shelf, most, _mixed_up)]
    good, bad = classes
    missed = sorted((row for row in wrong if row.label == bad), key=lambda row: (row.score, row.path))
    alarms = sorted((row for row in wrong if row.label == good), key=lambda row: (-row.score, row.path))

    def say(row: Prediction) -> str:
        return f"probability of {bad}: {_percent(row.score)}"

    return [
        _group(
            f"Which photos of class {bad} were missed?",
            f"False negatives, called {good}: those that looked most harmless come first. {_DOUBT}",
            missed,
            rows,
            shelf,
            most,
            say,
        ),
        _group(
            f"Which photos of class {good} raised a false alarm?",
            f"False positives, called {bad}: those that looked worst come first. {_DOUBT}",
            alarms,
            rows,
            shelf,
            most,
            say,
        ),
    ]


def _mixed_up(row: Prediction) -> str:
    return f"{row.label}, but called {row.prediction} with probability {_percent(row.score)}"


def _group(
    question: str,
    explanation: str,
    wrong: Sequence[Prediction],
    rows: Sequence[Prediction],
    shelf: ImageShelf,
    most: int,
    say: Callable[[Prediction], str],
) -> MistakeGroup:
    of_part: dict[str, list[Prediction]] = {}
    for row in rows:
        of_part.setdefault(row.part, []).append(row)
    mistakes = tuple(
        Mistake(
            shelf.thumbnail(row.path), row.path, "" if row.part == row.path else row.part, say(row),
            _rest(row, of_part[row.part]),
        )
        for row in wrong[:most]
    )  # fmt: skip
    return MistakeGroup(question, explanation, len(wrong), mistakes)


def _rest(row: Prediction, part: Sequence[Prediction]) -> str:
    """How the other photos of the same part were classified."""
    others = len(part) - 1
    right = sum(other.prediction == other.label for other in part)
    if others == 0:
        return ""
    return f"{right} of {others} other {'photo' if others == 1 else 'photos'} of this part classified rightly"


def _percent(share: float) -> str:
    """A probability for people, never rounded to a certainty that it is not."""
    if 0 < share < 0.001:
        return f"below 0.1{_SPACE}%"
    return f"{100 * share:.3g}{_SPACE}%" if share <= 0.9995 or share == 1 else f"above 99.9{_SPACE}%"
