"""Predictions drawn on the photos that they are about, for people to read."""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinov2.tasks.overlay_panel import DEPTH_OPACITY, DepthScale, LegendEntry, add_panel
from dinov2.tasks.overlay_style import class_colour, depth_table, display_size, label_table
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, Prediction, SegmentationPrediction

_AREA_OPACITY = 0.45
_EDGE_SHARE = 1 / 400  # thickness of the line around an area, of the longer side
_LEAST_COVER = 0.05  # share of a reduced pixel that a class needs to be drawn: a crack of few pixels should not vanish
_PIXELS_AT_ONCE = 2**22
_MOST_NAMED = 3  # classes of a photo that are written down
PRESENT_FROM = 0.5  # probability from which on one of several classes is taken to be there


def draw_overlay(
    photo: Image.Image | NDArray[np.uint8],
    prediction: Prediction,
    classes: Sequence[str] = (),
    *,
    keep_size: bool = False,
    depth_range: tuple[float, float] | None = None,
    caption: str = "",
) -> Image.Image:
    """Draws a prediction on its photo, with a legend of what is there.

    A photo whose longer side exceeds 2048 pixels is reduced and one below 320 is enlarged, for the drawing only.
    Classes beyond 0 are coloured; class 0, the background, stays as it is.

    Args:
        photo: RGB, or uint8 ``[H, W, 3]``; of the prediction's size.
        prediction: what to draw.
        classes: names by index; a class without a name is called by its index.
        keep_size: draw at the photo's own size, the legend inside it, as frames of a video need it.
        depth_range: depths of the first and the last colour; by default the smallest and largest of this photo.
        caption: further words for the legend.

    Returns:
        RGB, with the legend below the photo unless ``keep_size``.
    """
    if not isinstance(photo, Image.Image):
        photo = Image.fromarray(photo)
    size = photo.size if keep_size else display_size(*photo.size)
    picture = resize_photo(photo, size)
    scale = None
    if isinstance(prediction, SegmentationPrediction):
        entries = _area_entries(prediction.labels, classes)
        picture = paint_labels(picture, resize_labels(prediction.labels, size))
    elif isinstance(prediction, DepthPrediction):
        entries = []
        low, high = depth_range or known_range(prediction.depth)
        scale = DepthScale(low, high, prediction.unit)
        picture = paint_depth(picture, resize_depth(prediction.depth, size), (low, high))
    else:
        entries = _class_entries(prediction, classes)
    if caption:
        entries = [*entries, LegendEntry(caption)]
    return add_panel(picture, entries, scale, inside=keep_size)


def paint_labels(picture: Image.Image, labels: NDArray[np.uint8]) -> Image.Image:
    """Covers the areas of all classes but 0 with their colours, and their edges with thick lines.

    Args:
        picture: RGB.
        labels: uint8 ``[H, W]`` of the picture's size.
    """
    assert labels.shape == (picture.height, picture.width)
    pixels = np.array(picture)
    coloured = cv2.LUT(cv2.merge([labels] * 3), label_table()[None])
    thickness = max(round(max(picture.size) * _EDGE_SHARE), 1)
    kernel = np.ones((2 * thickness + 1, 2 * thickness + 1), dtype=np.uint8)
    areas = labels != 0
    edges = (cv2.dilate(labels, kernel) != cv2.erode(labels, kernel)) & areas
    blended = cv2.addWeighted(pixels, 1 - _AREA_OPACITY, coloured, _AREA_OPACITY, 0)
    cv2.copyTo(blended, areas.astype(np.uint8), pixels)
    cv2.copyTo(coloured, edges.astype(np.uint8), pixels)
    return Image.fromarray(pixels)


def paint_depth(picture: Image.Image, depth: NDArray[np.float32], depth_range: tuple[float, float]) -> Image.Image:
    """Covers a grey version of a picture with the colours of depths; where none is known it stays grey.

    Args:
        picture: RGB.
        depth: float32 ``[H, W]`` of the picture's size, NaN where unknown.
        depth_range: depths of the first and the last colour; what lies outside has the nearest one's.
    """
    assert depth.shape == (picture.height, picture.width)
    grey = np.array(picture.convert("L").convert("RGB"))
    low, high = depth_range
    known = np.isfinite(depth)
    share = (np.where(known, depth, low) - low) / (high - low) if high > low else np.full(depth.shape, 0.5)
    levels = (np.nan_to_num(share).clip(0, 1) * 255).round().astype(np.uint8)
    coloured = cv2.LUT(cv2.merge([levels] * 3), depth_table()[None])
    blended = cv2.addWeighted(grey, 1 - DEPTH_OPACITY, coloured, DEPTH_OPACITY, 0)
    cv2.copyTo(blended, known.astype(np.uint8), grey)
    return Image.fromarray(grey)


