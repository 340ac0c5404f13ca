"""Classification of images, or of parts from several images; one class each, or several."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from dinov2.config import ConfigError
from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.data.task_dataset import (
    LabelSource,
    PartBags,
    ReadTargets,
    TaskDataset,
    TaskSample,
    label_targets,
    part_label,
)
from dinov2.data.transforms import as_rgb
from dinov2.distributed import all_gather_objects
from dinov2.loss.classification_losses import ClassificationLoss, MultiLabelLoss
from dinov2.models.heads.classification import ClassificationHead, LinearClassifier, MLPClassifier, PartClassifier
from dinov2.tasks.drawing import PRESENT_FROM
from dinov2.tasks.options import HeadOptions, TaskConfig
from dinov2.tasks.predictions import ClassPrediction
from dinov2.tasks.task import (
    THRESHOLD_OPTIONS,
    ExportOutput,
    Head,
    HeadSizes,
    Outputs,
    PreparedImage,
    Task,
    TaskFacts,
    TaskMetrics,
    spread_evenly,
)

if TYPE_CHECKING:
    from dinov2.eval.metrics.classification import Scores
    from dinov2.eval.metrics.thresholds import ThresholdRule
    from dinov2.eval.results import Predictions
    from dinov2.logging.plots import Chart


def _classifier(network: Callable[..., ClassificationHead], *options: str) -> Head:
    """A head for images that may be put over parts."""
    head = Head.of(network, *options)

    def build(given: HeadOptions, sizes: HeadSizes) -> nn.Module:
        classifier = head.build(given, sizes)
        return PartClassifier(cast(ClassificationHead, classifier)) if given.per_part else classifier

    return Head(build, (*options, "per_part"))


class ClassificationTask(Task):
    """Cross-entropy of one class, or binary cross-entropy of each.

    Args:
        config: options of the run.
        facts: classes of the training set.
    """

    name = "classification"
    heads = MappingProxyType(
        {
            "linear": _classifier(LinearClassifier, "pooling", "standardize", "dropout"),
            "mlp": _classifier(MLPClassifier, "pooling", "standardize", "hidden_dim", "dropout"),
        }
    )
    shared_options = frozenset(
        (
            *("loss.class_weights", "loss.label_smoothing", "data.max_photos", "evaluation.part_aggregate"),
            "data.reference",
            *THRESHOLD_OPTIONS,
        )
    )
    levels = ("image", "part")
    plot_titles = MappingProxyType({"image_accuracy": "accuracy"})  # under the name that people look for

    headline = (
        *("image_auroc", "image_average_precision", "image_balanced_accuracy", "image_accuracy", "image_f1"),
        *("image_escape_rate_at_5", "part_auroc", "part_balanced_accuracy", "part_f1", "part_escape_rate_at_5"),
        *("mean_average_precision", "macro_f1", "micro_f1", "image_recall", "image_precision", "image_top5"),
    )

    def __init__(self, config: TaskConfig, facts: TaskFacts) -> None:
        super().__init__(config, facts)
        self.multi_label = config.data.multi_label
        most = config.data.max_photos
        self.max_images = most if config.head.per_part else 0
        if config.head.per_part:
            self.inputs = ("image", "valid")
        if self.multi_label:
            self.metric, self.second_metric, self.fewest_classes = "mean_average_precision", "macro_f1", 1
        elif len(self.classes) == 2:
            self.metric, self.second_metric = "image_auroc", "image_balanced_accuracy"
        else:
            self.metric, self.second_metric = "image_balanced_accuracy", "image_accuracy"

    @classmethod
    def check_options(cls, config: TaskConfig) -> None:
        super().check_options(config)
        if config.data.multi_label and config.loss.label_smoothing > 0:
            raise ConfigError("loss.label_smoothing is for one label per image, data.multi_label for several")
        if config.data.multi_label and config.head.per_part:
            raise ConfigError("head.per_part goes with one label per part, not with data.multi_label")

    @classmethod
    def idle_options(cls, config: TaskConfig) -> Iterator[tuple[str, Iterable[str]]]:
        if config.head.per_part:
            yield "with head.per_part", ["evaluation.part_aggregate", "evaluation.flips"]
        else:
            yield "without head.per_part", ["data.max_photos"]
        if config.data.multi_label:
            yield "with data.multi_label", ["evaluation.part_aggregate"]

    @classmethod
    def read_facts(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> TaskFacts:
        classes = tuple(dataset.classes)
        if len(classes) < (1 if config.data.multi_label else 2):
            raise ValueError(f"{path} has the classes {list(classes)}: classification needs at least two")
        return TaskFacts(classes=classes)

    @classmethod
    def check_dataset(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> None:
        rule = cls.threshold_rule(config)
        if rule is not None and len(dataset.classes) > 2 and not config.data.multi_label:
            raise ValueError(
                f"evaluation.threshold={rule.goal} is for two classes, or several per image; {path} has "
                f"{len(dataset.classes)}, of which the most probable is taken"
            )

    def read_targets(self, dataset: ImageDataset) -> ReadTargets:
        return label_targets(dataset, len(self.classes), multi_label=self.multi_label)

    def make_samples(self, images: TaskDataset) -> TaskDataset | PartBags:
        if not self.max_images:
            return images
        return PartBags(images, num_classes=len(self.classes), max_images=self.max_images)

    def labels(self, dataset: ImageDataset, samples: TaskDataset | PartBags) -> list[tuple[int, ...] | None]:
        if isinstance(samples, PartBags):
            labels = samples.labels
        elif self.multi_label:
            return [several_labels(dataset, index) for index in range(len(dataset))]
        else:
            labels = dataset.get_targets()
        return [(label,) if label >= 0 else None for label in labels.tolist()]

    def prepare_loss(self, class_weights: Sequence[float], device: torch.device) -> None:
        weights = list(class_weights) or None
        criterion = (
            MultiLabelLoss(positive_weights=weights)
            if self.multi_label
            else ClassificationLoss(label_smoothing=self.config.loss.label_smoothing, class_weights=weights)
        )
        self.criterion: nn.Module = criterion.to(device)

    def forward(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        if self.max_images and inputs["image"].ndim == 4:  # every image is a part of its own
            inputs = {**inputs, "image": inputs["image"][:, None]}
        return super().forward(model, inputs)

    def loss(self, outputs: Outputs, targets: TaskSample) -> Outputs:
        terms: Outputs = self.criterion(outputs["logits"], targets["label"])
        return terms

    def activate(self, outputs: Outputs) -> Outputs:
        if "logits" not in outputs:
            return outputs
        logits = outputs["logits"].float()
        return {"probabilities": logits.sigmoid() if self.multi_label else logits.softmax(dim=1)}

    def postprocess(self, outputs: Outputs, prepared: Sequence[PreparedImage]) -> list[ClassPrediction]:
        rows = self.activate(outputs)["probabilities"].cpu().numpy()
        return [
            ClassPrediction(row, self.multi_label, self.classes, self._thresholds(image.thresholds))
            for row, image in zip(rows, prepared, strict=True)
        ]

    def _thresholds(self, given: Mapping[str, float]) -> tuple[float, ...]:
        """Thresholds of all classes; none where the model's file has none."""
        if not given or not (self.multi_label or len(self.classes) == 2):
            return ()
        return tuple(given.get(name, PRESENT_FROM) for name in self.classes)

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        share = "sigmoid of each" if self.multi_label else "softmax"
        return (ExportOutput(name="logits", meaning=f"[B, {len(self.classes)}]: {share} gives probabilities"),)

    def metrics(self, dataset: ImageDataset) -> TaskMetrics:
        rule = self.threshold_rule(self.config)
        if self.multi_label:
            return _MultiLabelTaskMetrics(dataset, self.classes, rule)
        if self.max_images:
            return _PartTaskMetrics(dataset, self.classes, self.max_images, rule)
        return _ClassTaskMetrics(dataset, self.classes, self.config.evaluation.part_aggregate, rule)


