"""What a backbone's scores have to beat: chance, the majority class, statistics of brightness, a random backbone."""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import floor
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import normalize

from dinov2.data.datasets.base import ImageDataset, ImageSelection, whole_parts
from dinov2.data.transforms import as_rgb
from dinov2.distributed import is_main_process
from dinov2.eval.features import TRAIN, VAL, Features, extract_features, warn_of_unseen_classes
from dinov2.eval.metrics.classification import (
    FALSE_ALARM_BUDGETS,
    LEVELS,
    RANKING_METRICS,
    Float64Array,
    FloatArray,
    IntArray,
    LevelScores,
    MetricValue,
    Scores,
    ScoringSettings,
    deciding_metric,
    score_parts,
    too_few_parts,
)
from dinov2.eval.neighbours import nearest_neighbours, nearest_of_other_parts, num_rows_of_other_parts
from dinov2.eval.results import BETTER, EQUAL, WORSE, Comparison, EvaluationResults, Predictions, variant_on

logger = logging.getLogger("dinov2")

CHANCE = "chance"
MAJORITY = "majority class"
IMAGE_STATISTICS = "image statistics"
RANDOM_BACKBONE = "random backbone"
PIXELS = "32x32 grey pixels"
NO_INTERVAL = "no interval to tell by"
MAX_LEARNT_FROM = 20_000  # images; a regression on all of a million, of a thousand classes, would need 30 GB

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
STATISTICS = ("mean", "standard_deviation", *(f"percentile_{q}" for q in PERCENTILES), "gradient_magnitude")
NUM_NEIGHBOURS = 20
MIN_DISTANCE = 1e-6  # below it, two images are the same to float32
GREY_LEVELS = 256
THUMBNAIL = 32  # pixels
ROWS_AT_A_TIME = 256  # of a gradient: an image of 100 megapixels must not need gigabytes


def image_statistics(image: Image.Image) -> Float64Array:
    """Describes an image by its brightness alone.

    Args:
        image: of any of Pillow's 8-bit modes; grey is what ``convert("L")`` makes of it, here in [0, 1].

    Returns:
        Mean, standard deviation, the percentiles `PERCENTILES` of grey, and the mean magnitude of its gradient (central
        differences, per pixel): ``[10]``, in the order of `STATISTICS`.
    """
    levels = np.asarray(as_rgb(image).convert("L"))
    counts = np.bincount(levels.ravel(), minlength=GREY_LEVELS)
    grey = np.arange(GREY_LEVELS) / (GREY_LEVELS - 1)
    mean = counts @ grey / levels.size
    deviation = np.sqrt(counts @ (grey - mean) ** 2 / levels.size)
    # Percentiles between two pixels are interpolated, as numpy does; a histogram gives them without a sort.
    places = np.array(PERCENTILES) / 100 * (levels.size - 1)
    below, above = (
        grey[np.searchsorted(counts.cumsum(), np.asarray(ends, dtype=np.int64), side="right")]
        for ends in (np.floor(places), np.ceil(places))
    )
    percentiles = below + (above - below) * (places - np.floor(places))
    return np.array([mean, deviation, *percentiles, _mean_gradient(levels) / (GREY_LEVELS - 1)])


def _mean_gradient(levels: np.typing.NDArray[np.uint8]) -> float:
    """Mean length of the gradient ``[H, W]``, in levels per pixel; along a side of one pixel it is 0."""
    total = 0.0
    for start in range(0, len(levels), ROWS_AT_A_TIME):
        first = max(start - 1, 0)
        rows = levels[first : start + ROWS_AT_A_TIME + 1].astype(np.float32)
        down, right = (np.gradient(rows, axis=axis) if rows.shape[axis] > 1 else np.zeros_like(rows) for axis in (0, 1))
        own = slice(start - first, start - first + ROWS_AT_A_TIME)
        total += float(np.hypot(down[own], right[own]).sum(dtype=np.float64))
    return total / levels.size


def extract_statistics(
    dataset: ImageDataset, *, batch_size: int = 64, num_workers: int = 2, device: torch.device | str = "cpu"
) -> Features:
    """Computes `image_statistics` of every image of a dataset, on all processes of the run together.

    Args:
        dataset: its transform is not used.
        batch_size: images per process and step.
        num_workers: processes that decode images, per process of the run.
        device: of this process; nothing is computed there, but the processes exchange rows by it.

    Returns:
        Embeddings ``[N, 10]``, not standardised yet; see `standardize`.

    Raises:
        ValueError: for an empty dataset, or an image that cannot be read.
    """
    return _extract_rows(dataset, _as_row, "image statistics", batch_size, num_workers, device)


