"""Predictions in a few numbers: lines of JSON and rows of tables."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dinov2.tasks.overlays import PRESENT_FROM, class_name, count_pixels
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, Prediction, SegmentationPrediction


def summarize(prediction: Prediction, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Plain values for one photo.

    Args:
        prediction: of the photo.
        classes: names by index.

    Returns:
        Classification: ``label`` and ``score`` of the most probable class (``labels``, those from 0.5 on, where there
        may be several) and ``probabilities`` by name. Segmentation: ``pixels`` and mean ``scores`` by name of the
        classes that are there, and ``defect_score``, the largest probability of anything but class 0. Depth: ``unit``,
        ``min``, ``median``, ``mean``, ``max`` (None where nothing is known) and ``known``, the share of known pixels.
    """
    if isinstance(prediction, ClassPrediction):
        return _summarize_classes(prediction, classes)
    if isinstance(prediction, SegmentationPrediction):
        return _summarize_areas(prediction, classes)
    return _summarize_depth(prediction)


def table_header(task: str, classes: Sequence[str]) -> list[str]:
    """Columns of `table_row`."""
    if task == "classification":
        return ["image", "label", "score", *(f"probability {name}" for name in classes)]
    if task == "segmentation":
        return ["image", "width", "height", "defect_score", *(f"pixels {name}" for name in classes)]
    return ["image", "width", "height", "unit", "min", "median", "mean", "max", "known"]


def table_row(image: str, prediction: Prediction, summary: dict[str, Any], classes: Sequence[str]) -> list[Any]:
    """The numbers of `summarize` as a row under `table_header`."""
    if isinstance(prediction, ClassPrediction):
        label = ";".join(summary["labels"]) if prediction.multi_label else summary["label"]
        return [image, label, summary["score"], *summary["probabilities"].values()]
    if isinstance(prediction, SegmentationPrediction):
        height, width = prediction.labels.shape
        areas = [summary["pixels"].get(name, 0) for name in classes]
        return [image, width, height, summary["defect_score"], *areas]
    height, width = prediction.depth.shape
    return [image, width, height, *(summary[name] for name in ("unit", "min", "median", "mean", "max", "known"))]


def _summarize_classes(prediction: ClassPrediction, classes: Sequence[str]) -> dict[str, Any]:
    probabilities = {
        class_name(classes, index): _round(value) for index, value in enumerate(prediction.probabilities.tolist())
    }
    best = int(prediction.probabilities.argmax())
    score = _round(float(prediction.probabilities[best]))
    if not prediction.multi_label:
        return {"label": class_name(classes, best), "score": score, "probabilities": probabilities}
    there = [class_name(classes, int(index)) for index in np.flatnonzero(prediction.probabilities >= PRESENT_FROM)]
    return {"labels": there, "score": score, "probabilities": probabilities}


def _summarize_areas(prediction: SegmentationPrediction, classes: Sequence[str]) -> dict[str, Any]:
    pixels, sums = count_pixels(prediction.labels), count_pixels(prediction.labels, prediction.scores)
    present = {class_name(classes, int(index)): int(index) for index in np.flatnonzero(pixels)}
    return {
        "pixels": {name: int(pixels[index]) for name, index in present.items()},
        "scores": {name: _round(float(sums[index] / pixels[index])) for name, index in present.items()},
        "defect_score": _round(float(prediction.defect.max())),
    }


def _summarize_depth(prediction: DepthPrediction) -> dict[str, Any]:
    known = prediction.depth[np.isfinite(prediction.depth)]
    figures: dict[str, Any] = {"unit": prediction.unit, "min": None, "median": None, "mean": None, "max": None}
    if known.size:
        figures |= {
            "min": _round(float(known.min())),
            "median": _round(float(np.median(known))),
            "mean": _round(float(known.mean(dtype=np.float64))),
            "max": _round(float(known.max())),
        }
    return {**figures, "known": _round(known.size / prediction.depth.size)}


def _round(value: float) -> float:
    """Six significant digits: a float32 has no more, and lines stay short."""
    return value if value == 0 or not math.isfinite(value) else round(value, 5 - math.floor(math.log10(abs(value))))