class _ClassTaskMetrics(TaskMetrics):
    """Scores of images and of the parts they show; images without a label are left out."""

    def __init__(
        self,
        dataset: ImageDataset,
        classes: Sequence[str],
        aggregation: str = "max",
        rule: "ThresholdRule | None" = None,
    ) -> None:
        super().__init__(dataset)
        self.rule = rule
        self.classes = tuple(classes)
        self.aggregation = aggregation
        self.labels = dataset.get_targets()
        self.group_ids = list(dataset.get_group_ids())
        self._probabilities: dict[int, npt.NDArray[np.float32]] = {}

    def update(self, index: int, prediction: ClassPrediction) -> float | None:
        self._probabilities[index] = prediction.probabilities
        label = int(self.labels[index])
        return None if label == MISSING_TARGET else 1.0 - float(prediction.probabilities[label])

    def ground_truth(self, index: int) -> ClassPrediction | None:
        label = int(self.labels[index])
        if label == MISSING_TARGET:
            return None
        return ClassPrediction(np.eye(len(self.classes), dtype=np.float32)[label], classes=self.classes)

    def merge_processes(self) -> None:
        for probabilities in all_gather_objects(self._probabilities):
            self._probabilities |= probabilities

    def compute(self) -> dict[str, float]:
        scores = self._score(num_resamples=0)
        if scores is None:
            return {}
        parts_differ = len(set(self.group_ids)) < len(self.group_ids)
        levels = {"image": scores.image} | ({"part": scores.part} if parts_differ else {})
        return {
            f"{level}_{name}": metric.value for level, one in levels.items() for name, metric in one.metrics.items()
        }

    def thresholds(self) -> dict[str, float]:
        """Of the second class, where there are two."""
        from dinov2.eval.metrics.classification import levels_of

        indices = self._labelled()
        if self.rule is None or len(self.classes) != 2 or not len(indices):
            return {}
        groups = [self.group_ids[index] for index in indices.tolist()]
        levels = levels_of(self._rows(indices), self.labels[indices], groups, aggregation=self.aggregation)
        level = levels[self.rule.level]
        chosen = self.rule.choose(level.probabilities[:, 1], level.labels == 1)
        return {} if chosen is None else {self.classes[1]: chosen}

    def warnings(self) -> list[str]:
        indices = self._labelled()
        labels = self.labels[indices]
        if len(set(labels.tolist())) < 2:
            return []
        taken = np.unique(self._rows(indices).argmax(axis=1))
        if len(taken) > 1:
            return []
        name, share = self.classes[int(taken[0])], float((labels != taken[0]).mean())
        return [f"ONE CLASS ONLY: every image or part is taken for {name}, though {share:.1%} of them are others"]

    def confusion(self) -> list[list[int]]:
        from dinov2.eval.metrics.classification import confusion_matrix

        indices = self._labelled()
        if not len(indices):
            return []
        return [list(row) for row in confusion_matrix(self._rows(indices), self.labels[indices])]

    def charts(self) -> "Mapping[str, Chart]":
        """Precision over recall of the second class, where there are two: of images, and of parts."""
        from sklearn.metrics import precision_recall_curve

        from dinov2.eval.metrics.classification import levels_of
        from dinov2.logging.plots import Chart, Curve

        indices = self._labelled()
        if len(self.classes) != 2 or len(set(self.labels[indices].tolist())) < 2:
            return {}
        groups = [self.group_ids[index] for index in indices.tolist()]
        levels = levels_of(self._rows(indices), self.labels[indices], groups, aggregation=self.aggregation)
        if len(set(groups)) == len(groups):
            del levels["part"]
        curves = []
        for name, level in levels.items():
            precision, recall, _ = precision_recall_curve(level.labels == 1, level.probabilities[:, 1])
            curves.append(Curve(f"{name}s", recall[::-1], precision[::-1]))
        title = f"precision over recall of {self.classes[1]}"
        return {"precision_recall": Chart(title=title, curves=curves, x_label="recall", from_zero=True)}

    def scores(self) -> "dict[str, Scores]":
        scores = self._score(num_resamples=1000)
        return {} if scores is None else {ClassificationTask.name: scores}

    def predictions(self) -> "Predictions | None":
        from dinov2.eval.results import Predictions

        indices = np.array(sorted(self._probabilities), dtype=np.int64)
        if not len(indices):
            return None
        return Predictions(
            paths=[self.name_of(index) for index in indices.tolist()],
            group_ids=[self.group_ids[index] for index in indices.tolist()],
            labels=self.labels[indices],
            probabilities=self._rows(indices),
        )

    def _score(self, num_resamples: int) -> "Scores | None":
        from dinov2.eval.metrics.classification import score_predictions

        indices = self._labelled()
        if not len(indices):
            return None
        return score_predictions(
            self._rows(indices),
            self.labels[indices],
            [self.group_ids[index] for index in indices.tolist()],
            aggregation=self.aggregation,
            num_resamples=num_resamples,
        )

    def _labelled(self) -> npt.NDArray[np.int64]:
        """Samples that were taken in and have a label."""
        return np.array([index for index in sorted(self._probabilities) if self.labels[index] >= 0], dtype=np.int64)

    def _rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """``[N, C]``; rows add up to 1 in double precision, as scores of parts are compared with each other."""
        rows = np.stack([self._probabilities[index] for index in indices.tolist()]).astype(np.float64)
        return np.asarray(rows / rows.sum(axis=1, keepdims=True))


