"""Semantic segmentation: the class of every pixel, and from it which images and parts have a defect."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import IGNORED, MaskSource
from dinov2.data.task_dataset import ReadTargets, TaskSample, mask_targets
from dinov2.loss.segmentation_losses import SegmentationLoss
from dinov2.models.heads.pyramid import PyramidHead
from dinov2.models.heads.segmentation import BNHead, ConvDecoder, MultiScaleHead
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.predictions import SegmentationPrediction
from dinov2.tasks.task import (
    THRESHOLD_OPTIONS,
    DenseTask,
    ExportOutput,
    Head,
    Outputs,
    PreparedImage,
    TaskFacts,
    TaskMetrics,
)

if TYPE_CHECKING:
    from dinov2.eval.metrics.classification import Scores

MAX_CLASSES = 255  # labels are uint8, and 255 means ignored
_MASKS_COUNTED = 500  # for class weights: enough for the classes' shares, and seconds instead of hours
_MASKS_SEARCHED = 2000  # for a class that is in none of them
_MAP_OPTIONS = ("channels", "class_token", "dropout")
_LOSSES = ("cross_entropy", "dice", "focal")


class SegmentationTask(DenseTask):
    """Cross-entropy, Dice and focal loss of every pixel.

    Args:
        config: options of the run.
        facts: classes of the training set's masks.
    """

    name = "segmentation"
    heads = MappingProxyType(
        {
            "bn_linear": Head.of(BNHead, "class_token", "dropout"),
            "multi_scale": Head.of(MultiScaleHead, *_MAP_OPTIONS),
            "conv_decoder": Head.of(ConvDecoder, *_MAP_OPTIONS, "output_stride", fits=["patch_size"]),
            "pyramid": Head.of(PyramidHead, *_MAP_OPTIONS, "output_stride", fits=["image_channels"]),
        }
    )
    shared_options = frozenset(
        (
            *(f"loss.{name}" for name in ("class_weights", "focal_gamma", *_LOSSES)),
            *(f"augmentation.{name}" for name in ("foreground_crop_prob", "mosaic", "copy_paste")),
            *("evaluation.boundary_tolerance", "data.reference"),
            *THRESHOLD_OPTIONS,
        )
    )
    levels = ("image", "part")
    plot_titles = MappingProxyType({"mean_iou": "miou"})  # under the name that people look for
    losses = _LOSSES
    second_metric = "pixel_average_precision"  # tells apart even what finds nothing at the threshold
    headline = (
        *("defect_iou", "defect_dice", "mean_iou", "mean_class_accuracy", "boundary_f1", "pixel_average_precision"),
        *("pixel_auroc", "image_auroc", "image_escape_rate_at_5", "part_auroc", "pixel_accuracy"),
    )
    counted = "pixel"
    class_hint = (
        "masks hold the numbers of the classes, and 255 is ignored; the key mask_values says what other values mean"
    )

    def __init__(self, config: TaskConfig, facts: TaskFacts) -> None:
        super().__init__(config, facts)
        # The mean of two classes is 0.5 at once where nothing is found: nearly all pixels are background.
        self.metric = "defect_iou" if len(self.classes) == 2 else "mean_iou"

    @classmethod
    def idle_options(cls, config: TaskConfig) -> Iterator[tuple[str, Iterable[str]]]:
        if not config.loss.focal:
            yield "with loss.focal=0", ["loss.focal_gamma"]

    @classmethod
    def read_facts(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> TaskFacts:
        if not isinstance(dataset, MaskSource):
            raise ValueError(f"{path} has no masks; GroupedJSON (mask_path), VOCSegmentation, ImageMaskFolder do")
        classes = tuple(dataset.mask_classes)
        if not 2 <= len(classes) <= MAX_CLASSES:
            raise ValueError(f"{path} has the classes {list(classes)}: segmentation needs at least two, at most 255")
        return TaskFacts(classes=classes)

    @classmethod
    def check_dataset(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> None:
        rule = cls.threshold_rule(config)
        if rule is not None and isinstance(dataset, MaskSource) and len(dataset.mask_classes) > 2:
            raise ValueError(
                f"evaluation.threshold={rule.goal} is for a background and one defect; masks of {path} have "
                f"{len(dataset.mask_classes)} classes, of which the most probable is taken"
            )

    def read_targets(self, dataset: ImageDataset) -> ReadTargets:
        return mask_targets(dataset, len(self.classes))

    def classes_to_balance(self, dataset: ImageDataset, indices: Sequence[int]) -> list[tuple[int, ...]] | None:
        """Those in the masks beside the background."""
        assert isinstance(dataset, MaskSource)
        return [
            tuple(value for value in np.unique(dataset.get_mask(index)).tolist() if value not in (0, IGNORED))
            for index in indices
        ]

    def count_classes(
        self, dataset: ImageDataset, indices: Sequence[int], labels: Sequence[tuple[int, ...] | None]
    ) -> list[int]:
        """Pixels of every class, in masks spread over the set.

        A few hundred masks tell the shares. Where a class is in none of them, others are looked through until it is
        found: a rare class must not come out as one that does not exist.
        """
        assert isinstance(dataset, MaskSource)
        counts = np.zeros(len(self.classes), dtype=np.int64)
        spread = np.unique(np.linspace(0, len(indices) - 1, min(_MASKS_COUNTED, len(indices))).astype(int))
        others = np.setdiff1d(np.arange(len(indices)), spread)
        for number, place in enumerate([*spread.tolist(), *others.tolist()]):
            if number >= len(spread) and counts.all():
                break
            mask = dataset.get_mask(indices[place])
            counts += np.bincount(mask[mask != IGNORED].ravel(), minlength=len(counts))
        return [int(count) for count in counts]

    def find_classes(
        self, dataset: ImageDataset, indices: Sequence[int], labels: Sequence[tuple[int, ...] | None]
    ) -> tuple[list[int], int]:
        """Pixels of every class in as many masks as it takes to find all classes, those of defective images first.

        A few thousand masks are looked through for a class, all of them where nothing but the background is found.
        """
        assert isinstance(dataset, MaskSource)
        counts = np.zeros(len(self.classes), dtype=np.int64)
        order = np.random.default_rng(0).permutation(len(indices))
        defective = np.array([any(label > 0 for label in labels[indices[place]] or ()) for place in order.tolist()])
        number = 0
        for number, place in enumerate(order[np.argsort(~defective, kind="stable")].tolist(), start=1):
            mask = dataset.get_mask(indices[place])
            counts += np.bincount(mask[mask != IGNORED].ravel(), minlength=len(counts))
            if counts.all() or (number >= _MASKS_SEARCHED and np.count_nonzero(counts) >= self.fewest_classes):
                break
        return counts.tolist(), number

    def prepare_loss(self, class_weights: Sequence[float], device: torch.device) -> None:
        options = self.config.loss
        self.criterion: nn.Module = SegmentationLoss(
            options.cross_entropy,
            options.dice,
            options.focal,
            class_weights=list(class_weights) or None,
            focal_gamma=options.focal_gamma,
            ignore_index=IGNORED,
        ).to(device)

    def loss(self, outputs: Outputs, targets: TaskSample) -> Outputs:
        terms: Outputs = self.criterion(outputs["logits"], targets["mask"])
        return terms

    def activate(self, outputs: Outputs) -> Outputs:
        return {"probabilities": outputs["logits"].float().softmax(dim=1)} if "logits" in outputs else outputs

    def reduce(self, outputs: Outputs) -> Outputs:
        """The most probable class (of equally probable ones the first), its probability, and that of any defect."""
        probabilities = outputs["probabilities"]
        scores, labels = probabilities.max(dim=1)
        return {
            "labels": labels.to(torch.uint8),
            "scores": scores,
            "defect": (1 - probabilities[:, 0]).clamp(0, 1),
        }

    def postprocess(self, outputs: Outputs, prepared: Sequence[PreparedImage]) -> list[SegmentationPrediction]:
        predictions: list[SegmentationPrediction] = super().postprocess(outputs, prepared)
        if len(self.classes) != 2:
            return predictions
        thresholds = [image.thresholds.get(self.classes[1]) for image in prepared]
        return [
            prediction if threshold is None else prediction.with_threshold(threshold)
            for prediction, threshold in zip(predictions, thresholds, strict=True)
        ]

    def to_prediction(self, maps: Outputs) -> SegmentationPrediction:
        labels, scores, defect = (maps[name][0].numpy() for name in ("labels", "scores", "defect"))
        return SegmentationPrediction(labels, scores, defect, self.classes)

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        meaning = f"[B, {len(self.classes)}, h, w], as large as the input: softmax gives the probabilities of classes"
        axes = {0: "batch", 2: "height", 3: "width"}
        return (ExportOutput(name="logits", meaning=meaning, dynamic_axes=axes),)

    def metrics(self, dataset: ImageDataset) -> "_MaskTaskMetrics":
        return _MaskTaskMetrics(dataset, self.classes, self.config)


class _MaskTaskMetrics(TaskMetrics):
    """Pixels, outlines, and the detection of any defect per image and per part."""

    def __init__(self, dataset: ImageDataset, classes: Sequence[str], config: TaskConfig) -> None:
        from dinov2.eval.metrics.defects import ImageDefectMetrics, PixelDefectMetrics
        from dinov2.eval.metrics.segmentation import BoundaryMetrics, SegmentationMetrics

        super().__init__(dataset)
        assert isinstance(dataset, MaskSource)
        self.masks: MaskSource = dataset
        self.classes = tuple(classes)
        self.group_ids = dataset.get_group_ids()
        self.pixels = SegmentationMetrics(classes)
        self.outlines = BoundaryMetrics(classes, tolerance=config.evaluation.boundary_tolerance)
        self.defect_pixels = PixelDefectMetrics()
        self.defects = ImageDefectMetrics()
        self.rule = SegmentationTask.threshold_rule(config)
        untried = {
            "loss.class_weights=sqrt_inverse": config.loss.class_weights == "none",
            "loss.dice=1": not config.loss.dice,
            "data.balance_classes=true": not config.data.balance_classes,
        }
        self._untried = [option for option, new in untried.items() if new]

    def update(self, index: int, prediction: SegmentationPrediction) -> float | None:
        """Takes in a mask; see `TaskMetrics.update`.

        Returns:
            1 - IoU of the classes that the image shows beside the background, or the share of wrong pixels if none.
        """
        mask = self.masks.get_mask(index)
        known = mask != IGNORED
        if not known.any():
            return None
        self.pixels.update(prediction.labels, mask)
        self.outlines.update(prediction.labels, mask)
        self.defect_pixels.update(prediction.defect, mask)
        self.defects.update(prediction.defect, mask, [self.group_ids[index]])
        wrong: NDArray[np.bool_] = prediction.labels != mask
        foreground = ((mask != 0) | (prediction.labels != 0)) & known
        return float(wrong[foreground if foreground.any() else known].mean())

    def ground_truth(self, index: int) -> SegmentationPrediction | None:
        mask = self.masks.get_mask(index)
        if (mask == IGNORED).all():
            return None
        sure = np.ones(mask.shape, dtype=np.float32)
        return SegmentationPrediction(mask, sure, (mask != 0).astype(np.float32), self.classes)

    def merge_processes(self) -> None:
        for metric in (self.pixels, self.outlines, self.defect_pixels, self.defects):
            metric.merge_processes()

    def compute(self) -> dict[str, float]:
        return {
            **self.pixels.compute(),
            **self.outlines.compute(),
            **self.defect_pixels.compute(),
            **self.defects.compute(),
        }

    def thresholds(self) -> dict[str, float]:
        """Of the only defect: from this probability on a pixel shows it, and so does its image and its part."""
        chosen = None if self.rule is None or len(self.classes) != 2 else self.defects.threshold(self.rule)
        return {} if chosen is None else {self.classes[1]: chosen}

    def warnings(self) -> list[str]:
        pixels = self.pixels.confusion()
        actual, predicted = pixels.sum(axis=1), pixels.sum(axis=0)
        (found,) = np.nonzero(predicted)
        if len(found) != 1 or np.count_nonzero(actual) < 2:
            return []
        name, share = self.classes[found[0]], 1 - actual[found[0]] / actual.sum()
        if found[0]:
            return [f"ONE CLASS ONLY: every pixel is taken for {name}, though {share:.2%} of the pixels are others"]
        return [
            f"NOTHING FOUND: every pixel is taken for {name}, though {share:.2%} of the pixels show another class; try "
            f"{''.join(f'{option}, ' for option in self._untried)}more epochs or another backbone"
        ]

    def confusion(self) -> list[list[int]]:
        counts: list[list[int]] = self.pixels.confusion().tolist()
        return counts

    def scores(self) -> "Mapping[str, Scores]":
        scores = self.defects.scores()
        return {} if scores is None else {"any defect": scores}
