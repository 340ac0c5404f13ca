"""Small drawings as SVG inside the page: line charts and intervals, coloured by the page's style sheet."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

FloatArray = npt.NDArray[np.float64]

NUM_COLOURS = 6  # classes `c0` to `c5` of the style sheet
_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 8, 24  # the left margin grows with long labels
_DIGIT_WIDTH = 7  # of a label
_MOST_POINTS = 200  # a chart is some 300 pixels wide: more points cost bytes and show nothing


@dataclass(frozen=True)
class Line:
    """One curve: values ``[N]``, NaN where there is none, at rising iterations ``[N]``."""

    name: str
    iterations: FloatArray
    values: FloatArray

    @property
    def last(self) -> float:
        """The last value, NaN where it is not finite or there is none."""
        return float(self.values[-1]) if len(self.values) else math.nan


@dataclass(frozen=True)
class _Thinned:
    """A curve in stretches of equally many values: middle of each stretch, mean, smallest and largest value."""

    iterations: FloatArray
    means: FloatArray
    lows: FloatArray
    highs: FloatArray


def draw_lines(title: str, lines: Sequence[Line], *, least_height: float = 0.0, marks: Sequence[float] = ()) -> Markup:
    """Draws curves over iterations. Long ones show the mean of each stretch in a pale band from smallest to largest.

    Args:
        title: for readers who cannot see.
        lines: the curves.
        least_height: range of values that the chart has at least, so that noise does not look like a trend.
        marks: iterations to mark by a vertical line; those outside the curves are left out.
    """
    thinned = [_thin(line) for line in lines]
    y = _Scale(
        _finite(part for line in thinned for part in (line.lows, line.highs)),
        _HEIGHT - _BOTTOM,
        _TOP,
        least=least_height,
    )
    left = max([_LEFT, *(6 + _DIGIT_WIDTH * len(short(tick)) for tick in y.ticks(4).tolist())])
    x = _Scale(_finite(line.iterations for line in thinned), left, _WIDTH - _RIGHT, margin=0.0)
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, title)]
    parts += _grid(x, y, left)
    parts += [
        Markup('<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>').format(
            _TOP, _HEIGHT - _BOTTOM, x=place
        )
        for place in x(np.asarray(marks, dtype=np.float64)).tolist()
        if left <= place <= _WIDTH - _RIGHT
    ]
    for number, line in enumerate(thinned):
        for start, stop in _runs(np.isfinite(line.means)):
            parts += _stretch(x(line.iterations[start:stop]), y, line, start, stop, _style(number))
    return Markup("").join([*parts, Markup("</svg>")])


def draw_interval(value: float, low: float | None, high: float | None) -> Markup:
    """Draws a figure in [0, 1] as a dot on a line from 0 to 1, with its interval where it has one."""
    width, middle, margin = 120, 8, 6

    def place(share: float) -> str:
        return f"{margin + (width - 2 * margin) * min(max(share, 0.0), 1.0):.1f}"

    whisker = Markup("")
    if low is not None and high is not None:
        whisker = Markup('<line class="whisker" x1="{}" x2="{}" y1="{m}" y2="{m}"/>').format(
            place(low), place(high), m=middle
        )
    return Markup(
        '<svg class="interval" viewBox="0 0 {w} 16" aria-hidden="true">'
        '<line class="axis" x1="{a}" x2="{b}" y1="{m}" y2="{m}"/>{whisker}<circle cx="{x}" cy="{m}" r="3.5"/></svg>'
    ).format(w=width, a=margin, b=width - margin, m=middle, whisker=whisker, x=place(value))


class _Scale:
    """Maps values to pixels, and knows round values to label.

    Args:
        values: what must fit, finite; may be empty.
        start: pixel of the smallest.
        stop: pixel of the largest.
        margin: share of the range left free at both ends.
        least: width of the range of values at least.
    """

    def __init__(self, values: FloatArray, start: float, stop: float, margin: float = 0.06, least: float = 0.0) -> None:
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        # Rounding noise of a constant is no variation.
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            widened = 0.1 * abs(low) or 1.0
            low, high = low - widened, high + widened
        missing = max(least - (high - low), 0.0)
        low, high = low - missing / 2, high + missing / 2
        room = margin * (high - low)
        self._low, self._high = low - room, high + room
        self._start, self._stop = start, stop

    def __call__(self, values: FloatArray) -> FloatArray:
        share = (values - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)

    def ticks(self, most: int, *, whole: bool = False) -> FloatArray:
        """Round values within the scale, about ``most``."""
        found = MaxNLocator(nbins=most, integer=whole).tick_values(self._low, self._high)
        values: FloatArray = np.asarray(found, dtype=np.float64)
        values = np.where(np.abs(values) < 1e-9 * (self._high - self._low), 0.0, values)
        return values[(values >= self._low) & (values <= self._high)]


def _thin(line: Line) -> _Thinned:
    size = math.ceil(len(line.values) / _MOST_POINTS) or 1
    rows = range(0, len(line.values), size)
    pieces = [line.values[row : row + size] for row in rows]
    finite = [piece[np.isfinite(piece)] for piece in pieces]
    return _Thinned(
        np.array([line.iterations[row : row + size].mean() for row in rows]),
        np.array([piece.mean() if len(piece) else math.nan for piece in finite]),
        np.array([piece.min() if len(piece) else math.nan for piece in finite]),
        np.array([piece.max() if len(piece) else math.nan for piece in finite]),
    )


def _finite(parts: Iterable[FloatArray]) -> FloatArray:
    values: FloatArray = np.concatenate([*parts, np.empty(0)])
    return values[np.isfinite(values)]


def _runs(present: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """First and past-the-end places of the stretches that are true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], present, [False]]).astype(int)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _grid(x: _Scale, y: _Scale, left: float) -> list[Markup]:
    parts = []
    for tick, place in _with_places(y, y.ticks(4)):
        line = Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>')
        parts += [line.format(left, _WIDTH - _RIGHT, y=place), label.format(left - 5, place + 4, short(tick))]
    for tick, place in _with_places(x, x.ticks(4, whole=True)):
        label = Markup('<text class="tick mid" x="{:.1f}" y="{}">{}</text>')
        parts.append(label.format(place, _HEIGHT - 8, short(tick)))
    return parts


