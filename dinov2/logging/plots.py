"""The only plotting: charts of curves, confusion matrices and sheets of images, saved as PNG or as SVG for a page."""

import io
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from dinov2.utils.files import write_atomically

FloatArray = npt.NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)

PALETTE = ("#0b62b8", "#c2500a", "#0f7b55", "#9a3f93", "#a37500", "#7f4f24")
MARKERS = "os^DvP*X"
RIGHT, WRONG = PALETTE[0], PALETTE[1]  # frames of images; told apart with any colour vision
GREY, RED = "#5b636b", "#b42318"
_EDGE, _PALE = "#d9dde2", "#a9c7e4"
# A page has colours of its own, light or dark: its style sheet defines these variables.
_PAGE_COLOURS = {colour: f"var(--c{number})" for number, colour in enumerate(PALETTE)} | {
    GREY: "var(--quiet)", RED: "var(--bad)", _EDGE: "var(--edge)", _PALE: "var(--pale)",
}  # fmt: skip

_DOTS_PER_INCH = 120
_MAX_POINTS = 200  # per curve: a chart is some 300 pixels wide, and more points show nothing
_MAX_MARKED_POINTS = 15
_SMOOTHING_SHARE = 0.02  # a smoothed curve looks back over this share of the run
_MAX_NUMBERED_CLASSES = 30  # beyond it the cells of a confusion matrix are too small for numbers
_MAX_LABELLED_CLASSES = 60


