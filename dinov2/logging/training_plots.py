"""Charts of a pretraining run: which of its numbers belong together, what they mean, and their PNG files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinov2.logging.metrics_file import read_metrics
from dinov2.logging.plots import Chart, Curve, collect_series, draw_charts, save_png


@dataclass(frozen=True)
class ChartGroup:
    """Charts that answer one question.

    Attributes:
        name: of their PNG file.
        question: heading of the group.
        explanation: how to read the answer; may be empty.
        charts: none in an empty group.
    """

    name: str
    question: str
    explanation: str = ""
    charts: tuple[Chart, ...] = ()


_GROUPS = (
    ChartGroup(
        "knn",
        "Did the features get better during training?",
        "Labelled images are classified with the features of that moment; training itself never uses the labels. "
        "Whoever picks the best moment here has chosen on these images: check it on others.",
    ),
    ChartGroup(
        "losses",
        "Did the losses behave?",
        "The total need not fall all the time: the teacher, which sets the target, gets better too. Jumps, a rise to "
        "the end, or values that are not finite are bad signs.",
    ),
    ChartGroup("monitors", "Are there signs of collapse, overfitting or unsteady updates?"),
    ChartGroup(
        "schedules",
        "How were learning rate, weight decay, momentum and temperature set over time?",
        "Set by the options, not measured.",
    ),
    ChartGroup("throughput", "How fast was it, and did the data keep up?"),
)
GROUP_NAMES = tuple(group.name for group in _GROUPS)
_SCHEDULES = ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp")
_THROUGHPUT = ("images_per_second", "data_wait_fraction", "iteration_seconds", "memory_gib")
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
    "kl": ("divergence of the student from its targets, in nats", ""),
    "teacher_cosine": ("mean cosine between class tokens of a batch", "Near 1 all images look the same to the model."),
    "crop_match": (
        "share of the images whose two global crops find each other in the batch",
        "At one over the batch the crops of an image look like those of any other, and there is nothing to learn from.",
    ),
    "prototypes_used": ("share of prototypes in use", ""),
    "prototypes_won": ("share of prototypes that were the largest of a target", ""),
    "probe_rank": ("effective rank of the features", "Directions that are used; a fall to a few is a collapse."),
    "probe_cosine": (
        "mean cosine of features",
        "Of class tokens between images, of patches within an image; near 1 all look the same to the model.",
    ),
    "probe_drift": ("change of patch similarities since the start", ""),
}
_MEMBERS = {"cls": "class token", "patch": "patches"}
# Names of one family are drawn together: the family, and which member this is.
_FAMILIES = (
    re.compile(r"(?P<family>knn_(?:image|part)_.+)_k(?P<member>\d+)"),
    re.compile(r"(?P<family>grad_norm)_(?P<member>.+)"),
    re.compile(r"(?P<member>last_layer)_(?P<family>lr)"),
    re.compile(r"(?P<head>probe_)(?P<member>cls|patch)_(?P<family>.+)"),
    re.compile(r"(?P<family>.+)_(?P<member>cls|patch|patches|image|part|local|global)"),
)


def plot_training(metrics_path: str | Path, output_dir: str | Path) -> list[Path]:
    """Draws a run's metrics file into PNG files under ``output_dir/plots``, one per group of charts that has data.

    ``knn.png`` shows evaluations, ``{"iteration": i, "evaluation": {"knn_image_balanced_accuracy_k10": 0.93, …}}``,
    ``losses.png``, ``schedules.png`` and ``throughput.png`` show training, and ``monitors.png`` how targets, features
    and gradients fare, from both.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: when there is no metrics file.
        ValueError: when it holds no record that can be drawn.
    """
    records = read_metrics(metrics_path)
    groups = chart_groups(records)
    if not groups:
        raise ValueError(f"{metrics_path} holds no training or evaluation record to draw ({len(records)} records)")
    folder = Path(output_dir) / "plots"
    remark = " (dotted: warnings of the log)" if any(record.get("warnings") for record in records) else ""
    return [
        save_png(draw_charts(group.charts, group.question + remark), folder / f"{group.name}.png") for group in groups
    ]


def chart_groups(records: Sequence[Mapping[str, Any]]) -> list[ChartGroup]:
    """Sorts every series of numbers into charts, whatever it is called, and the charts into groups.

    Args:
        records: of a metrics file; those without an iteration are passed over.
    """
    numbered = [record for record in records if isinstance(record.get("iteration"), int | float)]
    series = collect_series(
        ((group, name), record["iteration"], value) for record in numbered for group, name, value in _values(record)
    )
    families: dict[tuple[str, str], list[Curve]] = {}
    for (group, name), (iterations, values) in series.items():
        match = next((match for pattern in _FAMILIES if (match := pattern.fullmatch(name))), None)
        named = match.groupdict() if match else {"family": name, "member": ""}
        member = f"k = {named['member']}" if named["member"].isdigit() else named["member"].replace("_", " ")
        family = named.get("head", "") + named["family"]
        families.setdefault((group, family), []).append(Curve(_MEMBERS.get(member, member), iterations, values))
    warned = sorted({record["iteration"] for record in numbered if record.get("warnings")})
    charts: dict[str, list[Chart]] = {}
    for (group, family), curves in families.items():
        charts.setdefault(group, []).append(_chart(group, family, curves, warned))
    return [replace(group, charts=tuple(charts[group.name])) for group in _GROUPS if group.name in charts]


def _values(record: Mapping[str, Any], section: str = "") -> Iterator[tuple[str, str, Any]]:
    """Group, name and value of everything in a record and in the mappings inside it."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _values(value, name)
        elif name in _NOT_DRAWN:
            continue
        elif name.endswith("loss"):
            yield "losses", name, value
        elif name in _SCHEDULES:
            yield "schedules", name, value
        elif name in _THROUGHPUT or section == "timing":
            yield "throughput", name, value
        else:  # what needs no labels, such as the effective rank, is taken together with the monitors
            scored = section == "evaluation" and name.startswith(("knn_", "best_"))
            yield "knn" if scored else "monitors", name, value


def _chart(group: str, family: str, curves: Sequence[Curve], warned: Sequence[float]) -> Chart:
    title, remark = _TITLES.get(family, (family.replace("_", " "), ""))
    if match := re.fullmatch(r"knn_(image|part)_(.+)", family):
        title = f"k-NN {match[2].replace('_', ' ').replace('auroc', 'AUROC')} per {match[1]}"
    alone = "last value" if len(curves) == 1 else "all but the last layer" if family == "lr" else title
    named = [replace(curve, name=curve.name or alone) for curve in curves]
    return Chart(
        title=title,
        remark=remark,
        curves=sorted(named, key=lambda curve: (len(curve.name) if curve.name.startswith("k = ") else 0, curve.name)),
        marks=warned,
        min_height=0.1 if group == "knn" else 0.0,  # scores differ by a few hundredths for no reason
        from_zero=group == "throughput",
        smooth=group == "losses",
    )
