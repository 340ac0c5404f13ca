"""Results of several backbones side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dinov2.eval.metrics import Figure
from dinov2.eval.results import RESULTS_FILE, EvaluationResults

MOST_VARIANTS = 12  # of one backbone; of more, as of the 52 classifiers of a grid, the chosen one is shown
METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "auroc",
    "average_precision": "average precision",
    "map": "map",
}


def read_named_results(pairs: Sequence[str]) -> dict[str, EvaluationResults]:
    """Reads ``name=folder`` pairs, each folder holding the results of an evaluator.

    Raises:
        ValueError: a word is no such pair, or a file is not an evaluator's result.
        FileNotFoundError: a folder holds no results.
    """
    results = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"expected name=folder, found {pair!r}")
        path = Path(folder) / RESULTS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {RESULTS_FILE}: run an evaluator with --output-dir {folder}")
        try:
            results[name] = EvaluationResults.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a result of an evaluator: {error!r}") from error
    return results


def compare_results(results: Mapping[str, EvaluationResults], *, intervals: bool = False) -> str:
    """One row per backbone and variant, ``*`` marks the chosen one; parts are shown where a part has several photos.

    Of more than `MOST_VARIANTS` variants only the chosen one is shown, on every set that it was judged on.

    Args:
        results: by name of the backbone; at least one.
        intervals: shows 95 % intervals behind the figures that have one.
    """
    every = [(name, variant, found.scores[variant]) for name, found in results.items() for variant in _shown(found)]
    levels = ("image", "part") if any(scores.part.count != scores.image.count for *_, scores in every) else ("image",)
    present = {metric for *_, scores in every for metric in (*scores.image.figures, *scores.part.figures)}
    metrics = [metric for metric in METRICS if metric in present]
    rows = [["backbone", "variant", *(f"{level} {METRICS[metric]}" for level in levels for metric in metrics)]]
    for name, variant, scores in every:
        mark = "*" if variant == results[name].chosen else ""
        by_level = {"image": scores.image.figures, "part": scores.part.figures}
        figures = [_show(by_level[level].get(metric), intervals) for level in levels for metric in metrics]
        rows.append([name, f"{variant}{mark}", *figures])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    left_out = sum(len(found.scores) for found in results.values()) - len(every)
    return "\n".join([*lines, f"({left_out} variants that were not chosen are left out)"] if left_out else lines)


def _shown(found: EvaluationResults) -> list[str]:
    """Names of the variants that a reader wants to see."""
    if not found.chosen or len(found.scores) <= MOST_VARIANTS:
        return list(found.scores)
    return [name for name in found.scores if name == found.chosen or name.startswith(f"{found.chosen} on ")]


def _show(figure: Figure | None, intervals: bool) -> str:
    if figure is None:
        return "-"
    if not intervals or figure.low is None:
        return f"{figure.value:.3f}"
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
