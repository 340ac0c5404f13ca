"""Predictions in numbers."""

import json

import numpy as np
import pytest

from dinov2.predict.images import summarize, table_header, table_row
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, SegmentationPrediction

NAMES = ("background", "crack", "dent")


def row_of(task: str, prediction: ClassPrediction | SegmentationPrediction | DepthPrediction) -> dict[str, object]:
    classes = () if task == "depth" else NAMES
    values = table_row("a.png", prediction, summarize(prediction, classes), classes)
    return dict(zip(table_header(task, classes), values, strict=True))


def test_areas_count_every_pixel_once() -> None:
    labels = np.array([[0, 0, 2], [0, 2, 2]], dtype=np.uint8)
    scores = np.array([[0.5, 0.6, 0.9], [0.7, 0.8, 1.0]], dtype=np.float32)
    prediction = SegmentationPrediction(labels, scores, np.where(labels > 0, scores, 1 - scores))
    assert summarize(prediction, NAMES) == {
        "pixels": {"background": 3, "dent": 3},
        "scores": {"background": pytest.approx(0.6), "dent": pytest.approx(0.9)},
        "defect_score": 1.0,
    }
    assert row_of("segmentation", prediction) == {
        "image": "a.png", "width": 3, "height": 2, "defect_score": 1.0,
        "pixels background": 3, "pixels crack": 0, "pixels dent": 3,
    }  # fmt: skip


def test_the_most_probable_class_is_named() -> None:
    prediction = ClassPrediction(np.array([0.123456789, 0.7, 0.2], dtype=np.float32))
    summary = summarize(prediction, NAMES)
    assert summary == {
        "label": "crack",
        "score": 0.7,
        "probabilities": {"background": 0.123457, "crack": 0.7, "dent": 0.2},
    }
    assert row_of("classification", prediction)["label"] == "crack"
    assert row_of("classification", prediction)["probability dent"] == 0.2
    assert summarize(prediction, ("a",))["label"] == "class 1"


def test_several_classes_may_be_there_or_none() -> None:
    prediction = ClassPrediction(np.array([0.5, 0.4, 0.9], dtype=np.float32), multi_label=True)
    assert summarize(prediction, NAMES)["labels"] == ["background", "dent"]
    assert row_of("classification", prediction)["label"] == "background;dent"
    nothing = ClassPrediction(np.array([0.1, 0.2, 0.3], dtype=np.float32), multi_label=True)
    assert summarize(nothing, NAMES)["labels"] == []
    assert summarize(nothing, NAMES)["score"] == pytest.approx(0.3)


def test_depth_leaves_out_what_is_unknown() -> None:
    depth = np.array([[1, 2, np.nan, 6], [3, np.inf, 4, 2]], dtype=np.float32)
    prediction = DepthPrediction(depth, "mm")
    expected = {"unit": "mm", "min": 1.0, "median": 2.5, "mean": 3.0, "max": 6.0, "known": 0.75}
    assert summarize(prediction) == expected
    assert row_of("depth", prediction) == {"image": "a.png", "width": 4, "height": 2, **expected}
    nothing = summarize(DepthPrediction(np.full((2, 2), np.nan, dtype=np.float32)))
    assert nothing == {"unit": "", "min": None, "median": None, "mean": None, "max": None, "known": 0}
    json.dumps(nothing, allow_nan=False)


@pytest.mark.parametrize("value", [0.0, 1e-12, 123_456.7, 98_765_432.0, 0.33333334])
def test_six_digits_are_kept(value: float) -> None:
    prediction = DepthPrediction(np.full((1, 1), value, dtype=np.float32))
    assert summarize(prediction)["max"] == pytest.approx(value, rel=1e-5)
