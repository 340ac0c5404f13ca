"""Depth, or height, of every pixel."""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import DepthSource
from dinov2.data.task_dataset import ReadTargets, TaskSample, depth_targets
from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.loss.depth_losses import DepthLoss
from dinov2.models.heads.depth import (
    DepthBins,
    DepthFromScores,
    DepthOutput,
    DPTHead,
    LinearDepthHead,
    ReluDepth,
    SigmoidDepth,
    SoftplusDepth,
)
from dinov2.models.heads.segmentation import ConvDecoder
from dinov2.tasks.options import HeadOptions, TaskConfig, TaskLossOptions
from dinov2.tasks.predictions import DepthPrediction
from dinov2.tasks.task import DenseTask, ExportOutput, Head, HeadSizes, Outputs, TaskFacts, TaskMetrics

logger = logging.getLogger("dinov2")

ACTIVATIONS: Mapping[str, type[DepthOutput]] = MappingProxyType(
    {"softplus": SoftplusDepth, "sigmoid": SigmoidDepth, "relu": ReluDepth}
)
_LOSSES = ("silog", "gradient", "mse", "l1")
_DECODER = Head.of(ConvDecoder, "channels", "class_token", "dropout", "output_stride", fits=["patch_size"])
_RANGE = ("depth_activation", "min_depth", "max_depth")
_MAPS = 4  # tell the share of depths in range
_MAX_MAPS = 200  # that are looked through for a single one
_SUSPICIOUS = 0.05  # share
_CONSTANT = 1e-6  # share of a depth by which rounding makes equal ones differ


def _linear_bins(options: HeadOptions, sizes: HeadSizes) -> nn.Module:
    bins = DepthBins(
        options.min_depth,
        options.max_depth,
        num_bins=options.num_bins,
        spacing=options.bins,
        norm=options.norm_strategy,
    )
    return LinearDepthHead(
        sizes.embed_dim,
        bins,
        num_blocks=sizes.num_blocks,
        class_token=options.class_token,
        upsample=options.upsample,
    )


def _depth_output(options: HeadOptions) -> DepthOutput:
    return ACTIVATIONS[options.depth_activation](options.min_depth, options.max_depth)