def extract_pixels(
    dataset: ImageDataset, *, batch_size: int = 64, num_workers: int = 2, device: torch.device | str = "cpu"
) -> Features:
    """Describes every image of a dataset by its grey pixels after squeezing it into 32 x 32; see `extract_statistics`.

    Returns:
        Embeddings ``[N, 1024]`` in [0, 1].
    """
    return _extract_rows(dataset, _as_pixels, "pixels", batch_size, num_workers, device)


def _extract_rows(
    dataset: ImageDataset,
    describe: Callable[[Image.Image], Tensor],
    name: str,
    batch_size: int,
    num_workers: int,
    device: torch.device | str,
) -> Features:
    described: Any = copy.copy(dataset)
    described.transform = describe
    return extract_features(
        nn.Identity(), described, batch_size=batch_size, num_workers=num_workers, device=device, name=name
    )


def _as_row(image: Image.Image) -> Tensor:
    return torch.from_numpy(image_statistics(image)).float()


def _as_pixels(image: Image.Image) -> Tensor:
    small = as_rgb(image).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).ravel() / (GREY_LEVELS - 1)).float()


def standardize(train: Tensor, rows: Tensor) -> Tensor:
    """Brings rows ``[M, D]`` to the mean 0 and the standard deviation 1 of the rows ``[N, D]`` of the training set."""
    deviation = train.double().std(dim=0, correction=0)
    deviation[deviation < 1e-8] = 1.0  # a number that is the same for all images says nothing
    return ((rows.double() - train.double().mean(dim=0)) / deviation).float()


def knn_by_statistics(
    train: Features,
    val: Features,
    num_classes: int,
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    leave_one_part_out: bool = False,
    device: torch.device | str = "cpu",
) -> Float64Array:
    """Classifies images by the nearest others: cosine of standardised statistics, votes weighed by 1 / distance.

    Args:
        train: labelled statistics, from `extract_statistics`.
        val: those to classify.
        num_classes: width of the result.
        num_neighbours: as many as vote, or all that can.
        leave_one_part_out: images of an image's own part do not vote.
        device: of this process.

    Returns:
        Class probabilities ``[M, C]``.
    """
    bank, queries = (normalize(standardize(train.embeddings, rows.embeddings)) for rows in (train, val))
    if leave_one_part_out:
        k = min(num_neighbours, num_rows_of_other_parts(val.group_ids, train.group_ids))
        found = nearest_of_other_parts(queries, val.group_ids, bank, train.group_ids, k, device=device)
    else:
        found = nearest_neighbours(queries, bank, min(num_neighbours, len(train)), device=device)
    similarities, rows = found
    weights = 1 / (1 - similarities.double()).clamp(min=MIN_DISTANCE)
    votes = torch.zeros(len(val), num_classes, dtype=torch.float64).scatter_add_(1, train.labels[rows], weights)
    return np.asarray((votes / votes.sum(dim=1, keepdim=True)).numpy())


def logistic_by_statistics(train: Features, val: Features, num_classes: int) -> Float64Array:
    """Classifies images by a logistic regression (C = 1) of standardised statistics.

    Args:
        train: labelled statistics, from `extract_statistics`.
        val: those to classify.
        num_classes: width of the result.

    Returns:
        Class probabilities ``[M, C]``; those of classes that ``train`` does not show are 0.
    """
    known, rows = (standardize(train.embeddings, part.embeddings).double().numpy() for part in (train, val))
    labels = train.labels.numpy()
    seen = np.unique(labels)
    probabilities = np.zeros((len(rows), num_classes))
    if len(seen) == 1:
        probabilities[:, seen] = 1.0
    else:
        estimator = LogisticRegression(max_iter=5_000).fit(known, labels)
        probabilities[:, seen] = estimator.predict_proba(rows)
    return probabilities


