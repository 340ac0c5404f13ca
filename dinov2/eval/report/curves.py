"""Everything that a run's metrics file holds, as groups of charts."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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


PROBES = "Did the features get better during training?"
LOSSES = "Did the losses behave?"
MONITORS = "Are there signs of collapse or overfitting?"
GRADIENTS = "Were the updates steady?"
SCHEDULES = "How were learning rate, weight decay, momentum and temperature set over time?"
SPEED = "How fast was it, and did the data keep up?"
_ORDER = (PROBES, LOSSES, MONITORS, GRADIENTS, SCHEDULES, SPEED)

_EXPLAINED = {
    PROBES: "Labelled photos are classified with the features of that moment; training itself never sees the labels. "
    "Whoever picks the best moment here has chosen on these photos: check it on others.",
    LOSSES: "The total need not fall all the time: the teacher, which sets the target, gets better too. Jumps, a rise "
    "to the end, or values that are not finite are bad signs.",
    SCHEDULES: "Set by the options, not measured.",
}
_SCHEDULES = ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp")
_SPEED = ("images_per_second", "data_wait_fraction", "iteration_seconds", "memory_gib")
_NOT_DRAWN = ("iteration", "batch_size", "seconds", "eta_seconds")
# Title and, where the values need it, how to read them.
_TITLES = {
    "lr": ("learning rate", ""),
    "teacher_temp": ("teacher temperature", ""),
    "momentum": ("teacher momentum", ""),
    "grad_norm": ("gradient norm before clipping", ""),
    "images_per_second": ("images per second", ""),
    "data_wait_fraction": ("share of time spent waiting for data", "Above a few percent, more workers may help."),
    "iteration_seconds": ("seconds per iteration", ""),
    "memory_gib": ("memory in GiB", ""),
    "teacher_entropy": (
        "entropy of the targets, as share of its maximum",
        "At 1 a target names all prototypes alike, at 0 a single one; both ends are bad.",
    ),
    "teacher_information": ("what a target tells about its image, in nats", "Near 0 all targets are the same."),
    "kl": ("distance of the student from its targets, in nats", ""),
    "teacher_cosine": ("mean cosine between class tokens of a batch", "Near 1 all images look the same to the model."),
    "crop_match": (
        "share of the photos whose two global crops find each other in the batch",
        "At one over the batch the crops of a photo look like those of any other, and there is nothing to learn from.",
    ),
    "prototypes_used": ("share of prototypes in use", ""),
    "prototypes_won": ("share of prototypes that were the largest of a target", ""),
    "probe_rank": ("effective rank of the features", "Directions that are used; a fall to a few is a collapse."),
    "probe_cosine": (
        "mean cosine of features",
        "Of class tokens between photos, of patches within a photo; near 1 all look the same to the model.",
    ),
    "probe_drift": ("change of patch similarities since the start", ""),
}
_LEAST_HEIGHT = 0.1  # of charts of k-NN scores, which differ by a few hundredths for no reason
_MEMBERS = {"cls": "class token", "patch": "patches"}
# Names of one family are drawn together: the family, and which member this is.
_FAMILIES = (
    re.compile(r"(?P<family>knn_(?:image|part)_.+)_k(?P<member>\d+)"),
    re.compile(r"(?P<family>grad_norm)_(?P<member>.+)"),
    re.compile(r"(?P<member>last_layer)_(?P<family>lr)"),
    re.compile(r"(?P<head>probe)_(?P<member>cls|patch)_(?P<family>.+)"),
    re.compile(r"(?P<family>.+)_(?P<member>cls|patch|patches|image|part|local|global)"),
)


@dataclass(frozen=True)
class LegendEntry:
    """What a curve is called, its mark, and its last value."""

    mark: Markup
    name: str
    last: str


@dataclass(frozen=True)
class Chart:
    """A drawing with its legend; ``broken`` says where values are not finite, empty where all are."""

    title: str
    remark: str
    drawing: Markup
    legend: tuple[LegendEntry, ...]
    broken: str


@dataclass(frozen=True)
class ChartGroup:
    """Charts that answer one question."""

    question: str
    explanation: str
    charts: tuple[Chart, ...]


def chart_groups(records: Sequence[Mapping[str, Any]]) -> list[ChartGroup]:
    """Draws every series of numbers, whatever it is called; a null stands for a number that was not finite.

    Args:
        records: of a metrics file; those without an iteration are passed over.
    """
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in records:
        iteration = record.get("iteration")
        if not isinstance(iteration, int | float):
            continue
        for question, name, value in _numbers(record):
            points.setdefault((question, name), []).append((iteration, value))
    charts: dict[str, dict[str, list[Line]]] = {}
    for (question, name), rows in points.items():
        family, member = _family(name)
        rows.sort(key=lambda row: row[0])
        values = np.array(rows, dtype=np.float64)
        charts.setdefault(question, {}).setdefault(family, []).append(Line(member, values[:, 0], values[:, 1]))
    warned = sorted({record["iteration"] for record in records if record.get("warnings") and "iteration" in record})
    questions = [*_ORDER, *(question for question in charts if question not in _ORDER)]
    return [
        ChartGroup(
            question,
            _EXPLAINED.get(question, ""),
            tuple(_chart(family, lines, warned) for family, lines in charts[question].items()),
        )
        for question in questions
        if question in charts
    ]


def _numbers(record: Mapping[str, Any], question: str = "") -> Iterable[tuple[str, str, float]]:
    """Question, name and value of every number in a record and in the mappings inside it."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, _question_of_section(name))
        elif name not in _NOT_DRAWN and (value is None or _is_number(value)):
            yield _question_of(name, question), name, np.nan if value is None else float(value)