@dataclass(frozen=True)
class Curve:
    """Values ``[N]``, NaN where one is missing or not finite, at rising places ``[N]``."""

    name: str
    x: FloatArray
    y: FloatArray
    dashed: bool = False

    @property
    def last(self) -> str:
        """The last value in few characters."""
        return short(float(self.y[-1]) if len(self.y) else math.nan)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves in one picture.

    Attributes:
        title: what is drawn.
        curves: at least one; a single one needs no name.
        x_label: what the places are.
        remark: how to read the values.
        marks: places of vertical lines; those outside of the curves are left out.
        lines: name and value of horizontal lines, such as chance.
        min_height: range of values that is shown at least, so that noise does not look like a trend.
        min_share: the same as share of the largest value.
        from_zero: whether the values are shown from 0 on, with their median.
        smooth: whether a running mean is drawn over pale values.
    """

    title: str
    curves: Sequence[Curve]
    x_label: str = "iteration"
    remark: str = ""
    marks: Sequence[float] = ()
    lines: Sequence[tuple[str, float]] = ()
    min_height: float = 0.0
    min_share: float = 0.05
    from_zero: bool = False
    smooth: bool = False

    @property
    def broken(self) -> str:
        """How many values are not finite, and since when; empty where all are."""
        said = []
        for curve in self.curves:
            bad = curve.x[~np.isfinite(curve.y)]
            if len(bad):
                name = f"{curve.name}: " if len(self.curves) > 1 else ""
                first = f"first at {self.x_label} {bad[0]:.0f}"
                said.append(f"{name}{len(bad)} of {len(curve.y)} values not finite, {first}")
        return "; ".join(said)


def collect_series(points: Iterable[tuple[Key, float, Any]]) -> dict[Key, tuple[FloatArray, FloatArray]]:
    """Sorts values into series.

    Args:
        points: name, place and value, in any order. None is a value that was not finite; what is no number is left out.

    Returns:
        Places ``[N]``, rising, and values ``[N]`` by name, in the order in which the names appeared.
    """
    rows: dict[Key, list[tuple[float, float]]] = {}
    for name, x, value in points:
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            rows.setdefault(name, []).append((x, math.nan if value is None else float(value)))
    series = {name: np.array(sorted(found, key=lambda row: row[0]), dtype=np.float64) for name, found in rows.items()}
    return {name: (values[:, 0], values[:, 1]) for name, values in series.items()}


def short(value: float) -> str:
    """A number in few characters: ``12.5k``, ``0.042``, ``3e-06``; a dash where it is not finite."""
    if not math.isfinite(value):
        return "-"
    for limit, unit, scale in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e4, "k", 1e3)):
        if abs(value) >= limit:
            return f"{value / scale:.4g}{unit}"
    return f"{value:.3g}" if abs(value) < 1e-3 else f"{value:.4g}"


def draw_charts(charts: Sequence[Chart], heading: str = "") -> Figure:
    """A figure with up to three charts in a row, each with its title and legend."""
    columns = min(len(charts), 3)
    rows = math.ceil(len(charts) / columns)
    size = (7.5, 4.4) if len(charts) == 1 else (4.6 * columns, 0.5 + 2.7 * rows)
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
    if heading:
        figure.suptitle(heading, fontweight="bold", parse_math=False)
    for number, chart in enumerate(charts):
        axes = figure.add_subplot(rows, columns, number + 1)
        lines = draw_chart(axes, chart)
        axes.set_title(chart.title, fontsize=11, parse_math=False, wrap=True)
        if number + columns >= len(charts):  # nothing below
            axes.set_xlabel(chart.x_label)
        if chart.broken:
            axes.text(0.98, 0.95, chart.broken.replace("; ", "\n"), transform=axes.transAxes, ha="right", va="top",
                      color=RED, fontsize=9, parse_math=False)  # fmt: skip
        if len(lines) > 1:
            columns_of_legend = 1 + len(lines) // 12
            legend = axes.legend(lines, [str(line.get_label()) for line in lines], frameon=False, fontsize=9,
                                 ncols=columns_of_legend)  # fmt: skip
            for text in legend.get_texts():
                text.set_parse_math(False)
    return figure


def draw_chart(axes: Axes, chart: Chart) -> list[Line2D]:
    """Draws curves on axes. Long ones show the mean of each stretch in a pale band from the smallest to the largest.

    Crosses on the axis stand where values are not finite.

    Returns:
        The lines of the curves, which are labelled by their names.
    """
    axes.grid(color=_EDGE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=9, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 5, 10), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=(1, 2, 2.5, 5, 10)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    lines = []
    for number, curve in enumerate(chart.curves):
        colour, rounds = PALETTE[number % len(PALETTE)], number // len(PALETTE)
        x, means, lows, highs, broken = _thin(curve)
        finite = np.isfinite(means)
        padded = np.pad(finite, 1)
        alone = finite & ~padded[:-2] & ~padded[2:]
        marked = finite if len(x) <= _MAX_MARKED_POINTS and not chart.smooth else alone
        lines += axes.plot(
            x, _smooth(means) if chart.smooth else means, "--" if curve.dashed or rounds % 2 else "-",
            color=colour, linewidth=1.6, marker=MARKERS[rounds % len(MARKERS)] if marked.any() else "", markersize=3.5,
            markevery=marked, label=curve.name,
        )  # fmt: skip
        if chart.smooth:
            axes.plot(x, means, color=colour, linewidth=0.8, alpha=0.45)
        if (highs > lows).any():
            axes.fill_between(x, lows, highs, color=colour, alpha=0.22, linewidth=0)
        if broken.any():
            bottom = np.zeros(int(broken.sum()))
            axes.plot(x[broken], bottom, "x", color=RED, transform=axes.get_xaxis_transform(), clip_on=False)
    places = np.concatenate([curve.x for curve in chart.curves])
    for mark in chart.marks:
        if len(places) and places.min() <= mark <= places.max():
            axes.axvline(mark, color=RED, linewidth=1.2, linestyle=":")
    values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in chart.curves])
    if chart.from_zero and len(values):
        median = float(np.median(values))
        axes.axhline(median, color=GREY, linewidth=1.0, linestyle=":")
        axes.annotate(f"median {short(median)}", (1, median), xycoords=axes.get_yaxis_transform(), ha="right",
                      va="bottom", color=GREY, fontsize=9)  # fmt: skip
        axes.set_ylim(min(float(values.min()), 0.0), max(1.15 * float(values.max()), 0.0) or None)
    for number, (name, value) in enumerate(sorted(chart.lines, key=lambda line: line[1])):
        axes.axhline(value, color=GREY, linewidth=1.0, linestyle="--")
        left = number % 2 == 0  # lines that lie close have their names at different ends
        axes.annotate(f"{name} {short(value)}", (0 if left else 1, value), xycoords=axes.get_yaxis_transform(),
                      ha="left" if left else "right", va="bottom", color=GREY, fontsize=9)  # fmt: skip
    low, high = axes.get_ylim()
    # Rounding noise of a constant is no variation.
    missing = max(chart.min_height, max(chart.min_share, 1e-6) * max(abs(low), abs(high))) - (high - low)
    if missing > 0:
        low, high = low - missing / 2, high + missing / 2
    if len(values) and low < 0 <= values.min():  # what is never below 0 stands at the bottom, also where it is flat
        low, high = -0.03 * (high - low), 0.97 * (high - low)
    axes.set_ylim(low, high)
    return lines


def _thin(curve: Curve) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    """Middle, mean, smallest and largest finite value of at most 200 stretches, and whether one has broken values."""
    size = math.ceil(len(curve.y) / _MAX_POINTS) or 1
    rows = []
    for start in range(0, len(curve.y), size):
        values = curve.y[start : start + size]
        finite = values[np.isfinite(values)]
        known = (finite.mean(), finite.min(), finite.max()) if len(finite) else (math.nan,) * 3
        rows.append((curve.x[start : start + size].mean(), *known, len(finite) < len(values)))
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3], table[:, 4] > 0


def _smooth(values: FloatArray) -> FloatArray:
    """Exponential average over about ``_SMOOTHING_SHARE`` of the values, unbiased at the start; skips NaN."""
    keep = 1.0 - 1.0 / max(1.0, _SMOOTHING_SHARE * len(values))
    smoothed, total, weight = np.full_like(values, math.nan), 0.0, 0.0
    for index, value in enumerate(values):
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1.0
            smoothed[index] = total / weight
    return smoothed


def draw_confusion_matrix(counts: npt.ArrayLike, classes: Sequence[str]) -> Figure:
    """Draws how many of each class (rows) were taken for each class (columns), and as shares of the row.

    Args:
        counts: integers ``[C, C]``.
        classes: ``C`` names.

    Raises:
        ValueError: when the counts are not square or have another number of classes.
    """
    matrix = np.asarray(counts, dtype=np.int64)
    count = len(classes)
    if matrix.shape != (count, count) or not matrix.size:
        raise ValueError(f"a confusion matrix of {count} classes cannot be {list(matrix.shape)}")
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    side = min(max(2.6 + 0.42 * count, 3.6), 15.0)
    figure = Figure(figsize=(2 * side, side), dpi=_DOTS_PER_INCH, layout="constrained")
    accuracy = np.trace(matrix) / matrix.sum() if matrix.sum() else math.nan
    figure.suptitle(f"{matrix.sum():,} in all, {100 * accuracy:.1f} % right", fontweight="bold")
    small = 9 if count <= 12 else 8 if count <= 20 else 7
    ticks = range(0, count, math.ceil(count / _MAX_LABELLED_CLASSES))
    names = [name if len(name) <= 22 else name[:21] + "…" for name in (classes[index] for index in ticks)]
    texts = {
        "counts": [_three_digits(int(value)) for value in matrix.flat],
        "% of the true class": [f"{100 * value:.0f}" if value else "" for value in shares.flat],
    }
    for number, (title, cells) in enumerate(texts.items()):
        axes = figure.add_subplot(1, 2, number + 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("taken for")
        axes.set_ylabel("is")
        axes.set_xticks(ticks, names, rotation=90 if count > 4 else 0, fontsize=small, parse_math=False)
        axes.set_yticks(ticks, names, fontsize=small, parse_math=False)
        for place, words in enumerate(cells if count <= _MAX_NUMBERED_CLASSES else ()):
            row, column = divmod(place, count)
            colour = "white" if shares[row, column] > 0.55 else "#202124"
            text = axes.text(column, row, words, ha="center", va="center", color=colour, fontsize=small)
            text.set_in_layout(False)  # it lies inside anyway, and measuring hundreds takes seconds
    return figure


def _three_digits(count: int) -> str:
    """A count in at most five letters."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * size or (count >= size and size > 10**3):
            return f"{count / size:.3g}{letter}"
    return str(count)