class DepthTask(DenseTask):
    """Scale-invariant, gradient, squared and absolute losses.

    Where none of them tells scale and shift (see `unknown_to`), depth is relative: it has no unit, and the weights are
    chosen by the error after alignment.

    Args:
        config: options of the run.
        facts: unit of the training set's depths.
    """

    name = "depth"
    heads = MappingProxyType(
        {
            "linear_bins": Head(
                _linear_bins,
                ("class_token", "upsample", "num_bins", "bins", "norm_strategy", "min_depth", "max_depth"),
            ),
            "dpt": Head(
                lambda options, sizes: DPTHead(sizes.embed_dim, _depth_output(options), channels=options.channels),
                ("channels", *_RANGE),
                num_blocks=4,
            ),
            "conv_decoder": Head(
                lambda options, sizes: DepthFromScores(_DECODER.build(options, sizes), _depth_output(options)),
                (*_DECODER.options, *_RANGE),
            ),
        }
    )
    shared_options = frozenset((*(f"loss.{name}" for name in (*_LOSSES, "depth_alignment")), "evaluation.depth_crop"))
    losses = _LOSSES
    output = "depth"
    is_error = (*DenseTask.is_error, "abs_rel", "sq_rel", "rmse", "log10", "silog")
    headline = (
        *("abs_rel", "rmse", "delta1", "delta2", "delta3", "silog", "sq_rel", "rmse_log"),
        *("median/abs_rel", "least_squares/abs_rel"),
    )

    def __init__(self, config: TaskConfig, facts: TaskFacts) -> None:
        super().__init__(config, facts)
        self.alignment = unknown_to(config.loss)
        self.unit = facts.unit if self.alignment == "none" else ""
        prefix = "" if self.alignment == "none" else f"{self.alignment}/"
        self.metric, self.second_metric = f"{prefix}abs_rel", f"{prefix}rmse"

    @classmethod
    def read_facts(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> TaskFacts:
        if not isinstance(dataset, DepthSource):
            raise ValueError(f"{path} has no depth maps; GroupedJSON (depth_path, height_path), NYUDepthV2 … do")
        return TaskFacts(unit=dataset.depth_unit)

    @classmethod
    def check_dataset(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> None:
        """Looks at a few maps, spread over the set, and at more of them as long as no depth is in range."""
        assert isinstance(dataset, DepthSource)
        min_depth, max_depth = config.head.min_depth, config.head.max_depth
        span = f"head.min_depth={min_depth:g} and head.max_depth={max_depth:g} ({dataset.depth_unit})"
        least, greatest = np.inf, -np.inf
        num_known = num_inside = 0
        order = np.random.default_rng(0).permutation(len(dataset))[:_MAX_MAPS].tolist()
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

    def read_targets(self, dataset: ImageDataset) -> ReadTargets:
        return depth_targets(dataset)

    def prepare_loss(self, class_weights: Sequence[float], device: torch.device) -> None:
        options = self.config.loss
        self.criterion: nn.Module = DepthLoss(
            scale_invariant_log=options.silog,
            gradient=options.gradient,
            mse=options.mse,
            l1=options.l1,
            alignment=options.depth_alignment,
            max_depth=self.config.head.max_depth,
        ).to(device)

    def loss(self, outputs: Outputs, targets: TaskSample) -> Outputs:
        depth, head = targets["depth"], self.config.head
        # What the head cannot say teaches nothing; in logarithms a few tiny depths at edges would be all that counts.
        said = (depth >= head.min_depth) & (depth <= head.max_depth)
        terms: Outputs = self.criterion(outputs["depth"], depth.where(said, math.nan))
        return terms

    def reduce(self, outputs: Outputs) -> Outputs:
        return {"depth": outputs["depth"][:, 0].float()}

    def to_prediction(self, maps: Outputs) -> DepthPrediction:
        return DepthPrediction(maps["depth"][0].numpy(), self.unit)

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        meaning = f"[B, 1, h, w], as large as the input: depth in {self.unit}" if self.unit else "relative depth"
        axes = {0: "batch", 2: "height", 3: "width"}
        return (ExportOutput(name="depth", meaning=meaning, dynamic_axes=axes),)

    def metrics(self, dataset: ImageDataset) -> "_DepthTaskMetrics":
        head = self.config.head
        crop = self.config.evaluation.depth_crop
        return _DepthTaskMetrics(dataset, self.alignment, head.min_depth, head.max_depth, crop)


def unknown_to(loss: TaskLossOptions) -> str:
    """What a network trained so cannot know, as the alignment of `DepthMetrics` that makes up for it.

    ``none`` for metric depth; ``least_squares`` (scale and shift) where `align_depth` takes both out of every loss
    that is left; ``median`` (scale) for gradient matching alone, which compares ratios.
    """
    aligned = loss.depth_alignment != "none"
    if loss.silog or ((loss.mse or loss.l1) and not aligned):
        return "none"
    return "least_squares" if aligned else "median"


def _wider(first: tuple[float, float], second: tuple[float, float]) -> tuple[float, float]:
    return min(first[0], second[0]), max(first[1], second[1])


class _DepthTaskMetrics(TaskMetrics):
    """Errors of depth as it is, and (``median/…``, ``least_squares/…``) after alignment of each image."""

    def __init__(self, dataset: ImageDataset, alignment: str, min_depth: float, max_depth: float, crop: str) -> None:
        from dinov2.eval.metrics.depth import ALIGNMENTS, DepthMetrics

        super().__init__(dataset)
        assert isinstance(dataset, DepthSource)
        self.depths: DepthSource = dataset
        self.alignment = alignment
        self.by_alignment = {
            each: DepthMetrics(min_depth=min_depth, max_depth=max_depth, crop=crop, alignment=each)
            for each in ALIGNMENTS
        }
        self._span = (math.inf, -math.inf)  # of all predictions

    def update(self, index: int, prediction: DepthPrediction) -> float | None:
        target = self.depths.get_depth(index)
        self._span = _wider(self._span, (float(prediction.depth.min()), float(prediction.depth.max())))
        for metric in self.by_alignment.values():
            metric.update(prediction.depth, target)
        errors = self.by_alignment[self.alignment].image_errors(prediction.depth, target)
        return None if errors is None else errors["abs_rel"]

    def ground_truth(self, index: int) -> DepthPrediction | None:
        return DepthPrediction(self.depths.get_depth(index), self.depths.depth_unit)

    def merge_processes(self) -> None:
        for metric in self.by_alignment.values():
            metric.merge_processes()
        self._span = functools.reduce(_wider, all_gather_objects(self._span))

    def warnings(self) -> list[str]:
        low, high = self._span
        if not high - low <= _CONSTANT * abs(high):
            return []
        return [f"CONSTANT DEPTH: every pixel of every image is taken for {high:.4g} {self.depths.depth_unit}"]

    def compute(self) -> dict[str, float]:
        values = {}
        for alignment, metric in self.by_alignment.items():
            for name, value in metric.compute().items():
                if alignment == "none":
                    values[name] = value
                elif not name.startswith("images"):
                    values[f"{alignment}/{name}"] = value
        return values