def known_range(*depths: NDArray[np.float32]) -> tuple[float, float]:
    """Smallest and largest depth of all maps; NaN where nothing is known."""
    values = [depth[np.isfinite(depth)] for depth in depths]
    values = [value for value in values if value.size]
    if not values:
        return float("nan"), float("nan")
    return min(float(value.min()) for value in values), max(float(value.max()) for value in values)


def resize_photo(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The photo in RGB at ``(width, height)``; enlarged pixels stay squares."""
    photo = photo.convert("RGB")
    if photo.size == size:
        return photo
    larger = size[0] >= photo.width and size[1] >= photo.height
    return photo.resize(size, Image.Resampling.NEAREST if larger else Image.Resampling.BOX)


def resize_labels(labels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Labels at ``(width, height)``; when reduced, what covers a twentieth of a pixel wins over the background."""
    width, height = size
    if labels.shape == (height, width):
        return labels
    if width >= labels.shape[1] and height >= labels.shape[0]:
        return np.asarray(cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST), dtype=np.uint8)
    best = np.full((height, width), round(_LEAST_COVER * 255), dtype=np.uint8)
    reduced = np.zeros((height, width), dtype=np.uint8)
    for value in np.flatnonzero(count_pixels(labels)[1:]) + 1:
        cover = cv2.resize(np.uint8(255) * (labels == value), size, interpolation=cv2.INTER_AREA)
        reduced[cover > best] = value
        best = np.maximum(best, cover.astype(np.uint8))
    return reduced


def resize_depth(depth: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Depth at ``(width, height)``, each value one of the given ones: means of near and far would be of neither."""
    if depth.shape == (size[1], size[0]):
        return depth
    return np.asarray(cv2.resize(depth, size, interpolation=cv2.INTER_NEAREST), dtype=np.float32)


def count_pixels(labels: NDArray[np.uint8], weights: NDArray[np.float32] | None = None) -> NDArray[np.float64]:
    """How many pixels have each value, or the sum of their weights ``[256]``, in blocks of rows: masks may be large."""
    num_rows = max(_PIXELS_AT_ONCE // labels.shape[1], 1)
    counts = np.zeros(256)
    for top in range(0, labels.shape[0], num_rows):
        rows = slice(top, top + num_rows)
        counts += np.bincount(
            labels[rows].ravel(), None if weights is None else weights[rows].ravel(), minlength=len(counts)
        )
    return counts


def class_name(classes: Sequence[str], index: int) -> str:
    """Name of a class, or its index where it has none."""
    return classes[index] if index < len(classes) else f"class {index}"


def _area_entries(labels: NDArray[np.uint8], classes: Sequence[str]) -> list[LegendEntry]:
    """Classes that are there with their share of the photo: the largest first, the background last."""
    counts = count_pixels(labels)
    present = sorted(np.flatnonzero(counts), key=lambda index: (index == 0, -counts[index]))
    return [
        LegendEntry(
            f"{class_name(classes, index)}  {_percent(counts[index] / labels.size)}", class_colour(index), index > 0
        )
        for index in map(int, present)
    ]


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %") if share >= 0.001 else "< 0.1 %"


def _class_entries(prediction: ClassPrediction, classes: Sequence[str]) -> list[LegendEntry]:
    """The most probable classes, or all that are there where a photo may have several."""
    order = np.argsort(-prediction.probabilities, kind="stable")
    texts = {int(index): f"{class_name(classes, int(index))}  {prediction.probabilities[index]:.2f}" for index in order}
    if prediction.multi_label:
        there = [index for index in texts if prediction.probabilities[index] >= PRESENT_FROM]
        if there:
            return [LegendEntry(texts[index], bold=True) for index in there]
        return [LegendEntry(f"nothing reaches {PRESENT_FROM}; most likely: {next(iter(texts.values()))}")]
    return [LegendEntry(text, bold=place == 0) for place, text in enumerate(list(texts.values())[:_MOST_NAMED])]
