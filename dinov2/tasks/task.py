"""The abstract supervised task: whatever the engine, the evaluation, the predictor or an export asks of one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from dinov2.config import ConfigError
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.preprocessing import Placement
from dinov2.data.task_dataset import PartBags, TaskDataset, TaskSample
from dinov2.eval.sliding_window import Tile, full_size_tiles
from dinov2.models.task_model import ComparingTaskModel, TaskModel
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.tasks.options import HeadOptions, TaskConfig
from dinov2.tasks.predictions import Prediction

if TYPE_CHECKING:  # metrics take seconds to import, and predicting does without them
    from dinov2.eval.metrics.classification import Scores
    from dinov2.eval.metrics.thresholds import ThresholdRule
    from dinov2.eval.results import PredictionTable
    from dinov2.logging.plots import Chart

Outputs = dict[str, Tensor]

COMPARING = ("image", "reference")  # inputs of a task that compares images with others
THRESHOLD_OPTIONS = tuple(f"evaluation.threshold{name}" for name in ("", "_recall", "_false_alarms", "_level"))
OVERFIT_GOAL = 0.05  # share of the first loss
MAX_HEADLINE = 10


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """What the training set says about the task; validation and test must say the same.

    Attributes:
        classes: names by index; empty where nothing is classified.
        unit: of the values that are predicted; empty where they have none.
    """

    classes: tuple[str, ...] = ()
    unit: str = ""

    @property
    def num_outputs(self) -> int:
        """Channels of the head."""
        return max(1, len(self.classes))

    def __str__(self) -> str:
        return f"classes {list(self.classes)}" if self.classes else f"values in {self.unit!r}"


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """What a head must fit: the backbone below it and the task above.

    Attributes:
        embed_dim: width of the features: that of the backbone, or twice as much, see `ComparingTaskModel`.
        num_blocks: blocks whose features the head gets.
        num_outputs: channels, such as classes.
        patch_size: pixels (height, width) of a patch.
        image_channels: of the images that a `PixelHead` gets.
    """

    embed_dim: int
    num_blocks: int
    num_outputs: int
    patch_size: int | tuple[int, int]
    image_channels: int = 3


@dataclass(frozen=True)
class Head:
    """One kind of head that a task may have.

    Attributes:
        build: makes it, with random weights.
        options: those of the section ``head`` that it reads.
        num_blocks: of the backbone that it needs; None for any number.
    """

    build: Callable[[HeadOptions, HeadSizes], nn.Module]
    options: tuple[str, ...] = ()
    num_blocks: int | None = None

    @classmethod
    def of(cls, network: Callable[..., nn.Module], *options: str, fits: Sequence[str] = ()) -> "Head":
        """A head whose constructor takes the width, outputs and blocks, and by their names options and further sizes.

        Args:
            network: the constructor.
            *options: those that it takes.
            fits: further `HeadSizes` that it takes.
        """

        def build(given: HeadOptions, sizes: HeadSizes) -> nn.Module:
            chosen: dict[str, Any] = {name: getattr(given, name) for name in options}
            chosen |= {name: getattr(sizes, name) for name in fits}
            return network(sizes.embed_dim, sizes.num_outputs, num_blocks=sizes.num_blocks, **chosen)

        return cls(build, options)


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image (or the images of a part) as the network sees it, and what it takes to get back.

    Attributes:
        inputs: by name, as in a training sample without the batch: ``image`` float32 ``[3, h, w]``, normalised, or
            ``[P, 3, h, w]`` of a part; of a dense task that sees images at their own size uint8, normalised window by
            window: a large image needs a fraction of the memory. ``reference`` alike, for tasks that look at two.
        size: height and width of the image.
        scale: pixels of the network's image per pixel of the image, (vertical, horizontal).
        padding: pixels of the network's image (above, to the left) before the image begins; negative where it was cut.
        thresholds: by name, what the model's file says about scores; empty where it says nothing.
        placement: of the image, where preprocessing has cut it out of another, in whose coordinates predictions are.
    """

    inputs: Mapping[str, Tensor]
    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    padding: tuple[int, int] = (0, 0)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    placement: Placement | None = None


@dataclass(frozen=True, kw_only=True)
class ExportOutput:
    """One output of an exported model.

    Attributes:
        name: as in the outputs of the model.
        meaning: in a sentence, with its shape.
        dynamic_axes: axes whose length is not fixed, with their names; axis 0 is the batch.
        is_set: whether entries along axis 1 have no order, and belong to those of other such outputs.
    """

    name: str
    meaning: str
    dynamic_axes: Mapping[int, str] = field(default_factory=lambda: {0: "batch"})
    is_set: bool = False


