"""Sheets of photos with truth and prediction."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dinov2.tasks import plots as prediction_grid
from dinov2.tasks.drawing import IGNORED_COLOUR, paint_depth, paint_labels
from dinov2.tasks.plots import draw_grid, draw_worst
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, SegmentationPrediction

NAMES = ("background", "crack", "dent")


def segmentation(value: int, height: int = 40, width: int = 60) -> SegmentationPrediction:
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[10:30, 10:30] = value
    ones = np.ones(labels.shape, dtype=np.float32)
    return SegmentationPrediction(labels, ones, ones)


def classes(*probabilities: float, multi_label: bool = False) -> ClassPrediction:
    return ClassPrediction(np.array(probabilities, dtype=np.float32), multi_label)


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What was drawn, beside the files themselves."""
    found: list[dict[str, Any]] = []
    write = prediction_grid.write_panels

    def keep(path: Path, rows: Any, **settings: Any) -> None:
        found.append({"rows": rows, **settings})
        write(path, rows, **settings)

    monkeypatch.setattr(prediction_grid, "write_panels", keep)
    return found


PHOTO = np.full((40, 60, 3), 100, dtype=np.uint8)


def test_masks_stand_in_rows_of_photo_truth_and_prediction(tmp_path: Path, sheets: list[dict[str, Any]]) -> None:
    path = tmp_path / "valid_preds" / "epoch_0003.png"
    truths = [segmentation(1), None, segmentation(255)]
    found = [segmentation(2), segmentation(1), segmentation(0)]
    draw_grid([PHOTO] * 3, truths, found, path, classes=NAMES, names=["a", "b", "x" * 99], heading="epoch 3")
    with Image.open(path) as image:
        assert image.size > (500, 300)
    (sheet,) = sheets
    first, second, third = sheet["rows"]
    assert [panel.title for panel in first] == ["photo", "truth: crack", "prediction: dent"]
    np.testing.assert_array_equal(first[0].picture, PHOTO)
    for panel, one in ((first[1], truths[0]), (first[2], found[0])):
        assert one is not None
        np.testing.assert_array_equal(panel.picture, paint_labels(Image.fromarray(PHOTO), one.labels))
    assert second[1] is None
    assert [panel.title for panel in third[1:]] == ["truth: ignored", "prediction: nothing"]
    assert third[1].picture.getpixel((10, 10)) == IGNORED_COLOUR
    assert sheet["row_titles"][:2] == ["a", "b"]
    assert sheet["row_titles"][2].startswith("…x")
    assert sheet["heading"] == "epoch 3"


def test_truth_and_prediction_of_a_depth_share_their_colours(tmp_path: Path, sheets: list[dict[str, Any]]) -> None:
    truth = DepthPrediction(np.linspace(1, 2, 2400, dtype=np.float32).reshape(40, 60), "mm")
    found = DepthPrediction(truth.depth * 2, "mm")
    draw_grid([PHOTO], [truth], [found], tmp_path / "grid.png")
    _, left, right = sheets[0]["rows"][0]
    assert left.title == "truth, 1 to 4 mm"
    assert right.title == "prediction, 1 to 4 mm"
    np.testing.assert_array_equal(left.picture, paint_depth(Image.fromarray(PHOTO), truth.depth, (1, 4)))
    np.testing.assert_array_equal(right.picture, paint_depth(Image.fromarray(PHOTO), found.depth, (1, 4)))


def test_relative_depth_has_colours_of_its_own(tmp_path: Path, sheets: list[dict[str, Any]]) -> None:
    truth = DepthPrediction(np.linspace(1, 2, 2400, dtype=np.float32).reshape(40, 60), "mm")
    draw_grid([PHOTO], [truth], [DepthPrediction(truth.depth * 50)], tmp_path / "grid.png")
    assert [panel.title.strip() for panel in sheets[0]["rows"][0][1:]] == ["truth, 1 to 2 mm", "prediction, 50 to 100"]


def test_classes_stand_six_in_a_row_framed_by_right_and_wrong(tmp_path: Path, sheets: list[dict[str, Any]]) -> None:
    truths = [classes(0, 1, 0), classes(1, 0, 0), None] + [classes(1, 0, 0)] * 4
    draw_grid(
        [PHOTO] * 7, truths, [classes(0.1, 0.7, 0.2)] * 7, tmp_path / "grid.png", classes=NAMES, names=list("abcdefg")
    )
    first, second = sheets[0]["rows"]
    assert (len(first), len(second)) == (6, 1)
    assert first[0].title == "a\nis crack\ntaken for crack 0.70"
    assert first[1].title == "b\nis background\ntaken for crack 0.70"
    assert first[2].title == "c\ntaken for crack 0.70"
    assert first[0].frame != first[1].frame
    assert first[2].frame is None


def test_of_several_classes_all_must_be_right(tmp_path: Path, sheets: list[dict[str, Any]]) -> None:
    truth = classes(1, 1, 0, multi_label=True)
    found = [classes(0.9, 0.6, 0.4, multi_label=True), classes(0.9, 0.4, 0.4, multi_label=True),
             classes(0.1, 0.1, 0.1, multi_label=True)]  # fmt: skip
    draw_grid([PHOTO] * 3, [truth] * 3, found, tmp_path / "grid.png", classes=NAMES)
    right, wrong, nothing = sheets[0]["rows"][0]
    assert right.title == "is background, crack\ntaken for background 0.90, crack\n0.60"
    assert right.frame != wrong.frame == nothing.frame
    assert nothing.title.endswith("taken for nothing")


def test_the_worst_come_first(tmp_path: Path, sheets: list[dict[str, Any]]) -> None:
    truths, found = [classes(1, 0, 0)] * 4, [classes(0.2, 0.7, 0.1)] * 4
    path = tmp_path / "worst_cases.png"
    draw_worst([PHOTO] * 4, truths, found, [0.1, 0.9, 0.5, 0.9], path, classes=NAMES, names=list("abcd"), most=3)
    titles = [panel.title.split("\n")[:2] for panel in sheets[0]["rows"][0]]
    assert titles == [["error 0.9", "b"], ["error 0.9", "d"], ["error 0.5", "c"]]
    assert path.exists()


def test_large_photos_are_reduced_for_the_sheet(tmp_path: Path, sheets: list[dict[str, Any]]) -> None:
    photo = np.full((900, 3000, 3), 100, dtype=np.uint8)
    draw_grid([photo], [None], [segmentation(1, 900, 3000)], tmp_path / "grid.png", classes=NAMES)
    assert sheets[0]["rows"][0][0].picture.size == (384, 115)
    assert sheets[0]["aspect"] == pytest.approx(0.3)


def test_lists_of_other_lengths_are_refused(tmp_path: Path) -> None:
    one = [classes(1, 0, 0)]
    for photos, truths, found, names in (([], [], [], None), ([PHOTO], [], one, None), ([PHOTO], one, one, ["a", "b"])):
        with pytest.raises(ValueError, match="make no sheet"):
            draw_grid(photos, truths, found, tmp_path / "grid.png", names=names)
    with pytest.raises(ValueError, match="1 photos, 2 errors"):
        draw_worst([PHOTO], one, one, [1.0, 2.0], tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())
