"""Evaluation of a task model on a set by the path of inference, and which of its weights are the best so far."""

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.references import References
from dinov2.data.preprocessing import Chain
from dinov2.distributed import all_gather_objects, get_rank, get_world_size, is_main_process
from dinov2.eval.features import report_progress
from dinov2.eval.metrics.classification import Scores
from dinov2.eval.results import RESULTS_FILE
from dinov2.tasks.inference import Inference
from dinov2.tasks.options import TaskEvaluationOptions
from dinov2.tasks.package import TaskPackage
from dinov2.tasks.predictions import Prediction
from dinov2.tasks.task import MAX_HEADLINE, PreparedImage, Task, TaskMetrics, spread_evenly

logger = logging.getLogger("dinov2")

_CHANCE = 0.5  # AUROC of a constant answer
_READ_AHEAD = 2  # batches of every loading process


@dataclass(frozen=True, order=True)
class Case:
    """One sample with its prediction, kept for drawing; cases are ordered by how wrong they are."""

    error: float
    index: int
    prediction: Prediction = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was found; the same in all processes.

    Attributes:
        metrics: have taken in the whole set.
        values: of the metrics, by name.
        warnings: see `TaskMetrics.warnings`.
        shown: samples spread over the set, in its order.
        worst: those that the model is most wrong about, the worst first; one of each part.
    """

    metrics: TaskMetrics
    values: dict[str, float]
    warnings: tuple[str, ...]
    shown: tuple[Case, ...]
    worst: tuple[Case, ...]


def evaluate_set(
    package: TaskPackage,
    dataset: ImageDataset,
    options: TaskEvaluationOptions,
    *,
    num_workers: int = 0,
    indices: Sequence[int] | None = None,
) -> Evaluation:
    """Predicts every sample of a set once, over all processes, and compares at the image's own size.

    Every process must call it with a whole, unsharded model: processes run it independently of each other.

    Args:
        package: the model, in evaluation mode, and its task.
        dataset: images with what is known about them.
        options: batch size, flips, scales, and how many samples are kept for drawing: so many spread over the set, and
            so many of the worst.
        num_workers: processes that read images; 0 reads in this one.
        indices: samples to look at; None for all.

    Raises:
        OSError: naming an image that cannot be read: a score that leaves some out would be another score.
        BadTargetError: naming a target or a reference that cannot be used.
    """
    task, most = package.task, options.num_pictures
    metrics = task.metrics(dataset)
    chosen = range(len(metrics)) if indices is None else indices
    inference = _inference(package, options, flips=options.flips, scales=options.scales)
    references = References(dataset) if inference.compares else None
    samples = _Prepared(len(metrics), metrics.read_inputs, inference, references)
    loader = _loader(samples, chosen, options.batch_size, num_workers)
    shown_indices = set(spread_evenly(chosen, most))
    parts = metrics.part_ids()
    shown: list[Case] = []
    worst: list[Case] = []
    for batch in loader:
        numbers, prepared = zip(*batch, strict=True)
        for index, prediction in zip(numbers, inference.predict_prepared(prepared), strict=True):
            error = metrics.update(index, prediction)
            case = Case(0.0 if error is None else error, index, prediction)
            if index in shown_indices:
                shown.append(case)
            if error is not None:
                worst = worst_of_parts([*worst, case], parts, most)
    metrics.merge_processes()
    all_shown, all_worst = zip(*all_gather_objects((shown, worst)), strict=True)
    return Evaluation(
        metrics=metrics,
        values=metrics.compute(),
        warnings=tuple(metrics.warnings()),
        shown=tuple(sorted((case for cases in all_shown for case in cases), key=lambda case: case.index)),
        worst=tuple(worst_of_parts([case for cases in all_worst for case in cases], parts, most)),
    )


def predict_set(
    package: TaskPackage, dataset: ImageDataset, options: TaskEvaluationOptions, *, num_workers: int = 0
) -> Iterator[tuple[int, Any]]:
    """Number and prediction of every image of a set, prepared as for evaluation; of every process its share.

    Raises:
        OSError: naming an image that cannot be read.
    """
    inference = _inference(package, options)
    samples = _Prepared(len(dataset), partial(_image_alone, dataset), inference)
    loader = _loader(samples, range(len(dataset)), options.batch_size, num_workers)
    for batch in report_progress(loader, "images", options.batch_size * get_world_size(), len(dataset)):
        numbers, prepared = zip(*batch, strict=True)
        yield from zip(numbers, inference.predict_prepared(prepared), strict=True)


def show_set(
    package: TaskPackage, dataset: ImageDataset, options: TaskEvaluationOptions, *, num_workers: int = 0
) -> None:
    """Runs a model over a set as `predict_set` does, for heads that learn by looking."""
    for _ in predict_set(package, dataset, options, num_workers=num_workers):
        pass


def _image_alone(dataset: ImageDataset, index: int) -> dict[str, Any]:
    return {"image": dataset.get_placed_image(index)}


def _inference(package: TaskPackage, options: TaskEvaluationOptions, **more: Any) -> Inference:
    return Inference(
        package.model,
        package.task,
        # The dataset itself prepares the light of its images, and all before it.
        replace(package.preprocessing, light="original", chain=Chain()),
        device=package.device,
        batch_size=options.batch_size,
        thresholds=package.thresholds,
        **more,
    )


def _loader(
    samples: "_Prepared", chosen: Sequence[int], batch_size: int, num_workers: int
) -> DataLoader[list[tuple[int, PreparedImage]]]:
    """Batches of this process's share of the chosen samples."""
    return DataLoader(
        samples,  # type: ignore[arg-type]  # batches are lists
        sampler=chosen[get_rank() :: get_world_size()],
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        prefetch_factor=_READ_AHEAD if num_workers else None,
        generator=torch.Generator(),  # draws nothing from the run's
    )


