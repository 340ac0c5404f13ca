"""Pictures of a supervised run: its loss and every figure over the epochs, and what it takes for what."""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from dinov2.eval.visualize import Panel, write_panels
from dinov2.tasks.drawing import (
    PRESENT_FROM,
    class_name,
    known_range,
    paint_depth,
    paint_labels,
    resize_depth,
    resize_labels,
    resize_photo,
)
from dinov2.tasks.evaluation import Case, Verdict
from dinov2.tasks.package import TaskPackage
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, Prediction, SegmentationPrediction
from dinov2.utils.files import write_atomically

_GREY, _RED = "#55585c", "#b3372f"
# Okabe and Ito, then their darker shades: told apart with any colour vision.
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#004a74", "#8a3d00", "#00664a", "#85416a")
_MOST_NUMBERED_CLASSES = 30  # beyond it the cells of a confusion matrix are too small for numbers
_MOST_LABELLED_CLASSES = 60


def plot_training(
    records: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    best_epoch: int | None = None,
    titles: Mapping[str, str] | None = None,
) -> list[Path]:
    """Draws ``loss.png`` and one PNG per figure of the validation set.

    Figures that share a beginning up to ``/``, such as ``iou/crack`` and ``iou/dent``, share a picture.

    Args:
        records: one per epoch, such as ``{"epoch": 3, "train": {"loss": 0.2, …}, "val": {"accuracy": 0.9, …}}``;
            ``train`` and ``val`` may be missing, None stands for a value that is not finite, what is no number is left
            out. Records without an epoch are ignored.
        folder: made where needed.
        best_epoch: marked in every picture.
        titles: what a figure's picture is called, where that is not the figure's own name.

    Returns:
        The files written.
    """
    epochs = sorted((record for record in records if "epoch" in record), key=lambda record: int(record["epoch"]))
    pictures: dict[str, dict[str, str]] = {}  # file name to label and "train"/"val" path of every line
    for name in _names(epochs, "train"):
        pictures.setdefault("loss", {})[f"train {_words(name)}"] = f"train.{name}"
    for name in _names(epochs, "val"):
        if name.endswith("loss"):
            pictures.setdefault("loss", {})[f"val {_words(name)}"] = f"val.{name}"
        else:
            group, _, member = name.partition("/")
            title = (titles or {}).get(group, group)
            pictures.setdefault(_file_name(title), {})[_words(member or group)] = f"val.{name}"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, lines in pictures.items():
        figure = _draw_curves(epochs, lines, _words(name), best_epoch)
        written.append(folder / f"{name}.png")
        write_atomically(written[-1], partial(figure.savefig, format="png"))
    return written


def draw_confusion_matrix(counts: ArrayLike, classes: Sequence[str], path: str | Path) -> None:
    """Draws how many of each class (rows) were taken for each class (columns), and as shares of the row.

    Args:
        counts: integers ``[C, C]``.
        classes: ``C`` names.
        path: PNG file; its folder is made where needed.

    Raises:
        ValueError: when the counts are not square or have another number of classes.
    """
    matrix = np.asarray(counts, dtype=np.int64)
    if matrix.shape != (len(classes), len(classes)) or not matrix.size:
        raise ValueError(f"a confusion matrix of {len(classes)} classes cannot be {list(matrix.shape)}")
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    side = min(max(2.6 + 0.42 * len(classes), 3.6), 15.0)
    figure = Figure(figsize=(2 * side, side), dpi=120, layout="constrained")
    count_axes, share_axes = figure.subplots(1, 2)
    accuracy = np.trace(matrix) / matrix.sum() if matrix.sum() else math.nan
    figure.suptitle(f"{matrix.sum():,} in all, {100 * accuracy:.1f} % right", fontweight="bold")
    _draw_matrix(count_axes, shares, [[_short(int(value)) for value in row] for row in matrix], classes, "counts")
    percents = [[f"{100 * value:.0f}" if value else "" for value in row] for row in shares]
    _draw_matrix(share_axes, shares, percents, classes, "% of the true class")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(figure.savefig, format="png"))