def classify_by_statistics(
    datasets: Mapping[str, ImageDataset],
    num_classes: int,
    classifier: Literal["knn", "logistic"],
    *,
    leave_one_part_out: bool = False,
    num_workers: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, FloatArray]:
    """Classifies the images of every set but ``train`` by ten statistics of their brightness.

    All processes of the run must call it. A set in two roles is read once. Of a training set of more than 20,000 images
    whole parts with about as many are learnt from.

    Args:
        datasets: by name; ``train`` has labels to learn from.
        num_classes: width of the results.
        classifier: ``knn`` or ``logistic``.
        leave_one_part_out: images of an image's own part do not vote.
        num_workers: processes that decode images, per process of the run.
        device: of this process.

    Returns:
        Class probabilities ``[N, C]`` by set.
    """
    train_set = datasets[TRAIN]
    if len(train_set) > MAX_LEARNT_FROM:
        chosen = ImageSelection(train_set, whole_parts(train_set, MAX_LEARNT_FROM))
        datasets = {**datasets, TRAIN: chosen}
        if is_main_process():
            logger.info("image statistics are learnt from %d of %d training images", len(chosen), len(train_set))
    distinct = {id(dataset): dataset for dataset in datasets.values()}
    described = {
        key: extract_statistics(dataset, num_workers=num_workers, device=device) for key, dataset in distinct.items()
    }
    sets = {name: described[id(dataset)] for name, dataset in datasets.items()}
    train = sets.pop(TRAIN)
    if classifier == "logistic":
        return {name: logistic_by_statistics(train, rows, num_classes) for name, rows in sets.items()}
    return {
        name: knn_by_statistics(train, rows, num_classes, leave_one_part_out=leave_one_part_out, device=device)
        for name, rows in sets.items()
    }


def warn_of_unseen(datasets: Mapping[str, ImageDataset], classes: tuple[str, ...]) -> None:
    """The main process warns of every set in which a class has no image."""
    for name, dataset in datasets.items():
        warn_of_unseen_classes(dataset.get_targets().tolist(), dataset.classes or classes, name)


def add_yardsticks(
    results: EvaluationResults,
    datasets: Mapping[str, ImageDataset],
    scoring: ScoringSettings,
    *,
    by_statistics: Mapping[str, FloatArray] | None = None,
    random: EvaluationResults | None = None,
    class_mappings: Mapping[str, IntArray] | None = None,
) -> EvaluationResults:
    """Adds yardsticks to the results of a classification, and compares the chosen variant with them.

    The comparison is by AUROC where there are two classes that both occur, else by balanced accuracy, and with the
    majority class by accuracy. Differences have intervals from the same resamples of parts.

    Args:
        results: with the predictions of the chosen variant, if one was chosen.
        datasets: by name: those that were evaluated, and ``train`` where something was learnt.
        scoring: how predictions are scored.
        by_statistics: see `classify_by_statistics`.
        random: results of the same evaluation with a random backbone.
        class_mappings: by set, the training class ``[K]`` that stands for each of its own.
    """
    yardsticks: dict[str, Scores] = {}
    comparisons: list[Comparison] = []
    notes: list[str] = []
    predictions = {VAL: results.predictions, **results.test_predictions}
    baselines = {} if random is None else {VAL: random.predictions, **random.test_predictions}
    for name, dataset in datasets.items():
        if name == TRAIN:
            continue
        labels, groups = dataset.get_targets(), dataset.get_group_ids()
        mapping = (class_mappings or {}).get(name)
        num_classes = len(results.classes if mapping is None else mapping)
        notes += _absent(name, labels, dataset.classes or results.classes)
        part_labels = score_parts(np.broadcast_to(1.0, (len(labels), num_classes)), labels, groups).labels
        of_level = {"image": labels, "part": part_labels}
        rows: dict[str, FloatArray] = {}
        if TRAIN in datasets:
            counts = np.bincount(datasets[TRAIN].get_targets(), minlength=len(results.classes))
            rows[MAJORITY] = np.broadcast_to(_mapped(counts / counts.sum(), mapping), (len(labels), num_classes))
        if by_statistics is not None:
            rows[IMAGE_STATISTICS] = _mapped(by_statistics[name], mapping)
        baseline = baselines.get(name)
        if isinstance(baseline, Predictions):
            rows[RANDOM_BACKBONE] = baseline.probabilities
        scores = {CHANCE: Scores(**{level: guess(of_level[level], num_classes) for level in LEVELS})}
        resampled = {yardstick: scoring.resample(found, labels, groups) for yardstick, found in rows.items()}
        scores |= {
            yardstick: Scores(**{level: one.scores() for level, one in levels.items()})
            for yardstick, levels in resampled.items()
        }
        if MAJORITY in scores:
            scores[MAJORITY] = _without_ranking(scores[MAJORITY])
        yardsticks |= {variant_on(yardstick, name): found for yardstick, found in scores.items()}
        predicted = predictions.get(name)
        if not isinstance(predicted, Predictions) or len(np.unique(labels)) < 2:
            continue
        variant = variant_on(results.chosen, name)
        ours = scoring.resample(predicted.probabilities, labels, groups)
        metrics = {level: deciding_metric(of_level[level], num_classes) for level in LEVELS}
        for yardstick, reference in scores.items():
            for level in LEVELS if len(part_labels) < len(labels) else LEVELS[:1]:
                metric = "accuracy" if yardstick == MAJORITY else metrics[level]
                value = getattr(results.scores[variant], level).metrics.get(metric)
                beside = getattr(reference, level).metrics.get(metric)
                if value is None or beside is None:
                    continue
                comparisons.append(
                    compare(
                        variant,
                        yardstick,
                        level,
                        metric,
                        value,
                        beside,
                        too_few=too_few_parts(part_labels),
                        difference=None
                        if yardstick == CHANCE
                        else ours[level].less(resampled[yardstick][level])[metric],
                    )
                )
    if random is not None and not random.chosen:  # few labels only: no variant was chosen, each stands for itself
        yardsticks |= {f"{RANDOM_BACKBONE}, {variant}": scores for variant, scores in random.scores.items()}
    return replace(results, yardsticks=yardsticks, comparisons=comparisons, notes=(*results.notes, *notes))


