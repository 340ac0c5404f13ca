"""Pictures of a supervised run, read back from figures: metrics over epochs, sheets of images with predictions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from dinov2.logging.plots import RIGHT, WRONG, save_png
from dinov2.tasks import plots
from dinov2.tasks.drawing import IGNORED_COLOUR, paint_depth, paint_labels
from dinov2.tasks.plots import draw_grid, plot_epochs
from dinov2.tasks.predictions import ClassPrediction, DepthPrediction, SegmentationPrediction

RECORDS: list[dict[str, Any]] = [
    {"iteration": 0, "loss": 2.0, "dice_loss": 0.5, "lr": 0.1},
    {"iteration": 9, "evaluation": {"loss": 2.5, "accuracy": 0.3, "iou/a b": 0.1}},
    {"iteration": 12, "loss": None, "dice_loss": 0.4},
    {"iteration": 20, "loss": 1.0},
    {"iteration": 22, "loss": 3.0},
    {"iterbtion": 23, "loss": 99.0},  # damaged on the disk
    {"iteration": 29, "evaluation": {"accuracy": 0.5, "iou/a b": None, "iou/c": 0.7, "note": "x"}},
]
NAN = pytest.approx(np.nan, nan_ok=True)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by file name, beside the files themselves."""
    found = {}

    def keep(figure: Figure, path: Path) -> Path:
        found[path.name] = figure
        return save_png(figure, path)

    monkeypatch.setattr(plots, "save_png", keep)
    return found


def curves(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    lines = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in lines}


def test_loss_and_every_metric_get_their_picture(tmp_path: Path, figures: dict[str, Figure]) -> None:
    written = plot_epochs(RECORDS[::-1], tmp_path / "plots", steps_per_epoch=10, best_epoch=3)
    assert {path.name for path in written} == {"loss.png", "accuracy.png", "iou.png"}
    for path in written:
        with Image.open(path) as image:
            assert image.size > (500, 300)
    assert curves(figures["loss.png"]) == {
        "train loss": [(1, 2.0), (2, NAN), (3, 2.0)],
        "train dice loss": [(1, 0.5), (2, 0.4)],
        "val loss": [(1, 2.5)],
    }
    assert curves(figures["accuracy.png"]) == {"accuracy": [(1, 0.3), (3, 0.5)]}
    assert curves(figures["iou.png"]) == {"a b": [(1, 0.1), (3, NAN)], "c": [(3, 0.7)]}
    crosses = [line for line in figures["iou.png"].axes[0].get_lines() if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[3.0]]
    best = [line for line in figures["accuracy.png"].axes[0].get_lines() if line.get_linestyle() == ":"]
    assert [list(line.get_xdata()) for line in best] == [[3, 3]]
    assert plot_epochs([], tmp_path, steps_per_epoch=10) == []


