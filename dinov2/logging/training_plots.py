"""Charts of a run: which of its numbers belong together, what they mean, and the PNG files of pretraining."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dinov2.config import ConfigError, load_config
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
        "scores",
        "Did it get better on val?",
        "After every evaluation; what is worth keeping is the best of them, which was chosen on these images.",
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
# Question and explanation where a task head was trained.
_OF_TASKS = {
    "losses": ("Did the losses behave?", "Where train falls while val rises, images are learnt by heart."),
    "monitors": ("Were the updates steady?", ""),
    "schedules": ("How were learning rate and weight decay set over time?", "Set by the options, not measured."),
}
GROUP_NAMES = tuple(group.name for group in _GROUPS)
_SCHEDULES = ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp")
_THROUGHPUT = ("images_per_second", "data_wait_fraction", "iteration_seconds", "memory_gib")
_NOT_DRAWN = ("iteration", "batch_size", "seconds", "eta_seconds", "comparison")
_MAX_ITERATION = 1e12
_MAX_CURVES = 12  # of one chart
_BASELINES = {"chance": "chance", "random": "random backbone", "image_statistics": "image statistics", "start": "start"}
# Title and, where the values need it, how to read them.
_TITLES = {
    "total_loss": ("total loss", ""),
    "dino_local_crops_loss": ("DINO loss of local crops, in nats", ""),
    "dino_global_crops_loss": ("DINO loss of global crops, in nats", ""),
    "ibot_loss": ("iBOT loss of masked patches, in nats", ""),
    "koleo_loss": ("KoLeo loss", "Falls as class tokens spread."),
    "loss": ("loss on train and val", "On val without random changes of the images: it may lie below."),
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
    "probe_rank": (
        "effective rank of the features, in directions",
        "Directions that are used; a fall to a few is a collapse.",
    ),
    "probe_cosine": (
        "mean cosine of features",
        "Of class tokens between images, of patches within an image; near 1 all look the same to the model.",
    ),
    "probe_drift": ("change of patch similarities since the start", ""),
}
_TASK_FAMILIES = (re.compile(r"(?P<family>[^/]+)/(?P<member>.+)"),)  # iou/crack and iou/dent
_TASK_LOSSES = (
    re.compile(r"(?P<member>val) (?P<family>.*loss)"),
    re.compile(r"(?P<member>)(?:total_)(?P<family>loss)"),
)
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

    Args:
        metrics_path: the metrics file.
        output_dir: folder of the run; its ``config.yaml``, if that is one of pretraining, gives the batch size, see
            `chart_groups`.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: when there is no metrics file.
        ValueError: when it holds no record that can be drawn.
    """
    records = read_metrics(metrics_path)
    batch_size = None
    with suppress(ConfigError, OSError):
        batch_size = load_config(Path(output_dir) / "config.yaml").train.batch_size_per_gpu
    groups = chart_groups(records, batch_size=batch_size)
    if not groups:
        raise ValueError(f"{metrics_path} holds no training or evaluation record to draw ({len(records)} records)")
    folder = Path(output_dir) / "plots"
    remark = " (dotted: warnings of the log)" if any(record.get("warnings") for record in records) else ""
    return [
        save_png(draw_charts(group.charts, group.question + remark), folder / f"{group.name}.png") for group in groups
    ]


def chart_groups(
    records: Sequence[Mapping[str, Any]], *, batch_size: int | None = None, fine_tuning: bool = False
) -> list[ChartGroup]:
    """Sorts every series of numbers into charts, whatever it is called, and the charts into groups.

    Args:
        records: of a metrics file; those without an iteration are passed over.
        batch_size: images per process, from which the chance that crops find each other follows; None if not known.
        fine_tuning: whether they are those of a task head, whose losses on train and val share a chart.
    """
    numbered = [record for record in records if _is_place(record.get("iteration"))]
    series = collect_series(
        ((group, name), record["iteration"], value)
        for record in numbered
        for group, name, value in _values(record, fine_tuning=fine_tuning)
    )
    families: dict[tuple[str, str], list[Curve]] = {}
    for (group, name), (iterations, values) in series.items():
        patterns = _TASK_FAMILIES if group == "scores" else (*_TASK_LOSSES, *_FAMILIES) if fine_tuning else _FAMILIES
        match = next((match for pattern in patterns if (match := pattern.fullmatch(name))), None)
        named = match.groupdict() if match else {"family": name, "member": ""}
        member = f"k = {named['member']}" if named["member"].isdigit() else named["member"].replace("_", " ")
        family = named.get("head", "") + named["family"]
        families.setdefault((group, family), []).append(Curve(_MEMBERS.get(member, member), iterations, values))
    warned = sorted({record["iteration"] for record in numbered if record.get("warnings")})
    lines = _baseline_lines(numbered)
    if batch_size is not None and batch_size > 1:
        lines["crop_match"] = [("chance", 1 / batch_size)]
    charts: dict[str, list[Chart]] = {}
    for (group, family), curves in families.items():
        charts.setdefault(group, []).append(_chart(group, family, curves, warned, lines.get(family, ())))
    groups = [replace(group, charts=tuple(charts[group.name])) for group in _GROUPS if group.name in charts]
    texts = {group.name: (group.question, group.explanation) for group in groups} | (_OF_TASKS if fine_tuning else {})
    return [replace(group, question=texts[group.name][0], explanation=texts[group.name][1]) for group in groups]


