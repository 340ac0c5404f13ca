"""The worst mistakes of an evaluation, with their photos: what a person wants to look at first."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2.eval.report.figures import EVALUATORS
from dinov2.eval.report.images import EmbeddedImage, ImageShelf
from dinov2.eval.report.results import FoundResults, weights_name
from dinov2.eval.results import PREDICTIONS_FILE

_SPACE = "\u00a0"  # no line ends between a number and its unit
_COLUMNS = ("image", "part", "label", "prediction", "score")


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
    """A wrongly classified photo: the sentence below it, and whether another photo of its part was right."""

    photo: EmbeddedImage
    path: str
    part: str
    verdict: str
    rest_of_part: str


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
    num_photos: int
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
            rows = read_predictions(path)
        except (OSError, ValueError, csv.Error) as error:
            views.append(MistakesView(title, name, 0, (), str(error)))
            continue
        views.append(MistakesView(title, name, len(rows), tuple(_groups(rows, results.classes, shelf, most))))
    return views


def read_predictions(path: Path) -> list[Prediction]:
    """Reads the rows of a file of predictions that have a label.

    Raises:
        ValueError: when columns are missing or a score is no number.
        OSError: when the file cannot be read.
    """
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
        rows = []
        for row in reader:
            values = [row[column] for column in _COLUMNS]
            if None in values:
                raise ValueError(f"{path}, line {reader.line_num}: the line ends too early")
            image, part, label, prediction, score = values
            try:
                found = Prediction(image, part, label, prediction, float(score))
            except ValueError:
                raise ValueError(f"{path}, line {reader.line_num}: the score {score!r} is no number") from None
            if label:
                rows.append(found)
    return rows


def _groups(rows: Sequence[Prediction], classes: Sequence[str], shelf: ImageShelf, most: int) -> list[MistakeGroup]:
    wrong = [row for row in rows if row.prediction != row.label]
    if len(classes) != 2:
        said = "The photos whose wrong class was given with the most confidence come first."
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
            f"False negatives, called {good}: those that looked most harmless come first.",
            missed,
            rows,
            shelf,
            most,
            say,
        ),
        _group(
            f"Which photos of class {good} raised a false alarm?",
            f"False positives, called {bad}: those that looked worst come first.",
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