def _draw_curves(
    epochs: Sequence[Mapping[str, Any]], lines: Mapping[str, str], title: str, best_epoch: int | None
) -> Figure:
    figure = Figure(figsize=(7.5, 4.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.set_xlabel("epoch")
    axes.set_title(title, fontweight="bold", parse_math=False)
    handles = []
    for number, path in enumerate(lines.values()):
        part, name = path.split(".", 1)
        points = [
            (record["epoch"], _value(record[part][name])) for record in epochs if name in (record.get(part) or {})
        ]
        x, y = np.array(points, dtype=np.float64).T
        colour = _LINES[number % len(_LINES)]
        style = "-" if part == "val" or len(lines) == 1 else "--"
        marker = "os^D"[number // len(_LINES) % 4]
        handles += axes.plot(x, y, style, color=colour, linewidth=1.6, marker=marker, markersize=3.5)
        broken = x[~np.isfinite(y)]
        if len(broken):
            axes.plot(
                broken, np.zeros(len(broken)), "x", color=_RED, transform=axes.get_xaxis_transform(), clip_on=False
            )
    if best_epoch is not None:
        axes.axvline(best_epoch, color=_GREY, linewidth=1.0, linestyle=":")
        axes.text(best_epoch, 1.0, " best", transform=axes.get_xaxis_transform(), color=_GREY, fontsize=9, va="top")
    if len(lines) > 1:
        legend = axes.legend(handles, list(lines), frameon=False, fontsize=9, ncols=1 + len(lines) // 12)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _draw_matrix(
    axes: Axes, shares: NDArray[np.float64], texts: Sequence[Sequence[str]], classes: Sequence[str], title: str
) -> None:
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    count = len(classes)
    small = 9 if count <= 12 else 8 if count <= 20 else 7
    step = math.ceil(count / _MOST_LABELLED_CLASSES)
    ticks = range(0, count, step)
    names = [_cut(classes[index]) for index in ticks]
    axes.set_xticks(ticks, names, rotation=90 if count > 4 else 0, fontsize=small, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=small, parse_math=False)
    if count > _MOST_NUMBERED_CLASSES:
        return
    for row in range(count):
        for column in range(count):
            colour = "white" if shares[row, column] > 0.55 else "#202124"
            text = axes.text(column, row, texts[row][column], ha="center", va="center", color=colour, fontsize=small)
            text.set_in_layout(False)  # it lies inside anyway, and measuring hundreds takes seconds


def _names(records: Iterable[Mapping[str, Any]], part: str) -> list[str]:
    """Names of all numbers (None stands for one that is not finite), in order of first appearance."""
    found = (item for record in records for item in (record.get(part) or {}).items())
    return list(dict.fromkeys(name for name, value in found if value is None or _is_number(value)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan


def _words(name: str) -> str:
    return name.replace("_", " ")


def _file_name(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.@-]+", "_", name).strip("._") or "figure"


def _short(count: int) -> str:
    """A count in at most five letters."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * size or (count >= size and size > 10**3):
            return f"{count / size:.3g}{letter}"
    return str(count)


def _cut(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"


Photo = Image.Image | NDArray[np.uint8]

_PANEL_PIXELS = 384  # longer side of a small picture
_RIGHT, _WRONG = "#0072b2", "#d55e00"  # told apart with any colour vision
_LETTERS = 32  # that have place above a panel
_CLASS_COLUMNS = 6


def draw_grid(
    photos: Sequence[Photo],
    truths: Sequence[Prediction | None],
    predictions: Sequence[Prediction],
    path: str | Path,
    *,
    classes: Sequence[str] = (),
    names: Sequence[str] | None = None,
    heading: str = "",
) -> None:
    """Writes a sheet with a row per photo: the photo, the truth, the prediction.

    Of classes, six photos stand in a row, with truth and prediction above them, in a blue frame where the prediction is
    right and in a red one where it is wrong. Truth and prediction of a depth share their colours, unless their units
    differ (relative depth has none).

    Args:
        photos: RGB, or uint8 ``[H, W, 3]``.
        truths: what is known, as a prediction that is sure of it (ignored pixels 255); None where nothing is known.
        predictions: of the same kind.
        path: PNG file; its folder is made where needed.
        classes: names by index.
        names: text beside every row.
        heading: text above the sheet.

    Raises:
        ValueError: when there is no photo, or not as many truths, predictions and names.
    """
    if not photos or not len(photos) == len(truths) == len(predictions) == len(names or photos):
        raise ValueError(
            f"{len(photos)} photos, {len(truths)} truths, {len(predictions)} predictions and "
            f"{len(names or photos)} names make no sheet"
        )
    aspect = _aspect(photos)
    lines = [""] * len(photos) if names is None else list(names)
    cases = list(zip(photos, truths, predictions, lines, strict=True))
    if all(isinstance(prediction, ClassPrediction) for prediction in predictions):
        panels = [_class_panel(*case, classes) for case in cases]
        rows = [panels[start : start + _CLASS_COLUMNS] for start in range(0, len(panels), _CLASS_COLUMNS)]
        write_panels(path, rows, aspect=aspect, heading=heading)
        return
    row_titles = [_tail(line, round(_LETTERS * aspect)) for line in lines] if names is not None else None
    write_panels(
        path, [_row(*case[:3], classes) for case in cases], row_titles=row_titles, aspect=aspect, heading=heading
    )


def draw_worst(
    photos: Sequence[Photo],
    truths: Sequence[Prediction | None],
    predictions: Sequence[Prediction],
    errors: Sequence[float],
    path: str | Path,
    *,
    classes: Sequence[str] = (),
    names: Sequence[str] | None = None,
    heading: str = "Worst cases",
    most: int = 12,
) -> None:
    """Writes a sheet as `draw_grid` does, of the photos with the largest errors, the worst first.

    Args:
        photos: see `draw_grid`, like what else is not named here.
        truths: what is known.
        predictions: of the photos.
        errors: how wrong each prediction is; larger is worse.
        path: PNG file.
        classes: names by index.
        names: of the photos.
        heading: text above the sheet.
        most: rows at most.

    Raises:
        ValueError: see `draw_grid`; or when there are not as many errors, or ``most`` is below 1.
    """
    if len(errors) != len(photos) or most < 1:
        raise ValueError(f"{len(photos)} photos, {len(errors)} errors and at most {most} rows make no sheet")
    order = np.argsort(-np.asarray(errors, dtype=np.float64), kind="stable")[:most].tolist()
    words = [f"error {errors[index]:.3g}" + (f"\n{names[index]}" if names is not None else "") for index in order]
    draw_grid(
        [photos[index] for index in order],
        [truths[index] for index in order],
        [predictions[index] for index in order],
        path,
        classes=classes,
        names=words,
        heading=heading,
    )


def _row(photo: Photo, truth: Prediction | None, prediction: Prediction, classes: Sequence[str]) -> list[Panel | None]:
    picture = _small(photo)
    panels: list[Panel | None] = [Panel(picture=picture, title="photo")]
    depths = [depth for depth in (truth, prediction) if isinstance(depth, DepthPrediction)]
    alike = len({depth.unit for depth in depths}) < 2
    for word, shown in (("truth", truth), ("prediction", prediction)):
        if isinstance(shown, SegmentationPrediction):
            panels.append(_area_panel(word, picture, shown, classes))
        elif isinstance(shown, DepthPrediction):
            span = known_range(*(depth.depth for depth in (depths if alike else [shown])))
            panels.append(_depth_panel(word, picture, shown, span))
        else:
            panels.append(None)
    return panels


def _class_panel(
    photo: Photo, truth: Prediction | None, prediction: Prediction, name: str, classes: Sequence[str]
) -> Panel:
    assert isinstance(prediction, ClassPrediction)
    lines = [_tail(name, _LETTERS)] if name else []
    frame = None
    if isinstance(truth, ClassPrediction):
        lines.append(_wrap(f"is {_name_classes(truth, classes, score=False)}"))
        frame = _RIGHT if _present(truth) == _present(prediction) else _WRONG
    lines.append(_wrap(f"taken for {_name_classes(prediction, classes)}"))
    return Panel(picture=_small(photo), title="\n".join(lines), frame=frame)


def _area_panel(word: str, picture: Image.Image, areas: SegmentationPrediction, classes: Sequence[str]) -> Panel:
    painted = paint_labels(picture, resize_labels(areas.labels, picture.size))
    return Panel(picture=painted, title=_wrap(f"{word}: {_name_areas(areas, classes)}"))


def _depth_panel(word: str, picture: Image.Image, depth: DepthPrediction, colours: tuple[float, float]) -> Panel:
    painted = paint_depth(picture, resize_depth(depth.depth, picture.size), colours)
    return Panel(picture=painted, title=_wrap(f"{word}, {colours[0]:.3g} to {colours[1]:.3g} {depth.unit}"))


def _small(photo: Photo) -> Image.Image:
    if not isinstance(photo, Image.Image):
        photo = Image.fromarray(photo)
    factor = min(_PANEL_PIXELS / max(photo.size), 1.0)
    return resize_photo(photo, (max(round(photo.width * factor), 1), max(round(photo.height * factor), 1)))


def _aspect(photos: Sequence[Photo]) -> float:
    """Height of a panel over its width: that of the middle photo, within reason."""
    sizes = [photo.size if isinstance(photo, Image.Image) else photo.shape[1::-1] for photo in photos]
    return float(np.clip(np.median([height / width for width, height in sizes]), 0.3, 3.0))


def _present(classes: ClassPrediction) -> list[int]:
    if classes.multi_label:
        return np.flatnonzero(classes.probabilities >= PRESENT_FROM).tolist()
    return [int(classes.probabilities.argmax())]


def _name_classes(prediction: ClassPrediction, classes: Sequence[str], *, score: bool = True) -> str:
    names = [
        class_name(classes, index) + (f" {prediction.probabilities[index]:.2f}" if score else "")
        for index in _present(prediction)
    ]
    return ", ".join(names) or "nothing"


def _name_areas(areas: SegmentationPrediction, classes: Sequence[str]) -> str:
    """Names of the areas that are coloured."""
    present = [int(value) for value in np.unique(areas.labels) if value > 0]
    return ", ".join("ignored" if value == 255 else class_name(classes, value) for value in present) or "nothing"


def _wrap(text: str) -> str:
    """The text in at most two lines, as wide as a panel."""
    return textwrap.fill(text, _LETTERS, max_lines=2, placeholder=" …")


def _tail(text: str, most: int) -> str:
    """The end of every line: of a path, the part that tells files apart."""
    return "\n".join(line if len(line) <= most else "…" + line[len(line) - most + 1 :] for line in text.split("\n"))


EPOCH_FOLDER = "valid_preds"
PLOTS_FOLDER = "plots"
# The pictures that people look for first, under the names that they look for.
TITLES = {"classification": {"image_accuracy": "accuracy"}, "segmentation": {"mean_iou": "miou"}}


def draw_epoch(output_dir: Path, epoch: int, verdict: Verdict, package: TaskPackage) -> None:
    """Writes ``valid_preds/epoch_0003.png``: photos spread over val with truth and prediction."""
    if verdict.shown:
        path = output_dir / EPOCH_FOLDER / f"epoch_{epoch:04d}.png"
        heading = f"after epoch {epoch}"
        draw_grid(*_rows(verdict, verdict.shown), path, classes=package.classes, heading=heading)


def draw_end(
    output_dir: Path,
    records: Iterable[Mapping[str, Any]],
    verdicts: Mapping[str, Verdict],
    package: TaskPackage,
    *,
    steps_per_epoch: int,
    best_epoch: int,
) -> list[Path]:
    """Writes ``plots/``: loss and figures over epochs, confusion and worst cases of every judged set.

    Args:
        output_dir: folder of the run.
        records: of ``metrics.jsonl``.
        verdicts: by set, such as ``val`` and ``test``.
        package: of the model that was judged.
        steps_per_epoch: to find the epoch of a record.
        best_epoch: is marked in the curves.

    Returns:
        The files written.
    """
    folder = output_dir / PLOTS_FOLDER
    epochs = by_epoch(records, steps_per_epoch)
    best = best_epoch if best_epoch > 0 else None
    written = plot_training(epochs, folder, best_epoch=best, titles=TITLES.get(package.task))
    for name, verdict in verdicts.items():
        confusion = verdict.judge.confusion()
        if confusion:
            written.append(folder / f"{name}_confusion_matrix.png")
            draw_confusion_matrix(confusion, package.classes, written[-1])
        if verdict.worst:
            written.append(folder / f"{name}_worst_cases.png")
            wrongness = [case.wrongness for case in verdict.worst]
            draw_worst(*_rows(verdict, verdict.worst), wrongness, written[-1], classes=package.classes)
    return written


def by_epoch(records: Iterable[Mapping[str, Any]], steps_per_epoch: int) -> list[dict[str, Any]]:
    """One record per epoch: the mean of its losses, and the figures of its evaluation.

    Args:
        records: of ``metrics.jsonl``: reports of some steps, and evaluations.
        steps_per_epoch: steps that count as one epoch; step 0 is in epoch 1.
    """
    losses: dict[int, dict[str, list[float]]] = {}
    evaluations: dict[int, Mapping[str, Any]] = {}
    for record in records:
        epoch = math.ceil((record["iteration"] + 1) / steps_per_epoch)
        if "evaluation" in record:
            evaluations[epoch] = record["evaluation"]
            continue
        for name, value in record.items():
            if name.endswith("loss") and value is not None:
                losses.setdefault(epoch, {}).setdefault(name, []).append(value)
    return [
        {
            "epoch": epoch,
            "train": {name: sum(values) / len(values) for name, values in losses.get(epoch, {}).items()},
            "val": dict(evaluations.get(epoch, {})),
        }
        for epoch in sorted(losses.keys() | evaluations.keys())
    ]


def _rows(verdict: Verdict, cases: Sequence[Case]) -> tuple[list[Any], list[Any], list[Any]]:
    """Photos, truths and predictions of some cases."""
    judge = verdict.judge
    return (
        [judge.dataset.get_image(judge.photo_of(case.index)) for case in cases],
        [judge.truth(case.index) for case in cases],
        [case.prediction for case in cases],
    )