def _is_place(iteration: Any) -> bool:
    """Whether something can be a place on an axis: also no iteration that a damaged file makes larger than any."""
    return isinstance(iteration, int | float) and abs(iteration) < _MAX_ITERATION


def _baseline_lines(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, float]]]:
    """What k-NN has to beat, by the name of the family of charts; as measured last."""
    lines: dict[str, list[tuple[str, float]]] = {}
    for record in records:
        evaluation = record.get("evaluation")
        comparison = evaluation.get("comparison") if isinstance(evaluation, Mapping) else None
        if not isinstance(comparison, Mapping):
            continue
        found = ((name, comparison.get(key)) for key, name in _BASELINES.items())
        values = ((name, value.get("score") if isinstance(value, Mapping) else value) for name, value in found)
        lines[f"knn_{comparison.get('metric')}"] = [
            (name, float(value)) for name, value in values if isinstance(value, int | float)
        ]
    return lines


def _values(
    record: Mapping[str, Any], section: str = "", *, fine_tuning: bool = False
) -> Iterator[tuple[str, str, Any]]:
    """Group, name and value of everything in a record and in the mappings inside it."""
    for name, value in record.items():
        if name in _NOT_DRAWN:
            continue
        if isinstance(value, Mapping):
            yield from _values(value, name, fine_tuning=fine_tuning)
        elif fine_tuning and section == "evaluation":
            yield ("losses", f"val {name}", value) if name.endswith("loss") else ("scores", name, value)
        elif name.endswith("loss"):
            yield "losses", name, value
        elif name in _SCHEDULES:
            yield "schedules", name, value
        elif name in _THROUGHPUT or section == "timing":
            yield "throughput", name, value
        else:  # what needs no labels, such as the effective rank, is taken together with the monitors
            scored = section == "evaluation" and name.startswith(("knn_", "best_"))
            yield "knn" if scored else "monitors", name, value


def _chart(
    group: str,
    family: str,
    curves: Sequence[Curve],
    warned: Sequence[float],
    lines: Sequence[tuple[str, float]],
) -> Chart:
    title, remark = _TITLES.get(family, (family.replace("_", " "), ""))
    if match := re.fullmatch(r"knn_(image|part)_(.+)", family):
        title = f"k-NN {match[2].replace('_', ' ').replace('auroc', 'AUROC')} per {match[1]}"
    if "auroc" in family and not lines:
        lines = [("chance", 0.5)]
    on_val = any(curve.name == "val" for curve in curves)
    alone = "train" if on_val else "last value" if len(curves) == 1 else title
    if family == "lr" and len(curves) > 1:
        alone = "all but the last layer"
    named = [replace(curve, name=curve.name or alone) for curve in curves]
    if len(named) > _MAX_CURVES:
        worst = sorted(named, key=lambda curve: curve.y[-1] if math.isfinite(curve.y[-1]) else -math.inf)
        remark = f"{remark} The {_MAX_CURVES} of {len(named)} with the lowest last value.".strip()
        named = worst[:_MAX_CURVES]
    return Chart(
        title=title,
        remark=remark,
        curves=sorted(named, key=lambda curve: (len(curve.name) if curve.name.startswith("k = ") else 0, curve.name)),
        marks=warned,
        lines=lines,
        # Scores differ by a few hundredths for no reason; what options set has no noise.
        min_height=0.1 if group in ("knn", "scores") else 0.0,
        min_share=0.0 if group == "schedules" else 0.05,
        from_zero=group == "throughput",
        smooth=group == "losses" and not on_val,
    )