def test_names_of_pictures_may_be_given_and_are_safe_as_names_of_files(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    values = {"mean_iou": 0.4, "iou/a": 0.5, "../evil$x^2$": 0.5, "delta<1.25": 0.1, "...": 1.0}
    records = [{"iteration": 0, "evaluation": values}]
    written = plot_epochs(records, tmp_path / "plots", steps_per_epoch=1, titles={"mean_iou": "miou"})
    names = ["miou.png", "iou.png", "metric.png", "delta_1.25.png"]
    assert [path.name for path in written] == names
    assert {path.name for path in (tmp_path / "plots").iterdir()} == set(names)
    assert figures["miou.png"].axes[0].get_title() == "miou"


NAMES = ("background", "crack", "dent")
IMAGE = np.full((40, 60, 3), 100, dtype=np.uint8)


def segmentation(value: int, height: int = 40, width: int = 60) -> SegmentationPrediction:
    labels = np.zeros((height, width), dtype=np.uint8)
    labels[10:30, 10:30] = value
    ones = np.ones(labels.shape, dtype=np.float32)
    return SegmentationPrediction(labels, ones, ones, NAMES)


def classes(*probabilities: float, multi_label: bool = False) -> ClassPrediction:
    return ClassPrediction(np.array(probabilities, dtype=np.float32), multi_label, NAMES)


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def pictures(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes]


def frames(figure: Figure) -> list[str | None]:
    spines = [axes.spines["top"] for axes in figure.axes]
    return [to_hex(spine.get_edgecolor()) if spine.get_visible() else None for spine in spines]


def test_masks_stand_in_rows_of_image_label_and_prediction() -> None:
    labels = [segmentation(1), None, segmentation(255)]
    found = [segmentation(2), segmentation(1), segmentation(0)]
    figure = draw_grid([IMAGE] * 3, labels, found, names=["a", "b", "x" * 99], heading="epoch 3")
    assert titles(figure)[:3] == ["image", "ground truth: crack", "prediction: dent"]
    shown = pictures(figure)
    np.testing.assert_array_equal(shown[0], IMAGE)
    for picture, one in ((shown[1], labels[0]), (shown[2], found[0])):
        np.testing.assert_array_equal(picture, paint_labels(Image.fromarray(IMAGE), one.labels))
    assert [axes.get_subplotspec().num1 for axes in figure.axes] == [0, 1, 2, 3, 5, 6, 7, 8]  # one label is not known
    assert titles(figure)[-2:] == ["ground truth: ignored", "prediction: nothing"]
    assert tuple(shown[-2][10, 10]) == IGNORED_COLOUR
    row_titles = [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()]
    assert row_titles[:2] == ["a", "b"]
    assert row_titles[2].startswith("…x")
    assert figure.get_suptitle() == "epoch 3"


@pytest.mark.parametrize(
    ("unit", "factor", "spans", "said"),
    [
        ("mm", 2, [(1, 4), (1, 4)], ["ground truth, 1 to 4 mm", "prediction, 1 to 4 mm"]),
        ("", 50, [(1, 2), (50, 100)], ["ground truth, 1 to 2 mm", "prediction, 50 to 100"]),
    ],
)
def test_depths_of_one_unit_share_their_colours(
    unit: str, factor: float, spans: list[tuple[float, float]], said: list[str]
) -> None:
    label = DepthPrediction(np.linspace(1, 2, 2400, dtype=np.float32).reshape(40, 60), "mm")
    found = DepthPrediction(label.depth * factor, unit)
    figure = draw_grid([IMAGE], [label], [found])
    assert [title.strip() for title in titles(figure)[1:]] == said
    for picture, depth, span in zip(pictures(figure)[1:], (label, found), spans, strict=True):
        np.testing.assert_array_equal(picture, paint_depth(Image.fromarray(IMAGE), depth.depth, span))


def test_classes_stand_six_in_a_row_framed_by_right_and_wrong_where_all_of_several_must_be_right() -> None:
    labels = [classes(0, 1, 0), classes(1, 0, 0), None] + [classes(1, 0, 0)] * 4
    found = [classes(0.1, 0.7, 0.2)] * 7
    figure = draw_grid([IMAGE] * 7, labels, found, names=list("abcdefg"))
    assert [axes.get_subplotspec().num1 for axes in figure.axes] == list(range(7))
    assert figure.axes[0].get_gridspec().ncols == 6
    assert titles(figure)[:3] == [
        "a\nis crack\ntaken for crack 0.70",
        "b\nis background\ntaken for crack 0.70",
        "c\ntaken for crack 0.70",
    ]
    assert frames(figure)[:3] == [RIGHT, WRONG, None]
    label = classes(1, 1, 0, multi_label=True)
    found = [classes(*values, multi_label=True) for values in ((0.9, 0.6, 0.4), (0.9, 0.4, 0.4), (0.1, 0.1, 0.1))]
    figure = draw_grid([IMAGE] * 3, [label] * 3, found)
    assert titles(figure)[0] == "is background, crack\ntaken for background 0.90, crack\n0.60"
    assert frames(figure) == [RIGHT, WRONG, WRONG]
    assert titles(figure)[2].endswith("taken for nothing")


def test_a_flat_metric_is_not_blown_up_and_auroc_has_its_chance(tmp_path: Path, figures: dict[str, Figure]) -> None:
    records = [{"iteration": 9 + 10 * n, "evaluation": {"auroc": 0.9 + n / 1e4, "loss": 3.0 + n / 1e4}} for n in (0, 1)]
    plot_epochs(records, tmp_path, steps_per_epoch=10)
    low, high = figures["auroc.png"].axes[0].get_ylim()
    assert low < 0.5 < 0.9 < high
    assert "chance 0.5" in [text.get_text() for text in figures["auroc.png"].axes[0].texts]
    low, high = figures["loss.png"].axes[0].get_ylim()
    assert high - low > 0.05 * 3
    assert figures["loss.png"].axes[0].get_title() == "loss on train and val"


def test_large_images_are_reduced_for_the_sheet() -> None:
    figure = draw_grid([np.full((900, 3000, 3), 100, dtype=np.uint8)], [None], [segmentation(1, 900, 3000)])
    assert pictures(figure)[0].shape == (115, 384, 3)


def test_lists_of_other_lengths_are_refused() -> None:
    one = [classes(1, 0, 0)]
    for images, labels, found, names in (([], [], [], None), ([IMAGE], [], one, None), ([IMAGE], one, one, ["a", "b"])):
        with pytest.raises(ValueError, match="make no sheet"):
            draw_grid(images, labels, found, names=names)
