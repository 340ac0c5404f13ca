"""Semantic segmentation: the class of every pixel, and from it which photos and parts have a defect."""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import IGNORED, MaskSource
from dinov2.data.task_dataset import TaskSample
from dinov2.eval.metrics.classification import Scores
from dinov2.loss.segmentation_losses import SegmentationLoss
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.predictions import SegmentationPrediction
from dinov2.tasks.task import Judge, Task, TaskFacts


class SegmentationTask(Task):
    """Cross-entropy, Dice and focal loss of every pixel.

    Args:
        config: options of the run.
        facts: classes of the training set's masks.
        class_weights: of the loss; empty for none.
    """

    name = "segmentation"

    def __init__(self, config: TaskConfig, facts: TaskFacts, class_weights: Sequence[float] = ()) -> None:
        self.classes = facts.classes
        self.boundary_tolerance = config.evaluation.boundary_tolerance
        self.metric = "mean_iou"
        self.higher_is_better = True
        self.criterion = SegmentationLoss(
            config.loss.cross_entropy,
            config.loss.dice,
            config.loss.focal,
            class_weights=list(class_weights) or None,
            focal_gamma=config.loss.focal_gamma,
            ignore_index=IGNORED,
        )

    def loss(self, outputs: Tensor, sample: TaskSample) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.criterion(outputs, sample["mask"])
        return terms

    def judge(self, dataset: ImageDataset) -> "MaskJudge":
        return MaskJudge(dataset, self.classes, self.boundary_tolerance)


class MaskJudge(Judge[SegmentationPrediction]):
    """Pixels, outlines, and the detection of any defect per photo and per part.

    Args:
        dataset: a `MaskSource`.
        classes: names by value.
        boundary_tolerance: share of the diagonal, see `BoundaryMetrics`.
    """

    def __init__(self, dataset: ImageDataset, classes: Sequence[str], boundary_tolerance: float) -> None:
        # Here, as torchmetrics below them takes seconds to import, and predicting needs none.
        from dinov2.eval.metrics.defects import ImageDefectMetrics, PixelDefectMetrics
        from dinov2.eval.metrics.segmentation import BoundaryMetrics, SegmentationMetrics

        super().__init__(dataset)
        assert isinstance(dataset, MaskSource)
        self.masks = dataset
        self.num_classes = len(classes)
        self.group_ids = dataset.get_group_ids()
        self.pixels = SegmentationMetrics(classes)
        self.outlines = BoundaryMetrics(classes, tolerance=boundary_tolerance)
        self.defect_pixels = PixelDefectMetrics()
        self.defects = ImageDefectMetrics()

    def see(self, index: int, prediction: SegmentationPrediction) -> float | None:
        mask = self.masks.get_mask(index)
        known = mask != IGNORED
        if not known.any():
            return None
        self.pixels.update(prediction.labels, mask)
        self.outlines.update(prediction.labels, mask)
        self.defect_pixels.update(prediction.defect, mask)
        self.defects.update(prediction.defect, mask, [self.group_ids[index]])
        return _pixels_taken_wrongly(prediction, mask)

    def truth(self, index: int) -> SegmentationPrediction | None:
        mask = self.masks.get_mask(index)
        if (mask == IGNORED).all():
            return None
        sure = np.ones(mask.shape, dtype=np.float32)
        return SegmentationPrediction(labels=mask, scores=sure, defect=(mask != 0).astype(np.float32))

    def merge_processes(self) -> None:
        for metric in (self.pixels, self.outlines, self.defect_pixels, self.defects):
            metric.merge_processes()

    def figures(self) -> dict[str, float]:
        return {
            **self.pixels.compute(),
            **self.outlines.compute(),
            **self.defect_pixels.compute(),
            **self.defects.compute(),
        }

    def confusion(self) -> list[list[int]]:
        counts: list[list[int]] = self.pixels.confusion().tolist()
        return counts

    def scores(self) -> Mapping[str, Scores]:
        scores = self.defects.scores()
        return {} if scores is None else {"any defect": scores}


def _pixels_taken_wrongly(prediction: SegmentationPrediction, mask: np.ndarray) -> float:
    """1 - IoU of the classes that the photo shows beside the background, or the share of wrong pixels if none."""
    known = mask != IGNORED
    wrong = (prediction.labels != mask) & known
    foreground = ((mask != 0) | (prediction.labels != 0)) & known
    if foreground.any():
        return float(wrong[foreground].mean())
    return float(wrong[known].mean())
