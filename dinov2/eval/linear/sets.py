"""The labelled sets of a linear evaluation: what is learnt from, what is judged, and which classes they have."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.common_checks import common_classes
from dinov2.eval.metrics import IntArray

TRAIN, VAL = "train", "val"


@dataclass(frozen=True, eq=False)
class SetToJudge:
    """A labelled set, and what its labels mean to the classifiers.

    Attributes:
        dataset: with all labels.
        classes: of its labels.
        class_mapping: ``[len(classes)]``, the classifiers' class that stands for each; None where they are the same.
    """

    dataset: ImageDataset
    classes: tuple[str, ...]
    class_mapping: IntArray | None = None


@dataclass(frozen=True, eq=False)
class LinearSets:
    """The sets of an evaluation, checked.

    Attributes:
        classes: that the classifiers know.
        train: to learn from; None where the classifiers are trained already.
        judged: ``val``, by which the best classifier is chosen, and the test sets, by name.
    """

    classes: tuple[str, ...]
    train: ImageDataset | None
    judged: Mapping[str, SetToJudge]

    @property
    def datasets(self) -> dict[str, ImageDataset]:
        """All sets by name."""
        learnt = {} if self.train is None else {TRAIN: self.train}
        return learnt | {name: judged.dataset for name, judged in self.judged.items()}


def check_sets(
    train: ImageDataset | None,
    val: ImageDataset,
    tests: Mapping[str, ImageDataset],
    class_mapping_fpaths: Mapping[str, str | Path],
    classes: tuple[str, ...] | None = None,
) -> LinearSets:
    """Checks labels, classes and class mappings of all sets; no image is read.

    Args:
        train: to learn from; None where the classifiers are trained already.
        val: to choose the best classifier by.
        tests: further sets, by name.
        class_mapping_fpaths: file of the class mapping of a judged set, by name.
        classes: of classifiers that are trained already; None to take those of the training set.

    Raises:
        FileNotFoundError: for a class mapping that is not there.
        ValueError: for what is wrong with a set, naming it.
    """
    sets = {VAL: val, **tests}
    for name in tests:
        if name in (TRAIN, VAL) or not name or Path(name).name != name:
            raise ValueError(f"a test set cannot be named {name!r}")
    unknown = [name for name in class_mapping_fpaths if name not in sets]
    if unknown:
        raise ValueError(f"there is a class mapping for {unknown[0]!r}, but the sets are {', '.join(sets)}")
    if classes is None:
        if train is None:
            raise ValueError("without a training set, trained classifiers (classifier_fpath) are needed")
        classes = _training_classes(train, val, VAL in class_mapping_fpaths)
    judged = {}
    for name, dataset in sets.items():
        path = class_mapping_fpaths.get(name)
        mapping = None if path is None else read_class_mapping(path, len(classes))
        judged[name] = SetToJudge(dataset, classes_of(dataset, name, classes, mapping), mapping)
    return LinearSets(classes, train, judged)


def read_class_mapping(path: str | Path, num_classes: int) -> IntArray:
    """Reads which of the classifiers' classes stands for each class of another set.

    Args:
        path: ``.npy`` file of one integer per class of the set.
        num_classes: how many classes the classifiers know.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds something else, a class that the classifiers do not know, or a class twice.
    """
    try:
        mapping = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"no class mapping at {path}") from None
    except (ValueError, EOFError, OSError) as error:  # numpy's words advise to load it unsafely
        raise ValueError(f"{path} is not a .npy file of integers, as numpy.save writes them") from error
    if not isinstance(mapping, np.ndarray) or mapping.ndim != 1 or not np.issubdtype(mapping.dtype, np.integer):
        raise ValueError(f"{path} must hold integers [classes], found {getattr(mapping, 'dtype', 'an archive')}")
    if len(mapping) == 0 or mapping.min() < 0 or mapping.max() >= num_classes:
        raise ValueError(f"{path} must hold classes in [0, {num_classes}), found {mapping.tolist()[:20]}")
    if len(np.unique(mapping)) < len(mapping):
        raise ValueError(f"{path} names a class twice: {mapping.tolist()[:20]}")
    return mapping.astype(np.int64)


def classes_of(dataset: ImageDataset, name: str, classes: tuple[str, ...], mapping: IntArray | None) -> tuple[str, ...]:
    """Class names of a set that is judged by classifiers of ``classes``.

    Raises:
        ValueError: for an empty set, missing labels, labels outside the classes, or classes that differ from the
            classifiers' (from the mapping's number, where there is one).
    """
    labels = dataset.get_targets()
    if len(labels) == 0:
        raise ValueError(f"the {name} set has no images")
    missing = int((labels < 0).sum())
    if missing:
        raise ValueError(f"{missing} of {len(labels)} images of the {name} set have no label; all need one")
    if mapping is None:
        expected = classes
        if dataset.classes and dataset.classes != classes:
            raise ValueError(
                f"the classes of the {name} set, {list(dataset.classes)}, are not those of the classifiers, "
                f"{list(classes)}; a class mapping can say which stand for which"
            )
    else:
        expected = dataset.classes or tuple(classes[index] for index in mapping)
        if len(expected) != len(mapping):
            raise ValueError(f"the class mapping has {len(mapping)} classes, the {name} set has {len(expected)}")
    if labels.max() >= len(expected):
        raise ValueError(f"label {labels.max()} of the {name} set is outside the {len(expected)} classes")
    return expected


def _training_classes(train: ImageDataset, val: ImageDataset, val_is_mapped: bool) -> tuple[str, ...]:
    labels = train.get_targets()
    if val_is_mapped:
        known = train.classes or tuple(str(label) for label in range(int(labels.max(initial=0)) + 1))
        classes = classes_of(train, TRAIN, known, None)
    else:
        classes = common_classes(train, val)
    seen = np.unique(labels)
    if len(seen) < 2:
        raise ValueError(f"a classifier needs training images of at least two classes, found only {classes[seen[0]]!r}")
    return classes
