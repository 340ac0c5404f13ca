"""Detection: boxes around objects such as defects, their classes, and from them which images and parts have any."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms

from dinov2.config import ConfigError
from dinov2.config.schema import leaf
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.boxes import BoxSource
from dinov2.data.task_dataset import PartBags, ReadTargets, TaskDataset, TaskSample, box_targets
from dinov2.eval.sliding_window import Tile
from dinov2.loss.dense_detection_loss import DenseDetectionLoss
from dinov2.loss.set_detection_loss import SetDetectionLoss
from dinov2.models.heads.dense_detection import DenseDetectionHead
from dinov2.models.heads.set_detection import SetDetectionHead
from dinov2.models.task_model import TaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.predictions import DetectionPrediction
from dinov2.tasks.task import (
    THRESHOLD_OPTIONS,
    ExportOutput,
    Head,
    Outputs,
    PreparedImage,
    Task,
    TaskFacts,
    TaskMetrics,
)

if TYPE_CHECKING:
    from dinov2.eval.metrics.classification import Scores
    from dinov2.logging.plots import Chart

_MIN_SCORE = 0.001  # of what is kept for curves, below the thresholds
_MOST_CANDIDATES = 3000  # of an image or a window, before those that overlap are joined
_BORDER = 2.0  # pixels: a box so near to the edge of a window may be cut by it
_LEARNT = 0.95  # AP at an IoU of 0.5 of images that are known by heart
_NO_MIRROR = "boxes of an image and of the mirrored one cannot be averaged, as task=detection has them"
_CUT_SHARE = 0.85  # of a cut box that lies in another one, which then shows the same object


@dataclass(frozen=True, kw_only=True)
class DetectionOptions:
    score_threshold: float = leaf(
        0.3, "Score from which on a box is an object, where val has not chosen a threshold.", minimum=0, maximum=1
    )
    nms_iou: float = leaf(
        0.6, "Boxes of a class that overlap more are one object (yolo; detr where windows overlap).", above=0, maximum=1
    )
    max_boxes: int = leaf(300, "Boxes of an image that are kept, the most certain ones.", minimum=1)
    class_loss: str = leaf("bce", "yolo: loss of the classes.", choices=("bce", "varifocal"))


class DetectionTask(Task):
    """Boxes from every position of the image (``yolo``) or from queries (``detr``).

    Sides that are no multiple of the patch are filled up on the right and below, so that boxes keep their coordinates.

    Args:
        config: options of the run.
        facts: classes of the training set's boxes.
    """

    name = "detection"
    options = DetectionOptions
    heads = MappingProxyType(
        {
            "yolo": Head.of(DenseDetectionHead, "channels", "output_stride", "detail", fits=["image_channels"]),
            "detr": Head.of(
                SetDetectionHead,
                *("channels", "output_stride", "detail", "num_queries", "num_layers", "cross_attention"),
                *("two_stage", "num_denoising", "one_to_many", "dropout"),
                fits=["image_channels"],
            ),
        }
    )
    shared_options = frozenset(
        (
            *(f"augmentation.{name}" for name in ("foreground_crop_prob", "mosaic", "copy_paste")),
            *("data.reference", *THRESHOLD_OPTIONS),
        )
    )
    windowed = True
    levels = ("object", "image", "part")
    auto_threshold = "f1"
    is_error = ("escape_rate", "alarm", "miss")
    metric = "ap50"
    second_metric = "ap"
    headline = (
        *("ap50", "ap", "ap75", "image_misses", "image_false_alarms", "image_escape_rate", "image_alarm_rate"),
        *("part_escape_rate", "part_alarm_rate", "false_alarms_at_zero_escapes", "image_auroc", "part_auroc", "ar"),
    )
    fewest_classes = 1
    class_hint = "boxes hold the numbers of the classes, from 0 on; there is none for the background"

    def __init__(self, config: TaskConfig, facts: TaskFacts) -> None:
        super().__init__(config, facts)
        self.settings: DetectionOptions = getattr(config, self.name)
        self.is_dense = self.head_kind(config) == "yolo"
        self._patch_size = (1, 1)

    @classmethod
    def check_options(cls, config: TaskConfig) -> None:
        super().check_options(config)
        if config.evaluation.flips:
            raise ConfigError(f"evaluation.flips: {_NO_MIRROR}")

    @classmethod
    def idle_options(cls, config: TaskConfig) -> Iterator[tuple[str, Iterable[str]]]:
        if cls.head_kind(config) != "yolo":
            yield "on a detr head", ["detection.class_loss"]
            if config.data.resize != "original":
                yield "on a detr head that sees the whole image", ["detection.nms_iou"]

    @classmethod
    def read_facts(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> TaskFacts:
        if not isinstance(dataset, BoxSource) or not dataset.has_boxes:
            raise ValueError(
                f"{path} has no boxes; CocoDetection, VOCDetection, YOLODetection, and GroupedJSON with boxes or "
                "mask_path have"
            )
        classes = tuple(dataset.box_classes)
        if not classes:
            raise ValueError(f"{path} names no class of its boxes: detection needs at least one")
        return TaskFacts(classes=classes)

    def build_model(self, backbone: DinoVisionTransformer, num_outputs: int) -> TaskModel:
        self._patch_size = backbone.patch_size
        return super().build_model(backbone, num_outputs)

    # Training.

    def read_targets(self, dataset: ImageDataset) -> ReadTargets:
        return box_targets(dataset, len(self.classes))

    def labels(self, dataset: ImageDataset, samples: TaskDataset | PartBags) -> list[tuple[int, ...] | None]:
        """Classes of the boxes of every image; none where it shows no object, and None where nobody has looked."""
        assert isinstance(dataset, BoxSource)
        return [
            tuple(np.unique(dataset.get_box_labels(index)).tolist()) if dataset.knows_boxes(index) else None
            for index in range(len(dataset))
        ]

    def prepare_loss(self, class_weights: Sequence[float], device: torch.device) -> None:
        self.criterion: nn.Module = (
            DenseDetectionLoss(kind=self.settings.class_loss) if self.is_dense else SetDetectionLoss()
        ).to(device)

    def forward(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        image = inputs["image"]
        below, right = (-side % patch for side, patch in zip(image.shape[-2:], self._patch_size, strict=True))
        images = [inputs[name] for name in self.inputs if name in inputs]
        if below or right:
            images = [F.pad(entry, (0, right, 0, below)) for entry in images]
        if self.is_dense or "boxes" not in inputs:
            return model(*images)
        return model(*images, targets=_targets(inputs, image.device))

    def loss(self, outputs: Outputs, targets: TaskSample) -> Outputs:
        found = _targets(targets, outputs["boxes"].device)
        terms: Outputs = self.criterion(outputs, found["boxes"], found["box_labels"])
        return terms

    def overfit_reached(self, metrics: Mapping[str, float]) -> bool:
        return metrics.get(self.metric, 0.0) > _LEARNT  # the loss of boxes falls long after all are found

    # Prediction.

    def activate(self, outputs: Outputs) -> Outputs:
        if "scores" not in outputs:
            return outputs
        return {"boxes": outputs["boxes"].float(), "probabilities": outputs["scores"].float().sigmoid()}

    def unmirror(self, outputs: Outputs) -> Outputs:
        raise ValueError(f"flips: {_NO_MIRROR}")

    def merge_windows(self, tiles: Iterable[Tile], size: tuple[int, int]) -> Outputs:
        """Boxes of all windows in pixels of the image, without those that a window's edge has cut off another one."""
        pieces = [self._of_window(tile, size) for tile in tiles]
        boxes, scores, labels, cut, window = (torch.cat(column) for column in zip(*pieces, strict=True))
        whole = torch.nonzero(~_is_cut_off(boxes, scores, labels, cut, window))[:, 0]
        kept = whole[batched_nms(boxes[whole], scores[whole], labels[whole], self.settings.nms_iou)]
        probabilities = scores.new_zeros(1, len(kept), len(self.classes))
        probabilities[0, torch.arange(len(kept)), labels[kept]] = scores[kept]
        return {"boxes": boxes[None, kept], "probabilities": probabilities}

    def postprocess(self, outputs: Outputs, prepared: Sequence[PreparedImage]) -> list[DetectionPrediction]:
        activated = self.activate(outputs)
        predictions = []
        for place, image in enumerate(prepared):
            boxes, scores, labels = self._best(activated["boxes"][place], activated["probabilities"][place])
            boxes = _in_image(boxes, image)
            there = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
            predictions.append(self._to_prediction(boxes[there], scores[there], labels[there], image))
        return predictions

    def _best(self, boxes: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best pairs of a box ``[N, 4]`` and a class ``[N, C]``, the best first: boxes, scores, labels."""
        flat = probabilities.flatten()
        scores, places = flat.topk(min(_MOST_CANDIDATES, len(flat)))
        places = places[scores >= _MIN_SCORE]
        scores, labels = scores[: len(places)], places % len(self.classes)
        boxes = boxes[places // len(self.classes)]
        if self.is_dense:
            kept = batched_nms(boxes, scores, labels, self.settings.nms_iou)
            boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        most = self.settings.max_boxes
        return boxes[:most], scores[:most], labels[:most]

    def _of_window(self, tile: Tile, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The best boxes of a window in pixels of the image, scores, labels, which it may cut, and which it is."""
        outputs = self.activate(tile.outputs)
        boxes, scores, labels = self._best(outputs["boxes"][0], outputs["probabilities"][0])
        rows, columns = tile.size
        limits = boxes.new_tensor([columns, rows, columns, rows])
        boxes = torch.minimum(boxes.clamp_min(0), limits)  # a window knows nothing of what lies beyond
        inner = [tile.left > 0, tile.top > 0, tile.left + columns < size[1], tile.top + rows < size[0]]
        distances = torch.cat([boxes[:, :2], limits[2:] - boxes[:, 2:]], dim=1)
        cut = ((distances < _BORDER) & torch.tensor(inner, device=boxes.device)).any(dim=1)
        shift = boxes.new_tensor([tile.left, tile.top, tile.left, tile.top])
        window = torch.full_like(labels, tile.top * size[1] + tile.left)
        return boxes + shift, scores, labels, cut, window

    def _to_prediction(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, image: PreparedImage
    ) -> DetectionPrediction:
        thresholds = torch.tensor(
            [image.thresholds.get(name, self.settings.score_threshold) for name in self.classes], dtype=torch.float64
        )
        boxes, scores, labels = boxes.cpu(), scores.cpu(), labels.cpu()
        is_found = scores.double() >= thresholds[labels]

        def chosen(rows: Tensor, doubtful: DetectionPrediction | None = None) -> DetectionPrediction:
            found, how_sure, kinds = (column[rows].numpy() for column in (boxes, scores, labels))
            return DetectionPrediction(found, how_sure, kinds, self.classes, image.size, doubtful)

        return chosen(is_found, chosen(~is_found))

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        count = "N" if self.is_dense else "Q"
        return (
            ExportOutput(
                name="boxes",
                meaning=f"[B, {count}, 4]: x0, y0, x1, y1 in pixels of the input",
                is_set=not self.is_dense,
            ),
            ExportOutput(
                name="scores",
                is_set=not self.is_dense,
                meaning=f"[B, {count}, {len(self.classes)}]: sigmoid of each gives probabilities of the classes"
                + ("; boxes overlap, and of those of one class the best is kept (non-maximum suppression)"
                   if self.is_dense else ""),
            ),
        )  # fmt: skip

    def metrics(self, dataset: ImageDataset) -> "_BoxTaskMetrics":
        return _BoxTaskMetrics(dataset, self.classes, self.config)


def _targets(sample: Mapping[str, Any], device: torch.device) -> dict[str, list[Tensor]]:
    """Plain tensors on the device of what a batch says about boxes."""
    return {
        name: [values.as_subclass(Tensor).to(device, non_blocking=True) for values in sample[name]]
        for name in ("boxes", "box_labels")
    }


def _in_image(boxes: Tensor, image: PreparedImage) -> Tensor:
    """Boxes of the network's image in pixels of the image, clipped to it."""
    height, width = image.size
    above, left = image.padding
    down, across = image.scale
    boxes = (boxes - boxes.new_tensor([left, above, left, above])) / boxes.new_tensor([across, down, across, down])
    return torch.minimum(boxes.clamp_min(0), boxes.new_tensor([width, height, width, height]))


def _is_cut_off(boxes: Tensor, scores: Tensor, labels: Tensor, cut: Tensor, window: Tensor) -> Tensor:
    """Which boxes ``[N, 4]`` are a piece of an object that another window shows as a whole, or more of it.

    Suppression by overlap leaves them: the overlap of a piece with the whole is small.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp_min(0)
    areas = sides.prod(dim=1)
    result = torch.zeros_like(cut)
    for place in torch.nonzero(cut)[:, 0].tolist():
        corners = boxes[place]
        shared = torch.minimum(boxes[:, 2:], corners[2:]) - torch.maximum(boxes[:, :2], corners[:2])
        inside = shared.clamp_min(0).prod(dim=1) >= _CUT_SHARE * areas[place]
        larger = (areas > areas[place]) & (window != window[place]) & (labels == labels[place])
        result[place] = bool((inside & larger & (scores >= scores[place] / 2)).any())
    return result


class _BoxTaskMetrics(TaskMetrics):
    """Boxes of a set against those that it knows; images at which nobody has looked are left out."""

    def __init__(self, dataset: ImageDataset, classes: Sequence[str], config: TaskConfig) -> None:
        from dinov2.eval.metrics.detection import DetectionMetrics

        super().__init__(dataset)
        assert isinstance(dataset, BoxSource)
        self.source: BoxSource = dataset
        self.classes = tuple(classes)
        self.rule = DetectionTask.threshold_rule(config)
        self.threshold = getattr(config, DetectionTask.name).score_threshold
        self.boxes = DetectionMetrics(classes, dataset.get_group_ids())

    def update(self, index: int, prediction: DetectionPrediction) -> float | None:
        from dinov2.eval.metrics.detection import detection_error

        if not self.source.knows_boxes(index):
            return None
        true_boxes, true_labels = self.source.get_boxes(index)
        crowd = self.source.get_crowd(index)
        seen = prediction if prediction.doubtful is None else prediction.joined(prediction.doubtful)
        found = np.arange(len(seen)) < len(prediction)
        self.boxes.update(
            index, seen.boxes, seen.scores, seen.labels, true_boxes, true_labels, crowd=crowd, found=found
        )
        return detection_error(prediction.boxes, prediction.scores, prediction.labels, true_boxes, true_labels, crowd)

    def ground_truth(self, index: int) -> DetectionPrediction | None:
        if not self.source.knows_boxes(index):
            return None
        boxes, labels = self.source.get_boxes(index)
        kept = ~self.source.get_crowd(index)
        size = self.dataset.get_image_size(index)
        sure = np.ones(int(kept.sum()), dtype=np.float32)
        return DetectionPrediction(boxes[kept], sure, labels[kept], self.classes, size)

    def merge_processes(self) -> None:
        self.boxes.merge_processes()

    def compute(self) -> dict[str, float]:
        return self.boxes.compute()

    def thresholds(self) -> dict[str, float]:
        return {} if self.rule is None else self.boxes.thresholds(self.rule)

    def warnings(self) -> list[str]:
        num_objects, num_found = self.boxes.counts()
        found = []
        if num_objects and not num_found:
            found.append(
                f"NOTHING FOUND: no box of any image reaches its threshold ({self.threshold:g} unless val chose one), "
                f"though {num_objects} objects are there; try more epochs, a lower detection.score_threshold, or "
                "backbone.mode=lora or full"
            )
        if lost := self.boxes.zero_escapes().get("zero_escapes/parts_without_box"):
            found.append(f"BLIND TO PARTS: {lost:.0f} defective parts have no box at all, at any threshold")
        return found

    def scores(self) -> "Mapping[str, Scores]":
        scores = self.boxes.scores()
        return {} if scores is None else {"boxes": scores}

    def charts(self) -> "Mapping[str, Chart]":
        from dinov2.logging.plots import Chart, Curve

        curves = [Curve(name, found.recall, found.precision) for name, found in self.boxes.precision_recall().items()]
        if not curves:
            return {}
        title = "precision over recall of boxes, IoU 0.5"
        return {"precision_recall": Chart(title=title, curves=curves, x_label="recall", from_zero=True)}
