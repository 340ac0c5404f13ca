"""Results of several backbones side by side."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dinov2.eval.knn import RESULTS_FILE
from dinov2.eval.results import KnnResults, KnnScores

METRICS = ("accuracy", "balanced_accuracy", "auroc")


def read_named_results(pairs: Sequence[str]) -> dict[str, KnnResults]:
    """Reads ``name=folder`` pairs, each folder holding the results of a k-NN evaluation.

    Raises:
        ValueError: a word is no such pair, or a file is not a k-NN result.
        FileNotFoundError: a folder holds no results.
    """
    results = {}
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals or not name or not folder:
            raise ValueError(f"expected name=folder, found {pair!r}")
        path = Path(folder) / RESULTS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no {RESULTS_FILE}: run eval/knn.py with --output-dir {folder}")
        try:
            results[name] = KnnResults.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a result of eval/knn.py: {error!r}") from error
    return results


def compare_knn(results: Mapping[str, KnnResults]) -> str:
    """One row per backbone and number of neighbours; parts are shown where a part has several photos."""
    first = next(iter(results.values())).scores[0]
    levels = ("image",) if first.image.count == first.part.count else ("image", "part")
    rows = [["backbone", "k", *(f"{level} {metric.replace('_', ' ')}" for level in levels for metric in METRICS)]]
    for name, result in results.items():
        for scores in result.scores:
            rows.append(
                [name, str(scores.k), *(_figure(scores, level, metric) for level in levels for metric in METRICS)]
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _figure(scores: KnnScores, level: str, metric: str) -> str:
    value = getattr(getattr(scores, level), metric)
    return "-" if value is None else f"{value:.3f}"