def worst_of_parts(cases: Iterable[Case], parts: Sequence[str], most: int) -> list[Case]:
    """The worst case of each part, of so many parts, the worst first: images of one part are wrong alike."""
    chosen: dict[str, Case] = {}
    for case in sorted(cases, reverse=True):
        chosen.setdefault(parts[case.index], case)
    return list(chosen.values())[:most]


class BestSoFar:
    """Follows a metric over epochs.

    Of epochs that it holds equal a second metric chooses, and of those still equal the latest is the best: it has been
    trained for longest.

    Args:
        metric: its name.
        higher_is_better: whether larger is better.
        patience: epochs without improvement of ``metric`` after which the run is stale; 0 for never.
        second: name of the second metric; empty for none.
        second_higher: whether more of it is better.

    Attributes:
        value: the best, NaN before the first.
        epoch: of the best; -1 before the first.
        chosen_by: metric that ``value`` is of; empty where a state of an earlier version does not say.
    """

    def __init__(
        self,
        metric: str,
        *,
        higher_is_better: bool,
        patience: int,
        second: str = "",
        second_higher: bool = True,
    ) -> None:
        self.metric = metric
        self.second = second
        self.patience = patience
        self._signs = [1 if higher else -1 for higher in (higher_is_better, second_higher)]
        self.value = math.nan
        self.epoch = -1
        self.chosen_by = metric
        self._second_value = math.nan
        self._improved = -1  # epoch in which the metric itself last was better than ever
        self._last_epoch = -1

    def update(self, values: Mapping[str, float], epoch: int) -> bool:
        """Takes note of an evaluation; returns whether it is the best so far."""
        self._last_epoch = epoch
        found, second = (values.get(name, math.nan) for name in (self.metric, self.second))
        better = self._gain(found, self.value, 0)
        if math.isnan(self.value) or better > 0:
            self._improved = epoch
        elif better < 0 or self._gain(second, self._second_value, 1) < 0:
            return False
        self.value, self._second_value, self.epoch, self.chosen_by = found, second, epoch, self.metric
        return True

    def _gain(self, value: float, best: float, place: int) -> float:
        """Above 0 where better, 0 for equals and where one of the two is not known."""
        gain = self._signs[place] * (value - best)
        return 0.0 if math.isnan(gain) else gain

    def look_up(self, records: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Compares by the metrics of now from here on, also where the best so far was chosen by another one.

        Args:
            records: epochs and what was found after them, among them the best.
        """
        before = self.value
        values = next((values for epoch, values in records if epoch == self.epoch), {})
        self.value, self._second_value = (values.get(name, math.nan) for name in (self.metric, self.second))
        if self.value != before and is_main_process():
            logger.warning(
                "the best weights so far, after epoch %d, were chosen by %s; from here on %s chooses, then %s",
                self.epoch, self.chosen_by or "another metric", self.metric, f"{self.value:.4f}",
            )  # fmt: skip
        self.chosen_by = self.metric

    @property
    def is_stale(self) -> bool:
        """Whether nothing has improved for too long."""
        return self.patience > 0 and self._last_epoch - self._improved >= self.patience

    def __str__(self) -> str:
        if self.epoch < 0:
            return "nothing was evaluated"
        return f"the best {self.metric} is {self.value:.4f}, after epoch {self.epoch} of {self._last_epoch}"

    def state_dict(self) -> dict[str, Any]:
        """Builtins only."""
        return {
            "figure": self.value,
            "epoch": self.epoch,
            "last_epoch": self._last_epoch,
            "metric": self.chosen_by,
            "second": self._second_value,
            "improved": self._improved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from `state_dict`, also of earlier versions, which knew the first three entries."""
        self.value, self.epoch, self._last_epoch = state["figure"], state["epoch"], state["last_epoch"]
        self.chosen_by, self._second_value = state.get("metric", ""), state.get("second", math.nan)
        self._improved = state.get("improved", self.epoch)


def check_metric(task: Task, dataset: ImageDataset, metric: str, path: str, missing: Sequence[str] = ()) -> None:
    """Finds out, before anything is trained, whether evaluating a set will give a metric.

    The metrics are given the ground truth itself, sample by sample, until they have it.

    Args:
        task: has the metrics.
        dataset: the set.
        metric: name of the metric.
        path: what the options call the set.
        missing: classes that the set does not show.

    Raises:
        ValueError: it never comes; the message says why, or lists what there is.
        BadTargetError: naming a target that cannot be used.
    """
    metrics = task.metrics(dataset)
    look = 1
    for index in range(len(metrics)):
        truth = metrics.ground_truth(index)
        if truth is not None:
            metrics.update(index, truth)
        if index + 1 in (look, len(metrics)):  # computing is not for free
            if not math.isnan(metrics.compute().get(metric, math.nan)):
                return
            look *= 2
    values = metrics.compute()
    there_are = ", ".join(name for name, value in values.items() if not math.isnan(value)) or "none"
    near = difflib.get_close_matches(metric, values, n=1)
    if missing and (metric in values or metric in (task.metric, task.second_metric, *task.headline)):
        raise ValueError(
            f"{path} (val): no {task.counted} is of the class {' or '.join(missing)}, so {metric}, the metric that "
            f"chooses the best weights, cannot be computed. Put some into val, or set evaluation.metric to one of "
            f"{there_are}"
        )
    if metric in values:
        raise ValueError(f"{path} is too small or too uniform for {metric}, the metric that chooses the best weights")
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"evaluation.metric={metric}: evaluating val gives no such metric{hint}; there are {there_are}")


