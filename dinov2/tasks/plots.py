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
from dinov2.tasks.drawing import resize_image
from dinov2.tasks.evaluation import Case, Evaluation
from dinov2.tasks.predictions import Prediction, span_text
from dinov2.tasks.task import Task

EPOCH_FOLDER = "valid_preds"
PLOTS_FOLDER = "plots"

_PANEL_PIXELS = 384  # longer side of a small picture
_LETTERS = 32  # that have place above a panel
_CLASS_COLUMNS = 6


def draw_epoch(output_dir: Path, epoch: int, evaluation: Evaluation) -> None:
    """Writes ``valid_preds/epoch_0003.png``: images spread over val with ground truth and prediction."""
    if evaluation.shown:
        figure = draw_grid(*_columns(evaluation, evaluation.shown), heading=f"after epoch {epoch}")
        save_png(figure, output_dir / EPOCH_FOLDER / f"epoch_{epoch:04d}.png")


def draw_end(
    output_dir: Path,
    records: Iterable[Mapping[str, Any]],
    evaluations: Mapping[str, Evaluation],
    task: Task,
    *,
    steps_per_epoch: int,
    best_epoch: int,
) -> list[Path]:
    """Writes ``plots/``: losses and metrics over epochs, confusion and worst cases of every evaluated set.

    Args:
        output_dir: folder of the run.
        records: of ``metrics.jsonl``.
        evaluations: by set, such as ``val`` and ``test``.
        task: of the run.
        steps_per_epoch: to find the epoch of a record.
        best_epoch: is marked in the curves.

    Returns:
        The files written.
    """
    folder = output_dir / PLOTS_FOLDER
    written = plot_epochs(
        records,
        folder,
        steps_per_epoch=steps_per_epoch,
        best_epoch=best_epoch if best_epoch > 0 else None,
        titles=task.plot_titles,
    )
    for name, evaluation in evaluations.items():
        confusion = evaluation.metrics.confusion()
        if confusion:
            figure = draw_confusion_matrix(confusion, task.classes)
            written.append(save_png(figure, folder / f"{name}_confusion_matrix.png"))
        for title, chart in evaluation.metrics.charts().items():
            written.append(save_png(draw_charts([chart]), folder / f"{name}_{title}.png"))
        if evaluation.worst:
            names = [f"{evaluation.metrics.name_of(case.index)}\nerror {case.error:.3g}" for case in evaluation.worst]
            figure = draw_grid(
                *_columns(evaluation, evaluation.worst), names=names, heading=f"Worst cases of {name}, one per part"
            )
            written.append(save_png(figure, folder / f"{name}_worst_cases.png"))
    return written


def _columns(evaluation: Evaluation, cases: Sequence[Case]) -> tuple[list[Any], list[Any], list[Any]]:
    """Images, ground truths and predictions of some cases."""
    metrics = evaluation.metrics
    return (
        [metrics.shown_image(case.index) for case in cases],
        [metrics.ground_truth(case.index) for case in cases],
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
        if "iteration" not in record:  # damaged
            continue
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
        finite = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
        is_share = file_name != "loss" and bool(((finite >= 0) & (finite <= 1)).all())
        chart = Chart(
            title="loss on train and val" if file_name == "loss" else file_name.replace("_", " "),
            curves=curves,
            x_label="epoch",
            lines=[("chance", 0.5)] if "auroc" in file_name else (),
            min_height=0.1 if is_share else 0.0,  # shares differ by a few hundredths for no reason
        )
        figure = draw_charts([chart])
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
    names: Sequence[str] | None = None,
    heading: str = "",
) -> Figure:
    """Draws a sheet with a row per image: the image, the ground truth, the prediction.

    Where predictions are no maps, six images stand in a row, with ground truth and prediction above them, in a blue
    frame where the prediction is right and in an orange one where it is wrong. Ground truth and prediction of values
    share their colours, unless their units differ (relative depth has none).

    Args:
        images: RGB, or uint8 ``[H, W, 3]``.
        labels: what is known, as a prediction that is sure of it (ignored pixels 255); None where nothing is known.
        predictions: of the same kind.
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
    if not any(prediction.is_map for prediction in predictions):
        panels = [_worded_panel(*case, name) for case, name in zip(cases, names or [""] * len(cases), strict=True)]
        rows = [panels[start : start + _CLASS_COLUMNS] for start in range(0, len(panels), _CLASS_COLUMNS)]
        return draw_panels(rows, aspect=aspect, heading=heading)
    row_titles = None if names is None else [_tail(name, round(_LETTERS * aspect)) for name in names]
    sheet = [_row(*case) for case in cases]
    return draw_panels(sheet, row_titles=row_titles, aspect=aspect, heading=heading)


def _row(picture: Image.Image, label: Prediction | None, prediction: Prediction) -> list[Panel | None]:
    panels: list[Panel | None] = [Panel(picture=picture, title="image")]
    pair = [shown for shown in (label, prediction) if shown is not None]
    ranges = [found for found in (shown.value_range() for shown in pair) if found is not None]
    shared = None
    if ranges and len({shown.unit for shown in pair}) < 2:
        values = np.array(ranges, dtype=np.float64)
        values = values[~np.isnan(values[:, 0])]
        shared = (float(values[:, 0].min()), float(values[:, 1].max())) if len(values) else None
    for word, shown in (("ground truth", label), ("prediction", prediction)):
        if shown is None:
            panels.append(None)
        else:
            span = shared or shown.value_range()
            said = f": {shown.describe()}" if span is None else f", {span_text(*span, shown.unit)}"
            panels.append(Panel(picture=shown.paint(picture, span), title=_wrap(word + said)))
    return panels


def _worded_panel(picture: Image.Image, label: Prediction | None, prediction: Prediction, name: str) -> Panel:
    lines = [_tail(name, _LETTERS)] if name else []
    frame = None
    if label is not None:
        lines.append(_wrap(f"is {label.describe(scores=False)}"))
        agrees = label.agrees(prediction)
        frame = None if agrees is None else RIGHT if agrees else WRONG
    lines.append(_wrap(f"taken for {prediction.describe()}"))
    return Panel(picture=picture, title="\n".join(lines), frame=frame)


def _reduced(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    factor = min(_PANEL_PIXELS / max(image.size), 1.0)
    return resize_image(image, (max(round(image.width * factor), 1), max(round(image.height * factor), 1)))


def _wrap(text: str) -> str:
    """The text in at most two lines, as wide as a panel."""
    return textwrap.fill(text, _LETTERS, max_lines=2, placeholder=" …")


def _tail(text: str, most: int) -> str:
    """The end of every line: of a path, the part that tells files apart."""
    return "\n".join(line if len(line) <= most else "…" + line[len(line) - most + 1 :] for line in text.split("\n"))
