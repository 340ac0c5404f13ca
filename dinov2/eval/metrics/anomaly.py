"""Metrics of anomaly detection: of maps pixel by pixel and region by region, of images, and of parts."""

from dataclasses import replace

import cv2
import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.eval.metrics.classification import (
    RANKING_METRICS,
    BoolArray,
    Float64Array,
    FloatArray,
    IntArray,
    Level,
    ResampledLevel,
    draw_parts,
    levels_of,
    number_parts,
    resample_levels,
    share_of,
)
from dinov2.eval.metrics.streaming import Pixels, StreamedMetric, as_array, check_same_size
from dinov2.eval.metrics.thresholds import choose_threshold

AUPRO_LIMITS = (0.3, 0.05)  # rates of false positive pixels up to which overlaps count
ZERO_ESCAPES = "false_alarms_at_zero_escapes"
DROPPED_BITS = 11  # of the 23 of a float32 behind the point: scores that differ by less than 1 in 4,096 are equal
RESAMPLED_LEVELS = 2048  # of scores, for the intervals of pixel metrics
NUMBERS_AT_A_TIME = 4_000_000
_IMAGE, _REGION, _KEY, _COUNT = range(4)  # columns of `AnomalyMetrics.pixels`


class AnomalyMetrics(StreamedMetric):
    """How well anomaly scores of pixels, images and parts divide what is good from what is not.

    Of a map only histograms are kept: how many good pixels, and how many of each defective region, have which score.
    Scores are cut to 12 binary digits behind the leading one, so pixels count as equal whose scores differ by less than
    1/4,096; what ranks above what changes nowhere else.

    Args:
        pixel_threshold: pixels that score above it are found, for ``pixel_segf1``; None where there is no threshold.
    """

    pixels: list[Tensor]  # [n, 4] int64: image, region (0: good pixels), cut score, how many pixels
    found: list[Tensor]  # [1, 4] int64: image, defective pixels found, good ones found, defective ones missed
    images: list[Tensor]
    scores: list[Tensor]
    labels: list[Tensor]
    group_ids: list[Tensor]

    def __init__(self, *, pixel_threshold: float | None = None) -> None:
        super().__init__()
        self.pixel_threshold = pixel_threshold
        for name in ("pixels", "found", "images", "scores", "labels", "group_ids"):
            self.add_rows(name)

    def update(
        self,
        index: int,
        score: float,
        anomalous: bool,
        group_id: str,
        scores: Pixels | None = None,
        mask: Pixels | None = None,
    ) -> None:
        """Adds an image.

        Args:
            index: its number in the set, each once.
            score: of the image, from 0 up.
            anomalous: whether it is labelled so.
            group_id: the part that it shows.
            scores: of its pixels, from 0 up, ``[H, W]``; None where only the image is scored.
            mask: ``[H, W]``, 0 good, 255 unknown (such pixels count nowhere), everything else defective; connected
                pixels, also by their corners, are a region.

        Raises:
            ValueError: shapes differ, or a score is negative, NaN or infinite.
        """
        if not 0 <= score < np.inf:
            raise ValueError(f"image {index}: an anomaly score must be finite and at least 0, found {score}")
        self.images.append(torch.tensor([index]))
        self.scores.append(torch.tensor([score], dtype=torch.float64))
        self.labels.append(torch.tensor([int(anomalous)]))
        self.group_ids.append(torch.tensor([*group_id.encode("utf-8", "surrogatepass"), 0], dtype=torch.uint8))
        if scores is None or mask is None:
            return
        values, actual = np.ascontiguousarray(as_array(scores), dtype=np.float32), as_array(mask)
        check_same_size(values, actual, "scores", "masks")
        if values.size and not 0 <= values.min() <= values.max() < np.inf:  # also for NaN
            raise ValueError(
                f"image {index}: scores of pixels must be finite and at least 0, found {values.min()} to {values.max()}"
            )
        known, defective = actual != IGNORED, (actual != 0) & (actual != IGNORED)
        _, regions = cv2.connectedComponents(defective.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)
        # Floats of one sign are ordered as the integers of their bits are.
        keys = (values + np.float32(0)).view(np.int32)[known].astype(np.int64) >> DROPPED_BITS
        pairs, counts = np.unique((regions[known].astype(np.int64) << 32) | keys, return_counts=True)
        columns = (np.full(len(pairs), index), pairs >> 32, pairs & 0xFFFFFFFF, counts)
        self.pixels.append(torch.from_numpy(np.stack(columns, axis=1).astype(np.int64)))
        if self.pixel_threshold is not None:
            above = values > self.pixel_threshold
            numbers = ((above & defective).sum(), (above & known & ~defective).sum(), (~above & defective).sum())
            self.found.append(torch.tensor([[index, *(int(number) for number in numbers)]]))

    def compute(self) -> dict[str, float]:
        """All values of `levels` without intervals, as ``pixel_NAME``, ``image_NAME`` and ``part_NAME``."""
        if not self.images:
            return {}
        levels = self.levels(num_resamples=0)
        values: dict[str, float] = {}
        for level, found in levels.items():
            values |= {
                name if name.startswith("pixel_") else f"{level}_{name}": value for name, value in found.values.items()
            }
        return values

    def table(self) -> tuple[IntArray, Float64Array, BoolArray, list[str]]:
        """Numbers of all images in ascending order, their scores, which are anomalous, and their parts.

        Raises:
            ValueError: there is no image.
        """
        if not self.images:
            raise ValueError("there is no image to evaluate: none has a label")
        images = torch.cat(self.images).numpy()
        order = np.argsort(images, kind="stable")
        text = bytes(torch.cat(self.group_ids).tolist()).decode("utf-8", "surrogatepass")
        names = text.split("\0")[:-1]
        return (
            images[order],
            torch.cat(self.scores).numpy()[order],
            torch.cat(self.labels).numpy()[order] == 1,
            [names[place] for place in order.tolist()],
        )

    def levels(
        self,
        *,
        aggregation: str = "max",
        top_k: int = 3,
        thresholds: tuple[float, float] | None = None,
        num_resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, ResampledLevel]:
        """Metrics of images (with those of their pixels) and of parts, and the same of resampled parts.

        Args:
            aggregation: how a part joins its images, see `score_parts`.
            top_k: images that count with ``topk_mean``.
            thresholds: above which an image, and a part, is called anomalous; None where there are none.
            num_resamples: resamples of parts; 0 gives none.
            seed: of the resamples.

        Returns:
            By level (``image``, ``part``): with good and anomalous ones ``auroc``, ``average_precision``, escape rates
            as in `classification_metrics`, and ``false_alarms_at_zero_escapes``, the share of good ones that score as
            high as the lowest anomalous one; with thresholds also the other metrics of `classification_metrics`.
            Beside those of images, where pixels of both kinds are known: ``pixel_auroc``, ``pixel_average_precision``,
            ``pixel_f1_max`` (the highest F1 that any threshold reaches over the pixels of the set),
            ``pixel_aupro_0.3`` and ``_0.05`` (see `pixel_metrics`), and with a threshold of pixels ``pixel_segf1``, the
            F1 that it reaches.

        Raises:
            ValueError: there is no image, or settings are out of range.
        """
        images, scores, anomalous, group_ids = self.table()
        labels = anomalous.astype(np.int64)
        part_of_image = number_parts(group_ids)[1]
        draws = draw_parts(len(set(group_ids)) if len(set(group_ids)) > 1 else 0, num_resamples, seed)
        found: dict[str, ResampledLevel] = {}
        for place, level in enumerate(("image", "part")):
            shifted = scores - (0.0 if thresholds is None else thresholds[place])
            rows = np.stack([-shifted, shifted], axis=1)  # the second is larger from the threshold on
            both = resample_levels(
                rows, labels, group_ids, num_resamples=num_resamples, seed=seed, aggregation=aggregation, top_k=top_k
            )
            kept = both[level]
            if thresholds is None:
                kept = _only(kept, RANKING_METRICS)
            unshifted = np.stack([-scores, scores], axis=1)
            raw = levels_of(unshifted, labels, group_ids, aggregation=aggregation, top_k=top_k)[level]
            found[level] = _with(kept, _zero_escapes(raw, draws))
        pixels = self._pixel_metrics(images, part_of_image, draws)
        found["image"] = _with(found["image"], pixels)
        return found

    def _pixel_metrics(
        self, images: IntArray, part_of_image: IntArray, draws: IntArray
    ) -> dict[str, tuple[float, Float64Array]]:
        """Values of pixel metrics and of their resamples, by name; empty without good or defective pixels."""
        if not self.pixels:
            return {}
        table = torch.cat(self.pixels).numpy()
        part = part_of_image[np.searchsorted(images, table[:, _IMAGE])]
        defective = table[:, _REGION] > 0
        if defective.all() or not defective.any():
            return {}
        # A region weighs its pixels by one over their number.
        _, region = np.unique(table[defective][:, [_IMAGE, _REGION]], axis=0, return_inverse=True)
        region = region.reshape(-1)
        sizes = np.bincount(region, weights=table[defective, _COUNT])
        share = np.zeros(len(table))
        share[defective] = table[defective, _COUNT] / sizes[region]
        counts = table[:, _COUNT].astype(np.float64)
        keys, level = np.unique(-table[:, _KEY], return_inverse=True)  # from the highest score down
        level = level.reshape(-1)
        num_parts = int(part_of_image.max()) + 1

        def by_level(weights: Float64Array, level: IntArray, num_levels: int, num_parts: int) -> Float64Array:
            rows = part if num_parts > 1 else np.zeros_like(part)
            sums = np.bincount(rows * num_levels + level, weights=weights, minlength=num_parts * num_levels)
            return np.asarray(sums.reshape(num_parts, num_levels))

        weighted = (counts * ~defective, counts * defective, share)
        whole = [by_level(weights, level, len(keys), 1) for weights in weighted]
        values = {name: float(value[0]) for name, value in pixel_metrics(*whole).items()}
        resampled: dict[str, Float64Array] = {}
        if len(draws):
            good, bad, _ = (weights[0] / weights.sum() for weights in whole)
            # Levels that hold equal shares of the pixels; 20,000 would make resampling slow and no interval better.
            middle = (good + bad).cumsum() - (good + bad) / 2
            coarse = np.minimum((middle / 2 * RESAMPLED_LEVELS).astype(np.int64), RESAMPLED_LEVELS - 1)
            _, coarse = np.unique(coarse, return_inverse=True)
            coarse = coarse.reshape(-1)
            num_levels = int(coarse.max()) + 1
            of_parts = [by_level(weights, coarse[level], num_levels, num_parts) for weights in weighted]
            step = max(NUMBERS_AT_A_TIME // num_levels, 1)
            pieces = []
            for start in range(0, len(draws), step):
                piece = draws[start : start + step].astype(np.float64)
                pieces.append(pixel_metrics(*(piece @ weights for weights in of_parts)))
            resampled = {name: np.concatenate([piece[name] for piece in pieces]) for name in values}
        metrics = {name: (value, resampled.get(name, np.zeros(0))) for name, value in values.items()}
        if self.found:
            counted = torch.cat(self.found).numpy()
            sums = np.zeros((num_parts, 3))
            np.add.at(sums, part_of_image[np.searchsorted(images, counted[:, 0])], counted[:, 1:])
            metrics["pixel_segf1"] = (float(_f1(sums.sum(axis=0)[None])[0]), _f1(draws @ sums) if len(draws) else sums)
        return metrics


def pixel_metrics(good: Float64Array, defective: Float64Array, overlap: Float64Array) -> dict[str, Float64Array]:
    """Metrics of thresholds on the scores of pixels, of several (re)samples at once.

    AUPRO: the mean over regions of the share that is found, over the share of good pixels that is found by the same
    threshold; the area below this curve up to a limit, between thresholds by trapezia, over the limit.

    Args:
        good: ``[R, L]``, how many good pixels have each score, from the highest of ``L`` down.
        defective: ``[R, L]``, how many defective ones.
        overlap: ``[R, L]``, the sum over regions of the share of their pixels that has each score.

    Returns:
        By name ``[R]``, NaN where good or defective pixels are missing.

    Reference:
        Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.2.
    """
    found, alarms, overlaps = (counts.cumsum(axis=1) for counts in (defective, good, overlap))
    num_good, num_defective, num_regions = alarms[:, -1:], found[:, -1:], overlaps[:, -1:]
    exists = ((num_good > 0) & (num_defective > 0))[:, 0]
    num_good, num_defective = np.maximum(num_good, 1), np.maximum(num_defective, 1)
    beaten = (defective * (num_good - alarms + good / 2)).sum(axis=1)  # pairs in the right order, equal ones half
    metrics = {
        "pixel_auroc": beaten / (num_good * num_defective)[:, 0],
        "pixel_average_precision": (defective * share_of(found, found + alarms)).sum(axis=1) / num_defective[:, 0],
        "pixel_f1_max": (2 * found / (found + alarms + num_defective)).max(axis=1),
    }
    zero = np.zeros((len(good), 1))
    rates = np.concatenate([zero, alarms / num_good], axis=1)
    shares = np.concatenate([zero, overlaps / np.maximum(num_regions, 1e-12)], axis=1)
    for limit in AUPRO_LIMITS:
        metrics[f"pixel_aupro_{limit}"] = _area_up_to(rates, shares, limit) / limit
    return {name: np.where(exists, values, np.nan) for name, values in metrics.items()}


def _area_up_to(x: Float64Array, y: Float64Array, limit: float) -> Float64Array:
    """Area below curves ``[R, L]`` of growing ``x`` from 0 to a limit, which may lie between two points."""
    step = np.diff(x, axis=1)
    width = np.clip(limit - x[:, :-1], 0.0, step)  # the part of each step that lies below the limit
    slope = np.divide(np.diff(y, axis=1), step, out=np.zeros_like(step), where=step > 0)
    return np.asarray((width * (y[:, :-1] + slope * width / 2)).sum(axis=1))


def _zero_escapes(level: Level, draws: IntArray) -> dict[str, tuple[float, Float64Array]]:
    """Share of the good ones that are called anomalous at the highest threshold that finds all anomalous ones."""
    positive = level.labels == 1
    if positive.all() or not positive.any():
        return {}
    scores = level.probabilities[:, 1]

    def share(weights: FloatArray) -> float:
        drawn: BoolArray = weights > 0
        threshold = choose_threshold(scores[drawn], positive[drawn], goal="recall", target=1.0)
        num_good = weights[~positive].sum()
        if threshold is None or num_good == 0:
            return float("nan")
        return float(weights[~positive & (scores >= threshold)].sum() / num_good)

    weights = draws[:, level.part_of_row].astype(np.float64) if len(draws) else np.zeros((0, len(scores)))
    return {ZERO_ESCAPES: (share(np.ones(len(scores))), np.array([share(row) for row in weights]))}


def _f1(counts: Float64Array) -> Float64Array:
    """F1 of rows of found, falsely found and missed pixels; NaN where there are none."""
    found, alarms, missed = counts.T
    whole = 2 * found + alarms + missed
    return np.where(whole > 0, share_of(2 * found, whole), np.nan)


def _only(level: ResampledLevel, names: tuple[str, ...]) -> ResampledLevel:
    return replace(
        level,
        values={name: value for name, value in level.values.items() if name in names},
        resamples={name: values for name, values in level.resamples.items() if name in names},
        confusion=(),
    )


def _with(level: ResampledLevel, metrics: dict[str, tuple[float, Float64Array]]) -> ResampledLevel:
    """A level with further metrics and their resamples."""
    resamples = dict(level.resamples)
    if resamples:
        resamples |= {name: values for name, (_, values) in metrics.items()}
    return replace(
        level, values={**level.values, **{name: value for name, (value, _) in metrics.items()}}, resamples=resamples
    )
