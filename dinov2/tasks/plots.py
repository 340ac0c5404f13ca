"""Pictures of a supervised run: losses and metrics over epochs, what it takes for what, images with predictions."""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from dinov2.logging.plots import (
    GREY,
    RIGHT,
    WRONG,
    Chart,
    Curve,
    Panel,
    collect_series,
    draw_charts,
    draw_confusion_matrix,
    draw_panels,
    save_png,
)
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

EPOCH_FOLDER = "valid_preds"
PLOTS_FOLDER = "plots"
# The pictures that people look for first, under the names that they look for.
TITLES = {"classification": {"image_accuracy": "accuracy"}, "segmentation": {"mean_iou": "miou"}}

_PANEL_PIXELS = 384  # longer side of a small picture
_LETTERS = 32  # that have place above a panel
_CLASS_COLUMNS = 6


def draw_epoch(output_dir: Path, epoch: int, verdict: Verdict, package: TaskPackage) -> None:
    """Writes ``valid_preds/epoch_0003.png``: images spread over val with label and prediction."""
    if verdict.shown:
        figure = draw_grid(*_rows(verdict, verdict.shown), classes=package.classes, heading=f"after epoch {epoch}")
        save_png(figure, output_dir / EPOCH_FOLDER / f"epoch_{epoch:04d}.png")


def draw_end(
    output_dir: Path,
    records: Iterable[Mapping[str, Any]],
    verdicts: Mapping[str, Verdict],
    package: TaskPackage,
    *,
    steps_per_epoch: int,
    best_epoch: int,
) -> list[Path]:
    """Writes ``plots/``: losses and metrics over epochs, confusion and worst cases of every evaluated set.

    Args:
        output_dir: folder of the run.
        records: of ``metrics.jsonl``.
        verdicts: by set, such as ``val`` and ``test``.
        package: of the evaluated model.
        steps_per_epoch: to find the epoch of a record.
        best_epoch: is marked in the curves.

    Returns:
        The files written.
    """
    folder = output_dir / PLOTS_FOLDER
    titles = TITLES.get(package.task, {})
    written = plot_epochs(
        records,
        folder,
        steps_per_epoch=steps_per_epoch,
        best_epoch=best_epoch if best_epoch > 0 else None,
        titles=titles,
    )
    for name, verdict in verdicts.items():
        confusion = verdict.judge.confusion()
        if confusion:
            figure = draw_confusion_matrix(confusion, package.classes)
            written.append(save_png(figure, folder / f"{name}_confusion_matrix.png"))
        if verdict.worst:
            errors = [f"error {case.wrongness:.3g}" for case in verdict.worst]
            rows = _rows(verdict, verdict.worst)
            figure = draw_grid(*rows, classes=package.classes, names=errors, heading="Worst cases")
            written.append(save_png(figure, folder / f"{name}_worst_cases.png"))
    return written


def _rows(verdict: Verdict, cases: Sequence[Case]) -> tuple[list[Any], list[Any], list[Any]]:
    """Images, labels and predictions of some cases."""
    judge = verdict.judge
    return (
        [judge.dataset.get_image(judge.photo_of(case.index)) for case in cases],
        [judge.truth(case.index) for case in cases],
        [case.prediction for case in cases],
    )


def plot_epochs(
    records: Iterable[Mapping[str, Any]],
    folder: str | Path,
    *,
    steps_per_epoch: int,
    best_epoch: int | None = None,
    titles: Mapping[str, str] | None = None,
) -> list[Path]:
    """Draws ``loss.png`` and one PNG per metric of the validation set.

    Metrics that share a beginning up to ``/``, such as ``iou/crack`` and ``iou/dent``, share a picture.

    Args:
        records: of ``metrics.jsonl``: reports of some steps, of whose losses an epoch's mean is drawn, and evaluations,
            ``{"iteration": 9, "evaluation": {"loss": 0.2, "accuracy": 0.9, …}}``.
        folder: made where needed.
        steps_per_epoch: steps that count as one epoch; step 0 is in epoch 1.
        best_epoch: marked in every picture.
        titles: what a metric's picture is called, where that is not the metric's own name.

    Returns:
        The files written.
    """
    points = []
    for record in records:
        epoch = math.ceil((record["iteration"] + 1) / steps_per_epoch)
        evaluated = "evaluation" in record
        numbers = (
            record["evaluation"] if evaluated else {name: record[name] for name in record if name.endswith("loss")}
        )
        points += [((evaluated, name), epoch, value) for name, value in numbers.items()]
    pictures: dict[str, list[Curve]] = {}
    for (evaluated, name), (epochs, values) in sorted(collect_series(points).items(), key=lambda item: item[0][0]):
        places = np.unique(epochs)
        of_epochs = [values[epochs == place] for place in places]
        y = [float(found[-1]) if evaluated else _finite_mean(found) for found in of_epochs]
        group, _, member = name.partition("/")
        if name.endswith("loss"):
            picture, label = "loss", f"{'val' if evaluated else 'train'} {name}"
        else:
            picture, label = (titles or {}).get(group, group), member or group
        file_name = re.sub(r"[^\w.@-]+", "_", picture).strip("._") or "metric"  # one that every file system takes
        curve = Curve(label.replace("_", " "), places, np.array(y), dashed=not evaluated)
        pictures.setdefault(file_name, []).append(curve)
    written = []
    for file_name, curves in pictures.items():
        figure = draw_charts([Chart(title=file_name.replace("_", " "), curves=curves, x_label="epoch")])
        if best_epoch is not None:
            axes = figure.axes[0]
            axes.axvline(best_epoch, color=GREY, linewidth=1.0, linestyle=":")
            above = axes.get_xaxis_transform()
            axes.text(best_epoch, 1.0, " best", transform=above, color=GREY, fontsize=9, va="top")
        written.append(save_png(figure, Path(folder) / f"{file_name}.png"))
    return written


