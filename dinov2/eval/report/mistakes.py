"""The worst mistakes of an evaluator, with the images that they are about."""

import base64
import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from dinov2.data.decoding import load_image
from dinov2.data.value_range import ValueRange
from dinov2.eval.report.results import FoundResults
from dinov2.eval.results import PREDICTIONS_FILE
from dinov2.utils.untrusted_text import from_table_cell

THUMBNAIL_PIXELS = 256
PICTURE_PIXELS = 1800
_JPEG_QUALITY = 82
_PARTS = ("parts", "reidentification")  # variants of a retrieval of what one part shows; others name a protocol
_DOUBT = "A label may be wrong, too."
_SPACE = "\u00a0"  # no line ends between a number and its unit
_COLUMNS = ("image", "part", "label", "prediction", "score")
_RANKING_COLUMNS = ("image", "part", "variant", "score", "first_hit", "best_wrong_image")

Row = dict[str, str]  # of a file of predictions
Thumbnail = Callable[[str], "EmbeddedImage"]


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
        max_bytes: of all images together, as they stand in the page.
    """

    max_bytes: int
    _used: int = 0
    _done: dict[tuple[str, int, ValueRange | None], EmbeddedImage] = field(default_factory=dict)

    def thumbnail(self, path: str | Path, value_range: ValueRange | None = None) -> EmbeddedImage:
        """An image as a person would see it, and as it was evaluated, as a JPEG of at most 256 pixels."""
        return self._embed(Path(path), THUMBNAIL_PIXELS, value_range)

    def picture(self, path: str | Path) -> EmbeddedImage:
        """A drawing: as it is, or smaller and as a JPEG where it is larger than a screen."""
        return self._embed(Path(path), PICTURE_PIXELS, None)

    def _embed(self, path: Path, pixels: int, value_range: ValueRange | None) -> EmbeddedImage:
        key = str(path), pixels, value_range
        if key not in self._done:
            self._done[key] = _encode(path, pixels, value_range)
        image = self._done[key]
        # The same address twice is twice as many bytes.
        if self._used + len(image.address) > self.max_bytes:
            return EmbeddedImage(problem="left out, as the report would become too large")
        self._used += len(image.address)
        return image


def _encode(path: Path, pixels: int, value_range: ValueRange | None) -> EmbeddedImage:
    kind = "jpeg"
    try:
        if not path.is_file():
            return EmbeddedImage(problem="the file is no longer there")
        image = load_image(path, value_range)
        if pixels == PICTURE_PIXELS and path.suffix.lower() == ".png" and max(image.size) <= pixels:
            kind, content = "png", path.read_bytes()
    except (OSError, ValueError) as error:
        return EmbeddedImage(problem=f"the file cannot be read: {error}")
    if kind == "jpeg":
        image.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=_JPEG_QUALITY, optimize=True)
        content = file.getvalue()
    return EmbeddedImage(f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}", *image.size)


@dataclass(frozen=True)
class Mistake:
    """An image that was taken for something else.

    Attributes:
        image: itself.
        path: its file.
        part: the part that it shows, empty where it is a part of its own.
        said: the sentence below it.
        rest_of_part: how the other images of its part fared.
        instead: the image that was taken for one of its part, in a retrieval.
        instead_path: the file of that one.
    """

    image: EmbeddedImage
    path: str
    part: str
    said: str
    rest_of_part: str = ""
    instead: EmbeddedImage | None = None
    instead_path: str = ""


@dataclass(frozen=True)
class MistakeGroup:
    """The worst mistakes of one kind, of ``count`` in all."""

    question: str
    explanation: str
    count: int
    mistakes: list[Mistake]


@dataclass(frozen=True)
class MistakesView:
    """The mistakes in one file of predictions, or why it cannot be read."""

    title: str
    name: str
    counted: str = ""
    groups: Sequence[MistakeGroup] = ()
    problem: str = ""


def view_mistakes(found: FoundResults, shelf: ImageShelf, max_mistakes: int) -> list[MistakesView]:
    """Shows the mistakes in the files of predictions beside a results file; there may be one per evaluated set.

    Args:
        found: the results.
        shelf: makes the thumbnails.
        max_mistakes: images per kind of mistake.
    """
    base = Path(PREDICTIONS_FILE)
    thumbnail = partial(shelf.thumbnail, value_range=found.value_range)
    views = []
    for path in sorted(found.folder.glob(f"{base.stem}*{base.suffix}")):
        set_name = path.stem.removeprefix(base.stem).strip("_")
        title = f"{found.evaluator}, {found.weights}" + (f", on {set_name}" if set_name else "")
        name = f"{found.name}/{path.name}"
        try:
            if found.content.evaluator == "retrieval":
                rows = _read_rows(path, _RANKING_COLUMNS, ("score", "first_hit"))
                counted, groups = f"{len(rows)} rankings", _failed_rankings(rows, thumbnail, max_mistakes)
            else:
                rows = [row for row in _read_rows(path, _COLUMNS, ("score",)) if row["label"]]
                counted = f"{len(rows)} labelled images"
                groups = _misclassified(rows, found.content.classes, thumbnail, max_mistakes)
            views.append(MistakesView(title, name, counted, groups))
        except (OSError, ValueError, csv.Error) as error:
            views.append(MistakesView(title, name, problem=str(error)))
    return views


def _read_rows(path: Path, columns: Sequence[str], numbers: Sequence[str]) -> list[Row]:
    """The lines of a CSV file with the numbers in it checked."""
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
        rows = []
        for row in reader:
            if any(row[column] is None for column in columns):
                raise ValueError(f"{path}, line {reader.line_num}: the line ends too early")
            for name in numbers:
                try:
                    float(row[name])
                except ValueError:
                    where = f"{path}, line {reader.line_num}"
                    raise ValueError(f"{where}: the {name} {row[name]!r} is no number") from None
            rows.append({column: from_table_cell(cell) for column, cell in row.items() if isinstance(cell, str)})
    return rows


def _failed_rankings(rows: Sequence[Row], thumbnail: Thumbnail, max_mistakes: int) -> list[MistakeGroup]:
    """By variant, the queries whose nearest image does not belong to them; the worst come first."""
    groups = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        wrong = [row for row in rows if row["variant"] == variant and float(row["first_hit"]) != 1]
        wrong.sort(key=lambda row: (float(row["score"]), row["image"]))
        of_what = "of another part" if variant in _PARTS else f"that does not show the same ({variant})"
        mistakes = []
        for row in wrong[:max_mistakes]:
            precision = f"average precision {float(row['score']):.3f}"
            said = f"the first image that belongs to it has rank {row['first_hit']}; {precision}"
            nearest = row["best_wrong_image"]
            instead = thumbnail(nearest) if nearest else None
            image = thumbnail(row["image"])
            mistakes.append(Mistake(image, row["image"], _part(row), said, instead=instead, instead_path=nearest))
        groups.append(
            MistakeGroup(
                f"To which images does one {of_what} come nearest?",
                "Left the image, right the one that looked most alike and is of something else; the worst rankings "
                "come first.",
                len(wrong),
                mistakes,
            )
        )
    return groups


def _misclassified(
    rows: Sequence[Row], classes: Sequence[str], thumbnail: Thumbnail, max_mistakes: int
) -> list[MistakeGroup]:
    wrong = [row for row in rows if row["prediction"] != row["label"]]
    of_part: dict[str, list[Row]] = {}
    for row in rows:
        of_part.setdefault(row["part"], []).append(row)

    def group(question: str, explanation: str, wrong: Sequence[Row], say: Callable[[Row], str]) -> MistakeGroup:
        mistakes = []
        for row in wrong[:max_mistakes]:
            part = of_part[row["part"]]
            right = sum(other["prediction"] == other["label"] for other in part)
            others = f"{len(part) - 1} other {'image' if len(part) == 2 else 'images'}"
            rest = f"{right} of {others} of this part classified rightly" if len(part) > 1 else ""
            mistakes.append(Mistake(thumbnail(row["image"]), row["image"], _part(row), say(row), rest))
        return MistakeGroup(question, f"{explanation} {_DOUBT}", len(wrong), mistakes)

    def from_large(row: Row) -> tuple[float, str]:
        return -float(row["score"]), row["image"]

    if len(classes) != 2:  # the score is the probability of the prediction
        return [
            group(
                "Which images were taken for something else?",
                "The images whose wrong class was given with the most confidence come first.",
                sorted(wrong, key=from_large),
                lambda row: f"{row['label']}, but called {row['prediction']} with probability {_percent(row)}",
            )
        ]
    good, bad = classes  # the score is the probability of the second
    return [
        group(
            f"Which images of class {bad} were missed?",
            f"False negatives, called {good}: those that looked most harmless come first.",
            sorted((row for row in wrong if row["label"] == bad), key=lambda row: (float(row["score"]), row["image"])),
            lambda row: f"probability of {bad}: {_percent(row)}",
        ),
        group(
            f"Which images of class {good} raised a false alarm?",
            f"False positives, called {bad}: those that looked worst come first.",
            sorted((row for row in wrong if row["label"] == good), key=from_large),
            lambda row: f"probability of {bad}: {_percent(row)}",
        ),
    ]


def _part(row: Row) -> str:
    return "" if row["part"] == row["image"] else row["part"]


def _percent(row: Row) -> str:
    """A probability for people, never rounded to a certainty that it is not."""
    share = float(row["score"])
    if 0 < share < 0.001:
        return f"below 0.1{_SPACE}%"
    return f"{100 * share:.3g}{_SPACE}%" if share <= 0.9995 or share == 1 else f"above 99.9{_SPACE}%"
