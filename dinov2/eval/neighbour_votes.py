"""Class probabilities from the nearest labelled neighbours."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dinov2.distributed import is_main_process
from dinov2.eval.features import Features
from dinov2.eval.leave_one_part_out import nearest_of_other_parts, num_rows_of_other_parts
from dinov2.eval.metrics import FloatArray, classification_figures
from dinov2.eval.neighbours import nearest_neighbours
from dinov2.utils.seeds import derive_seed

logger = logging.getLogger("dinov2")

MOST_IMAGES_FOR_CHOICE = 10_000


@dataclass(frozen=True, kw_only=True)
class VoteSettings:
    """How neighbours are found and how they vote.

    Attributes:
        nb_knn: numbers of neighbours.
        temperature: of the softmax over similarities.
        leave_one_part_out: the rows of a query's own part do not vote.
        gather_on_cpu: keeps the bank in host memory.
        device: where similarities are computed.
    """

    nb_knn: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07
    leave_one_part_out: bool = False
    gather_on_cpu: bool = False
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not self.nb_knn or min(self.nb_knn) < 1:
            raise ValueError(f"nb_knn must be one or more numbers from 1 up, found {sorted(self.nb_knn)}")
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be above 0, found {self.temperature}")


def neighbour_probabilities(
    bank: Features, queries: Features, num_classes: int, settings: VoteSettings
) -> dict[int, FloatArray]:
    """Class probabilities ``[M, C]`` of the queries by number of neighbours; rows sum to 1.

    Raises:
        ValueError: when the bank has fewer rows than the largest number of neighbours; see `clip_nb_knn`.
    """
    ks = settings.nb_knn
    if settings.leave_one_part_out:
        similarities, rows = nearest_of_other_parts(
            queries.embeddings,
            queries.group_ids,
            bank.embeddings,
            bank.group_ids,
            max(ks),
            device=settings.device,
            bank_on_cpu=settings.gather_on_cpu,
        )
    else:
        similarities, rows = nearest_neighbours(
            queries.embeddings,
            bank.embeddings,
            max(ks),
            device=settings.device,
            bank_on_cpu=settings.gather_on_cpu,
        )
    neighbour_labels = bank.labels[rows]
    probabilities = {}
    for k in ks:
        votes = knn_votes(similarities, neighbour_labels, k, settings.temperature, num_classes).double()
        # The sum differs between images for all but the largest k; only shares of it can be compared between images.
        probabilities[k] = (votes / votes.sum(dim=1, keepdim=True)).numpy()
    return probabilities


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


def num_voters(bank: Features, queries: Features, leave_one_part_out: bool) -> int:
    """How many images of the bank can vote on every query."""
    return num_rows_of_other_parts(queries.group_ids, bank.group_ids) if leave_one_part_out else len(bank)


def clip_nb_knn(nb_knn: Iterable[int], voters: int) -> tuple[int, ...]:
    """Numbers of neighbours from small to large, none above the number of images that can vote and none twice.

    Raises:
        ValueError: when no image can vote.
    """
    asked = sorted(set(nb_knn))
    if voters < 1:
        raise ValueError("the bank has no image that can vote; leaving one part out needs at least two parts")
    ks = tuple(sorted({min(k, voters) for k in asked}))
    if list(ks) != asked and is_main_process():
        logger.info("nb_knn %s clipped to the %d images that can vote: %s", asked, voters, list(ks))
    return ks


def choose_k(bank: Features, num_classes: int, settings: VoteSettings, seed: int) -> int | None:
    """The number of neighbours with which the bank judges itself best, every image without its own part.

    No other image is seen, so figures on a validation set stay those of images that decided nothing. The measure is
    the balanced accuracy over images; of equal numbers the smallest wins. Above 10,000 images, whole parts are drawn
    until there are as many. A number of neighbours that the bank without a part does not have stands for all there are.

    Returns:
        The number; None for a bank of one part, which cannot judge itself.
    """
    queries = _some_parts(bank, seed)
    voters = num_voters(bank, queries, True)
    if voters < 1:
        return None
    possible = {k: min(k, voters) for k in sorted(settings.nb_knn)}
    asked = replace(settings, nb_knn=tuple(sorted(set(possible.values()))), leave_one_part_out=True)
    labels = queries.labels.numpy()
    balanced = {
        k: classification_figures(probabilities, labels)["balanced_accuracy"]
        for k, probabilities in neighbour_probabilities(bank, queries, num_classes, asked).items()
    }
    return max(possible, key=lambda k: balanced[possible[k]])


def select_rows(features: Features, rows: Tensor) -> Features:
    """The features of some images."""
    indices = rows.tolist()
    return Features(
        embeddings=features.embeddings[rows],
        labels=features.labels[rows],
        group_ids=[features.group_ids[index] for index in indices],
        paths=[features.paths[index] for index in indices],
    )


def _some_parts(features: Features, seed: int) -> Features:
    """The features themselves, or whole parts of them, in random order, with about as many images as are needed."""
    if len(features) <= MOST_IMAGES_FOR_CHOICE:
        return features
    parts = sorted(set(features.group_ids))
    order = np.random.default_rng(derive_seed(seed, "parts to choose k by")).permutation(len(parts))
    place = {parts[number]: position for position, number in enumerate(order)}
    places = np.array([place[part] for part in features.group_ids])
    kept = places < places[np.argsort(places, kind="stable")][MOST_IMAGES_FOR_CHOICE]
    kept |= places == 0  # one part alone may have more
    return select_rows(features, torch.from_numpy(np.flatnonzero(kept)))
