"""Every option of a supervised run, typed, with its default and meaning; tasks may add sections of their own.

``configs/task_default_config.yaml`` shows the same options as text.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from dinov2.config import ConfigError, RunOptions
from dinov2.config.schema import PRECISIONS, STRATEGIES, Auto, Size, Steps, leaf, section
from dinov2.data.task_transforms import AugmentationOptions
from dinov2.eval.metrics.thresholds import ThresholdRule


@dataclass(frozen=True, kw_only=True)
class TaskBackboneOptions:
    config_file: str = leaf(
        "", "YAML whose student section describes the backbone, such as OUT/config.yaml; empty: told from the weights."
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
class HeadOptions:
    """Options that describe a head; `Task.heads` says which of them each kind of head reads."""

    kind: str = leaf(
        "auto", "Of the task's heads; auto: linear for classes, bn_linear for masks, linear_bins for depth, yolo."
    )
    pooling: str = leaf(
        "cls_mean",
        "Classification: class tokens of all blocks, these and the mean patch of the last, or mean patches.",
        choices=("cls", "cls_mean", "mean"),
    )
    standardize: bool = leaf(True, "Classification: pooled features are standardised by running statistics.")
    per_part: bool = leaf(False, "Classification: one answer per part, by attention over its images.")
    class_token: bool = leaf(False, "Dense heads: the class token beside every patch.")
    hidden_dim: int = leaf(512, "Width inside mlp.", minimum=1)
    channels: int = leaf(128, "Channels of multi_scale, conv_decoder, pyramid, dpt, yolo and detr.", minimum=1)
    dropout: float = leaf(0.0, "Before the last layer.", minimum=0, maximum=0.99)
    output_stride: int = leaf(
        4,
        "Pixels per prediction of conv_decoder and pyramid, before it is enlarged; on the finest map of yolo and detr "
        "(8 is common). A power of 2.",
        minimum=1,
    )
    detail: bool = leaf(True, "yolo and detr: a convolutional branch on the pixels beside the patches.")
    num_queries: int = leaf(300, "detr: most objects of an image.", minimum=1)
    num_layers: int = leaf(3, "detr: layers of the decoder.", minimum=1)
    cross_attention: str = leaf(
        "deformable", "detr: queries look at a few places of all maps, or at all of them.",
        choices=("deformable", "standard"),
    )  # fmt: skip
    two_stage: bool = leaf(True, "detr: queries begin as the best proposals of the maps; else they are learnt.")
    num_denoising: int = leaf(100, "detr: queries that learn from noised objects; 0: none.", minimum=0)
    one_to_many: bool = leaf(True, "detr: a second group of queries, several of which match an object, in training.")
    upsample: int = leaf(4, "Enlargement of the patch map before linear_bins.", minimum=1)
    num_bins: int = leaf(256, "Depth bins of linear_bins.", minimum=2)
    bins: str = leaf(
        "UD",
        "Depth bins: UD evenly spaced, SID evenly in log depth; SID_upstream as upstream computes them.",
        choices=("UD", "SID", "SID_upstream"),
    )
    norm_strategy: str = leaf("linear", "How bin scores become weights.", choices=("linear", "softmax", "sigmoid"))
    depth_activation: str = leaf(
        "sigmoid",
        "How dpt and conv_decoder make a depth of a number; sigmoid begins amid the range, whatever the unit.",
        choices=("sigmoid", "softplus", "relu"),
    )
    min_depth: float = leaf(0.001, "Smallest depth that the head can predict, in the set's unit.", above=0)
    max_depth: float = leaf(10.0, "Largest depth that the head can predict.", above=0)


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
    reference: bool = leaf(
        False, "Classes, masks and boxes: the network also sees an image without a defect, and how the two differ."
    )
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
    preprocessing: Auto | Steps = leaf(
        "auto",
        "Steps that each image goes through before augmentation; auto: those of the backbone, []: none.",
    )


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
        "Chooses the best weights; auto: image_auroc, image_balanced_accuracy or mean_average_precision; defect_iou, "
        "or mean_iou of more than two classes; abs_rel (aligned, for relative depth); ap50 of boxes.",
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
    threshold: str = leaf(
        "auto",
        "Chooses on val, class by class, the score from which on something is found, for the best F1, a recall or a "
        "rate of false alarms; stored with the model. auto: f1 of boxes, false_alarms of anomalies, none of classes "
        "and masks.",
        choices=("auto", "none", "f1", "recall", "false_alarms"),
    )
    threshold_recall: float = leaf(0.95, "With threshold=recall: share that is found.", above=0, maximum=1)
    threshold_false_alarms: float = leaf(
        0.01, "With threshold=false_alarms: share of what is good, or boxes per image.", minimum=0
    )
    threshold_level: str = leaf(
        "auto", "What is to be found. auto: each object, and images where there are none.",
        choices=("auto", "object", "image", "part"),
    )  # fmt: skip
    num_pictures: int = leaf(8, "Images drawn per evaluation, and worst cases at the end; 0: none.", minimum=0)

    def threshold_rule(self, *, auto: str, level: str) -> ThresholdRule | None:
        """By what thresholds are chosen; None for not at all.

        Args:
            auto: what ``threshold=auto`` means to the task.
            level: what ``threshold_level=auto`` means to it.
        """
        goal = auto if self.threshold == "auto" else self.threshold
        if goal == "none":
            return None
        target = {"recall": self.threshold_recall, "false_alarms": self.threshold_false_alarms}.get(goal, 0.0)
        return ThresholdRule(goal, target, level if self.threshold_level == "auto" else self.threshold_level)


@dataclass(frozen=True, kw_only=True)
class TaskConfig(RunOptions):
    """All options of a supervised run.

    `task_config_class` makes the class for the tasks to choose from, with the sections that they add.

    Attributes:
        tasks: the tasks by name.
    """

    overview: ClassVar[str] = "configs/task_default_config.yaml"
    tasks: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    task: str = leaf("classification", "Task to learn.")
    backbone: TaskBackboneOptions = section(TaskBackboneOptions, "Where features come from.")
    head: HeadOptions = section(HeadOptions, "What turns features into predictions.")
    loss: TaskLossOptions = section(TaskLossOptions, "What is minimised.")
    data: TaskDataOptions = section(TaskDataOptions, "Images and labels.")
    augmentation: AugmentationOptions = section(AugmentationOptions, "Random changes of training images.")
    optim: TaskOptimOptions = section(TaskOptimOptions, "Optimiser and schedule.")
    train: TaskTrainOptions = section(TaskTrainOptions, "The run.")
    evaluation: TaskEvaluationOptions = section(TaskEvaluationOptions, "Evaluation.")

    @property
    def task_class(self) -> Any:
        """The subclass of `dinov2.tasks.task.Task` that ``task`` names."""
        return self.tasks[self.task]

    def __reduce__(self) -> tuple[Any, ...]:
        """Loading processes may get options by pickle, which knows no class that was made on the way."""
        return _rebuild, (tuple(self.tasks.items()), dict(vars(self)))

    def check(self) -> None:
        """Checks options that must agree with one another.

        Raises:
            ConfigError: naming the options involved and their values.
        """
        self.task_class.check_options(self)
        if len(set(self.backbone.blocks)) < len(self.backbone.blocks):
            raise ConfigError(f"backbone.blocks={self.backbone.blocks} names a block twice")
        if self.head.min_depth >= self.head.max_depth:
            raise ConfigError(
                f"head.min_depth={self.head.min_depth} must be less than head.max_depth={self.head.max_depth}"
            )
        augmentation = self.augmentation
        if augmentation.random_resized_crop != (0.0, 0.0) and augmentation.scale_jitter != (1.0, 1.0):
            raise ConfigError("augmentation.random_resized_crop and augmentation.scale_jitter exclude each other")
        for name, (low, high) in {
            "augmentation.random_resized_crop": augmentation.random_resized_crop,
            "augmentation.scale_jitter": augmentation.scale_jitter,
            "augmentation.multi_scale": augmentation.multi_scale,
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
        task, kind = self.task_class, self.task_class.head_kind(self)
        read = {"head.kind", *(f"head.{name}" for name in task.heads[kind].options)}
        yield (
            f"on a {kind} head for {task.name}",
            [name for name in values if name.startswith("head.") and name not in read],
        )
        of_some = {name for other in self.tasks.values() for name in other.shared_options} - task.shared_options
        yield (
            f"on task={task.name}",
            [
                name
                for name in values
                if name in of_some or (name.startswith("loss.") and name not in task.shared_options)
            ],
        )
        others = {name for name, other in self.tasks.items() if other.options is not None and name != self.task}
        yield f"on task={task.name}", [name for name in values if name.split(".")[0] in others]
        evaluation = self.evaluation
        for goal in ("recall", "false_alarms"):
            if goal not in (evaluation.threshold, task.auto_threshold if evaluation.threshold == "auto" else ""):
                yield f"with evaluation.threshold={evaluation.threshold}", [f"evaluation.threshold_{goal}"]
        if evaluation.threshold == "none" or (evaluation.threshold == "auto" and task.auto_threshold == "none"):
            yield f"with evaluation.threshold={evaluation.threshold}", ["evaluation.threshold_level"]
        yield from task.idle_options(self)
        lora = {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
        unused = {"frozen": lora | {"last_blocks", "drop_path_rate"}, "lora": {"last_blocks"}, "last_blocks": lora}
        mode = values["backbone.mode"]
        names = unused.get(mode, lora | {"last_blocks"})
        yield f"with backbone.mode={mode}", [name for name in values if name.removeprefix("backbone.") in names]
        if mode == "frozen":
            yield "on a frozen backbone", ["optim.backbone_lr_mult", "optim.layerwise_decay"]
        if values["optim.schedule"] == "constant":
            yield "with optim.schedule=constant", ["optim.min_lr"]


def task_config_class(tasks: Mapping[str, Any]) -> type[TaskConfig]:
    """The class of options for a choice of tasks.

    Args:
        tasks: classes by name; `Task.options`, if it has any, becomes the section of that name.

    Raises:
        ConfigError: there is no task, a name is that of a section or not the task's own, or a class lacks what the
            options need to know of it.
    """
    if not isinstance(tasks, Mapping) or not tasks:
        found = "none" if isinstance(tasks, Mapping) else f"a {type(tasks).__name__}"
        raise ConfigError(f"tasks must be classes by name, such as {{**TASKS, 'mine': Mine}}, found {found}")
    taken = {field.name for field in fields(TaskConfig)}
    for name, kind in tasks.items():
        name_of_task, heads, options = (getattr(kind, part, None) for part in ("name", "heads", "options"))
        if not isinstance(kind, type) or not isinstance(heads, Mapping) or not heads:
            raise ConfigError(
                f"the task {name!r} must be a class derived from dinov2.tasks.task.Task with its heads by name, "
                f"heads = {{'linear': Head(...)}}; found {kind!r}"
            )
        if name_of_task != name:
            raise ConfigError(
                f"the task {name!r} calls itself name = {name_of_task!r}; both must be the same, since "
                f"its best.pth is opened by that name"
            )
        if name in taken:
            raise ConfigError(f"a task cannot be called {name!r}: that is a section of the options; give another name")
        if options is not None and not is_dataclass(options):
            raise ConfigError(f"the options of the task {name!r} must be a dataclass, found {options!r}")
    return _config_class(tuple(tasks.items()))


@functools.cache  # so that equal options are of one class
def _config_class(tasks: tuple[tuple[str, Any], ...]) -> type[TaskConfig]:
    task = leaf("classification", "Task to learn.", choices=tuple(name for name, _ in tasks))
    own: list[tuple[str, type, Any]] = [
        (name, kind.options, section(kind.options, f"Options of task={name}."))
        for name, kind in tasks
        if kind.options is not None
    ]
    return make_dataclass(
        "TaskConfig",
        [("task", str, task), *own],
        bases=(TaskConfig,),
        namespace={"tasks": MappingProxyType(dict(tasks))},
        frozen=True,
        kw_only=True,
    )


def _rebuild(tasks: tuple[tuple[str, Any], ...], values: dict[str, Any]) -> TaskConfig:
    return _config_class(tasks)(**values)
