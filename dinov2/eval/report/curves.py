"""Everything that a run's metrics file holds, as groups of charts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from dinov2.eval.report.svg import Line, draw_lines, draw_swatch, short

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
