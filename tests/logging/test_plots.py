"""What is drawn, read back from the figures, and the SVG that a page gets."""

import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dinov2.logging.plots import (
    PALETTE,
    RED,
    RIGHT,
    Chart,
    Curve,
    Panel,
    collect_series,
    draw_chart,
    draw_charts,
    draw_confusion_matrix,
    draw_panels,
    save_png,
    short,
    svg_of_chart,
    svg_of_interval,
    to_svg,
)


def chart(*curves: list[float], **options: object) -> Chart:
    names = ("a", "b", "c")
    return Chart(
        title="<t>",
        curves=[
            Curve(name, np.arange(len(y), dtype=float), np.array(y)) for name, y in zip(names, curves, strict=False)
        ],
        **options,
    )


def drawn(value: Chart) -> tuple[Figure, np.ndarray]:
    """The figure of a chart, and the points ``[N, 2]`` of its first curve."""
    figure = Figure(figsize=(4, 2), layout="constrained")
    lines = draw_chart(figure.add_subplot(), value)
    return figure, lines[0].get_xydata()


def test_series_are_sorted_and_hold_numbers_only() -> None:
    points = [("b", 3, 1.0), ("a", 2, None), ("b", 1, 2), ("a", 1, True), ("a", 4, "x")]
    series = collect_series(points)
    assert list(series) == ["b", "a"]
    assert [values.tolist() for values in series["b"]] == [[1, 3], [2, 1]]
    np.testing.assert_equal(series["a"], ([2.0], [math.nan]))


def test_long_curves_keep_their_means_and_extremes() -> None:
    values = np.random.default_rng(0).normal(size=10_000)
    values[6_543] = 25.0  # one spike that a thinned curve must not hide
    figure, points = drawn(Chart(title="t", curves=[Curve("loss", np.arange(10_000.0), values)]))
    assert points.shape == (200, 2)
    np.testing.assert_allclose(points[:, 1], values.reshape(200, 50).mean(axis=1))
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (values.min(), 25.0)
    assert len(to_svg(figure)) < 15_000


def test_gaps_stay_open_single_points_are_dots_and_broken_values_crosses() -> None:
    values = [1.0, 2.0, math.nan, 3.0, math.nan, math.inf, 4.0, 5.0]
    figure, points = drawn(chart(values + [1.0] * 30))
    assert np.isnan(points[:, 1]).nonzero()[0].tolist() == [2, 4, 5]
    line, crosses = figure.axes[0].get_lines()
    assert line.get_markevery().nonzero()[0].tolist() == [3]
    assert crosses.get_xdata().tolist() == [2, 4, 5]
    assert crosses.get_color() == RED
    few, _ = drawn(chart(values))
    assert few.axes[0].get_lines()[0].get_markevery().sum() == 5  # all of a short curve


@pytest.mark.parametrize("values", [[], [math.nan, math.nan], [3.0], [0.0, 0.0], [-5.0, -5.0], [1e-30, 2e30]])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    for options in ({}, {"from_zero": True, "smooth": True, "marks": [0.0]}):
        text = svg_of_chart(chart(values, **options))
        assert "nan" not in text
        assert "inf" not in text


def test_noise_does_not_fill_a_chart_that_has_a_height() -> None:
    for values, options in (([0.66, 0.67], {"min_height": 0.1}), ([1.0, 1.0 + 1e-12], {})):
        figure, _ = drawn(chart(values, **options))
        low, high = figure.axes[0].get_ylim()
        assert values[1] - values[0] < 0.12 * (high - low)
        assert low < values[0] < values[1] < high
    assert (
        drawn(chart([0.0, 1.0], min_height=0.1))[0].axes[0].get_ylim() == drawn(chart([0.0, 1.0]))[0].axes[0].get_ylim()
    )


