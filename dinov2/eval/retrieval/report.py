"""Figures of rankings with intervals, and what is written about them."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process
from dinov2.eval.fingerprints import find_origins
from dinov2.eval.metrics import Figure
from dinov2.eval.part_scores import number_parts
from dinov2.eval.results import EvaluationResults
from dinov2.eval.retrieval.measures import FloatArray, IntArray, QueryMeasures
from dinov2.eval.scoring import LevelScores, Scores, draw_parts, interval

logger = logging.getLogger("dinov2")

COLUMNS = ("image", "part", "label", "score", "variant", "first_hit", "best_wrong_image")
NUMBERS_AT_A_TIME = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Rankings:
    """What the queries achieved that have something to find.

    Attributes:
        measures: of ``Q`` queries.
        queries: their paths.
        parts: with which a resample draws them.
        labels: names of their classes, empty where they have none; nothing is decided by them.
        gallery: paths of what was ranked.
        num_skipped: queries that have nothing to find.
    """

    measures: QueryMeasures
    queries: Sequence[str]
    parts: Sequence[str]
    labels: Sequence[str]
    gallery: Sequence[str]
    num_skipped: int


@dataclass(frozen=True)
class RankedQueries:
    """What every query achieved under every variant, for ``predictions.csv``."""

    variants: Mapping[str, Rankings]

    def to_csv(self, classes: Sequence[str]) -> str:
        """One line per query and variant, with the columns `COLUMNS`.

        The score is the average precision, ``first_hit`` the rank of the first relevant image, from 1; the wrong image
        is that of the best rank.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for variant, rankings in self.variants.items():
            measures = rankings.measures
            described = zip(rankings.queries, rankings.parts, rankings.labels, strict=True)
            for row, (query, part, label) in enumerate(described):
                wrong = int(measures.best_wrong[row])
                name = rankings.gallery[wrong] if wrong >= 0 else ""
                score = f"{measures.average_precision[row]:.6f}"
                writer.writerow([query, part, label, score, variant, int(measures.first_hit[row]), name])
        return text.getvalue()


def score_rankings(rankings: Rankings, ks: Sequence[int], *, num_resamples: int, seed: int) -> Scores:
    """Means over queries (image) and over the means of parts (part), with intervals from resampled parts.

    Args:
        rankings: of queries that all have something to find.
        ks: of precision and recall.
        num_resamples: each draws whole parts with replacement; 0 gives no intervals, and neither does a single part.
        seed: of the resamples.
    """
    measures = rankings.measures
    names = ["map", *(f"mp@{k}" for k in ks), *(f"recall@{k}" for k in ks)]
    values = np.column_stack([measures.average_precision, measures.precision, measures.recall])  # [Q, F]
    if len(values) == 0:
        return Scores(image=LevelScores(count=0, figures={}), part=LevelScores(count=0, figures={}))
    parts = number_parts(rankings.parts)[1]
    counts = np.bincount(parts)
    sums = np.stack([np.bincount(parts, weights=column) for column in values.T], axis=1, dtype=np.float64)  # [P, F]
    draws = draw_parts(len(counts) if len(counts) > 1 else 0, num_resamples, seed)
    of_images = _resampled_means(draws, sums, counts)
    of_parts = _resampled_means(draws, sums / counts[:, None], np.ones_like(counts))
    return Scores(
        image=LevelScores(count=len(values), figures=_figures(names, values.mean(axis=0), of_images)),
        part=LevelScores(count=len(counts), figures=_figures(names, (sums / counts[:, None]).mean(axis=0), of_parts)),
    )


def make_results(
    variants: Mapping[str, Rankings],
    ks: Sequence[int],
    *,
    settings: Mapping[str, Any],
    sets: Mapping[str, ImageDataset],
    weights: str,
    num_resamples: int,
    seed: int,
) -> EvaluationResults:
    """Joins the figures of all variants with what they come from.

    Args:
        variants: rankings by the name of how they were judged.
        ks: of precision and recall.
        settings: plain values of what decided the figures.
        sets: the images.
        weights: file of the weights.
        num_resamples: see `score_rankings`.
        seed: of the resamples.
    """
    return EvaluationResults(
        evaluator="retrieval",
        settings=settings,
        classes=(),
        scores={
            name: score_rankings(rankings, ks, num_resamples=num_resamples, seed=seed)
            for name, rankings in variants.items()
        },
        predictions=RankedQueries(variants),
        extra={
            "num_gallery": {name: len(rankings.gallery) for name, rankings in variants.items()},
            "num_queries": {name: len(rankings.queries) for name, rankings in variants.items()},
            "num_skipped_queries": {name: rankings.num_skipped for name, rankings in variants.items()},
        },
        **find_origins(sets, weights),
    )


def write_and_log(results: EvaluationResults, variants: Mapping[str, Rankings], output_dir: str | Path | None) -> None:
    """The main process logs the table and, where there is a folder, writes the results into it."""
    if not is_main_process():
        return
    logger.info("%s", results.table())
    for name, rankings in variants.items():
        if rankings.num_skipped:
            logger.info("%s: %d queries have nothing to find and were left out", name, rankings.num_skipped)
    if output_dir is not None:
        results.write(output_dir)


def _resampled_means(draws: IntArray, sums: FloatArray, counts: npt.NDArray[Any]) -> FloatArray:
    """Means ``[R, F]`` of resamples that draw parts so often, ``[R, P]``, from their sums ``[P, F]`` and counts."""
    at_a_time = max(1, NUMBERS_AT_A_TIME // len(counts))
    pieces = [draws[start : start + at_a_time].astype(np.float64) for start in range(0, len(draws), at_a_time)]
    means = [(piece @ sums) / (piece @ counts)[:, None] for piece in pieces]
    return np.concatenate(means) if means else np.empty((0, sums.shape[1]))


def _figures(names: Sequence[str], values: FloatArray, resampled: FloatArray) -> dict[str, Figure]:
    figures = {}
    for column, name in enumerate(names):
        low, high = interval(resampled[:, column])
        figures[name] = Figure(value=float(values[column]), low=low, high=high)
    return figures
