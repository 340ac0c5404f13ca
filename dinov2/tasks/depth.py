"""Depth, or height, of every pixel."""

import logging
import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import DepthSource
from dinov2.data.task_dataset import TaskSample
from dinov2.distributed import is_main_process
from dinov2.loss.depth_losses import DepthLoss
from dinov2.tasks.options import TaskConfig, TaskLossOptions
from dinov2.tasks.predictions import DepthPrediction
from dinov2.tasks.task import Judge, Task, TaskFacts


class DepthTask(Task):
    """Scale-invariant, gradient, squared and absolute losses.

    Where none of them tells scale and shift (see `unknown_to`), depth is relative: it has no unit, and the weights are
    chosen by the error after alignment.

    Args:
        config: options of the run.
        facts: unit of the training set's depths.
        class_weights: must be empty; depth has no classes.
    """

    name = "depth"

    def __init__(self, config: TaskConfig, facts: TaskFacts, class_weights: Sequence[float] = ()) -> None:
        assert not class_weights
        self.alignment = unknown_to(config.loss)
        self.unit = facts.depth_unit if self.alignment == "none" else ""
        self.min_depth, self.max_depth = config.head.min_depth, config.head.max_depth
        self.crop = config.evaluation.depth_crop
        self.metric = "abs_rel" if self.alignment == "none" else f"{self.alignment}/abs_rel"
        self.higher_is_better = False
        self.criterion = DepthLoss(
            scale_invariant_log=config.loss.silog,
            gradient=config.loss.gradient,
            mse=config.loss.mse,
            l1=config.loss.l1,
            alignment=config.loss.depth_alignment,
            max_depth=config.head.max_depth,
        )

    def loss(self, outputs: Tensor, sample: TaskSample) -> dict[str, Tensor]:
        depth = sample["depth"]
        # What the head cannot say teaches nothing; in logarithms a few tiny depths at edges would be all that counts.
        said = (depth >= self.min_depth) & (depth <= self.max_depth)
        terms: dict[str, Tensor] = self.criterion(outputs, depth.where(said, math.nan))
        return terms

    def judge(self, dataset: ImageDataset) -> "DepthJudge":
        return DepthJudge(dataset, self.alignment, self.min_depth, self.max_depth, self.crop)


def unknown_to(loss: TaskLossOptions) -> str:
    """What a network trained so cannot know, as the alignment of `DepthMetrics` that makes up for it.

    ``none`` for metric depth; ``least_squares`` (scale and shift) where `align_depth` takes both out of every loss
    that is left; ``median`` (scale) for gradient matching alone, which compares ratios.
    """
    aligned = loss.depth_alignment != "none"
    if loss.silog or ((loss.mse or loss.l1) and not aligned):
        return "none"
    return "least_squares" if aligned else "median"


class DepthJudge(Judge[DepthPrediction]):
    """Errors of depth as it is, and (``median/…``, ``least_squares/…``) after alignment of each photo.

    Args:
        dataset: a `DepthSource`.
        alignment: by which photos are compared when the worst are looked for, one of ``ALIGNMENTS``.
        min_depth: least depth that counts.
        max_depth: greatest depth that counts.
        crop: part of the photo that counts, see `DepthMetrics`.
    """

    def __init__(self, dataset: ImageDataset, alignment: str, min_depth: float, max_depth: float, crop: str) -> None:
        # Here, as torchmetrics below it takes seconds to import, and predicting needs none.
        from dinov2.eval.metrics.depth import ALIGNMENTS, DepthMetrics

        super().__init__(dataset)
        assert isinstance(dataset, DepthSource)
        self.depths = dataset
        self.alignment = alignment
        self.metrics = {
            alignment: DepthMetrics(min_depth=min_depth, max_depth=max_depth, crop=crop, alignment=alignment)
            for alignment in ALIGNMENTS
        }

    def see(self, index: int, prediction: DepthPrediction) -> float | None:
        target = self.depths.get_depth(index)
        for metric in self.metrics.values():
            metric.update(prediction.depth, target)
        errors = self.metrics[self.alignment].image_errors(prediction.depth, target)
        return None if errors is None else errors["abs_rel"]

    def truth(self, index: int) -> DepthPrediction | None:
        return DepthPrediction(self.depths.get_depth(index), self.depths.depth_unit)

    def merge_processes(self) -> None:
        for metric in self.metrics.values():
            metric.merge_processes()

    def figures(self) -> dict[str, float]:
        figures = self.metrics["none"].compute()
        for alignment, metric in self.metrics.items():
            if alignment != "none":
                figures |= {
                    f"{alignment}/{name}": value
                    for name, value in metric.compute().items()
                    if not name.startswith("images")
                }
        return figures


logger = logging.getLogger("dinov2")

_MAPS = 4  # tell the share of depths in range
_MOST_MAPS = 200  # that are looked through for a single one
_SUSPICIOUS = 0.05  # share


def check_depths_in_range(dataset: ImageDataset, path: str, *, min_depth: float, max_depth: float) -> None:
    """Looks at a few maps, spread over the set, and at more of them as long as no depth is in range.

    Warns where few depths are.

    Args:
        dataset: a `DepthSource`.
        path: what the options call it.
        min_depth: least depth that counts, in the set's unit.
        max_depth: greatest depth that counts.

    Raises:
        ValueError: none is; the first photo and what was found are named.
        BadTargetError: a map cannot be used.
    """
    assert isinstance(dataset, DepthSource)
    span = f"head.min_depth={min_depth:g} and head.max_depth={max_depth:g} ({dataset.depth_unit})"
    least, greatest = np.inf, -np.inf
    num_known = num_inside = 0
    order = np.random.default_rng(0).permutation(len(dataset))[:_MOST_MAPS].tolist()
    for number, index in enumerate(order):
        if number >= _MAPS and num_inside:
            break
        depth = dataset.get_depth(index)
        known = depth[np.isfinite(depth)]
        num_known += known.size
        num_inside += int(((known > min_depth) & (known < max_depth)).sum())
        least, greatest = float(known.min(initial=least)), float(known.max(initial=greatest))
    if not num_inside:
        found = f"depths of {least:g} to {greatest:g}" if num_known else "not a single known depth"
        raise ValueError(
            f"{path}: no depth lies between {span}; {len(order)} maps, such as that of "
            f"{dataset.get_image_path(order[0])}, hold {found}"
        )
    if num_inside < _SUSPICIOUS * num_known and is_main_process():
        share = f"{num_inside / num_known:.2%}"
        logger.warning("%s: only %s of the depths (%g to %g) lie between %s", path, share, least, greatest, span)
