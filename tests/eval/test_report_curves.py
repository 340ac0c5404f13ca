"""Charts of the report: the points are where the numbers are, whatever the numbers are called."""

import math
import re

import numpy as np
import pytest
from markupsafe import Markup

from dinov2.eval.report.curves import (
    LOSSES,
    MONITORS,
    PROBES,
    SCHEDULES,
    SPEED,
    ChartGroup,
    Line,
    chart_groups,
    draw_interval,
    draw_lines,
    short,
)


def points(drawing: str, kind: str) -> list[np.ndarray]:
    """Corners ``[N, 2]`` of every polyline or polygon."""
    found = re.findall(rf'<{kind} class="[^"]*" points="([^"]*)"', drawing)
    return [np.array([[float(part) for part in pair.split(",")] for pair in entry.split()]) for entry in found]


def ticks(drawing: str, side: str) -> list[tuple[float, float]]:
    """Pixel and value of every label."""
    axis = {"end": "y", "mid": "x"}[side]
    found = re.findall(rf'<text class="tick {side}"[^>]* {axis}="([\d.]+)"[^>]*>([^<]*)<', drawing)
    shift = 4 if side == "end" else 0
    return [(float(pixel) - shift, float(label)) for pixel, label in found]


def line(values: list[float], name: str = "loss") -> Line:
    return Line(name, np.arange(len(values), dtype=float), np.array(values))


def test_points_lie_where_the_labels_say() -> None:
    values = [0.0, 10.0, 5.0, 7.5, 2.0]
    drawing = draw_lines("t", [line(values)])
    (corners,) = points(drawing, "polyline")
    for axis, side, expected in ((0, "mid", range(5)), (1, "end", values)):
        labels = np.array(ticks(drawing, side))
        assert len(labels) >= 3
        slope, offset = np.polyfit(labels[:, 0], labels[:, 1], 1)
        np.testing.assert_allclose(slope * corners[:, axis] + offset, list(expected), atol=0.02)
    assert corners[1, 1] < corners[0, 1]  # large values are at the top


def test_long_labels_have_room() -> None:
    """A character is at most 7 pixels wide, and a label ends 5 pixels before the curves begin."""
    for scale in (1.0, 1e-3, 5e-4, 3e-7):
        drawing = draw_lines("t", [line([0.0, scale, 0.91 * scale])])
        end = float(re.search(r'<text class="tick end" x="([\d.]+)"', drawing)[1])
        assert end >= 7 * max(len(label) for label in re.findall(r'tick end"[^>]*>([^<]*)<', drawing))
        assert points(drawing, "polyline")[0][:, 0].min() == pytest.approx(end + 5)


def test_long_curves_keep_their_means_and_extremes() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=10_000)
    values[6_543] = 25.0  # one spike that a thinned curve must not hide
    drawing = draw_lines("t", [Line("loss", np.arange(10_000.0), values)])
    (corners,) = points(drawing, "polyline")
    (band,) = points(drawing, "polygon")
    assert len(corners) == 200
    labels = np.array(ticks(drawing, "end"))
    slope, offset = np.polyfit(labels[:, 0], labels[:, 1], 1)
    np.testing.assert_allclose(slope * corners[:, 1] + offset, values.reshape(200, 50).mean(axis=1), atol=0.1)
    assert slope * band[:, 1].min() + offset == pytest.approx(25.0, abs=0.1)
    assert slope * band[:, 1].max() + offset == pytest.approx(values.min(), abs=0.1)
    assert len(drawing) < 12_000


def test_gaps_stay_open_and_single_points_are_dots() -> None:
    drawing = draw_lines("t", [line([1.0, 2.0, math.nan, 3.0, math.nan, math.inf, 4.0, 5.0])])
    assert [len(part) for part in points(drawing, "polyline")] == [2, 2]
    assert drawing.count("<circle") == 1


@pytest.mark.parametrize("values", [[], [math.nan, math.nan], [3.0], [0.0, 0.0], [-5.0, -5.0], [1e-30, 2e30]])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    drawing = draw_lines("t", [line(values)])
    assert "nan" not in drawing
    assert "inf" not in drawing


def test_noise_does_not_fill_a_chart_that_has_a_least_height() -> None:
    drawing = draw_lines("t", [line([0.66, 0.67])], least_height=0.1)
    (corners,) = points(drawing, "polyline")
    assert abs(corners[1, 1] - corners[0, 1]) < 20
    labels = [value for _, value in ticks(drawing, "end")]
    assert max(labels) - min(labels) >= 0.06
    high = draw_lines("t", [line([0.0, 1.0])], least_height=0.1)
    assert high == draw_lines("t", [line([0.0, 1.0])])