def compare(
    variant: str,
    yardstick: str,
    level: str,
    metric: str,
    value: MetricValue,
    reference: MetricValue,
    *,
    difference: MetricValue | None = None,
    too_few: str = "",
) -> Comparison:
    """Compares a metric with a yardstick's.

    Args:
        variant: name of what is compared.
        yardstick: name of what it is compared with.
        level: ``image`` or ``part``.
        metric: its name.
        value: of the variant.
        reference: of the yardstick.
        difference: with its interval; None for a yardstick that is a constant.
        too_few: why no interval would say much; empty where it does.
    """
    if difference is None:
        low, high = (None if end is None else end - reference.value for end in (value.low, value.high))
    else:
        low, high = difference.low, difference.high
    if too_few:
        verdict = f"too few parts to tell ({too_few})"
    elif low is None or high is None:
        verdict = NO_INTERVAL
    else:
        verdict = BETTER if low > 0 else WORSE if high < 0 else EQUAL
    return Comparison(
        variant=variant,
        yardstick=yardstick,
        level=level,
        metric=metric,
        value=value.value,
        reference=reference.value,
        low=low,
        high=high,
        verdict=verdict,
    )


def guess(labels: IntArray, num_classes: int) -> LevelScores:
    """What guessing gives on average, every class as often as any other, with scores drawn at random."""
    metrics = {"accuracy": 1 / num_classes, "balanced_accuracy": 1 / num_classes}
    if num_classes == 2 and len(np.unique(labels)) == 2:
        num_good = int((labels == 0).sum())
        metrics |= {"auroc": 0.5, "average_precision": float((labels == 1).mean())}
        for name, budget in FALSE_ALARM_BUDGETS.items():
            metrics[name] = 1 - (floor(budget * num_good) + 1) / (num_good + 1)
    if num_classes > 5:
        metrics["top5"] = 5 / num_classes
    return LevelScores(count=len(labels), metrics={name: MetricValue(value=value) for name, value in metrics.items()})


def _without_ranking(scores: Scores) -> Scores:
    """A constant answer ranks nothing: its AUROC is that of chance, and no threshold divides it."""
    levels = {}
    for level in LEVELS:
        found: LevelScores = getattr(scores, level)
        kept = {name: metric for name, metric in found.metrics.items() if name not in RANKING_METRICS}
        levels[level] = replace(found, metrics=kept)
    return Scores(**levels)


def _mapped(probabilities: FloatArray, mapping: IntArray | None) -> FloatArray:
    """Probabilities ``[…, C]`` over the classes of a set, ``[…, K]``, whose rows sum to 1 again."""
    if mapping is None:
        return probabilities
    chosen = probabilities[..., mapping]
    sums = chosen.sum(axis=-1, keepdims=True)
    return np.asarray(np.where(sums > 0, chosen / np.where(sums > 0, sums, 1), 1 / len(mapping)))


def _absent(name: str, labels: IntArray, classes: tuple[str, ...]) -> list[str]:
    """A line on a set that shows a single class, where no metric says whether classes are told apart."""
    seen = np.unique(labels)
    if len(seen) > 1 or len(classes) < 2:
        return []
    return [f"{name} shows only {classes[seen[0]]}: nothing here says whether the classes are told apart"]