class _PartTaskMetrics(_ClassTaskMetrics):
    """Scores of parts that the model answers for as a whole; see `PartBags` for a part's label."""

    def __init__(
        self, dataset: ImageDataset, classes: Sequence[str], max_images: int, rule: "ThresholdRule | None" = None
    ) -> None:
        from dinov2.eval.metrics.classification import number_parts

        super().__init__(dataset, classes, rule=rule)
        names, part_of_image = number_parts(dataset.get_group_ids())
        targets = dataset.get_targets()
        self.group_ids = list(names)
        self._members = [np.flatnonzero(part_of_image == part).tolist() for part in range(len(names))]
        self.labels = np.array([part_label(targets[members], len(classes)) for members in self._members])
        self._max_images = max_images

    def __len__(self) -> int:
        return len(self.group_ids)

    def name_of(self, index: int) -> str:
        return self.group_ids[index]

    def part_ids(self) -> Sequence[str]:
        return self.group_ids

    def read_inputs(self, index: int) -> dict[str, Any]:
        chosen = spread_evenly(self._members[index], self._max_images)
        return {"image": [self.dataset.get_placed_image(image) for image in chosen]}

    def shown_image(self, index: int) -> Image.Image:
        return as_rgb(self.dataset.get_image(self._members[index][0]))