def test_warnings_are_marked_where_they_were_raised() -> None:
    records = [{"iteration": iteration, "kl_cls": 1.0 * iteration} for iteration in range(0, 101, 10)]
    records[5] |= {"warnings": ["COLLAPSE: ..."]}
    records.append({"iteration": 900, "warnings": ["outside of this chart"], "lr": 0.1})
    group = next(group for group in chart_groups(records) if group.question == MONITORS)
    drawing = group.charts[0].drawing
    marks = re.findall(r'<line class="mark" x1="([\d.]+)"', drawing)
    (corners,) = points(drawing, "polyline")
    assert [float(mark) for mark in marks] == [pytest.approx(corners[5, 0], abs=0.1)]


def test_names_are_escaped() -> None:
    assert 'aria-label="&lt;b&gt;&#34;"' in draw_lines('<b>"', [line([1.0, 2.0])])


def test_an_interval_reaches_from_low_to_high() -> None:
    drawing = draw_interval(0.5, 0.25, 0.75)
    assert '<line class="whisker" x1="33.0" x2="87.0"' in drawing
    assert 'cx="60.0"' in drawing
    assert "whisker" not in draw_interval(0.5, None, None)
    assert 'cx="114.0"' in draw_interval(1.7, None, None)  # never outside


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1234.5, "1234"), (12500, "12.5k"), (3.2e6, "3.2M"), (4e9, "4G"), (0.042, "0.042"), (1.5e-6, "1.5e-06")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
    assert short(-value) == ("0" if value == 0 else f"-{text}")
    assert short(math.nan) == "-"


def named(groups: list[ChartGroup]) -> dict[str, dict[str, list[str]]]:
    """Names in the legends, by question and chart."""
    return {
        group.question: {chart.title: [entry.name for entry in chart.legend] for chart in group.charts}
        for group in groups
    }


def test_every_number_is_drawn_under_its_question() -> None:
    records = [
        {
            "iteration": 1,
            "koleo_loss": 0.5,
            "lr": 0.1,
            "last_layer_lr": 0.0,
            "batch_size": 8,
            "prototypes_used_cls": 0.4,
            "prototypes_used_patch": 0.3,
            "something_new": 3,
            "warnings": ["COLLAPSE"],
            "flag": True,
            "timing": {"memory_gib": 2.0, "eta_seconds": 9.0},
            "extra": {"inner": 1.0},
        },
        {"iteration": -1, "evaluation": {"probe_cls_rank": 9.0, "probe_patch_rank": 8.0}},
        {"iteration": 2, "evaluation": {"knn_part_auroc_k100": 0.8, "knn_part_auroc_k20": 0.7}},
        {"no": "iteration", "total_loss": 5.0},
    ]
    found = named(chart_groups(records))
    assert list(found) == [PROBES, LOSSES, MONITORS, SCHEDULES, SPEED]
    assert found[PROBES] == {"k-NN AUROC per part": ["k = 20", "k = 100"]}
    assert found[LOSSES] == {"koleo loss": ["last value"]}
    assert found[SCHEDULES] == {"learning rate": ["all but the last layer", "last layer"]}
    assert found[SPEED] == {"memory in GiB": ["last value"]}
    assert found[MONITORS] == {
        "share of prototypes in use": ["class token", "patches"],
        "something new": ["last value"],
        "inner": ["last value"],
        "effective rank of the features": ["class token", "patches"],
    }


def test_records_in_any_order_make_one_curve() -> None:
    records = [{"iteration": iteration, "total_loss": float(iteration)} for iteration in (30, 10, 20)]
    (group,) = chart_groups(records)
    (corners,) = points(group.charts[0].drawing, "polyline")
    assert (np.diff(corners[:, 0]) > 0).all()
    assert group.charts[0].legend[0].last == "30"


def test_what_is_not_finite_is_said() -> None:
    records = [
        {"iteration": 1, "kl_cls": None, "kl_patch": 1.0},
        {"iteration": 2, "kl_cls": 2.0, "kl_patch": None},
        {"iteration": 3, "kl_cls": None, "kl_patch": 1.0},
    ]
    (group,) = chart_groups(records)
    assert group.charts[0].broken == (
        "class token: 2 of 3 values not finite, first at iteration 1; "
        "patches: 1 of 3 values not finite, first at iteration 2"
    )
    assert isinstance(group.charts[0].drawing, Markup)
    assert chart_groups([]) == []
