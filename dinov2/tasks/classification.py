"""Classification of photos, or of parts from several photos; one class each, or several."""

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.data.task_dataset import TaskSample, part_label
from dinov2.distributed import all_gather_objects
from dinov2.eval.metrics.classification import Scores, confusion_matrix, number_parts, score_predictions
from dinov2.eval.results import Predictions
from dinov2.loss.classification_losses import ClassificationLoss, MultiLabelLoss
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.predictions import ClassPrediction
from dinov2.tasks.task import Judge, Task, TaskFacts

SURE = 1.0


class ClassificationTask(Task):
    """Cross-entropy of one class, or binary cross-entropy of each.

    Args:
        config: options of the run.
        facts: classes of the training set.
        class_weights: of the loss; empty for none.
    """

    name = "classification"

    def __init__(self, config: TaskConfig, facts: TaskFacts, class_weights: Sequence[float] = ()) -> None:
        self.classes = facts.classes
        self.multi_label = config.data.multi_label
        self.per_part = config.head.per_part
        self.aggregation = config.evaluation.part_aggregate
        self.higher_is_better = True
        weights = list(class_weights) or None
        if self.multi_label:
            self.metric = "mean_average_precision"
            self.criterion = MultiLabelLoss(positive_weights=weights)
        else:
            self.metric = "image_auroc" if len(self.classes) == 2 else "image_balanced_accuracy"
            self.criterion = ClassificationLoss(label_smoothing=config.loss.label_smoothing, class_weights=weights)

    def loss(self, outputs: Tensor, sample: TaskSample) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.criterion(outputs, sample["label"])
        return terms

    def judge(self, dataset: ImageDataset) -> Judge[ClassPrediction]:
        if self.multi_label:
            return MultiLabelJudge(dataset, self.classes)
        if self.per_part:
            return PartJudge(dataset, self.classes)
        return ClassJudge(dataset, self.classes, self.aggregation)


