"""What the supervised loop asks of a task: a loss, a way to judge predictions, and the figure that counts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.task_dataset import TaskSample
from dinov2.eval.metrics.classification import Scores
from dinov2.eval.results import Predictions
from dinov2.tasks.predictions import Prediction

PredictionT = TypeVar("PredictionT", bound=Prediction)


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What the training set says about the task; validation and test must say the same.

    Attributes:
        classes: names by index; empty for depth.
        depth_unit: unit of the depths; empty for other tasks.
    """

    classes: tuple[str, ...] = ()
    depth_unit: str = ""

    @property
    def num_outputs(self) -> int:
        """Channels of the head."""
        return max(1, len(self.classes))


class Judge(ABC, Generic[PredictionT]):
    """Compares predictions with what a set says, one photo (or part) at a time, each exactly once.

    Args:
        dataset: the set.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """How many photos (or parts) there are to judge."""
        return len(self.dataset)

    def photo_of(self, index: int) -> int:
        """Number of a photo that shows what ``index`` is about: itself, or the first of a part."""
        return index

    @abstractmethod
    def see(self, index: int, prediction: PredictionT) -> float | None:
        """Takes in one prediction.

        Args:
            index: of the photo in the set, or of the part.
            prediction: at the photo's own size.

        Returns:
            How wrong it is, to find the worst; None where the set does not say.
        """

    @abstractmethod
    def truth(self, index: int) -> PredictionT | None:
        """What the set says, as a prediction that is sure of it; None where it does not say."""

    @abstractmethod
    def merge_processes(self) -> None:
        """Adds what all other processes have seen; every process must call it, once."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Figures of all that was seen."""

    def confusion(self) -> list[list[int]]:
        """How many of each class (outer) were taken for each class (inner); empty where nothing is classified."""
        return []

    def scores(self) -> Mapping[str, Scores]:
        """Figures with intervals from resampled parts, by what they are about; empty where there are none."""
        return {}

    def predictions(self) -> Predictions | None:
        """One row per photo for ``predictions.csv``; None where there is none."""
        return None


class Task(ABC):
    """One kind of supervised learning.

    Attributes:
        name: as in the options.
        metric: figure of the judge that chooses the best weights.
        higher_is_better: whether a larger figure is better.
        unit: of what is predicted; empty for classes and relative depth.
        criterion: the loss as a module, whose buffers (class weights) follow the model to its device.
    """

    name: ClassVar[str]
    metric: str
    higher_is_better: bool
    unit: str = ""
    criterion: nn.Module

    @abstractmethod
    def loss(self, outputs: Tensor, sample: TaskSample) -> dict[str, Tensor]:
        """Terms whose sum is the objective.

        Args:
            outputs: of the task model, for a batch.
            sample: the batch, collated.
        """

    @abstractmethod
    def judge(self, dataset: ImageDataset) -> Judge[Any]:
        """A new judge for a set."""
