"""Ten numbers of an image's brightness, and its pixels: yardsticks that learnt features have to beat."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import normalize

from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.features import Features, extract_features
from dinov2.eval.metrics.classification import Float64Array
from dinov2.eval.neighbours import nearest_neighbours, nearest_of_other_parts, num_rows_of_other_parts

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
STATISTICS = ("mean", "standard_deviation", *(f"percentile_{q}" for q in PERCENTILES), "gradient_magnitude")
NUM_NEIGHBOURS = 20
MIN_DISTANCE = 1e-6  # below it, two images are the same to float32
LEVELS = 256
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
    levels = np.asarray(image.convert("L"))
    counts = np.bincount(levels.ravel(), minlength=LEVELS)
    grey = np.arange(LEVELS) / (LEVELS - 1)
    mean = counts @ grey / levels.size
    deviation = np.sqrt(counts @ (grey - mean) ** 2 / levels.size)
    # Percentiles between two pixels are interpolated, as numpy does; a histogram gives them without a sort.
    places = np.array(PERCENTILES) / 100 * (levels.size - 1)
    below, above = (
        grey[np.searchsorted(counts.cumsum(), np.asarray(ends, dtype=np.int64), side="right")]
        for ends in (np.floor(places), np.ceil(places))
    )
    percentiles = below + (above - below) * (places - np.floor(places))
    return np.array([mean, deviation, *percentiles, _mean_gradient(levels) / (LEVELS - 1)])


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
    small = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small).ravel() / (LEVELS - 1)).float()


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
