"""Curves and confusion matrices: what is drawn, read back from the figures."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from dinov2.tasks import plots
from dinov2.tasks.plots import draw_confusion_matrix, plot_training

RECORDS: list[dict[str, Any]] = [
    {"epoch": 0, "train": {"loss": 2.0, "dice": 0.5}, "val": {"loss": 2.5, "accuracy": 0.3, "iou/a b": 0.1}},
    {"epoch": 1, "iteration": 19, "train": {"loss": None, "dice": 0.4}},
    {"epoch": 2, "train": {"loss": 1.0}, "val": {"accuracy": 0.5, "iou/a b": None, "iou/c": 0.7, "note": "x"}},
    {"iteration": 35, "train": {"loss": 9.0}},
]


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, matplotlib.figure.Figure]:
    """Figures by file name, beside the files themselves."""
    found = {}
    write = plots.write_atomically

    def keep(path: Path, save: Any) -> None:
        found[Path(path).name] = save.func.__self__
        write(path, save)

    monkeypatch.setattr(plots, "write_atomically", keep)
    return found


def curves(figure: matplotlib.figure.Figure) -> dict[str, list[tuple[float, float]]]:
    axes = figure.axes[0]
    legend = axes.get_legend()
    labels = [text.get_text() for text in legend.get_texts()] if legend else [axes.get_title()]
    lines = [line for line in axes.get_lines() if line.get_marker() == "o"]
    return {label: [tuple(point) for point in line.get_xydata()] for label, line in zip(labels, lines, strict=True)}


def test_loss_and_every_figure_get_their_picture(tmp_path: Path, figures: dict[str, matplotlib.figure.Figure]) -> None:
    written = plot_training(RECORDS[::-1], tmp_path / "plots", best_epoch=2)
    assert [path.name for path in written] == ["loss.png", "accuracy.png", "iou.png"]
    assert all(size_of(path) > (500, 300) for path in written)
    nan = pytest.approx(np.nan, nan_ok=True)
    assert curves(figures["loss.png"]) == {
        "train loss": [(0, 2.0), (1, nan), (2, 1.0)],
        "train dice": [(0, 0.5), (1, 0.4)],
        "val loss": [(0, 2.5)],
    }
    assert curves(figures["accuracy.png"]) == {"accuracy": [(0, 0.3), (2, 0.5)]}
    assert curves(figures["iou.png"]) == {"a b": [(0, 0.1), (2, nan)], "c": [(2, 0.7)]}
    crosses = [line for line in figures["iou.png"].axes[0].get_lines() if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[2.0]]
    best = [line for line in figures["accuracy.png"].axes[0].get_lines() if line.get_linestyle() == ":"]
    assert [list(line.get_xdata()) for line in best] == [[2, 2]]


def test_a_figure_may_have_a_picture_of_another_name(
    tmp_path: Path, figures: dict[str, matplotlib.figure.Figure]
) -> None:
    records = [{"epoch": 1, "val": {"mean_iou": 0.4, "iou/a": 0.5}}]
    written = plot_training(records, tmp_path, titles={"mean_iou": "miou"})
    assert [path.name for path in written] == ["miou.png", "iou.png"]
    assert curves(figures["miou.png"]) == {"miou": [(1, 0.4)]}


def test_names_of_figures_are_safe_as_names_of_files(tmp_path: Path) -> None:
    records = [{"epoch": 0, "val": {"../evil$x^2$": 0.5, "delta<1.25": 0.1, "...": 1.0}}]
    names = {path.name for path in plot_training(records, tmp_path)}
    assert names == {"figure.png", "delta_1.25.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert {path.name for path in tmp_path.parent.iterdir()} >= {tmp_path.name}


def test_without_epochs_nothing_is_drawn(tmp_path: Path) -> None:
    assert plot_training([], tmp_path) == []
    assert plot_training([{"epoch": 0}, {"epoch": 1, "val": {}, "train": None}], tmp_path) == []


def test_the_confusion_matrix_shows_counts_and_row_shares(
    tmp_path: Path, figures: dict[str, matplotlib.figure.Figure]
) -> None:
    counts = [[90, 10, 0], [1, 1, 0], [0, 0, 0]]
    draw_confusion_matrix(counts, ("good", "$bad$", "none"), tmp_path / "new" / "confusion_matrix.png")
    left, right = figures["confusion_matrix.png"].axes
    assert [text.get_text() for text in left.texts] == [str(value) for row in counts for value in row]
    assert [text.get_text() for text in right.texts] == ["90", "10", "", "50", "50", "", "", "", ""]
    np.testing.assert_allclose(right.images[0].get_array(), [[0.9, 0.1, 0], [0.5, 0.5, 0], [0, 0, 0]])
    assert [label.get_text() for label in left.get_yticklabels()] == ["good", "$bad$", "none"]
    assert figures["confusion_matrix.png"].get_suptitle() == "102 in all, 89.2 % right"


@pytest.mark.parametrize("count", [2, 30, 31])
def test_numbers_stay_in_their_cells(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(plots, "write_atomically", lambda path, save: found.append(save.func.__self__))
    draw_confusion_matrix(np.full((count, count), 98_765), [f"class {index}" for index in range(count)], tmp_path / "c")
    axes = found[0].axes[0]
    if count > 30:
        assert not axes.texts
        return
    canvas = FigureCanvasAgg(found[0])
    canvas.draw()
    renderer = canvas.get_renderer()
    cell = axes.get_window_extent().width / count
    assert max(text.get_window_extent(renderer).width for text in axes.texts) < cell
    names = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
    assert all(one.y0 > other.y1 for one, other in pairwise(names))  # from top to bottom


def test_large_counts_are_shortened(tmp_path: Path, figures: dict[str, matplotlib.figure.Figure]) -> None:
    draw_confusion_matrix([[9_999, 10_000], [2_500_000, 7_000_000_000]], ("a", "b"), tmp_path / "c.png")
    assert [text.get_text() for text in figures["c.png"].axes[0].texts] == ["9999", "10k", "2.5M", "7G"]


@pytest.mark.parametrize("counts", [[[1, 2]], [[1, 2, 3]] * 3, []])
def test_a_matrix_of_another_size_is_refused(counts: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a confusion matrix of 2 classes cannot be"):
        draw_confusion_matrix(counts, ("a", "b"), tmp_path / "c.png")