_WIDEST_PANEL, _NARROWEST_PANEL, _WIDEST_SHEET, _LINE_HEIGHT = 2.4, 1.3, 22.0, 0.19  # inches


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One small picture.

    Attributes:
        picture: an image, colours ``[h, w, 3]`` in [0, 1], or values ``[h, w]``, which are drawn from 0 (dark) to 1.
        title: text above it.
        frame: colour of a frame around it; none by default.
    """

    picture: Image.Image | npt.NDArray[np.floating]
    title: str = ""
    frame: str | None = None


def draw_panels(
    rows: Sequence[Sequence[Panel | None]],
    *,
    row_titles: Sequence[str] | None = None,
    aspect: float = 1.0,
    heading: str = "",
    widest: float = _WIDEST_PANEL,
) -> Figure:
    """Draws a sheet with one row of panels per entry; the same panels give the same bytes.

    Args:
        rows: panels from left to right; None leaves a place empty, and so does a short row.
        row_titles: text left of each row.
        aspect: height of a panel over its width.
        heading: text above the sheet.
        widest: inches of a panel, of 120 pixels, as far as all fit side by side.
    """
    columns = max(len(row) for row in rows)
    width = min(max(_WIDEST_SHEET / columns, _NARROWEST_PANEL), widest)
    title_lines = [max((p.title.count("\n") + 1 for p in row if p and p.title), default=0) for row in rows]
    heading_lines = 1.5 * (heading.count("\n") + 1) if heading else 0.0
    height = width * aspect * len(rows) + _LINE_HEIGHT * (sum(title_lines) + heading_lines) + 0.2
    figure = Figure(figsize=(width * columns, height), dpi=_DOTS_PER_INCH, layout="constrained")
    if heading:
        figure.suptitle(heading, fontsize=11, parse_math=False)
    for number, row in enumerate(rows):
        for column, panel in enumerate(row):
            if panel is None:
                continue
            axes = figure.add_subplot(len(rows), columns, number * columns + column + 1)
            axes.imshow(panel.picture, interpolation="nearest", cmap="inferno", vmin=0, vmax=1)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(panel.frame is not None)
            if panel.frame is not None:
                axes.spines[:].set(color=panel.frame, linewidth=4)
            if panel.title:
                axes.set_title(panel.title, fontsize=9, parse_math=False)
            if column == 0 and row_titles is not None:
                axes.set_ylabel(row_titles[number], fontsize=9, parse_math=False)
    return figure


def save_png(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as a PNG file, atomically, and makes its folder where needed; the same figure, the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(figure.savefig, format="png"))
    return path


# Of matplotlib's SVG files: groups and names that nothing refers to, lists of fonts, and what would cut nothing off.
_SUPERFLUOUS = re.compile(
    r'<!--.*?-->|<defs> <style.*?</style> </defs>|<defs> <clipPath.*?</defs>|</?g\b[^>]*>| clip-path="[^"]*"'
    r'|font-family: [^;]*; | transform="rotate\(-?0 [^"]*"| (?=[<"])'
)


def svg_of_chart(chart: Chart) -> Markup:
    """A chart without title and legend as SVG for a page (see `to_svg`)."""
    figure = Figure(figsize=(4.0, 2.2), layout="constrained")
    draw_chart(figure.add_subplot(), chart)
    return to_svg(figure, chart.title)


def svg_of_interval(value: float, low: float | None, high: float | None) -> Markup:
    """A value in [0, 1] as a dot on a line from 0 to 1, with its interval where it has one, as SVG for a page."""
    figure = Figure(figsize=(120 / 72, 16 / 72))
    lines = [((0.0, 1.0), _EDGE, 2.0)]
    if low is not None and high is not None:
        lines.append(((low, high), _PALE, 4.0))
    lines.append(((value, value), PALETTE[0], 7.0))
    for ends, colour, width in lines:
        places = 0.05 + 0.9 * np.clip(ends, 0.0, 1.0)
        figure.add_artist(Line2D(places, (0.5, 0.5), color=colour, linewidth=width, solid_capstyle="round"))
    return to_svg(figure)


def to_svg(figure: Figure, label: str = "") -> Markup:
    """A figure as an element of a page: as wide as its place, without a ground, in the page's own colours and letters.

    The same figure gives the same text.

    Args:
        figure: drawn with the colours of this module.
        label: for readers who cannot see; without one the figure is a mere ornament.
    """
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    file = io.StringIO()
    # Texts stay texts, and names inside the file do not change from one time to the next.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "DejaVu Sans"}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = _SUPERFLUOUS.sub("", re.sub(r"\s*\n\s*", " ", text))
    # Hundredths of a pixel are enough; what stands between the tags are labels.
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    for colour, variable in _PAGE_COLOURS.items():
        text = text.replace(colour, variable)
    meaning = Markup('role="img" aria-label="{}"').format(label) if label else Markup('aria-hidden="true"')
    return Markup('<svg viewBox="{}" {}>{}').format(box[1], meaning, Markup(text.strip()))