def test_marks_outside_of_the_curves_are_left_out() -> None:
    figure, _ = drawn(chart([1.0, 2.0, 3.0], marks=[1.5, 900.0]))
    marks = [line.get_xdata() for line in figure.axes[0].get_lines() if line.get_linestyle() == ":"]
    assert marks == [[1.5, 1.5]]


def test_a_smoothed_curve_stands_over_its_values_and_a_median_over_zero() -> None:
    values = np.tile([1.0, 3.0], 100)
    figure, points = drawn(chart(values.tolist(), smooth=True))
    assert points[0, 1] == 1.0
    assert 1.5 < points[-50:, 1].min() < points[-50:, 1].max() < 2.5
    np.testing.assert_array_equal(figure.axes[0].get_lines()[1].get_ydata(), values)
    figure, _ = drawn(chart([4.0, 5.0, 9.0], from_zero=True))
    assert figure.axes[0].get_ylim()[0] == 0
    assert [text.get_text() for text in figure.axes[0].texts] == ["median 5"]


def test_charts_stand_three_in_a_row_with_legends_and_what_is_broken(tmp_path: "pytest.TempPathFactory") -> None:
    one = chart([1.0, math.nan], [2.0, 3.0], [4.0, math.inf])
    assert one.broken == (
        "a: 1 of 2 values not finite, first at iteration 1; c: 1 of 2 values not finite, first at iteration 1"
    )
    figure = draw_charts([one, *[chart([1.0, 2.0])] * 3], "$heading$")
    first, *_, last = figure.axes
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["a", "b", "c"]
    assert [line.get_color() for line in first.get_legend().get_lines()] == list(PALETTE[:3])
    assert first.texts[0].get_text().count("\n") == 1
    assert last.get_legend() is None
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "iteration", "iteration", "iteration"]
    path = save_png(figure, tmp_path / "new" / "a.png")
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.size == (1656, 708)
        assert (np.asarray(picture.convert("L")) < 250).mean() > 0.01
    assert path.read_bytes() == save_png(draw_charts([one, *[chart([1.0, 2.0])] * 3], "$heading$"), path).read_bytes()


def test_svg_is_text_in_the_colours_of_the_page() -> None:
    value = chart([1.0, math.nan, 3.0], [5.0, 4.0, 2.0], marks=[1])
    text = svg_of_chart(value)
    assert text == svg_of_chart(value)
    assert ">0.0001</text>" in svg_of_chart(chart([0.0, 0.0002]))
    assert text.startswith('<svg viewBox="0 0 288 158.4" role="img" aria-label="&lt;t&gt;">')
    assert {"var(--c0)", "var(--c1)", "var(--bad)", "var(--quiet)", "var(--edge)"} == set(
        re.findall(r"var\(--\w+\)", text)
    )
    assert not re.search(r"#[0-9a-f]{6}[^0-9a-f]|url\(|<style|<metadata|<!--|<\?xml|http|font-family", text)
    labels = re.findall(r'<text [^>]*x="([\d.]+)"[^>]*>([^<]*)<', text)
    assert {"0", "1", "2"} <= {label for _, label in labels}
    assert all(0 < float(x) < 288 for x, _ in labels)
    assert len(text) < 6_000


def test_long_labels_have_room() -> None:
    for scale in (1.0, 1e-3, 5e-4, 3e-7):
        text = svg_of_chart(chart([0.0, scale, 0.91 * scale]))
        ends = re.findall(r'text-anchor: end[^>]* x="([\d.]+)"[^>]*>([^<]*)<', text)
        assert len(ends) >= 3
        assert all(float(x) >= 5 * len(label) for x, label in ends)  # a digit is less than 6 wide


def test_an_interval_reaches_from_low_to_high() -> None:
    ends = re.findall(r'd="M ([\d.]+) 8 L ([\d.]+) 8"', svg_of_interval(0.5, 0.25, 0.75))
    assert ends == [("6", "114"), ("33", "87"), ("60", "60")]
    assert re.findall(r'd="M ([\d.]+) 8 L', svg_of_interval(1.7, None, None)) == ["6", "114"]  # never outside
    assert 'aria-hidden="true"' in svg_of_interval(0.5, None, None)


