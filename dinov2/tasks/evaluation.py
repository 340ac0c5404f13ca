"""Judging a task model on a set: the same path from photo to prediction as inference, compared with the truth."""

import difflib
import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import all_gather_objects, get_rank, get_world_size
from dinov2.eval.metrics.classification import number_parts
from dinov2.tasks.inference import PartPredictor, PreparedPart, PreparedPhoto, TaskPredictor
from dinov2.tasks.package import TaskPackage
from dinov2.tasks.predictions import Prediction
from dinov2.tasks.task import Judge, Task

_READ_AHEAD = 2  # batches of every loading process


@dataclass(frozen=True, kw_only=True)
class JudgingOptions:
    """How a set is run through the model.

    Attributes:
        batch_size: photos (parts) per forward pass.
        flips: average with the mirrored photo.
        scales: average over these sizes; dense tasks only.
        num_workers: processes that read photos; 0 reads in this one.
        num_pictures: photos that are kept for drawing: so many spread over the set, and so many of the worst.
    """

    batch_size: int = 16
    flips: bool = False
    scales: tuple[float, ...] = (1.0,)
    num_workers: int = 0
    num_pictures: int = 0


@dataclass(frozen=True, order=True)
class Case:
    """One photo with its prediction, kept for drawing; cases are ordered by how wrong they are."""

    wrongness: float
    index: int
    prediction: Prediction = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found; the same in all processes.

    Attributes:
        judge: has seen the whole set.
        figures: by name.
        shown: photos spread over the set, in its order.
        worst: those that the model is most wrong about, the worst first.
    """

    judge: Judge[Any]
    figures: dict[str, float]
    shown: tuple[Case, ...]
    worst: tuple[Case, ...]


def judge_set(task: Task, package: TaskPackage, dataset: ImageDataset, options: JudgingOptions) -> Verdict:
    """Predicts every photo (part) of a set once, over all processes, and judges it at the photo's own size.

    Every process must call it with a whole, unsharded model: processes run it independently of each other.

    Args:
        task: says how predictions are judged.
        package: the model, in evaluation mode.
        dataset: photos with what is known about them.
        options: see `JudgingOptions`.

    Raises:
        OSError: naming a photo that cannot be read: a score that leaves some out would be another score.
        BadTargetError: naming a mask or depth map that cannot be used.
    """
    judge = task.judge(dataset)
    # The dataset itself prepares the light of its photos.
    package = replace(package, light="original")
    source: _Source = _Parts(package, dataset) if package.per_part else _Photos(package, dataset, options)
    shown_indices = set(_spread(len(source), options.num_pictures))
    shown: list[Case] = []
    worst: list[Case] = []
    for indices, predictions in _predictions(source, options):
        for index, prediction in zip(indices, predictions, strict=True):
            wrongness = judge.see(index, prediction)
            case = Case(0.0 if wrongness is None else wrongness, index, prediction)
            if index in shown_indices:
                shown.append(case)
            if wrongness is not None and options.num_pictures:
                heapq.heappush(worst, case)
                if len(worst) > options.num_pictures:
                    heapq.heappop(worst)
    judge.merge_processes()
    all_shown, all_worst = zip(*all_gather_objects((shown, worst)), strict=True)
    return Verdict(
        judge=judge,
        figures=judge.figures(),
        shown=tuple(sorted((case for cases in all_shown for case in cases), key=lambda case: case.index)),
        worst=tuple(heapq.nlargest(options.num_pictures, (case for cases in all_worst for case in cases))),
    )


def check_metric(task: Task, dataset: ImageDataset, metric: str) -> None:
    """Finds out, before anything is trained, whether judging a set will give a figure.

    The judge is shown what the set itself says, photo by photo, until it has the figure.

    Raises:
        ValueError: it never has; the message lists what there is.
        BadTargetError: naming a mask or depth map that cannot be used.
    """
    judge = task.judge(dataset)
    look = 1
    for index in range(len(judge)):
        truth = judge.truth(index)
        if truth is not None:
            judge.see(index, truth)
        if index + 1 in (look, len(judge)):  # figures of all that was seen are not for free
            if not math.isnan(judge.figures().get(metric, math.nan)):
                return
            look *= 2
    figures = judge.figures()
    if metric in figures:
        raise ValueError(f"val is too small or too uniform for {metric}, the figure that chooses the best weights")
    near = difflib.get_close_matches(metric, figures, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(
        f"evaluation.metric={metric}: judging val gives no such figure{hint}; there are {', '.join(figures) or 'none'}"
    )


class _Source(Dataset[tuple[int, Any]], ABC):
    """Photos or parts, ready for the model."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def predict(self, prepared: Sequence[Any]) -> Sequence[Prediction]: ...


class _Photos(_Source):
    def __init__(self, package: TaskPackage, dataset: ImageDataset, options: JudgingOptions) -> None:
        self.dataset = dataset
        self.predictor = TaskPredictor(
            package, batch_size=options.batch_size, flips=options.flips, scales=options.scales
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, PreparedPhoto]:
        return index, self.predictor.prepare(self.dataset.get_image(index))

    def predict(self, prepared: Sequence[PreparedPhoto]) -> Sequence[Prediction]:
        return self.predictor.predict_prepared(prepared)


class _Parts(_Source):
    def __init__(self, package: TaskPackage, dataset: ImageDataset) -> None:
        self.dataset = dataset
        self.predictor = PartPredictor(package)
        names, part_of_photo = number_parts(dataset.get_group_ids())
        self.photos: list[list[int]] = [[] for _ in names]
        for photo, part in enumerate(part_of_photo.tolist()):
            self.photos[part].append(photo)

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> tuple[int, PreparedPart]:
        chosen = self.predictor.choose(self.photos[index])
        photos: list[Image.Image] = [self.dataset.get_image(photo) for photo in chosen]
        return index, self.predictor.prepare(photos)

    def predict(self, prepared: Sequence[PreparedPart]) -> Sequence[Prediction]:
        return self.predictor.predict_prepared(prepared)


def _predictions(source: _Source, options: JudgingOptions) -> Iterator[tuple[list[int], Sequence[Prediction]]]:
    """This process's share of the set, batch by batch."""
    loader: DataLoader[Any] = DataLoader(
        source,
        sampler=range(get_rank(), len(source), get_world_size()),
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        collate_fn=list,
        prefetch_factor=_READ_AHEAD if options.num_workers else None,
        generator=torch.Generator(),  # draws nothing from the run's
    )
    for batch in loader:
        indices, prepared = zip(*batch, strict=True)
        yield list(indices), source.predict(prepared)


def _spread(length: int, count: int) -> list[int]:
    """At most ``count`` numbers below ``length``, evenly spread."""
    count = min(length, count)
    return [place * length // count for place in range(count)]
