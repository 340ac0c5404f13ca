"""Pictures of a run: losses, schedules, throughput and k-NN scores over iterations, from its metrics file."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dinov2.logging.metrics_file import read_metrics
from dinov2.utils.files import write_atomically

Series = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]  # iterations and values, NaN where there is none

_BLUE, _PALE_BLUE, _RED, _GREY = "#1f5a99", "#a9c7e4", "#b3372f", "#55585c"
_LINE_COLOURS = ("#1f5a99", "#d1802b", "#3c8a4e", "#8a4fa3", "#b3372f", "#55585c")
_SMOOTHING_SHARE = 0.02  # the smoothed loss looks back over this share of the run

_SCHEDULES = {
    "learning rate": ("lr", "last_layer_lr"),
    "weight decay": ("weight_decay",),
    "teacher momentum": ("momentum",),
    "teacher temperature": ("teacher_temp",),
}
_THROUGHPUT = {
    "images_per_second": ("throughput", "images / s", 1.0),
    "data_wait_fraction": ("time spent waiting for data", "% of an iteration", 100.0),
    "memory_gib": ("memory", "GiB", 1.0),
}
# Panels of the monitors: what they show, the unit, and names of lines of training or evaluation with their label.
_MONITORS = {
    "effective rank": ("directions", {"probe_cls_rank": "class tokens", "probe_patch_rank": "patches"}),
    "cosine on the probe set": (
        "cosine",
        {"probe_cls_cosine": "between images", "probe_patch_cosine": "within an image"},
    ),
    "drift of patch similarities": ("mean change of cosine", {"probe_patch_drift": ""}),
    "teacher entropy": ("share of log K", {"teacher_entropy_cls": "class tokens", "teacher_entropy_patch": "patches"}),
    "what a target tells of its image": (
        "nats",
        {"teacher_information_cls": "class tokens", "teacher_information_patch": "patches"},
    ),
    "divergence of student and teacher": ("nats", {"kl_cls": "class tokens", "kl_patch": "patches"}),
    "prototypes used": ("% of all", {"prototypes_used_cls": "class tokens", "prototypes_used_patch": "patches"}),
    "prototypes that led a target": (
        "% of all",
        {"prototypes_won_cls": "class tokens", "prototypes_won_patch": "patches"},
    ),
    "cosine in the batch": ("cosine", {"teacher_cosine": "between class tokens"}),
    "crops that find each other": ("share of the batch", {"crop_match": "by class tokens"}),
}
_KNN_KEY = re.compile(r"knn_(?P<what>.+)_k(?P<k>\d+)")


def plot_training(metrics_path: str | Path, output_dir: str | Path) -> list[Path]:
    """Draws a run's metrics file into PNG files under ``output_dir/plots``.

    ``losses.png``, ``schedules.png`` and ``throughput.png`` show lines of training, ``knn.png`` those of evaluation,
    ``{"iteration": i, "evaluation": {"knn_image_balanced_accuracy_k10": 0.93, ...}}``, whose names are
    ``knn_{image or part}_{score}_k{k}`` and whose scores are in [0, 1]. ``monitors.png`` shows how targets and features
    fare, from both, and marks warnings. A picture without data is not drawn.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: when there is no metrics file.
        ValueError: when it holds no record that can be drawn.
    """
    records = read_metrics(metrics_path)
    training = [record for record in records if "iteration" in record and "evaluation" not in record]
    evaluation = [record for record in records if "iteration" in record and "evaluation" in record]
    figures = {
        "losses": _draw_losses(training),
        "schedules": _draw_schedules(training),
        "throughput": _draw_throughput(training),
        "knn": _draw_knn(evaluation),
        "monitors": _draw_monitors(training, evaluation),
    }
    if not any(figures.values()):
        raise ValueError(f"{metrics_path} holds no training or evaluation record to draw ({len(records)} records)")
    folder = Path(output_dir) / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            write_atomically(path, partial(figure.savefig, format="png"))
            written.append(path)
    return written


def _draw_losses(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    names = [name for name in _names(records) if name.endswith("loss")]
    if not names:
        return None
    figure, panels = _grid(len(names), columns=min(len(names), 3), title="Training losses")
    for name, axes in zip(names, panels, strict=True):
        iterations, values = _series(records, name)
        axes.plot(iterations, values, color=_PALE_BLUE, linewidth=1.0)
        axes.plot(iterations, _smooth(values), color=_BLUE, linewidth=1.8)
        axes.set_title(name.removesuffix("_loss").replace("_", " "))
        axes.set_ylabel("loss")
        broken = iterations[~np.isfinite(values)]
        if len(broken):
            axes.text(
                0.98, 0.95, f"{len(broken)} not finite, first at {broken[0]}",
                transform=axes.transAxes, ha="right", va="top", color=_RED, fontsize=9,
            )  # fmt: skip
    return figure


def _draw_schedules(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    present = _names(records)
    groups = {
        title: [name for name in names if name in present]
        for title, names in _SCHEDULES.items()
        if any(name in present for name in names)
    }
    if not groups:
        return None
    figure, panels = _grid(len(groups), columns=min(len(groups), 2), title="Schedules")
    for (title, names), axes in zip(groups.items(), panels, strict=True):
        # The last layer's rate lies under the other one, and shows where the two part.
        for name, colour in reversed(list(zip(names, (_BLUE, _RED), strict=False))):
            axes.plot(*_series(records, name), color=colour, linewidth=1.8 if colour == _BLUE else 3.0, label=name)
        axes.set_title(title)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
        if len(names) > 1:
            axes.legend(["last layer", "all others"], frameon=False)
    return figure


def _draw_throughput(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    timings = [{"iteration": record["iteration"], **record["timing"]} for record in records if "timing" in record]
    present = [name for name in _THROUGHPUT if name in _names(timings)]
    if not present:
        return None
    figure, panels = _grid(len(present), columns=1, title="Speed and memory")
    for name, axes in zip(present, panels, strict=True):
        title, unit, factor = _THROUGHPUT[name]
        iterations, values = _series(timings, name)
        axes.plot(iterations, values * factor, color=_BLUE, linewidth=1.4)
        if np.isfinite(values).any():
            median = float(np.nanmedian(values)) * factor
            axes.axhline(median, color=_GREY, linewidth=1.0, linestyle=":")
            axes.set_title(f"median {median:.3g} {unit}", loc="right", color=_GREY, fontsize=9)
        axes.set_title(title, loc="left")
        axes.set_ylabel(unit)
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0.0)
    return figure


def _draw_knn(records: Sequence[Mapping[str, Any]]) -> Figure | None:
    flat = [{"iteration": record["iteration"], **record["evaluation"]} for record in records]
    panels_by_score: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in _names(flat):
        if match := _KNN_KEY.fullmatch(name):
            panels_by_score[match["what"]].append((int(match["k"]), name))
    if not panels_by_score:
        return None
    figure, panels = _grid(len(panels_by_score), columns=min(len(panels_by_score), 2), title="k-NN on the teacher")
    for (what, members), axes in zip(sorted(panels_by_score.items()), panels, strict=True):
        for number, (k, name) in enumerate(sorted(members)):
            colour = _LINE_COLOURS[number % len(_LINE_COLOURS)]
            iterations, values = _series(flat, name)
            axes.plot(iterations, values * 100, color=colour, marker="o", markersize=4, label=f"k = {k}")
        axes.set_title(what.replace("_", " ").replace(" ", ": ", 1))
        axes.set_ylabel("%")
        axes.legend(frameon=False, fontsize=9)
    return figure


def _draw_monitors(training: Sequence[Mapping[str, Any]], evaluation: Sequence[Mapping[str, Any]]) -> Figure | None:
    records = [*training, *({"iteration": record["iteration"], **record["evaluation"]} for record in evaluation)]
    present = set(_names(records))
    shown = {title: panel for title, panel in _MONITORS.items() if any(name in present for name in panel[1])}
    if not shown:
        return None
    warned = [record["iteration"] for record in (*training, *evaluation) if record.get("warnings")]
    title = "Monitors of the teacher" + (" (dotted: warnings of the log)" if warned else "")
    figure, panels = _grid(len(shown), columns=min(len(shown), 3), title=title)
    for (title, (unit, names)), axes in zip(shown.items(), panels, strict=True):
        factor = 100.0 if unit.startswith("%") else 1.0
        for colour, (name, label) in zip(_LINE_COLOURS, names.items(), strict=False):
            if name in present:
                iterations, values = _series(records, name)
                marker = "o" if name.startswith("probe_") else ""
                axes.plot(
                    iterations, values * factor, color=colour, linewidth=1.4, marker=marker, markersize=4, label=label
                )
        for iteration in warned:
            axes.axvline(iteration, color=_RED, linewidth=1.0, linestyle=":")
        axes.set_title(title)
        axes.set_ylabel(unit)
        if any(names.values()):
            axes.legend(frameon=False, fontsize=9)
    return figure


def _grid(count: int, *, columns: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels that share their iterations."""
    rows = math.ceil(count / columns)
    width = 9.0 if columns == 1 else 4.6 * columns
    figure = Figure(figsize=(width, 0.5 + 2.7 * rows), dpi=120, layout="constrained")
    figure.suptitle(title, fontweight="bold")
    panels: list[Axes] = []
    for number in range(count):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.grid(color="#e3e5e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_GREY, labelsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        if number + columns >= count:  # nothing below
            axes.set_xlabel("iteration")
        panels.append(axes)
    return figure, panels


def _names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of all numbers (None stands for NaN), in order of first appearance."""
    return list(
        dict.fromkeys(
            name for record in records for name, value in record.items() if value is None or _is_number(value)
        )
    )


def _series(records: Iterable[Mapping[str, Any]], name: str) -> Series:
    points = [(record["iteration"], record[name]) for record in records if name in record]
    iterations = np.array([iteration for iteration, _ in points], dtype=np.int64)
    values = np.array([value if _is_number(value) else math.nan for _, value in points], dtype=np.float64)
    order = np.argsort(iterations, kind="stable")
    return iterations[order], values[order]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Exponential average over about ``_SMOOTHING_SHARE`` of the values, unbiased at the start; skips NaN."""
    keep = 1.0 - 1.0 / max(1.0, _SMOOTHING_SHARE * len(values))
    smoothed, total, weight = np.full_like(values, math.nan), 0.0, 0.0
    for index, value in enumerate(values):
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1.0
            smoothed[index] = total / weight
    return smoothed
