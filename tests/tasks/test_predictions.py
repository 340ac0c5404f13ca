"""Predictions in numbers."""

import json

import numpy as np
import pytest
from PIL import Image, ImageChops

from dinov2.tasks.predictions import (
    ClassPrediction,
    DepthPrediction,
    DetectionPrediction,
    Prediction,
    SegmentationPrediction,
    span_text,
)

NAMES = ("background", "crack", "dent")


def row_of(prediction: Prediction) -> dict[str, object]:
    return prediction.table_row(prediction.to_dict())


def test_areas_count_every_pixel_once() -> None:
    labels = np.array([[0, 0, 2], [0, 2, 2]], dtype=np.uint8)
    scores = np.array([[0.5, 0.6, 0.9], [0.7, 0.8, 1.0]], dtype=np.float32)
    prediction = SegmentationPrediction(labels, scores, np.where(labels > 0, scores, 1 - scores), NAMES)
    assert prediction.to_dict() == {
        "pixels": {"background": 3, "dent": 3},
        "scores": {"background": pytest.approx(0.6), "dent": pytest.approx(0.9)},
        "defect_score": 1.0,
    }
    assert row_of(prediction) == {
        "width": 3, "height": 2, "defect_score": 1.0,
        "pixels background": 3, "pixels crack": 0, "pixels dent": 3,
    }  # fmt: skip


def test_the_most_probable_class_is_named() -> None:
    prediction = ClassPrediction(np.array([0.123456789, 0.7, 0.2], dtype=np.float32), classes=NAMES)
    summary = prediction.to_dict()
    assert summary == {
        "label": "crack",
        "score": 0.7,
        "probabilities": {"background": 0.123457, "crack": 0.7, "dent": 0.2},
    }
    assert row_of(prediction)["label"] == "crack"
    assert row_of(prediction)["probability dent"] == 0.2
    assert ClassPrediction(prediction.probabilities, classes=("a",)).to_dict()["label"] == "class 1"


def test_several_classes_may_be_there_or_none() -> None:
    prediction = ClassPrediction(np.array([0.5, 0.4, 0.9], dtype=np.float32), multi_label=True, classes=NAMES)
    assert prediction.to_dict()["labels"] == ["background", "dent"]
    assert row_of(prediction)["label"] == "background;dent"
    nothing = ClassPrediction(np.array([0.1, 0.2, 0.3], dtype=np.float32), multi_label=True, classes=NAMES)
    assert nothing.to_dict()["labels"] == []
    assert nothing.to_dict()["score"] == pytest.approx(0.3)


def test_depth_keeps_six_digits_and_leaves_out_what_is_unknown() -> None:
    depth = np.array([[1, 2, np.nan, 6], [3, np.inf, 4, 2]], dtype=np.float32)
    prediction = DepthPrediction(depth, "mm")
    expected = {"unit": "mm", "min": 1.0, "median": 2.5, "mean": 3.0, "max": 6.0, "known": 0.75}
    assert prediction.to_dict() == expected
    assert row_of(prediction) == {"width": 4, "height": 2, **expected}
    nothing = DepthPrediction(np.full((2, 2), np.nan, dtype=np.float32)).to_dict()
    assert nothing == {"unit": "", "min": None, "median": None, "mean": None, "max": None, "known": 0}
    json.dumps(nothing, allow_nan=False)
    for value in (0.0, 1e-12, 123_456.7, 98_765_432.0, 0.33333334):
        exact = DepthPrediction(np.full((1, 1), value, dtype=np.float32))
        assert exact.to_dict()["max"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("span", "text"),
    [((0, 2043.4, "um"), "0 to 2040 um"), ((0.01234, 1.5, ""), "0.0123 to 1.5"), ((0, 65535, "um"), "0 to 65500 um")],
)
def test_a_span_has_three_digits_and_no_exponent(span: tuple[float, float, str], text: str) -> None:
    assert span_text(*span) == text


def boxes_of(*rows: tuple[float, float, float, float, float, int], **more: object) -> DetectionPrediction:
    table = np.array(rows, dtype=np.float64).reshape(-1, 6)
    return DetectionPrediction(
        table[:, :4].astype(np.float32), table[:, 4].astype(np.float32), table[:, 5].astype(np.int64),
        classes=("scratch", "hole"), **more,
    )  # fmt: skip


def test_objects_are_listed_counted_and_drawn_where_they_are() -> None:
    doubtful = boxes_of((0, 0, 9, 9, 0.95, 0))
    found = boxes_of((10, 20, 30, 40.5, 0.5, 1), (5, 5, 9, 9, 0.75, 1), size=(60, 80), doubtful=doubtful)
    assert found.to_dict() == {
        "objects": [
            {"label": "hole", "score": 0.75, "box": [5, 5, 9, 9]},
            {"label": "hole", "score": 0.5, "box": [10, 20, 30, 40.5]},
        ],
        "defect_score": 0.95,
    }
    json.dumps(found.to_dict())
    counts = {"objects scratch": 0, "objects hole": 2}
    assert row_of(found) == {"width": 80, "height": 60, "defect_score": 0.95, **counts}
    assert (found.describe(), found.describe(scores=False)) == ("2 hole 0.75", "2 hole")
    picture = Image.new("RGB", (800, 600))
    corners = ImageChops.difference(found.paint(picture), picture).getbbox()
    assert corners is not None
    assert 40 <= corners[0] <= 60  # the left edge of the leftmost box, ten times as large
    nothing = boxes_of(size=(60, 80))
    assert nothing.describe() == "nothing"
    assert nothing.to_dict() == {"objects": [], "defect_score": 0}
    assert nothing.draw(Image.new("RGB", (80, 60))).height > 60