class ClassJudge(Judge[ClassPrediction]):
    """Scores of photos and of the parts they show; photos without a label are left out.

    Args:
        dataset: what the photos show.
        classes: names by index.
        aggregation: how a part's photos become one score, see `score_predictions`.
    """

    def __init__(self, dataset: ImageDataset, classes: Sequence[str], aggregation: str = "max") -> None:
        super().__init__(dataset)
        self.classes = tuple(classes)
        self.aggregation = aggregation
        self.labels = dataset.get_targets()
        self.group_ids = dataset.get_group_ids()
        self.path_of: Callable[[int], str] = lambda index: str(dataset.get_image_path(index))
        self._seen: dict[int, npt.NDArray[np.float32]] = {}

    def see(self, index: int, prediction: ClassPrediction) -> float | None:
        self._seen[index] = prediction.probabilities
        label = int(self.labels[index])
        return None if label == MISSING_TARGET else 1.0 - float(prediction.probabilities[label])

    def truth(self, index: int) -> ClassPrediction | None:
        label = int(self.labels[index])
        if label == MISSING_TARGET:
            return None
        return ClassPrediction(np.eye(len(self.classes), dtype=np.float32)[label])

    def merge_processes(self) -> None:
        for seen in all_gather_objects(self._seen):
            self._seen |= seen

    def figures(self) -> dict[str, float]:
        scores = self._score(num_resamples=0)
        if scores is None:
            return {}
        levels = {"image": scores.image} | ({"part": scores.part} if self._parts_differ else {})
        return {
            f"{level}_{name}": figure.value for level, found in levels.items() for name, figure in found.metrics.items()
        }

    def confusion(self) -> list[list[int]]:
        indices = self._known()
        if not len(indices):
            return []
        return [list(row) for row in confusion_matrix(self._probabilities(indices), self.labels[indices])]

    def scores(self) -> dict[str, Scores]:
        scores = self._score(num_resamples=1000)
        return {} if scores is None else {"classification": scores}

    def predictions(self) -> Predictions | None:
        indices = np.array(sorted(self._seen), dtype=np.int64)
        if not len(indices):
            return None
        return Predictions(
            paths=[self.path_of(index) for index in indices.tolist()],
            group_ids=[self.group_ids[index] for index in indices.tolist()],
            labels=self.labels[indices],
            probabilities=self._probabilities(indices),
        )

    def _score(self, num_resamples: int) -> Scores | None:
        indices = self._known()
        if not len(indices):
            return None
        return score_predictions(
            self._probabilities(indices),
            self.labels[indices],
            [self.group_ids[index] for index in indices.tolist()],
            aggregation=self.aggregation,
            num_resamples=num_resamples,
        )

    @property
    def _parts_differ(self) -> bool:
        return len(set(self.group_ids)) < len(self.group_ids)

    def _known(self) -> npt.NDArray[np.int64]:
        """Photos that were seen and have a label."""
        return np.array([index for index in sorted(self._seen) if self.labels[index] >= 0], dtype=np.int64)

    def _probabilities(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """``[N, C]``; rows add up to 1 in double precision, as scores of parts are compared with each other."""
        rows = np.stack([self._seen[index] for index in indices.tolist()]).astype(np.float64)
        return np.asarray(rows / rows.sum(axis=1, keepdims=True))


class PartJudge(ClassJudge):
    """Scores of parts that the model judges as a whole; see `PartBags` for a part's label.

    Args:
        dataset: photos with group ids; parts are numbered as `number_parts` does.
        classes: names by index.
    """

    def __init__(self, dataset: ImageDataset, classes: Sequence[str]) -> None:
        super().__init__(dataset, classes)
        names, part_of_photo = number_parts(dataset.get_group_ids())
        targets = dataset.get_targets()
        self.labels = np.array([part_label(targets[part_of_photo == part], len(classes)) for part in range(len(names))])
        self.group_ids = list(names)
        self.path_of = lambda index: names[index]
        self._first_photos = [int(np.flatnonzero(part_of_photo == part)[0]) for part in range(len(names))]

    def __len__(self) -> int:
        return len(self.group_ids)

    def photo_of(self, index: int) -> int:
        return self._first_photos[index]


class MultiLabelJudge(Judge[ClassPrediction]):
    """Figures of photos that may have several classes.

    Args:
        dataset: must have ``get_labels``.
        classes: names by index.
    """

    def __init__(self, dataset: ImageDataset, classes: Sequence[str]) -> None:
        # Here, as torchmetrics below it takes seconds to import, and predicting needs none.
        from dinov2.eval.metrics.multi_label import MultiLabelMetrics

        super().__init__(dataset)
        self.num_classes = len(classes)
        self.metrics = MultiLabelMetrics(classes)

    def see(self, index: int, prediction: ClassPrediction) -> float | None:
        truth = self.truth(index)
        if truth is None:
            return None
        self.metrics.update(prediction.probabilities[None], truth.probabilities[None])
        return float(np.abs(prediction.probabilities - truth.probabilities).max())

    def truth(self, index: int) -> ClassPrediction | None:
        labels = several_labels(self.dataset, index)
        if labels is None:
            return None
        flags = np.zeros(self.num_classes, dtype=np.float32)
        flags[list(labels)] = SURE
        return ClassPrediction(flags, multi_label=True)

    def merge_processes(self) -> None:
        self.metrics.merge_processes()

    def figures(self) -> dict[str, float]:
        return self.metrics.compute()


class ManyLabels(Protocol):
    """A dataset whose images may have several classes."""

    def get_labels(self, index: int) -> tuple[int, ...]:
        """All classes of an image; raises ValueError where it is not labelled."""


def several_labels(dataset: ImageDataset, index: int) -> tuple[int, ...] | None:
    """All classes of an image, of any dataset; None where it is not labelled."""
    if not hasattr(dataset, "get_labels"):
        label = dataset.get_target(index)
        return None if label is None else (label,)
    try:
        return cast(ManyLabels, dataset).get_labels(index)
    except ValueError:
        return None