def test_numbers_are_short() -> None:
    values = (0, 1234.5, -12500, 3.2e6, 4e9, 0.042, -1.5e-6, math.nan)
    assert [short(value) for value in values] == ["0", "1234", "-12.5k", "3.2M", "4G", "0.042", "-1.5e-06", "-"]


def test_the_confusion_matrix_shows_counts_and_row_shares() -> None:
    counts = [[90, 10, 0], [1, 1, 0], [0, 0, 0]]
    figure = draw_confusion_matrix(counts, ("good", "$bad$", "none"))
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == [str(value) for row in counts for value in row]
    assert [text.get_text() for text in right.texts] == ["90", "10", "", "50", "50", "", "", "", ""]
    np.testing.assert_allclose(right.images[0].get_array(), [[0.9, 0.1, 0], [0.5, 0.5, 0], [0, 0, 0]])
    assert [label.get_text() for label in left.get_yticklabels()] == ["good", "$bad$", "none"]
    assert figure.get_suptitle() == "102 in all, 89.2 % right"
    large = draw_confusion_matrix([[9_999, 10_000], [2_500_000, 7_000_000_000]], ("a", "b"))
    assert [text.get_text() for text in large.axes[0].texts] == ["9999", "10k", "2.5M", "7G"]
    for wrong in ([[1, 2]], [[1, 2, 3]] * 3, []):
        with pytest.raises(ValueError, match="a confusion matrix of 2 classes cannot be"):
            draw_confusion_matrix(wrong, ("a", "b"))


@pytest.mark.parametrize("count", [2, 30, 31])
def test_numbers_stay_in_their_cells(count: int) -> None:
    figure = draw_confusion_matrix(np.full((count, count), 98_765), [f"class {index}" for index in range(count)])
    axes = figure.axes[0]
    if count > 30:
        assert not axes.texts
        return
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    cell = axes.get_window_extent().width / count
    assert max(text.get_window_extent(renderer).width for text in axes.texts) < cell
    names = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
    assert all(one.y0 > other.y1 for one, other in pairwise(names))  # from top to bottom


def test_panels_stand_where_their_rows_put_them() -> None:
    picture = np.full((4, 6, 3), 0.5)
    figure = draw_panels(
        [[Panel(picture=picture, title="$a$"), None, Panel(picture=picture, frame=RIGHT)], [Panel(picture=picture)]],
        row_titles=["one", "two"],
        aspect=0.5,
        heading="h",
    )
    first, second, third = figure.axes
    assert [axes.get_subplotspec().num1 for axes in figure.axes] == [0, 2, 3]
    assert (first.get_title(), first.get_ylabel(), third.get_ylabel()) == ("$a$", "one", "two")
    assert second.spines["top"].get_visible()
    assert not third.spines["top"].get_visible()
    assert figure.get_suptitle() == "h"


def test_a_flat_curve_is_flat_and_lines_to_beat_are_seen() -> None:
    """Noise of a thousandth fills no chart; what has no noise may; a flat 0 does not hang in the air."""

    def limits(*values: float, **options: Any) -> tuple[float, float]:
        axes = Figure().add_subplot()
        x = np.arange(len(values), dtype=np.float64)
        draw_chart(axes, Chart(title="a", curves=[Curve("a", x, np.array(values))], **options))
        low, high = axes.get_ylim()
        return low, high

    low, high = limits(2.0, 2.002, 1.999)
    assert high - low >= 0.05 * 2
    low, high = limits(0.996, 0.999, min_share=0.0)
    assert high - low < 0.01
    low, high = limits(0.9, 0.901, lines=[("chance", 0.5)], min_height=0.1)
    assert low < 0.5
    low, high = limits(0.0, 0.0, min_height=0.1)
    assert -0.01 < low < 0 < 0.1 < high
    assert limits(-1.0, 1.0)[0] < -1
