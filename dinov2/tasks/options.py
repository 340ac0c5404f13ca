"""Every option of a supervised run (classification, segmentation, depth), typed, with its default and meaning.

``configs/task_default_config.yaml`` shows the same options as text.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from dinov2.config import ConfigError, RunOptions, load_options, parse_options
from dinov2.config.schema import PRECISIONS, STRATEGIES, Size, leaf, section
from dinov2.data.task_transforms import AugmentationOptions
from dinov2.models.heads.build import HEAD_OPTIONS, HeadOptions

TASKS = tuple(HEAD_OPTIONS)


@dataclass(frozen=True, kw_only=True)
class TaskBackboneOptions:
    config_file: str = leaf(
        "", "YAML whose student section describes the backbone, such as OUT/config.yaml; empty: the defaults."
    )
    pretrained_weights: str = leaf("", "File, https:// address or released name (dinov2_vits14_reg); empty: random.")
    mode: str = leaf(
        "frozen",
        "What of the backbone is trained: nothing, low-rank additions, the last blocks, or all.",
        choices=("frozen", "lora", "last_blocks", "full"),
    )
    last_blocks: int = leaf(2, "Blocks trained with mode=last_blocks, and the final norm.", minimum=1)
    lora_rank: int = leaf(8, "Rank of the additions with mode=lora.", minimum=1)
    lora_alpha: float = leaf(16.0, "Their scale is alpha / rank.", above=0)
    lora_dropout: float = leaf(0.0, "Dropout before the additions.", minimum=0, maximum=0.99)
    lora_targets: tuple[str, ...] = leaf(("qkv", "proj"), "Linear layers that get one, by the end of their name.")
    blocks: tuple[int, ...] = leaf((-1,), "Blocks whose output the head sees; negative numbers count from the last.")
    norm: bool = leaf(True, "Final norm on the features of each block; the released depth heads had none.")
    drop_path_rate: float = leaf(0.0, "Stochastic depth while the backbone is trained.", minimum=0, maximum=0.99)


@dataclass(frozen=True, kw_only=True)
class TaskLossOptions:
    class_weights: str = leaf(
        "none",
        "Weights of the classes in the loss, from their counts in the training set.",
        choices=("none", "inverse", "sqrt_inverse", "effective"),
    )
    label_smoothing: float = leaf(0.0, "Classification, one label per image.", minimum=0, maximum=0.99)
    cross_entropy: float = leaf(1.0, "Segmentation: weight of the cross-entropy.", minimum=0)
    dice: float = leaf(0.0, "Segmentation: weight of the Dice loss.", minimum=0)
    focal: float = leaf(0.0, "Segmentation: weight of the focal loss.", minimum=0)
    focal_gamma: float = leaf(2.0, "Exponent of the focal loss.", minimum=0)
    silog: float = leaf(1.0, "Depth: weight of the scale-invariant logarithmic loss.", minimum=0)
    gradient: float = leaf(0.5, "Depth: weight of gradient matching.", minimum=0)
    mse: float = leaf(0.0, "Depth: weight of the squared error.", minimum=0)
    l1: float = leaf(0.0, "Depth: weight of the absolute error.", minimum=0)
    depth_alignment: str = leaf(
        "none", "Depth: mse and l1 up to scale and shift of each image.", choices=("none", "least_squares", "median")
    )


@dataclass(frozen=True, kw_only=True)
class TaskDataOptions:
    train_dataset_path: str = leaf("", "Training set, such as GroupedJSON:split=TRAIN:root=/data/parts.")
    val_dataset_path: str = leaf("", "Chooses the best weights and ends the run early; must not hold training parts.")
    test_dataset_path: str = leaf("", "Scored once, with the best weights; empty: no test.")
    multi_label: bool = leaf(False, "Classification: an image may have several classes (gt_labels).")
    image_size: Size = leaf(224, "Network input in pixels, one number or height and width; multiples of the patch.")
    resize: str = leaf(
        "stretch",
        "Evaluation: stretch to image_size, shorter_side to it, or original size (dense tasks, by windows).",
        choices=("stretch", "shorter_side", "original"),
    )
    num_workers: int = leaf(4, "Data-loading processes per training process; 0: none.", minimum=0)
    max_bad_fraction: float = leaf(
        0.01, "Fraction of unreadable training images past which the run fails.", minimum=0, maximum=1
    )
    balance_classes: bool = leaf(False, "Draw training images so that all classes come equally often.")
    max_photos: int = leaf(6, "Images of one part that part pooling takes at once.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class TaskOptimOptions:
    optimizer: str = leaf("adamw", "Optimiser.", choices=("adamw", "adam", "sgd"))
    lr: float = leaf(1e-3, "Learning rate of the head.", above=0)
    backbone_lr_mult: float = leaf(0.1, "Factor on the learning rate of the backbone, where it is trained.", minimum=0)
    layerwise_decay: float = leaf(0.9, "Factor on it per block, from the top down.", above=0, maximum=1)
    schedule: str = leaf("cosine", "After the warm-up.", choices=("cosine", "constant"))
    min_lr: float = leaf(0.0, "Where the cosine ends, for the head.", minimum=0)
    epochs: int = leaf(20, "Passes over the training set.", minimum=1)
    warmup_epochs: float = leaf(1.0, "Linear warm-up from 0.", minimum=0)
    weight_decay: float = leaf(0.05, "Not of biases, norms and LayerScale.", minimum=0)
    momentum: float = leaf(0.9, "Of sgd; first beta of adam and adamw.", minimum=0, maximum=0.9999)
    clip_grad: float = leaf(3.0, "Largest gradient norm of backbone and head each; 0 does not clip.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class TaskTrainOptions:
    output_dir: str = leaf(".", "Folder of the run.")
    batch_size_per_gpu: int = leaf(16, "Images (parts, with part pooling) per process and forward pass.", minimum=1)
    accumulate_steps: int = leaf(1, "Forward passes per optimiser step.", minimum=1)
    seed: int = leaf(0, "Fixes head weights, data order and augmentation.", minimum=0)
    device: str = leaf("auto", "Where to compute.", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = leaf(
        "auto", "Format of computation (autocast); weights and losses are in fp32.", choices=PRECISIONS
    )
    sharding_strategy: str = leaf("NO_SHARD", "As in pretraining; NO_SHARD replicates.", choices=STRATEGIES)
    ema_momentum: float = leaf(
        0.0, "Weights averaged over steps are evaluated and shipped; 0: the trained ones.", minimum=0, maximum=0.99999
    )
    early_stopping_epochs: int = leaf(0, "Ends the run when val has not improved for so long; 0: never.", minimum=0)
    save_epochs: int = leaf(1, "Epochs between checkpoints.", minimum=1)
    keep_last: int = leaf(2, "Checkpoints kept; 0 keeps all.", minimum=0)
    max_save_failures: int = leaf(10, "Checkpoints in a row that may fail to be written.", minimum=1)
    log_period: int = leaf(10, "Optimiser steps between progress lines.", minimum=1)
    process_group_timeout_minutes: float = leaf(10.0, "How long a process waits for the others.", above=0)


@dataclass(frozen=True, kw_only=True)
class TaskEvaluationOptions:
    every_epochs: int = leaf(1, "Epochs between evaluations on val; the last epoch is always evaluated.", minimum=1)
    metric: str = leaf(
        "auto",
        "Chooses the best weights; auto: image_auroc, image_balanced_accuracy or mean_average_precision; mean_iou; "
        "abs_rel (aligned, for relative depth).",
    )
    batch_size: int = leaf(16, "Images per forward pass.", minimum=1)
    flips: bool = leaf(False, "Dense tasks: average with the mirrored image.")
    scales: tuple[float, ...] = leaf((1.0,), "Dense tasks: average over these sizes.", above=0)
    boundary_tolerance: float = leaf(0.0075, "Boundary F1: share of the diagonal.", above=0, maximum=1)
    part_aggregate: str = leaf("max", "How a part's images become one score.", choices=("max", "mean", "topk_mean"))
    depth_crop: str = leaf(
        "none",
        "Part of the image that depth is evaluated in.",
        choices=("none", "nyu_eigen", "kitti_eigen", "kitti_garg"),
    )
    num_pictures: int = leaf(8, "Images drawn per evaluation, and worst cases at the end; 0: none.", minimum=0)


_LOSS_WEIGHTS = {"segmentation": ("cross_entropy", "dice", "focal"), "depth": ("silog", "gradient", "mse", "l1")}
_LOSS_OPTIONS = {
    "classification": ("class_weights", "label_smoothing"),
    "segmentation": ("class_weights", "focal_gamma"),
    "depth": ("depth_alignment",),
}
_DPT_BLOCKS = 4  # that the DPT head fuses


@dataclass(frozen=True, kw_only=True)
class TaskConfig(RunOptions):
    """All options of a supervised run."""

    overview: ClassVar[str] = "configs/task_default_config.yaml"

    task: str = leaf("classification", "Task to learn.", choices=TASKS)
    backbone: TaskBackboneOptions = section(TaskBackboneOptions, "Where features come from.")
    head: HeadOptions = section(HeadOptions, "What turns features into predictions.")
    loss: TaskLossOptions = section(TaskLossOptions, "What is minimised.")
    data: TaskDataOptions = section(TaskDataOptions, "Images and labels.")
    augmentation: AugmentationOptions = section(AugmentationOptions, "Random changes of training images.")
    optim: TaskOptimOptions = section(TaskOptimOptions, "Optimiser and schedule.")
    train: TaskTrainOptions = section(TaskTrainOptions, "The run.")
    evaluation: TaskEvaluationOptions = section(TaskEvaluationOptions, "Evaluation.")

    @property
    def head_kind(self) -> str:
        """Kind of head, ``auto`` resolved: the first that `HEAD_OPTIONS` lists for the task."""
        heads = tuple(HEAD_OPTIONS.get(self.task, ()))
        return heads[0] if self.head.kind == "auto" and heads else self.head.kind

    def check(self) -> None:
        """Checks options that must agree with one another.

        Raises:
            ConfigError: naming the options involved and their values.
        """
        kind = self.head_kind
        heads = HEAD_OPTIONS.get(self.task, {})
        if heads and kind not in heads:
            raise ConfigError(f"head.kind={kind} does not go with task={self.task}: {', '.join(heads)} do")
        if kind == "dpt" and len(self.backbone.blocks) != _DPT_BLOCKS:
            raise ConfigError(f"head.kind=dpt fuses {_DPT_BLOCKS} blocks; backbone.blocks={self.backbone.blocks}")
        if len(set(self.backbone.blocks)) < len(self.backbone.blocks):
            raise ConfigError(f"backbone.blocks={self.backbone.blocks} names a block twice")
        if self.head.min_depth >= self.head.max_depth:
            raise ConfigError(
                f"head.min_depth={self.head.min_depth} must be less than head.max_depth={self.head.max_depth}"
            )
        if self.head.per_part and self.task != "classification":
            raise ConfigError(f"head.per_part answers one question per part; task={self.task} has one per pixel")
        if self.data.resize == "original" and self.task == "classification":
            raise ConfigError("data.resize=original is for dense tasks; classification needs stretch or shorter_side")
        if self.evaluation.scales != (1.0,) and self.task == "classification":
            raise ConfigError(
                f"evaluation.scales={list(self.evaluation.scales)} are for dense tasks: this one classifies"
            )
        losses = _LOSS_WEIGHTS.get(self.task, ())
        if losses and all(getattr(self.loss, name) == 0 for name in losses):
            raise ConfigError(
                f"{', '.join(f'loss.{name}' for name in losses)} are all 0: nothing is left to learn from"
            )
        if self.data.multi_label and self.loss.label_smoothing > 0:
            raise ConfigError("loss.label_smoothing is for one label per image, data.multi_label for several")
        if self.data.multi_label and self.head.per_part:
            raise ConfigError("head.per_part goes with one label per part, not with data.multi_label")
        augmentation = self.augmentation
        if augmentation.random_resized_crop != (0.0, 0.0) and augmentation.scale_jitter != (1.0, 1.0):
            raise ConfigError("augmentation.random_resized_crop and augmentation.scale_jitter exclude each other")
        if augmentation.foreground_crop_prob > 0 and self.task in ("classification", "depth"):
            raise ConfigError(f"augmentation.foreground_crop_prob needs masks, which task={self.task} has none of")
        for name, (low, high) in {
            "augmentation.random_resized_crop": augmentation.random_resized_crop,
            "augmentation.scale_jitter": augmentation.scale_jitter,
        }.items():
            if low > high:
                raise ConfigError(f"{name}=[{low}, {high}]: the first number must not exceed the second")
        if self.optim.warmup_epochs > self.optim.epochs:
            raise ConfigError(
                f"optim.warmup_epochs={self.optim.warmup_epochs} exceeds optim.epochs={self.optim.epochs}"
            )
        if self.optim.min_lr > self.optim.lr:
            raise ConfigError(f"optim.min_lr={self.optim.min_lr} exceeds optim.lr={self.optim.lr}")

    def idle(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Iterable[str]]]:
        task, mode, kind = values["task"], values["backbone.mode"], values["head.kind"]
        if task in HEAD_OPTIONS:
            kinds = HEAD_OPTIONS[task]
            kind = next(iter(kinds)) if kind == "auto" else kind
            yield f"on a {kind} head for {task}", _others(values, "head", {*kinds[kind], "kind"})
            yield f"on task={task}", _others(values, "loss", {*_LOSS_OPTIONS[task], *_LOSS_WEIGHTS.get(task, ())})
            metrics = {"segmentation": "boundary_tolerance", "classification": "part_aggregate", "depth": "depth_crop"}
            yield f"on task={task}", [f"evaluation.{name}" for other, name in metrics.items() if other != task]
        if task == "segmentation" and not values["loss.focal"]:
            yield "with loss.focal=0", ["loss.focal_gamma"]
        lora = {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
        unused = {"frozen": lora | {"last_blocks", "drop_path_rate"}, "lora": {"last_blocks"}, "last_blocks": lora}
        names = unused.get(mode, lora | {"last_blocks"})
        yield f"with backbone.mode={mode}", [name for name in values if name.removeprefix("backbone.") in names]
        if mode == "frozen":
            yield "on a frozen backbone", ["optim.backbone_lr_mult", "optim.layerwise_decay"]
        if values["optim.schedule"] == "constant":
            yield "with optim.schedule=constant", ["optim.min_lr"]
        if values["head.per_part"]:
            yield "with head.per_part", ["evaluation.part_aggregate", "evaluation.flips"]
        else:
            yield "without head.per_part", ["data.max_photos"]
        if values["data.multi_label"]:
            yield "with data.multi_label", ["evaluation.part_aggregate"]


def _others(values: Mapping[str, Any], section: str, names: Iterable[str]) -> list[str]:
    """Options of a section that are not among these."""
    return [name for name in values if name.startswith(f"{section}.") and name.partition(".")[2] not in names]


def task_config_class(sections: Mapping[str, type | None]) -> type[TaskConfig]:
    """The class of options with more tasks to choose from.

    Args:
        sections: name of each further task, with the frozen dataclass of its own options, which become the section of
            that name, or None where it has none.
    """
    return _config_class(tuple(sections.items()))


@functools.cache  # so that equal options are of one class
def _config_class(sections: tuple[tuple[str, type | None], ...]) -> type[TaskConfig]:
    task = leaf("classification", "Task to learn.", choices=(*TASKS, *(name for name, _ in sections)))
    own: list[tuple[str, type, Any]] = [
        (name, kind, section(kind, f"Options of task={name}.")) for name, kind in sections if kind is not None
    ]
    return make_dataclass("TaskConfig", [("task", str, task), *own], bases=(TaskConfig,), frozen=True, kw_only=True)


def load_task_config(
    config: str | Path | Mapping[str, Any] | TaskConfig | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    tasks: Mapping[str, type] = MappingProxyType({}),
) -> TaskConfig:
    """Reads the options of a supervised run: defaults <- ``config`` <- ``overrides``.

    Args:
        config: YAML file, mapping or options; see `dinov2.config.load_options`.
        overrides: pairs such as ``optim.epochs=5``, or a mapping.
        tasks: tasks by name; for those beside the built-in ones, a class attribute ``options`` (a frozen dataclass or
            None) becomes the section of that name.
    """
    return load_options(_class_for(tasks), config, overrides)


def parse_task_config(text: str, source: str, tasks: Mapping[str, type] = MappingProxyType({})) -> TaskConfig:
    """Reads the options of a supervised run from YAML text; ``source`` names it in errors. See `load_task_config`."""
    return parse_options(_class_for(tasks), text, source)


def _class_for(tasks: Mapping[str, type]) -> type[TaskConfig]:
    more = {name: getattr(task, "options", None) for name, task in tasks.items() if name not in TASKS}
    return task_config_class(more) if more else TaskConfig
