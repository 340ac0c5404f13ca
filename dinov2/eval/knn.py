"""Weighted nearest-neighbour classification of frozen features, per image and per part."""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process
from dinov2.eval.features import Features, extract_features
from dinov2.eval.frozen import ModelWithFeatures, ModelWithNormalize, device_of
from dinov2.eval.metrics import classification_metrics
from dinov2.eval.neighbours import nearest_neighbours
from dinov2.eval.part_scores import score_parts
from dinov2.eval.results import KnnResults, KnnScores
from dinov2.utils.files import write_text_atomically

logger = logging.getLogger("dinov2")

RESULTS_FILE = "results_eval_knn.json"


def eval_knn(
    model: nn.Module,
    train_dataset: ImageDataset,
    val_dataset: ImageDataset,
    *,
    nb_knn: Iterable[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    batch_size: int = 256,
    num_workers: int = 4,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    gather_on_cpu: bool = False,
    features: str = "cls",
    output_dir: str | Path | None = None,
    weights: str = "",
) -> KnnResults:
    """Scores a frozen backbone by its nearest labelled neighbours, on all processes of the run together.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]``, which are normalised here.
        train_dataset: the bank of labelled images.
        val_dataset: the images to classify; with two classes, class 1 is the positive one (a defect).
        nb_knn: numbers of neighbours, clipped to the size of the bank.
        temperature: of the softmax over similarities that weighs the neighbours.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run.
        device: where to compute; by default where the model lies.
        autocast_dtype: precision of the forward pass; by default that of the model.
        gather_on_cpu: keeps the bank's features in host memory, for banks larger than the device.
        features: what describes an image: ``cls``, ``patch_mean`` or ``cls_patch_mean``.
        output_dir: folder that gets ``results_eval_knn.json``; by default nothing is written.
        weights: name of the weights, kept in the results.

    Raises:
        ValueError: for missing labels, sets whose classes differ, images that cannot be read, features that are not
            finite, or settings out of range. Labels and settings are checked before anything is computed.
    """
    ks = clip_nb_knn(nb_knn, len(train_dataset))
    _check_temperature(temperature)
    classes = common_classes(train_dataset, val_dataset)
    device = device_of(model) if device is None else torch.device(device)
    normalised = ModelWithNormalize(ModelWithFeatures(model, features))
    train, val = (
        extract_features(
            normalised,
            dataset,
            batch_size=batch_size,
            num_workers=num_workers,
            device=device,
            autocast_dtype=autocast_dtype,
        )
        for dataset in (train_dataset, val_dataset)
    )
    results = score_features(
        train,
        val,
        classes,
        nb_knn=ks,
        temperature=temperature,
        device=device,
        gather_on_cpu=gather_on_cpu,
        features=features,
        weights=weights,
    )
    if is_main_process():
        logger.info("%s", results.table())
        if output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            write_text_atomically(Path(output_dir) / RESULTS_FILE, results.to_json())
    return results


def score_features(
    train: Features,
    val: Features,
    classes: tuple[str, ...],
    *,
    nb_knn: Iterable[int] = (10, 20, 100, 200),
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
    gather_on_cpu: bool = False,
    features: str = "cls",
    weights: str = "",
) -> KnnResults:
    """Scores features that are already there; see `eval_knn`. Rows must have unit length and labels in ``classes``."""
    ks = clip_nb_knn(nb_knn, len(train))
    _check_temperature(temperature)
    similarities, neighbours = nearest_neighbours(
        val.embeddings, train.embeddings, ks[-1], device=device, bank_on_cpu=gather_on_cpu
    )
    neighbour_labels = train.labels[neighbours]
    labels = val.labels.numpy()
    scores = []
    num_mixed = 0
    for k in ks:
        votes = knn_votes(similarities, neighbour_labels, k, temperature, len(classes)).double()
        # The sum differs between images for all but the largest k; only shares of it can be compared between images.
        probabilities = (votes / votes.sum(dim=1, keepdim=True)).numpy()
        parts = score_parts(probabilities, labels, val.group_ids)
        num_mixed = parts.num_mixed
        scores.append(
            KnnScores(
                k=k,
                image=classification_metrics(probabilities, labels),
                part=classification_metrics(parts.probabilities, parts.labels),
            )
        )
    train_parts, val_parts = set(train.group_ids), set(val.group_ids)
    shared = sorted(train_parts & val_parts)
    if shared and is_main_process():
        logger.warning(
            "%d parts are in both the training and the validation set, so the scores are too good: %s%s",
            len(shared),
            ", ".join(shared[:5]),
            ", …" if len(shared) > 5 else "",
        )
    return KnnResults(
        scores=tuple(scores),
        temperature=temperature,
        classes=classes,
        num_train_images=len(train),
        num_train_parts=len(train_parts),
        num_val_parts_in_train=len(shared),
        num_val_parts_mixed=num_mixed,
        features=features,
        weights=weights,
    )


def knn_votes(
    similarities: Tensor, neighbour_labels: Tensor, num_neighbours: int, temperature: float, num_classes: int
) -> Tensor:
    """Weighs the classes of the nearest neighbours.

    The weights are a softmax over *all* neighbours given, of which the first ``num_neighbours`` vote; rows therefore
    sum to 1 only where all of them do.

    Args:
        similarities: ``[M, K]`` from large to small.
        neighbour_labels: ``[M, K]`` int64 in ``[0, num_classes)``.
        num_neighbours: in ``[1, K]``.
        temperature: divides the similarities.
        num_classes: width of the result.

    Returns:
        Sum of the weights per class, ``[M, num_classes]``.

    Reference: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4.
    """
    weights = (similarities / temperature).softmax(dim=1)[:, :num_neighbours]
    votes = weights.new_zeros(len(similarities), num_classes)
    return votes.scatter_add_(1, neighbour_labels[:, :num_neighbours], weights)


def clip_nb_knn(nb_knn: Iterable[int], bank_size: int) -> tuple[int, ...]:
    """Numbers of neighbours from small to large, none above the size of the bank and none twice.

    Raises:
        ValueError: for an empty bank, no number, or one below 1.
    """
    asked = sorted(set(nb_knn))
    if bank_size < 1:
        raise ValueError("the training set has no images, so there are no neighbours")
    if not asked or asked[0] < 1:
        raise ValueError(f"nb_knn must be one or more numbers from 1 up, found {asked}")
    ks = tuple(sorted({min(k, bank_size) for k in asked}))
    if list(ks) != asked and is_main_process():
        logger.info("nb_knn %s clipped to the %d training images: %s", asked, bank_size, list(ks))
    return ks


def common_classes(train_dataset: ImageDataset, val_dataset: ImageDataset) -> tuple[str, ...]:
    """Class names of both sets; made up from the labels ("0", "1", …) where the sets name none.

    Raises:
        ValueError: naming the set with missing labels or labels outside the classes, or the classes that differ.
    """
    if train_dataset.classes != val_dataset.classes:
        raise ValueError(
            "the classes of the two sets differ: "
            f"training {list(train_dataset.classes)}, validation {list(val_dataset.classes)}"
        )
    targets = {"training": train_dataset.get_targets(), "validation": val_dataset.get_targets()}
    for name, labels in targets.items():
        if len(labels) == 0:
            raise ValueError(f"the {name} set has no images")
        missing = int((labels < 0).sum())
        if missing:
            raise ValueError(f"{missing} of {len(labels)} images of the {name} set have no label; all need one")
    largest = int(max(np.max(labels) for labels in targets.values()))
    classes = train_dataset.classes or tuple(str(index) for index in range(largest + 1))
    if largest >= len(classes):
        raise ValueError(f"label {largest} is outside the {len(classes)} classes {list(classes)}")
    return classes


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, found {temperature}")
