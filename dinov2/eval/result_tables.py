"""Results of evaluators as text for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from dinov2.eval.metrics import Figure
from dinov2.eval.scoring import LevelScores, Scores

SHORT = {
    "balanced_accuracy": "balanced",
    "average_precision": "ap",
    "escape_rate_at_0.1": "escape@0.1%",
    "escape_rate_at_1": "escape@1%",
    "escape_rate_at_5": "escape@5%",
}
MOST_CLASSES_SHOWN = 10
MOST_VARIANTS_WITH_INTERVALS = 4


def results_table(
    evaluator: str,
    classes: Sequence[str],
    scores: Mapping[str, Scores],
    chosen: str,
    settings: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, Any]],
) -> str:
    """The figures of all variants, and of the chosen one (of all where none is) the intervals; see `EvaluationResults`.

    Parts are shown only where a part has several photos.
    """
    blocks = [_heading(evaluator, classes, settings, datasets)]
    parts_differ = any(variant.part.count != variant.image.count for variant in scores.values())
    levels = ("image", "part") if parts_differ else ("image",)
    for level in levels:
        shown = {name: variant.image if level == "image" else variant.part for name, variant in scores.items()}
        blocks.append(_figures_block(level, shown, chosen))
    detailed = [chosen] if chosen else list(scores)[:MOST_VARIANTS_WITH_INTERVALS]
    for name in detailed:
        why = f", chosen by {settings['chosen_by']}" if name == chosen and "chosen_by" in settings else ""
        for level in levels:
            scored = scores[name].image if level == "image" else scores[name].part
            blocks.append(_detail_block(f"{name}{why}, per {level}", scored, classes))
    return "\n".join(block for block in blocks if block)


def spread_table(few_shot: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]) -> str:
    """Mean, deviation and range of the figures of several tries as text; empty where there are none.

    Args:
        few_shot: by variant, what `summarise_tries` says.
    """
    blocks = []
    for level in ("image", "part") if few_shot else ():
        spreads = {variant: levels[level] for variant, levels in few_shot.items()}
        names = dict.fromkeys(name for figures in spreads.values() for name in figures)
        rows = [[f"per {level}, mean ± std [min, max] over tries", *spreads]]
        for name in names:
            rows.append(
                [f"  {SHORT.get(name, name)}", *(_spread_cell(figures.get(name)) for figures in spreads.values())]
            )
        blocks.append("\n".join(align(rows)))
    return "\n".join(blocks)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines whose columns stand below each other; the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _heading(
    evaluator: str, classes: Sequence[str], settings: Mapping[str, Any], datasets: Mapping[str, Mapping[str, Any]]
) -> str:
    described = f" on {settings['features']}" if "features" in settings else ""
    sets = [
        f"{name}: {values['num_images']} images of {values['num_parts']} parts" for name, values in datasets.items()
    ]
    kinds = [f"{len(classes)} classes"] if classes else []
    return f"{evaluator}{described}: " + ", ".join([*kinds, *sets])


def _figures_block(level: str, scores: Mapping[str, LevelScores], chosen: str) -> str:
    names = list(dict.fromkeys(name for scored in scores.values() for name in scored.figures))
    if not names:
        return ""
    count = next(iter(scores.values())).count
    rows = [[f"per {level} ({count})", *(SHORT.get(name, name) for name in names)]]
    for variant, scored in scores.items():
        figures = [f"{scored.figures[name].value:.4f}" if name in scored.figures else "-" for name in names]
        rows.append([f"{variant}*" if variant == chosen else variant, *figures])
    return "\n".join(align(rows))


def _detail_block(title: str, scores: LevelScores, classes: Sequence[str]) -> str:
    """Figures with their intervals, and the confusion of few classes."""
    lines = []
    if any(figure.low is not None for figure in scores.figures.values()):
        rows = [[f"  {SHORT.get(name, name)}", *_figure_cells(figure)] for name, figure in scores.figures.items()]
        lines += [f"{title}, 95 % intervals over parts", *align(rows)]
    if scores.confusion and len(scores.confusion) <= MOST_CLASSES_SHOWN and len(classes) == len(scores.confusion):
        rows = [["  label, predicted as", *classes]]
        rows += [[f"  {name}", *map(str, row)] for name, row in zip(classes, scores.confusion, strict=True)]
        lines += [] if lines else [title]
        lines += align(rows)
    return "\n".join(lines)


def _figure_cells(figure: Figure) -> list[str]:
    if figure.low is None or figure.high is None:
        return [f"{figure.value:.4f}", ""]
    return [f"{figure.value:.4f}", f"[{figure.low:.4f}, {figure.high:.4f}]"]


def _spread_cell(spread: Mapping[str, Any] | None) -> str:
    if spread is None:
        return "-"
    return f"{spread['mean']:.3f} ± {spread['std']:.3f} [{min(spread['values']):.3f}, {max(spread['values']):.3f}]"