class TaskMetrics(ABC):
    """Compares predictions with the ground truth of a set, one sample (an image or a part) at a time, each once.

    Args:
        dataset: the set.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def read_inputs(self, index: int) -> dict[str, Any]:
        """The images that a prediction is about: ``image`` (several of a part)."""
        return {"image": self.dataset.get_placed_image(index)}

    def name_of(self, index: int) -> str:
        """What a sample is called in tables and pictures."""
        return str(self.dataset.get_image_path(index))

    def part_ids(self) -> Sequence[str]:
        """The part that each sample is of."""
        return self.dataset.get_group_ids()

    def shown_image(self, index: int) -> Image.Image:
        """The image that a sample's prediction is drawn on."""
        return self.dataset.get_placed_image(index).shown

    @abstractmethod
    def update(self, index: int, prediction: Any) -> float | None:
        """Takes in one prediction.

        Args:
            index: of the sample.
            prediction: at the image's own size.

        Returns:
            How wrong it is, to find the worst; None where the set does not say.
        """

    @abstractmethod
    def ground_truth(self, index: int) -> Prediction | None:
        """What the set says, as a prediction that is sure of it; None where it does not say."""

    @abstractmethod
    def merge_processes(self) -> None:
        """Adds what all other processes have taken in; every process must call it, once."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Metrics over all predictions, by name."""

    def confusion(self) -> list[list[int]]:
        """How many of each class (outer) were taken for each class (inner); empty where nothing is classified."""
        return []

    def warnings(self) -> list[str]:
        """What is wrong with the predictions of the whole set beyond metrics, such as that nothing is ever found.

        Each is a sentence that begins with a name in capitals, such as ``NOTHING FOUND: …``.
        """
        return []

    def thresholds(self) -> dict[str, float]:
        """Scores by class from which on something is found, chosen on this set as the options say; empty for none."""
        return {}

    def charts(self) -> "Mapping[str, Chart]":
        """Curves of the whole set by the name of their file, such as precision over recall."""
        return {}

    def scores(self) -> "Mapping[str, Scores]":
        """Metrics with intervals from resampled parts, by what they are about; empty where there are none."""
        return {}

    def predictions(self) -> "PredictionTable | None":
        """One row per image for ``predictions.csv``; None where there is none."""
        return None