def _question_of_section(name: str) -> str:
    known = {"timing": SPEED, "evaluation": PROBES}
    return known.get(name, MONITORS)


def _question_of(name: str, question: str) -> str:
    if name.endswith("loss"):
        return LOSSES
    if name in _SCHEDULES:
        return SCHEDULES
    if name.startswith("grad_norm"):
        return GRADIENTS
    if name in _SPEED:
        return SPEED
    # Figures without labels, such as the effective rank, are taken together with the probes.
    if question == PROBES and not name.startswith(("knn_", "best_")):
        return MONITORS
    return question or MONITORS


def _family(name: str) -> tuple[str, str]:
    """The chart that a series belongs to, and its name there."""
    for pattern in _FAMILIES:
        if match := pattern.fullmatch(name):
            head = f"{match['head']}_" if "head" in match.groupdict() else ""
            member = f"k = {match['member']}" if match["member"].isdigit() else match["member"].replace("_", " ")
            return head + match["family"], _MEMBERS.get(member, member)
    return name, ""


def _chart(family: str, lines: Sequence[Line], warned: Sequence[float]) -> Chart:
    title, remark = _title(family)
    alone = "last value" if len(lines) == 1 else "all but the last layer" if family == "lr" else title
    named = sorted((replace(line, name=line.name or alone) for line in lines), key=lambda line: _natural(line.name))
    legend = tuple(LegendEntry(draw_swatch(number), line.name, short(line.last)) for number, line in enumerate(named))
    least = _LEAST_HEIGHT if family.startswith("knn_") else 0.0
    drawing = draw_lines(title, named, least_height=least, marks=warned)
    return Chart(title, remark, drawing, legend, _broken(named))


def _title(family: str) -> tuple[str, str]:
    """Title of a chart, and how to read it."""
    if family in _TITLES:
        return _TITLES[family]
    if match := re.fullmatch(r"knn_(image|part)_(.+)", family):
        figure = match[2].replace("_", " ").replace("auroc", "AUROC")
        return f"k-NN {figure} per {match[1].replace('image', 'photo')}", ""
    return family.replace("_", " "), ""


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts ``k10`` before ``k100``, and after ``k2``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _broken(lines: Sequence[Line]) -> str:
    said = []
    for line in lines:
        bad = line.iterations[~np.isfinite(line.values)]
        if len(bad):
            name = f"{line.name}: " if len(lines) > 1 else ""
            said.append(f"{name}{len(bad)} of {len(line.values)} values not finite, first at iteration {bad[0]:.0f}")
    return "; ".join(said)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
