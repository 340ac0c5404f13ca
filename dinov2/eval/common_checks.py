"""What every evaluator checks about its datasets and features before it trusts them."""

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process

logger = logging.getLogger("dinov2")

MOST_NAMED = 5
ROWS_AT_A_TIME = 65_536


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


def shared_parts(train_groups: Iterable[str], val_groups: Iterable[str]) -> list[str]:
    """Parts that are in both sets, sorted."""
    return sorted(set(train_groups) & set(val_groups))


def warn_of_shared_parts(train_groups: Iterable[str], val_groups: Iterable[str]) -> list[str]:
    """Parts that are in both sets, sorted; the main process warns of them: photos of a part are almost copies."""
    shared = shared_parts(train_groups, val_groups)
    if shared and is_main_process():
        logger.warning(
            "%d parts are in both the training and the validation set, so the scores are too good: %s",
            len(shared),
            name_some(shared),
        )
    return shared


def warn_of_unseen_classes(labels: Iterable[int], classes: Sequence[str]) -> None:
    """The main process warns of classes that no training image shows.

    Args:
        labels: of the training images.
        classes: names by label.
    """
    seen = set(labels)
    unseen = [name for label, name in enumerate(classes) if label not in seen]
    if unseen and is_main_process():
        logger.warning("no training image shows %s: it will never be predicted", name_some(unseen))


def warn_of_idle_aggregation(aggregation: str, classes: Sequence[str]) -> None:
    """The main process warns of a part aggregation that was asked for and means nothing to so many classes."""
    if aggregation not in ("max", "mean") and len(classes) != 2 and is_main_process():
        logger.warning(
            "part_aggregation=%s has no effect with %d classes: a part has the mean probabilities of its photos",
            aggregation,
            len(classes),
        )


def check_finite_features(embeddings: Tensor, paths: Sequence[str], name: str = "") -> None:
    """Checks that all features are finite.

    Args:
        embeddings: ``[N, …]``.
        paths: of the N images.
        name: of the set, for the message.

    Raises:
        ValueError: naming some of the images whose features are not.
    """
    # In pieces: what isfinite makes on the way is larger than the features themselves.
    pieces = embeddings.flatten(1).split(ROWS_AT_A_TIME)
    finite = torch.cat([rows.isfinite().all(dim=1) for rows in pieces])
    if not bool(finite.all()):
        bad = (~finite).nonzero().flatten().tolist()
        where = f" of the {name} set" if name else ""
        raise ValueError(
            f"features of {len(bad)} of {len(paths)} images{where} are NaN or infinite: "
            f"{name_some([paths[index] for index in bad])}"
        )


def name_some(names: list[str]) -> str:
    """The first few names, with a sign that there are more."""
    return ", ".join(names[:MOST_NAMED]) + (", …" if len(names) > MOST_NAMED else "")
