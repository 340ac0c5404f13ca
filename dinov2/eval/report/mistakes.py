"""The worst mistakes of an evaluation, with their photos: what a person wants to look at first."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.eval.report.figures import EVALUATORS
from dinov2.eval.report.images import EmbeddedImage, ImageShelf
from dinov2.eval.report.results import FoundResults, weights_name
from dinov2.eval.results import PREDICTIONS_FILE

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