class _MultiLabelTaskMetrics(TaskMetrics):
    """Metrics of images that may have several classes; the dataset must have ``get_labels``."""

    def __init__(self, dataset: ImageDataset, classes: Sequence[str], rule: "ThresholdRule | None" = None) -> None:
        from dinov2.eval.metrics.multi_label import MultiLabelMetrics

        super().__init__(dataset)
        self.rule = rule
        self._rows: dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = {}  # found, and true
        self.classes = tuple(classes)
        self._metrics = MultiLabelMetrics(classes)
        self._num_found = self._num_there = 0

    def update(self, index: int, prediction: ClassPrediction) -> float | None:
        truth = self.ground_truth(index)
        if truth is None:
            return None
        self._metrics.update(prediction.probabilities[None], truth.probabilities[None])
        if self.rule is not None:
            self._rows[index] = prediction.probabilities, truth.probabilities
        self._num_found += len(prediction.present())
        self._num_there += len(truth.present())
        return float(np.abs(prediction.probabilities - truth.probabilities).max())

    def ground_truth(self, index: int) -> ClassPrediction | None:
        labels = several_labels(self.dataset, index)
        if labels is None:
            return None
        flags = np.zeros(len(self.classes), dtype=np.float32)
        flags[list(labels)] = 1.0
        return ClassPrediction(flags, multi_label=True, classes=self.classes)

    def merge_processes(self) -> None:
        self._metrics.merge_processes()
        self._rows = {index: row for rows in all_gather_objects(self._rows) for index, row in rows.items()}
        counts = np.array(all_gather_objects((self._num_found, self._num_there)))
        self._num_found, self._num_there = counts.sum(axis=0).tolist()

    def compute(self) -> dict[str, float]:
        return self._metrics.compute()

    def thresholds(self) -> dict[str, float]:
        """Of every class by itself; a part shows what any of its images does."""
        if self.rule is None or not self._rows:
            return {}
        indices = sorted(self._rows)
        groups = self.part_ids()
        units = [groups[index] if self.rule.level == "part" else str(index) for index in indices]
        names, places = np.unique(units, return_inverse=True)
        scores, there = np.zeros((len(names), len(self.classes))), np.zeros((len(names), len(self.classes)))
        np.maximum.at(scores, places, np.stack([self._rows[index][0] for index in indices]))
        np.maximum.at(there, places, np.stack([self._rows[index][1] for index in indices]))
        chosen = {
            name: self.rule.choose(scores[:, number], there[:, number] > 0)
            for number, name in enumerate(self.classes)
            if there[:, number].any()
        }
        return {name: threshold for name, threshold in chosen.items() if threshold is not None}

    def warnings(self) -> list[str]:
        if self._num_found or not self._num_there:
            return []
        return [f"NOTHING FOUND: no class of any image reaches {PRESENT_FROM}, though {self._num_there} are there"]


def several_labels(dataset: ImageDataset, index: int) -> tuple[int, ...] | None:
    """All classes of an image, of any dataset; None where it is not labelled."""
    if not isinstance(dataset, LabelSource):
        label = dataset.get_target(index)
        return None if label is None else (label,)
    try:
        return dataset.get_labels(index)
    except ValueError:
        return None