def _finite_mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def draw_grid(
    images: Sequence[Image.Image | NDArray[np.uint8]],
    labels: Sequence[Prediction | None],
    predictions: Sequence[Prediction],
    *,
    classes: Sequence[str] = (),
    names: Sequence[str] | None = None,
    heading: str = "",
) -> Figure:
    """Draws a sheet with a row per image: the image, the ground truth, the prediction.

    Of classes, six images stand in a row, with label and prediction above them, in a blue frame where the prediction is
    right and in an orange one where it is wrong. Ground truth and prediction of a depth share their colours, unless
    their units differ (relative depth has none).

    Args:
        images: RGB, or uint8 ``[H, W, 3]``.
        labels: what is known, as a prediction that is sure of it (ignored pixels 255); None where nothing is known.
        predictions: of the same kind.
        classes: names by index.
        names: text beside every row.
        heading: text above the sheet.

    Raises:
        ValueError: when there is no image, or not as many labels, predictions and names.
    """
    if not images or not len(images) == len(labels) == len(predictions) == len(names or images):
        raise ValueError(
            f"{len(images)} images, {len(labels)} labels, {len(predictions)} predictions and "
            f"{len(names or images)} names make no sheet"
        )
    pictures = [_reduced(image) for image in images]
    aspect = float(np.clip(np.median([picture.height / picture.width for picture in pictures]), 0.3, 3.0))
    cases = list(zip(pictures, labels, predictions, strict=True))
    if all(isinstance(prediction, ClassPrediction) for prediction in predictions):
        panels = [
            _class_panel(*case, name, classes) for case, name in zip(cases, names or [""] * len(cases), strict=True)
        ]
        rows = [panels[start : start + _CLASS_COLUMNS] for start in range(0, len(panels), _CLASS_COLUMNS)]
        return draw_panels(rows, aspect=aspect, heading=heading)
    row_titles = None if names is None else [_tail(name, round(_LETTERS * aspect)) for name in names]
    sheet = [_row(*case, classes) for case in cases]
    return draw_panels(sheet, row_titles=row_titles, aspect=aspect, heading=heading)


def _row(
    picture: Image.Image, label: Prediction | None, prediction: Prediction, classes: Sequence[str]
) -> list[Panel | None]:
    panels: list[Panel | None] = [Panel(picture=picture, title="image")]
    depths = [depth for depth in (label, prediction) if isinstance(depth, DepthPrediction)]
    alike = len({depth.unit for depth in depths}) < 2
    for word, shown in (("ground truth", label), ("prediction", prediction)):
        if isinstance(shown, SegmentationPrediction):
            painted = paint_labels(picture, resize_labels(shown.labels, picture.size))
            present = [int(value) for value in np.unique(shown.labels) if value > 0]
            areas = ["ignored" if value == 255 else class_name(classes, value) for value in present]
            panels.append(Panel(picture=painted, title=_wrap(f"{word}: {', '.join(areas) or 'nothing'}")))
        elif isinstance(shown, DepthPrediction):
            low, high = known_range(*(depth.depth for depth in (depths if alike else [shown])))
            painted = paint_depth(picture, resize_depth(shown.depth, picture.size), (low, high))
            panels.append(Panel(picture=painted, title=_wrap(f"{word}, {low:.3g} to {high:.3g} {shown.unit}")))
        else:
            panels.append(None)
    return panels


def _class_panel(
    picture: Image.Image, label: Prediction | None, prediction: Prediction, name: str, classes: Sequence[str]
) -> Panel:
    assert isinstance(prediction, ClassPrediction)
    found = _present(prediction)
    lines = [_tail(name, _LETTERS)] if name else []
    frame = None
    if isinstance(label, ClassPrediction):
        known = _present(label)
        lines.append(_wrap(f"is {', '.join(class_name(classes, index) for index in known) or 'nothing'}"))
        frame = RIGHT if known == found else WRONG
    scored = [f"{class_name(classes, index)} {prediction.probabilities[index]:.2f}" for index in found]
    lines.append(_wrap(f"taken for {', '.join(scored) or 'nothing'}"))
    return Panel(picture=picture, title="\n".join(lines), frame=frame)


def _present(classes: ClassPrediction) -> list[int]:
    if classes.multi_label:
        return np.flatnonzero(classes.probabilities >= PRESENT_FROM).tolist()
    return [int(classes.probabilities.argmax())]


def _reduced(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    factor = min(_PANEL_PIXELS / max(image.size), 1.0)
    return resize_photo(image, (max(round(image.width * factor), 1), max(round(image.height * factor), 1)))


def _wrap(text: str) -> str:
    """The text in at most two lines, as wide as a panel."""
    return textwrap.fill(text, _LETTERS, max_lines=2, placeholder=" …")


def _tail(text: str, most: int) -> str:
    """The end of every line: of a path, the part that tells files apart."""
    return "\n".join(line if len(line) <= most else "…" + line[len(line) - most + 1 :] for line in text.split("\n"))
