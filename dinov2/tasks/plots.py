"""Pictures of a supervised run: its loss and every figure over the epochs, and what it takes for what."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from dinov2.utils.files import write_atomically

_GREY, _RED = "#55585c", "#b3372f"
# Okabe and Ito, then their darker shades: told apart with any colour vision.
_LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#004a74", "#8a3d00", "#00664a", "#85416a")
_MOST_NUMBERED_CLASSES = 30  # beyond it the cells of a confusion matrix are too small for numbers
_MOST_LABELLED_CLASSES = 60


def plot_training(
    records: Sequence[Mapping[str, Any]],
    folder: str | Path,
    *,
    best_epoch: int | None = None,
    titles: Mapping[str, str] | None = None,
) -> list[Path]:
    """Draws ``loss.png`` and one PNG per figure of the validation set.

    Figures that share a beginning up to ``/``, such as ``iou/crack`` and ``iou/dent``, share a picture.

    Args:
        records: one per epoch, such as ``{"epoch": 3, "train": {"loss": 0.2, …}, "val": {"accuracy": 0.9, …}}``;
            ``train`` and ``val`` may be missing, None stands for a value that is not finite, what is no number is left
            out. Records without an epoch are ignored.
        folder: made where needed.
        best_epoch: marked in every picture.
        titles: what a figure's picture is called, where that is not the figure's own name.

    Returns:
        The files written.
    """
    epochs = sorted((record for record in records if "epoch" in record), key=lambda record: int(record["epoch"]))
    pictures: dict[str, dict[str, str]] = {}  # file name to label and "train"/"val" path of every line
    for name in _names(epochs, "train"):
        pictures.setdefault("loss", {})[f"train {_words(name)}"] = f"train.{name}"
    for name in _names(epochs, "val"):
        if name.endswith("loss"):
            pictures.setdefault("loss", {})[f"val {_words(name)}"] = f"val.{name}"
        else:
            group, _, member = name.partition("/")
            title = (titles or {}).get(group, group)
            pictures.setdefault(_file_name(title), {})[_words(member or group)] = f"val.{name}"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, lines in pictures.items():
        figure = _draw_curves(epochs, lines, _words(name), best_epoch)
        written.append(folder / f"{name}.png")
        write_atomically(written[-1], partial(figure.savefig, format="png"))
    return written


def draw_confusion_matrix(counts: ArrayLike, classes: Sequence[str], path: str | Path) -> None:
    """Draws how many of each class (rows) were taken for each class (columns), and as shares of the row.

    Args:
        counts: integers ``[C, C]``.
        classes: ``C`` names.
        path: PNG file; its folder is made where needed.

    Raises:
        ValueError: when the counts are not square or have another number of classes.
    """
    matrix = np.asarray(counts, dtype=np.int64)
    if matrix.shape != (len(classes), len(classes)) or not matrix.size:
        raise ValueError(f"a confusion matrix of {len(classes)} classes cannot be {list(matrix.shape)}")
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    side = min(max(2.6 + 0.42 * len(classes), 3.6), 15.0)
    figure = Figure(figsize=(2 * side, side), dpi=120, layout="constrained")
    count_axes, share_axes = figure.subplots(1, 2)
    accuracy = np.trace(matrix) / matrix.sum() if matrix.sum() else math.nan
    figure.suptitle(f"{matrix.sum():,} in all, {100 * accuracy:.1f} % right", fontweight="bold")
    _draw_matrix(count_axes, shares, [[_short(int(value)) for value in row] for row in matrix], classes, "counts")
    percents = [[f"{100 * value:.0f}" if value else "" for value in row] for row in shares]
    _draw_matrix(share_axes, shares, percents, classes, "% of the true class")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(figure.savefig, format="png"))


def _draw_curves(
    epochs: Sequence[Mapping[str, Any]], lines: Mapping[str, str], title: str, best_epoch: int | None
) -> Figure:
    figure = Figure(figsize=(7.5, 4.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(color="#e3e5e8", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_GREY, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.set_xlabel("epoch")
    axes.set_title(title, fontweight="bold", parse_math=False)
    handles = []
    for number, path in enumerate(lines.values()):
        part, name = path.split(".", 1)
        points = [
            (record["epoch"], _value(record[part][name])) for record in epochs if name in (record.get(part) or {})
        ]
        x, y = np.array(points, dtype=np.float64).T
        colour = _LINES[number % len(_LINES)]
        style = "-" if part == "val" or len(lines) == 1 else "--"
        marker = "os^D"[number // len(_LINES) % 4]
        handles += axes.plot(x, y, style, color=colour, linewidth=1.6, marker=marker, markersize=3.5)
        broken = x[~np.isfinite(y)]
        if len(broken):
            axes.plot(
                broken, np.zeros(len(broken)), "x", color=_RED, transform=axes.get_xaxis_transform(), clip_on=False
            )
    if best_epoch is not None:
        axes.axvline(best_epoch, color=_GREY, linewidth=1.0, linestyle=":")
        axes.text(best_epoch, 1.0, " best", transform=axes.get_xaxis_transform(), color=_GREY, fontsize=9, va="top")
    if len(lines) > 1:
        legend = axes.legend(handles, list(lines), frameon=False, fontsize=9, ncols=1 + len(lines) // 12)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _draw_matrix(
    axes: Axes, shares: NDArray[np.float64], texts: Sequence[Sequence[str]], classes: Sequence[str], title: str
) -> None:
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    count = len(classes)
    small = 9 if count <= 12 else 8 if count <= 20 else 7
    step = math.ceil(count / _MOST_LABELLED_CLASSES)
    ticks = range(0, count, step)
    names = [_cut(classes[index]) for index in ticks]
    axes.set_xticks(ticks, names, rotation=90 if count > 4 else 0, fontsize=small, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=small, parse_math=False)
    if count > _MOST_NUMBERED_CLASSES:
        return
    for row in range(count):
        for column in range(count):
            colour = "white" if shares[row, column] > 0.55 else "#202124"
            text = axes.text(column, row, texts[row][column], ha="center", va="center", color=colour, fontsize=small)
            text.set_in_layout(False)  # it lies inside anyway, and measuring hundreds takes seconds


def _names(records: Iterable[Mapping[str, Any]], part: str) -> list[str]:
    """Names of all numbers (None stands for one that is not finite), in order of first appearance."""
    found = (item for record in records for item in (record.get(part) or {}).items())
    return list(dict.fromkeys(name for name, value in found if value is None or _is_number(value)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan


def _words(name: str) -> str:
    return name.replace("_", " ")


def _file_name(name: str) -> str:
    """A name that every file system takes."""
    return re.sub(r"[^\w.@-]+", "_", name).strip("._") or "figure"


def _short(count: int) -> str:
    """A count in at most five letters."""
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= 10 * size or (count >= size and size > 10**3):
            return f"{count / size:.3g}{letter}"
    return str(count)


def _cut(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "…"