class TaskOutputs(ABC):
    """What the outputs of a model mean: all that inference and an export ask of a task.

    Attributes:
        name: as in the options.
        inputs: entries of a sample that the model takes, in this order.
        dense: whether the model predicts every pixel; see `DenseTask`.
        windowed: whether images may be seen at their own size, large ones window by window (``data.resize=original``).
        unit: of the values that are predicted; empty for classes and relative values.
        classes: names by index.
        max_images: images of a part that the model sees at once; 0 where every image is a sample of its own.
    """

    name: str
    inputs: tuple[str, ...] = ("image",)
    dense: bool = False
    windowed: bool = False
    unit: str = ""
    classes: tuple[str, ...] = ()
    max_images: int = 0

    def forward(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """Runs a model on a batch, which may hold more than the model takes."""
        return model(*(inputs[name] for name in self.inputs if name in inputs))

    def activate(self, outputs: Outputs) -> Outputs:
        """Outputs of the model as what may be averaged: probabilities instead of logits. Doing it again is harmless."""
        return outputs

    def unmirror(self, outputs: Outputs) -> Outputs:
        """Outputs for images that were mirrored left to right, as if they had not been.

        Raises:
            ValueError: the task has no such outputs, also where ``outputs`` is empty.
        """
        return outputs

    def merge_windows(self, tiles: Iterable[Tile], size: tuple[int, int]) -> Outputs:
        """Joins what was said about the windows of one image.

        Args:
            tiles: from top to bottom and from left to right; they may overlap.
            size: height and width of the image.

        Returns:
            Outputs for `postprocess`, for a batch of one.
        """
        raise NotImplementedError(f"task={self.name} does not go over windows")

    @abstractmethod
    def postprocess(self, outputs: Outputs, prepared: Sequence[PreparedImage]) -> list[Any]:
        """Predictions at the images' own sizes.

        Args:
            outputs: of the model for a batch, or what `activate` or `merge_windows` made of them.
            prepared: the images of the batch.
        """

    @abstractmethod
    def export_outputs(self) -> tuple[ExportOutput, ...]:
        """Outputs that an exported model has."""


class Task(TaskOutputs):
    """One kind of supervised learning, from its options to its exported outputs.

    The methods for classes see options only: they are asked before there is data. A task is built from the options and
    what the training set says, in training as in prediction.

    Args:
        config: options of the run.
        facts: classes or unit.

    Attributes:
        options: frozen dataclass of the task's own section of options, ``config.<name>``; None for none.
        heads: kinds of head; ``head.kind=auto`` is the first.
        shared_options: options of shared sections that are for some tasks only and that this one reads.
        output: what the model calls the output of a head that has a single one.
        levels: what thresholds may be chosen for, see `ThresholdRule`, first what ``evaluation.threshold_level=auto``
            means; empty where there are none to choose.
        auto_threshold: by what they are chosen where ``evaluation.threshold=auto``.
        is_error: parts of the names of metrics of which less is better.
        plot_titles: names of metrics' plots, where they are not the metrics' own.
        metric: chooses the best weights.
        second_metric: chooses between epochs that ``metric`` holds equal; of further equals the later one is the best.
        headline: metrics that matter most, in the order in which the end of a run shows them; at most `MAX_HEADLINE` of
            those that a set gives.
        counted: what `count_classes` counts.
        fewest_classes: a training set that shows fewer has nothing to be learnt.
        class_hint: where to look when a class is never there.
    """

    options: ClassVar[type | None] = None
    heads: ClassVar[Mapping[str, Head]]
    shared_options: ClassVar[frozenset[str]] = frozenset()
    output: ClassVar[str] = "logits"
    levels: ClassVar[tuple[str, ...]] = ()
    auto_threshold: ClassVar[str] = "none"
    is_error: ClassVar[tuple[str, ...]] = ("escape_rate",)
    plot_titles: ClassVar[Mapping[str, str]] = MappingProxyType({})
    metric: str
    second_metric: str = ""
    headline: ClassVar[tuple[str, ...]] = ()
    counted: ClassVar[str] = "image"
    fewest_classes: int = 2
    class_hint: ClassVar[str] = ""

    def __init__(self, config: TaskConfig, facts: TaskFacts) -> None:
        self.config = config
        self.classes = facts.classes
        if config.data.reference:
            self.inputs = COMPARING

    # Options and data sets.

    @classmethod
    def threshold_names(cls, classes: Iterable[str]) -> frozenset[str]:
        """What a model of these classes may hold thresholds of; behind a point may stand what one promises."""
        return frozenset(classes)

    @classmethod
    def head_kind(cls, config: TaskConfig) -> str:
        """The head that the options name, ``auto`` resolved."""
        return next(iter(cls.heads)) if config.head.kind == "auto" else config.head.kind

    @classmethod
    def check_options(cls, config: TaskConfig) -> None:
        """Raises a `ConfigError` for options that do not go with the task or with each other; call this one first."""
        kind = cls.head_kind(config)
        if kind not in cls.heads:
            raise ConfigError(f"head.kind={kind} does not go with task={cls.name}: {', '.join(cls.heads)} do")
        blocks, needed = config.backbone.blocks, cls.heads[kind].num_blocks
        if needed is not None and len(blocks) != needed:
            raise ConfigError(f"head.kind={kind} fuses {needed} blocks; backbone.blocks={blocks}")
        if config.head.per_part and "per_part" not in cls.heads[kind].options:
            raise ConfigError(f"head.per_part answers one question per part; task={cls.name} has another one")
        for name in ("foreground_crop_prob", "mosaic", "copy_paste"):
            if getattr(config.augmentation, name) > 0 and f"augmentation.{name}" not in cls.shared_options:
                raise ConfigError(f"augmentation.{name} needs masks or boxes, which task={cls.name} has none of")
        if config.data.reference:
            if "data.reference" not in cls.shared_options:
                raise ConfigError(
                    f"data.reference compares images with one without a defect, which does not help task={cls.name}"
                )
            if config.head.per_part:
                raise ConfigError(
                    "data.reference compares single images, and head.per_part looks at all images of a part at once: "
                    "set one of the two to false"
                )
        if config.data.resize == "original" and not cls.windowed:
            raise ConfigError(f"data.resize=original is for dense tasks; {cls.name} needs stretch or shorter_side")
        level = config.evaluation.threshold_level
        if config.evaluation.threshold != "none" and level not in ("auto", *cls.levels) and cls.levels:
            raise ConfigError(f"evaluation.threshold_level={level}: task={cls.name} has {', '.join(cls.levels)}")
        if config.evaluation.scales != (1.0,) and not cls.dense:
            scales = list(config.evaluation.scales)
            raise ConfigError(f"evaluation.scales={scales} are for dense tasks, task={cls.name} is none")

    @classmethod
    def idle_options(cls, config: TaskConfig) -> Iterator[tuple[str, Iterable[str]]]:
        """Why options of this task have no effect beside its others, and which."""
        return iter(())

    @classmethod
    def threshold_rule(cls, config: TaskConfig) -> "ThresholdRule | None":
        """By what thresholds are chosen on val; None for not at all."""
        return config.evaluation.threshold_rule(auto=cls.auto_threshold, level=cls.levels[0])

    @classmethod
    @abstractmethod
    def read_facts(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> TaskFacts:
        """Classes or unit of a set.

        Args:
            config: options of the run.
            dataset: the set.
            path: what the options call it.

        Raises:
            ValueError: the set has no labels of this task.
        """

    @classmethod
    def check_dataset(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> None:
        """Looks at a set before training; raises a ValueError where it cannot be learnt from, or warns."""

    @classmethod
    def check_other_set(cls, config: TaskConfig, train: ImageDataset, other: ImageDataset) -> None:
        """Looks whether labels of val or test mean what those of the training set do, beyond what `read_facts` says.

        Raises:
            ValueError: they do not.
        """

    def build_model(self, backbone: DinoVisionTransformer, num_outputs: int) -> TaskModel:
        """The network around a backbone, its head with random weights; a task of inputs of its own brings its own.

        Args:
            backbone: sees the images.
            num_outputs: channels of the head, see `TaskFacts`.

        Raises:
            ValueError: for blocks that the backbone does not have, or that are named twice.
        """
        options, count = self.config.backbone, backbone.n_blocks
        blocks = tuple(block + count if block < 0 else block for block in options.blocks)
        if not all(0 <= block < count for block in blocks):
            raise ValueError(f"backbone.blocks={list(options.blocks)}: the backbone has blocks 0 to {count - 1}")
        if len(set(blocks)) < len(blocks):
            raise ValueError(f"backbone.blocks={list(options.blocks)} names a block twice (it has {count})")
        seen = 2 if self.config.data.reference else 1  # an image, or also how it differs
        sizes = HeadSizes(
            embed_dim=seen * backbone.embed_dim,
            num_blocks=len(blocks),
            num_outputs=num_outputs,
            patch_size=backbone.patch_size,
            image_channels=seen * backbone.patch_embed.proj.in_channels,
        )
        head = self.heads[self.head_kind(self.config)].build(self.config.head, sizes)
        kind = ComparingTaskModel if self.config.data.reference else TaskModel
        return kind(backbone, head, blocks=blocks, norm=options.norm, output=self.output)

    # Training.

    @abstractmethod
    def read_targets(self, dataset: ImageDataset) -> Callable[[int], TaskSample]:
        """What reads the targets of an image by its number; see `TaskDataset`."""

    def make_samples(self, images: TaskDataset) -> TaskDataset | PartBags:
        """The samples of single images, or of parts made from them."""
        return images

    def labels(self, dataset: ImageDataset, samples: TaskDataset | PartBags) -> list[tuple[int, ...] | None]:
        """Classes of every sample; None where there is nothing to learn from it. No targets are read for it."""
        return [(target,) if target >= 0 else () for target in dataset.get_targets().tolist()]

    def classes_to_balance(self, dataset: ImageDataset, indices: Sequence[int]) -> list[tuple[int, ...]] | None:
        """Classes of images without labels, from their targets; None where these have no classes."""
        return None

    def count_classes(
        self, dataset: ImageDataset, indices: Sequence[int], labels: Sequence[tuple[int, ...] | None]
    ) -> list[int]:
        """How often every class occurs among samples, for ``loss.class_weights``."""
        counts = [0] * len(self.classes)
        for index in indices:
            for label in labels[index] or ():
                counts[label] += 1
        return counts

    def find_classes(
        self, dataset: ImageDataset, indices: Sequence[int], labels: Sequence[tuple[int, ...] | None]
    ) -> tuple[list[int], int]:
        """Which classes occur among samples at all, found as cheaply as the set allows.

        Returns:
            A count of every class, 0 where it does not occur, and how many samples were looked at for it.
        """
        return self.count_classes(dataset, indices, labels), len(indices)

    def prepare_loss(self, class_weights: Sequence[float], device: torch.device) -> None:
        """Called once before training.

        Args:
            class_weights: of the loss, by class; empty for none.
            device: where outputs will be.
        """

    @abstractmethod
    def loss(self, outputs: Outputs, targets: TaskSample) -> dict[str, Tensor]:
        """Terms whose sum is the objective.

        Args:
            outputs: of the model, for a batch.
            targets: the batch, collated.
        """

    @property
    def is_trained(self) -> bool:
        """Whether the head learns by gradients; otherwise `learn` computes it."""
        return True

    def learn(self, model: TaskModel, dataset: ImageDataset, show: Callable[[ImageDataset], None]) -> None:
        """Computes a head that is not trained (see `is_trained`) from the training set.

        All processes call it, and all have the same head afterwards.

        Args:
            model: whose head it is.
            dataset: the training set.
            show: runs ``model`` over a set, prepared as for evaluation; each process shows it its share of the images.

        Raises:
            ValueError: there is nothing that it can be computed from.
        """
        raise NotImplementedError(f"the heads of task={self.name} are trained")

    def learn_more(self, model: TaskModel, dataset: ImageDataset, show: Callable[[ImageDataset], None]) -> None:
        """Adds further images to what `learn` has computed; the arguments are its own.

        Raises:
            ValueError: the head cannot.
        """
        raise ValueError(f"a model of task={self.name} takes no further images without being trained again")

    def overfit_reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether a few images have been learnt by heart.

        Args:
            metrics: ``loss`` of this step and ``first_loss``, of the first one; now and then also those of an
                evaluation of the images.
        """
        return metrics["loss"] <= OVERFIT_GOAL * metrics["first_loss"]

    # Evaluation.

    @abstractmethod
    def metrics(self, dataset: ImageDataset) -> TaskMetrics:
        """New metrics for a set."""

    def good_images(self, dataset: ImageDataset) -> list[int]:
        """Numbers of the images of a set that show good parts; a task that sets thresholds from these knows which.

        Raises:
            ValueError: there is none.
        """
        return list(range(len(dataset)))

    def thresholds_from_good(
        self,
        predictions: Iterable[Any],
        group_ids: Sequence[str],
        *,
        false_alarm_rate: float | None = None,
        margin: float | None = None,
    ) -> dict[str, float]:
        """Thresholds from predictions for good images alone.

        Args:
            predictions: for images that nothing was learnt from.
            group_ids: the part of each.
            false_alarm_rate: share of good ones that may exceed them; None for that of the options it was trained with.
            margin: raises them by this share; None likewise.

        Raises:
            ValueError: the task has no such thresholds, or there are too few images.
        """
        raise ValueError(f"task={self.name} sets no thresholds from good parts")

    def higher_is_better(self, metric: str) -> bool:
        """Whether more of a metric is better."""
        return not any(part in metric for part in self.is_error)


class DenseTask(Task):
    """A task whose outputs are maps ``[B, C, h, w]`` of the network's image.

    They are averaged over overlapping windows, mirrored images and scales, and come to `merge_windows` as bands of rows
    of the image's full width that do not overlap.
    """

    dense = True
    windowed = True
    losses: ClassVar[tuple[str, ...]] = ()  # options of the section loss, not all of which may be 0

    @classmethod
    def check_options(cls, config: TaskConfig) -> None:
        super().check_options(config)
        if cls.losses and not any(getattr(config.loss, name) for name in cls.losses):
            names = ", ".join(f"loss.{name}" for name in cls.losses)
            raise ConfigError(f"{names} are all 0: nothing is left to learn from")

    def unmirror(self, outputs: Outputs) -> Outputs:
        return {name: value.flip(-1) for name, value in outputs.items()}

    def merge_windows(self, tiles: Iterable[Tile], size: tuple[int, int]) -> Outputs:
        pieces = [self.reduce(tile.outputs) for tile in tiles]
        return {name: torch.cat([piece[name] for piece in pieces], dim=1).cpu() for name in pieces[0]}

    def postprocess(self, outputs: Outputs, prepared: Sequence[PreparedImage]) -> list[Any]:
        if next(iter(outputs.values())).ndim == 3:  # merged
            return [self.to_prediction(outputs)]
        activated = self.activate(outputs)
        return [
            self.to_prediction(self.merge_windows(full_size_tiles(activated, place, image.size), image.size))
            for place, image in enumerate(prepared)
        ]

    @abstractmethod
    def reduce(self, outputs: Outputs) -> Outputs:
        """What is kept of activated maps ``[1, C, rows, W]`` of the image's size: maps ``[1, rows, W]``."""

    @abstractmethod
    def to_prediction(self, maps: Outputs) -> Any:
        """The prediction of one image, from whole maps ``[1, H, W]`` of `reduce`."""


def spread_evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, evenly spread."""
    count = min(len(items), count)
    return [items[place * len(items) // count] for place in range(count)]