def headline(name: str, task: Task, evaluation: Evaluation, scores: Mapping[str, Scores]) -> str:
    """The metrics of a set that matter most as a table, a row each, with intervals over parts where they have one.

    Args:
        name: of the set.
        task: says which they are.
        evaluation: of the set.
        scores: of the same, with intervals, see `TaskMetrics.scores`.
    """
    values = evaluation.values
    names = [metric for metric in task.headline if metric in values] or list(values)
    intervals = {
        f"{level}_{metric}": f"[{value.low:.4f}, {value.high:.4f}]"
        + (_beside_chance(value.low, value.high) if metric == "auroc" else "")
        for found in scores.values()
        for level, scored in (("image", found.image), ("part", found.part))
        for metric, value in scored.metrics.items()
        if value.low is not None and value.high is not None
    }
    shown = names[:MAX_HEADLINE]
    width = max(map(len, shown), default=0)
    lines = [f"{name}: {len(evaluation.metrics)} samples" + (", 95 % intervals over parts" if intervals else "")]
    lines += [f"  {metric:<{width}}  {values[metric]:9.4f}  {intervals.get(metric, '')}".rstrip() for metric in shown]
    if more := len(values) - len(shown):
        lines.append(f"  ({more} more in {name}/{RESULTS_FILE})")
    return "\n".join(lines)


def _beside_chance(low: float, high: float) -> str:
    if low > _CHANCE:
        return ""
    return f"  {'worse than' if high < _CHANCE else 'not distinguishable from'} chance, {_CHANCE}"


class _Prepared(Dataset[tuple[int, PreparedImage]]):
    """The samples of a set, ready for the model, with what they are compared with."""

    def __init__(
        self,
        count: int,
        read_inputs: Callable[[int], dict[str, Any]],
        inference: Inference,
        references: References | None = None,
    ) -> None:
        self.count = count
        self.read_inputs = read_inputs
        self.inference = inference
        self.references = references

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, PreparedImage]:
        inputs = self.read_inputs(index)
        if self.references is not None:
            inputs["reference"] = self.references.read(index, inputs["image"].full_size)
        return index, self.inference.prepare(**inputs)
