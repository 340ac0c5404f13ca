"""Sheets of photos beside what is true of them and what was predicted."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2.eval.pictures.picture_grid import Panel, write_panels
from dinov2.tasks.overlays import (
    PRESENT_FROM,
    class_name,
    known_range,
    paint_depth,
    paint_labels,
    resize_depth,
    resize_labels,
    resize_photo,
)
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, Prediction, SegmentationPrediction

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