def _with_places(scale: _Scale, ticks: FloatArray) -> list[tuple[float, float]]:
    return list(zip(ticks.tolist(), scale(ticks).tolist(), strict=True))


def _stretch(x: FloatArray, y: _Scale, line: _Thinned, start: int, stop: int, style: str) -> list[Markup]:
    means, lows, highs = (y(part[start:stop]) for part in (line.means, line.lows, line.highs))
    if stop - start == 1:
        return [Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(style, x[0], means[0])]
    drawn = []
    if (highs != lows).any():
        outline = _points(np.concatenate([x, x[::-1]]), np.concatenate([highs, lows[::-1]]))
        drawn.append(Markup('<polygon class="band {}" points="{}"/>').format(style, outline))
    drawn.append(Markup('<polyline class="line {}" points="{}"/>').format(style, _points(x, means)))
    return drawn


def _points(x: FloatArray, y: FloatArray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def short(value: float) -> str:
    """A number in few characters: ``12.5k``, ``0.042``, ``3e-06``; a dash where it is not finite."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.4g}{unit}"
    return f"{value:.3g}" if abs(value) < 1e-3 else f"{value:.4g}"


def draw_swatch(number: int) -> Markup:
    """The colour of the curve with this number, for a legend."""
    line = Markup('<line class="line {}" x1="0" x2="18" y1="4" y2="4"/>').format(_style(number))
    return Markup('<svg class="swatch" viewBox="0 0 18 8" aria-hidden="true">{}</svg>').format(line)


def _style(number: int) -> str:
    return f"c{number % NUM_COLOURS}" + (" dashed" if number >= NUM_COLOURS else "")
