"""The sets that a supervised run names, and what they must agree on."""

import logging
from dataclasses import dataclass

from dinov2.config import TaskConfig
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.dense_targets import DepthSource, MaskSource
from dinov2.data.loaders import make_dataset
from dinov2.distributed import is_main_process
from dinov2.eval.common_checks import name_some, shared_parts
from dinov2.tasks.depth_range import check_depths_in_range
from dinov2.tasks.task import TaskFacts

logger = logging.getLogger("dinov2")


@dataclass(frozen=True, kw_only=True)
class TaskSets:
    """Opened sets.

    Attributes:
        train: what is learnt from.
        val: chooses the best weights; None where none is named.
        test: scored once at the end; None where none is named.
        facts: what they all say about the task.
    """

    train: ImageDataset
    val: ImageDataset | None
    test: ImageDataset | None
    facts: TaskFacts

    def named(self) -> dict[str, ImageDataset]:
        """The sets there are, by role."""
        sets = {"train": self.train, "val": self.val, "test": self.test}
        return {name: dataset for name, dataset in sets.items() if dataset is not None}


def open_task_sets(config: TaskConfig) -> TaskSets:
    """Opens the sets, and checks that they fit the task and each other.

    Raises:
        FileNotFoundError: a set does not exist.
        ValueError: no training set is named; a set has no labels of the task, or other classes, units or light than the
            training set; a set has no depth that the head can say.
    """
    paths = {
        "train": config.data.train_dataset_path,
        "val": config.data.val_dataset_path,
        "test": config.data.test_dataset_path,
    }
    if not paths["train"]:
        raise ValueError("data.train_dataset_path is empty: name the training set, such as GroupedJSON:split=TRAIN:…")
    sets = {name: make_dataset(dataset_str=path) for name, path in paths.items() if path}
    facts = task_facts(config, sets["train"], paths["train"])
    for name in sets.keys() - {"train"}:
        other = task_facts(config, sets[name], paths[name])
        if other != facts:
            raise ValueError(f"{paths[name]} and {paths['train']} disagree: {_describe(other)}, {_describe(facts)}")
        if sets[name].light != sets["train"].light:
            raise ValueError(
                f"{paths[name]} has light={sets[name].light}, the training set light={sets['train'].light}"
            )
    if config.task == "depth":
        span = {"min_depth": config.head.min_depth, "max_depth": config.head.max_depth}
        for name, dataset in sets.items():
            check_depths_in_range(dataset, paths[name], **span)
    _warn_of_shared_parts(sets)
    if "val" not in sets and is_main_process():
        logger.warning("data.val_dataset_path is empty: the last weights are kept as the best")
    return TaskSets(train=sets["train"], val=sets.get("val"), test=sets.get("test"), facts=facts)


def task_facts(config: TaskConfig, dataset: ImageDataset, path: str) -> TaskFacts:
    """What a set says about the task.

    Raises:
        ValueError: when it has no labels for it, or fewer than two classes.
    """
    if config.task == "depth":
        if not isinstance(dataset, DepthSource):
            raise ValueError(f"{path} has no depth maps; GroupedJSON (depth_path, height_path), NYUDepthV2 … do")
        return TaskFacts(depth_unit=dataset.depth_unit)
    if config.task == "segmentation":
        if not isinstance(dataset, MaskSource):
            raise ValueError(f"{path} has no masks; GroupedJSON (mask_path), VOCSegmentation, ImageMaskFolder do")
        classes = tuple(dataset.mask_classes)
    else:
        classes = dataset.classes
    if len(classes) < (1 if config.data.multi_label else 2):
        raise ValueError(f"{path} has the classes {list(classes)}: {config.task} needs at least two")
    return TaskFacts(classes=classes)


def _describe(facts: TaskFacts) -> str:
    return f"classes {list(facts.classes)}" if facts.classes else f"depth in {facts.depth_unit!r}"


def _warn_of_shared_parts(sets: dict[str, ImageDataset]) -> None:
    if not is_main_process():
        return
    train_groups = sets["train"].get_group_ids()
    for name in sets.keys() - {"train"}:
        shared = shared_parts(train_groups, sets[name].get_group_ids())
        if shared:
            logger.warning(
                "%d parts are in both train and %s, so its scores are too good: %s",
                *(len(shared), name, name_some(shared)),
            )
