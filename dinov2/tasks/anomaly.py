"""Anomaly detection: how unlike good parts an image is, and where, learnt from good parts alone."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, cast

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinov2.config import ConfigError, as_pair, leaf_names
from dinov2.config.schema import leaf
from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset, ImageSelection
from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.data.image_reader import PlacedImage
from dinov2.data.preprocessing import Placement
from dinov2.data.task_dataset import PartBags, ReadTargets, TaskDataset, TaskSample
from dinov2.distributed import all_gather_objects
from dinov2.eval.sliding_window import Tile
from dinov2.models.heads.anomaly import CLASSES, FOREGROUNDS, MemoryHead, ReconstructionHead, anomaly_map, is_foreground
from dinov2.models.task_model import TaskModel, centre_padding
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.tasks.drawing import LegendEntry, paint_depth, resize_depth
from dinov2.tasks.options import TaskConfig
from dinov2.tasks.predictions import Prediction, SaveOptions
from dinov2.tasks.task import ExportOutput, Head, Outputs, PreparedImage, Task, TaskFacts, TaskMetrics

if TYPE_CHECKING:  # metrics take seconds to import, and predicting does without them
    from dinov2.eval.anomaly.operating_point import OperatingPoint
    from dinov2.eval.metrics.classification import Scores
    from dinov2.eval.results import PredictionTable

logger = logging.getLogger("dinov2")

IMAGE, PART, PIXEL = "image", "part", "pixel"  # thresholds of a model
_DEVIATIONS = 3.0  # of good pixels above their mean, from which on a pixel is anomalous
_OF_TRAINING = (
    *("augmentation.", "optim.", "evaluation.every_epochs", "train.accumulate_steps", "train.ema_momentum"),
    *("train.early_stopping_epochs", "train.save_epochs", "train.keep_last", "train.max_save_failures"),
)  # beginnings of options that mean nothing without steps
_WARM = 2.0  # thresholds up to which colours go
_OUTLINE = (255, 40, 40)


@dataclass(frozen=True, kw_only=True)
class AnomalyOptions:
    good_class: int = leaf(0, "Label of good images. Other than 0: masks, which mark defects, are not used.", minimum=0)
    coreset: float = leaf(0.1, "memory: share of the good patches that it keeps.", above=0, maximum=1)
    max_centres: int = leaf(10_000, "memory: how many it keeps at most.", minimum=1)
    projection: int = leaf(0, "memory: dimensions in which they are chosen, for speed; 0: all.", minimum=0)
    rotations: int = leaf(1, "memory: times every good image is shown, turned by equal angles; for few.", minimum=1)
    foreground: str = leaf(
        "none", "memory: pca tells the parts from what lies around them, which does not count.", choices=FOREGROUNDS
    )
    smoothing: float = leaf(4.0, "Standard deviation in pixels by which maps are smoothed.", minimum=0)
    margin: float = leaf(0.0, "Raises thresholds from good parts by this share of them.", minimum=0)


@dataclass(frozen=True, eq=False)
class AnomalyPrediction(Prediction):
    """How unlike good parts an image is, and where.

    Attributes:
        score: of the image, from 0 up.
        map: float32 ``[H, W]``, of its pixels, from 0 up.
        thresholds: by name, see `OperatingPoint.as_thresholds`: ``image`` and ``pixel``, above which they are
            anomalous, and what ``image`` promises; empty where there are none.
    """

    is_map = True

    score: float
    map: NDArray[np.float32]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    classes: tuple[str, ...] = CLASSES

    def __post_init__(self) -> None:
        assert self.map.dtype == np.float32
        assert self.map.ndim == 2

    def placed(self, placement: Placement) -> Self:
        """Outside of what was cut out, and where pixels do not count, nothing is anomalous."""
        share = placement.share_that_counts(self.map)
        return replace(self, map=placement.to_image_map(self.map), score=self.score * share)

    @property
    def is_anomalous(self) -> bool | None:
        """Whether the score exceeds its threshold; None without one."""
        return self.score > self.thresholds[IMAGE] if IMAGE in self.thresholds else None

    def to_dict(self) -> dict[str, Any]:
        """``label`` (None without a threshold), ``score``, ``threshold``, and ``anomalous_pixels``, how many exceed
        theirs."""
        found = self.is_anomalous
        limit = self.thresholds.get(PIXEL)
        return {
            "label": None if found is None else self.classes[found],
            "score": float(f"{self.score:.6g}"),
            "threshold": float(f"{self.thresholds[IMAGE]:.6g}") if IMAGE in self.thresholds else None,
            "anomalous_pixels": None if limit is None else int((self.map > limit).sum()),
        }

    def table_row(self, values: Mapping[str, Any]) -> dict[str, Any]:
        height, width = self.map.shape
        return {"width": width, "height": height, **values}

    def save(self, folder: Path, stem: str, options: SaveOptions) -> dict[str, Any]:
        """With ``score_maps`` ``anomaly/STEM.npy``, float32 ``[H, W]``, the scores of pixels."""
        if not options.score_maps:
            return {}
        path = folder / "anomaly" / f"{stem}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, self.map, allow_pickle=False)
        return {"anomaly": f"anomaly/{stem}.npy"}

    def describe(self, *, scores: bool = True) -> str:
        found = self.is_anomalous
        label = "no threshold" if found is None else self.classes[found]
        return f"{label} {self.score:.3g}" if scores else label

    def image_score(self) -> float:
        """In [0, 1]: one half at the threshold, and at 1 without one."""
        return self.score / (self.score + self.thresholds.get(IMAGE, 1.0) + 1e-12)

    def certainty(self) -> float | None:
        return None if self.is_anomalous is None else abs(2 * self.image_score() - 1)

    def value_range(self) -> tuple[float, float]:
        """From 0 to twice the threshold of pixels, so that colours mean the same on all images."""
        limit = self.thresholds.get(PIXEL)
        return 0.0, float(self.map.max()) if limit is None else _WARM * limit

    def agrees(self, other: Prediction) -> bool | None:
        return isinstance(other, AnomalyPrediction) and self.is_anomalous == other.is_anomalous

    def paint(self, picture: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
        """Colours of the scores, and lines around what exceeds the threshold."""
        scores = resize_depth(self.map, picture.size)
        painted = paint_depth(picture, scores, value_range or self.value_range())
        limit = self.thresholds.get(PIXEL)
        if limit is None:
            return painted
        pixels = np.array(painted)
        outlines, _ = cv2.findContours((scores > limit).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, outlines, -1, _OUTLINE, max(round(max(picture.size) / 400), 1))
        return Image.fromarray(pixels)

    def legend(self) -> list[LegendEntry]:
        """The score, the threshold that it is held against, and the rate of false alarms that this one promises."""
        entries = [LegendEntry(self.describe(scores=False), f"{self.score:.3g}", bold=True)]
        if IMAGE not in self.thresholds:
            return entries
        entries.append(LegendEntry("threshold", f"{self.thresholds[IMAGE]:.3g}"))
        promised = [self.thresholds.get(f"{IMAGE}.{name}") for name in ("false_alarm_rate", "low", "high")]
        if None not in promised:
            rate, low, high = (f"{100 * cast(float, value):.2g}" for value in promised)
            entries.append(LegendEntry("false alarms", f"{rate} % [{low}, {high}]"))
        if PIXEL in self.thresholds:
            entries.append(LegendEntry("anomalous pixels", colour=_OUTLINE, filled=False))
        return entries


class AnomalyTask(Task):
    """Distances to a memory of patches of good parts, or what a decoder of good parts fails to give back.

    Args:
        config: options of the run.
        facts: empty.
    """

    name = "anomaly"
    options = AnomalyOptions
    heads = MappingProxyType(
        {"memory": Head.of(MemoryHead), "reconstruction": Head.of(ReconstructionHead, "channels", "dropout")}
    )
    shared_options = frozenset(
        (
            "evaluation.part_aggregate",
            *(f"evaluation.threshold{name}" for name in ("", "_recall", "_false_alarms")),
        )
    )
    windowed = True
    levels = (IMAGE, PART)
    auto_threshold = "false_alarms"
    metric = "image_auroc"
    second_metric = "pixel_average_precision"
    is_error = ("escape_rate", "false_alarms", "good_score")
    headline = (
        *("image_auroc", "part_auroc", "image_false_alarms_at_zero_escapes", "part_false_alarms_at_zero_escapes"),
        *("pixel_average_precision", "pixel_aupro_0.3", "pixel_aupro_0.05", "pixel_segf1", "pixel_f1_max"),
        "good_score",
    )
    fewest_classes = 1

    def __init__(self, config: TaskConfig, facts: TaskFacts) -> None:
        super().__init__(config, facts)
        self.settings: AnomalyOptions = getattr(config, self.name)
        self.classes = CLASSES
        self._patch_size: tuple[int, int] | None = None

    @classmethod
    def check_options(cls, config: TaskConfig) -> None:
        super().check_options(config)
        if config.backbone.mode != "frozen":
            raise ConfigError(
                f"backbone.mode={config.backbone.mode}: task=anomaly needs a frozen backbone; one that is trained "
                "learns to describe everything alike"
            )
        if config.data.resize == "shorter_side":
            raise ConfigError(
                "data.resize=shorter_side cuts borders off, where defects may be: take stretch or original"
            )
        if getattr(config, cls.name).foreground != "none" and config.data.resize != "stretch":
            raise ConfigError(
                f"anomaly.foreground looks at the borders of whole images: data.resize={config.data.resize} must be "
                "stretch"
            )
        if config.evaluation.threshold == "f1":
            raise ConfigError(
                "evaluation.threshold=f1 is not for task=anomaly: take false_alarms (from good parts of val alone) or "
                "recall (from labelled ones; threshold_recall=1 for no escapes)"
            )

    @classmethod
    def idle_options(cls, config: TaskConfig) -> Iterator[tuple[str, Iterable[str]]]:
        if cls.head_kind(config) == "memory":
            yield (
                "on a memory, which is not trained",
                [name for name in leaf_names(type(config)) if name.startswith(_OF_TRAINING)],
            )
        else:
            yield (
                "without a memory",
                [f"anomaly.{name}" for name in ("coreset", "max_centres", "projection", "rotations", "foreground")],
            )
        if config.evaluation.threshold in ("none", "recall"):
            yield f"with evaluation.threshold={config.evaluation.threshold}", ["anomaly.margin"]

    @classmethod
    def read_facts(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> TaskFacts:
        return TaskFacts(classes=CLASSES)

    @classmethod
    def check_dataset(cls, config: TaskConfig, dataset: ImageDataset, path: str) -> None:
        if path != config.data.train_dataset_path:
            return
        good_class = getattr(config, cls.name).good_class
        if dataset.classes and good_class >= len(dataset.classes):
            raise ValueError(f"anomaly.good_class={good_class}: {path} has the classes {list(dataset.classes)}")
        try:
            _good_images(dataset, good_class)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def check_other_set(cls, config: TaskConfig, train: ImageDataset, other: ImageDataset) -> None:
        from dinov2.eval.anomaly.operating_point import check_good_class

        check_good_class(getattr(config, cls.name).good_class, train, other)

    def build_model(self, backbone: DinoVisionTransformer, num_outputs: int) -> TaskModel:
        from dinov2.eval.anomaly.patches import grid_of

        self._patch_size = backbone.patch_size
        grid_of(as_pair(self.config.data.image_size), backbone.patch_size)  # an exported file does not know of patches
        return super().build_model(backbone, num_outputs)

    @property
    def is_trained(self) -> bool:
        return self.head_kind(self.config) != "memory"

    @classmethod
    def threshold_names(cls, classes: Iterable[str]) -> frozenset[str]:
        return frozenset((IMAGE, PART, PIXEL))

    # Training.

    def read_targets(self, dataset: ImageDataset) -> ReadTargets:
        return _no_targets

    def labels(self, dataset: ImageDataset, samples: TaskDataset | PartBags) -> list[tuple[int, ...] | None]:
        """Nothing but that images of good parts are to be learnt from; None for all others."""
        good = set(self.good_images(dataset))
        return [(0,) if index in good else None for index in range(len(dataset))]

    def find_classes(
        self, dataset: ImageDataset, indices: Sequence[int], labels: Sequence[tuple[int, ...] | None]
    ) -> tuple[list[int], int]:
        """Both: nothing is to be learnt from anomalous images, and val may do without."""
        return [len(indices)] * len(CLASSES), len(indices)

    def learn(self, model: TaskModel, dataset: ImageDataset, show: Callable[[ImageDataset], None]) -> None:
        """Fills the memory with patches of the good parts; see `Task.learn`."""
        from dinov2.eval.anomaly.memory import choose_centres
        from dinov2.eval.anomaly.patches import find_foreground, grid_of

        settings, head = self.settings, _memory_of(model)
        grid = None
        if settings.foreground == "pca":  # before images are looked at, which takes long: it may refuse
            grid = grid_of(as_pair(self.config.data.image_size), model.backbone.patch_size)
        patches = self._collect(head, dataset, self.good_images(dataset), show)
        foreground = None
        if grid is not None:
            foreground = find_foreground(patches, grid).to(patches)
            patches = patches[is_foreground(patches, foreground)]
        centres, radius = choose_centres(
            patches,
            share=settings.coreset,
            max_centres=settings.max_centres,
            projection=settings.projection or None,
            seed=self.config.train.seed,
        )
        head.remember(centres, radius=radius, num_patches=len(patches), foreground=foreground)

    def learn_more(self, model: TaskModel, dataset: ImageDataset, show: Callable[[ImageDataset], None]) -> None:
        """Adds what the memory does not know yet of further images, all of good parts; see `Task.learn_more`."""
        from dinov2.eval.anomaly.memory import add_centres

        head = _memory_of(model)
        patches = self._collect(head, dataset, range(len(dataset)), show)
        if head.foreground is not None:
            patches = patches[is_foreground(patches, head.foreground)]
        centres = add_centres(head.centres, float(head.radius), patches)
        head.remember(
            centres,
            radius=float(head.radius),
            num_patches=int(head.num_patches) + len(patches),
            foreground=head.foreground,
        )

    def _collect(
        self,
        head: MemoryHead,
        dataset: ImageDataset,
        indices: Sequence[int],
        show: Callable[[ImageDataset], None],
    ) -> Tensor:
        """Patches ``[N, D]`` of images, on the device of the memory."""
        head.train()
        for number in range(self.settings.rotations):
            show(_Turned(dataset, indices, 360 * number / self.settings.rotations))
        head.eval()
        shown = [rows for of_process in all_gather_objects(head.shown) for rows in of_process]
        head.shown.clear()
        return torch.cat(shown).to(head.centres.device)

    def loss(self, outputs: Outputs, targets: TaskSample) -> Outputs:
        return {"reconstruction": outputs["patches"].float().mean()}

    # Prediction.

    def unmirror(self, outputs: Outputs) -> Outputs:
        return {**outputs, "patches": outputs["patches"].flip(-1)}

    def merge_windows(self, tiles: Iterable[Tile], size: tuple[int, int]) -> Outputs:
        """The mean of overlapping maps ``[1, H, W]``; an image scores as its worst window."""
        total, count, score = torch.zeros(size), torch.zeros(size), torch.zeros(1)
        for tile in tiles:
            rows, columns = tile.size
            place = slice(tile.top, tile.top + rows), slice(tile.left, tile.left + columns)
            found = self._without_padding(tile.outputs["patches"][0, 0].float().cpu(), tile.size)
            total[place] += F.interpolate(found[None, None], tile.size, mode="bilinear")[0, 0]
            count[place] += 1
            score = torch.maximum(score, tile.outputs["score"].float().cpu())
        return {"map": (total / count)[None], "score": score}

    def postprocess(self, outputs: Outputs, prepared: Sequence[PreparedImage]) -> list[AnomalyPrediction]:
        predictions = []
        for place, image in enumerate(prepared):
            height, width = image.inputs["image"].shape[-2:]
            if "map" in outputs:
                found = outputs["map"][place]
            else:
                found = self._without_padding(outputs["patches"][place, 0].float().cpu(), (height, width))
            scores = anomaly_map(found, (height, width), image.size, self.settings.smoothing)
            predictions.append(AnomalyPrediction(float(outputs["score"][place]), scores, image.thresholds))
        return predictions

    def _without_padding(self, patches: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores of patches ``[h, w]``, or of pixels where the network's image was filled up to whole patches."""
        if self._patch_size is None:
            return patches
        left, right, top, bottom = centre_padding(*size, self._patch_size)
        if not any((left, right, top, bottom)):
            return patches
        padded = F.interpolate(patches[None, None], (top + size[0] + bottom, left + size[1] + right), mode="bilinear")[
            0, 0
        ]
        return padded[top : top + size[0], left : left + size[1]]

    def export_outputs(self) -> tuple[ExportOutput, ...]:
        return (
            ExportOutput(name="patches", meaning="[B, 1, h, w], how unlike good parts each patch is, from 0 up"),
            ExportOutput(name="score", meaning="[B], the same of the image"),
        )

    # Evaluation.

    def metrics(self, dataset: ImageDataset) -> "_AnomalyTaskMetrics":
        return _AnomalyTaskMetrics(dataset, self.settings, self.config)

    def good_images(self, dataset: ImageDataset) -> list[int]:
        """Those of parts without any other label; all of a set without labels."""
        return _good_images(dataset, self.settings.good_class)

    def thresholds_from_good(
        self,
        predictions: Iterable[AnomalyPrediction],
        group_ids: Sequence[str],
        *,
        false_alarm_rate: float | None = None,
        margin: float | None = None,
    ) -> dict[str, float]:
        """Thresholds of images, parts and pixels from predictions for good images; see `Task.thresholds_from_good`."""
        scores, pixels = [], np.zeros(3)
        for prediction in predictions:
            scores.append(prediction.score)
            pixels += _sums(prediction.map)
        if false_alarm_rate is None:
            false_alarm_rate = self.config.evaluation.threshold_false_alarms
        if margin is None:
            margin = self.settings.margin
        points = good_points(np.array(scores), group_ids, self.config, false_alarm_rate=false_alarm_rate, margin=margin)
        return _as_thresholds(points, pixels)


def good_points(
    scores: NDArray[np.float64],
    group_ids: Sequence[str],
    config: TaskConfig,
    *,
    false_alarm_rate: float,
    margin: float,
) -> "dict[str, OperatingPoint]":
    """Thresholds of images and parts from scores of good images.

    Raises:
        ValueError: there are fewer parts than `MIN_CALIBRATION`.
    """
    from dinov2.eval.anomaly.operating_point import MIN_CALIBRATION, threshold_from_good
    from dinov2.eval.metrics.classification import score_parts

    if len(set(group_ids)) < MIN_CALIBRATION:
        raise ValueError(
            f"{len(set(group_ids))} good parts are too few for a threshold: at least {MIN_CALIBRATION}, and to "
            f"promise a rate of {false_alarm_rate:g}, {int(np.ceil(1 / false_alarm_rate)) - 1} are needed"
        )
    nothing = np.zeros(len(scores), dtype=np.int64)
    joined = score_parts(
        np.stack([-scores, scores], axis=1), nothing, group_ids, aggregation=config.evaluation.part_aggregate
    )
    of_parts = np.asarray(joined.probabilities)[:, 1]
    choose = partial(threshold_from_good, false_alarm_rate=false_alarm_rate, margin=margin)
    return {IMAGE: choose(scores, group_ids=group_ids), PART: choose(of_parts)}


def _as_thresholds(points: "Mapping[str, OperatingPoint]", pixels: NDArray[np.float64]) -> dict[str, float]:
    """All thresholds as numbers by name; that of pixels from the sums (see `_sums`) of good images."""
    found = {name: value for level, point in points.items() for name, value in point.as_thresholds(level).items()}
    count, total, squares = pixels.tolist()
    if count:
        mean = total / count
        found[PIXEL] = mean + _DEVIATIONS * max(squares / count - mean**2, 0.0) ** 0.5
    return found


def _sums(scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """How many pixels there are, the sum of their scores, and that of the squares; not of those that do not count."""
    exact = scores[scores > 0].astype(np.float64)  # 0 is what `placed` fills in
    return np.array([exact.size, exact.sum(), np.square(exact).sum()])


def _good_images(dataset: ImageDataset, good_class: int) -> list[int]:
    """See `find_good_parts`."""
    from dinov2.eval.anomaly.operating_point import find_good_parts

    return find_good_parts(dataset, good_class, 0.0, 0).memory


def _no_targets(index: int) -> TaskSample:
    """Good images are all that there is to learn from."""
    return {}


def _memory_of(model: TaskModel) -> MemoryHead:
    if not isinstance(model.head, MemoryHead):
        raise ValueError("this model has no memory that takes further good parts: train its decoder anew")
    return model.head


class _Turned(ImageSelection):
    """Images of a set, turned."""

    def __init__(self, dataset: ImageDataset, positions: Sequence[int], degrees: float) -> None:
        super().__init__(dataset, positions)
        self.degrees = degrees

    def get_placed_image(self, index: int) -> PlacedImage:
        from dinov2.eval.anomaly.patches import turn

        picture = super().get_placed_image(index)
        return PlacedImage(turn(picture.image, self.degrees)) if self.degrees else picture


class _AnomalyTaskMetrics(TaskMetrics):
    """Scores of images, parts and pixels; unlabelled images are left out."""

    def __init__(self, dataset: ImageDataset, settings: AnomalyOptions, config: TaskConfig) -> None:
        from dinov2.eval.anomaly.evaluation import mask_source
        from dinov2.eval.metrics.anomaly import AnomalyMetrics

        super().__init__(dataset)
        self.settings, self.config = settings, config
        self.group_ids = dataset.get_group_ids()
        self.labels = dataset.get_targets()
        if (self.labels == MISSING_TARGET).all():  # a set without labels is good throughout, as for training
            self.labels = np.full_like(self.labels, settings.good_class)
        groups, is_other = np.array(self.group_ids), ~np.isin(self.labels, (MISSING_TARGET, settings.good_class))
        self.is_of_good_part = ~np.isin(groups, groups[is_other])
        self.masks = mask_source(dataset) if settings.good_class == 0 else None
        self.found = AnomalyMetrics()
        self.good_pixels = np.zeros(3)
        self.used: Mapping[str, float] = {}  # thresholds of the predictions
        self.rule = AnomalyTask.threshold_rule(config)

    def is_anomalous(self, index: int) -> bool | None:
        """Whether an image is labelled so; None where it has no label."""
        label = int(self.labels[index])
        return None if label == MISSING_TARGET else label != self.settings.good_class

    def update(self, index: int, prediction: AnomalyPrediction) -> float | None:
        """Takes in an image; see `TaskMetrics.update`.

        Returns:
            The share of the threshold (of 1 without one) that a good image reaches; of an anomalous one the inverse.
        """
        anomalous = self.is_anomalous(index)
        if anomalous is None:
            return None
        self.used = prediction.thresholds
        self.found.pixel_threshold = self.used.get(PIXEL)
        mask = None if self.masks is None else self.masks.get_mask(index)
        pixels = None if mask is None else prediction.map
        self.found.update(index, prediction.score, anomalous, self.group_ids[index], pixels, mask)
        if self.is_of_good_part[index]:
            self.good_pixels += _sums(prediction.map)
        share = prediction.score / self.used.get(IMAGE, 1.0)
        return 1 / max(share, 1e-6) if anomalous else share

    def ground_truth(self, index: int) -> AnomalyPrediction | None:
        anomalous = self.is_anomalous(index)
        if anomalous is None:
            return None
        if self.masks is None:
            sure = np.full(self.dataset.get_image_size(index), float(anomalous), dtype=np.float32)
        else:
            mask = self.masks.get_mask(index)
            sure = ((mask != 0) & (mask != IGNORED)).astype(np.float32)
        return AnomalyPrediction(float(anomalous), sure, {IMAGE: 0.5, PIXEL: 0.5})

    def merge_processes(self) -> None:
        self.found.merge_processes()
        states = all_gather_objects((self.good_pixels, dict(self.used)))
        self.good_pixels = np.sum([pixels for pixels, _ in states], axis=0)
        self.used = max((used for _, used in states), key=len)

    def compute(self) -> dict[str, float]:
        _, scores, anomalous, _ = self.found.table()
        good = scores[~anomalous]
        return {**self.found.compute(), **({"good_score": float(good.mean())} if len(good) else {})}

    def thresholds(self) -> dict[str, float]:
        """From the good parts of this set alone, or with a wanted recall from all that are labelled."""
        from dinov2.eval.anomaly.operating_point import threshold_from_labelled
        from dinov2.eval.metrics.classification import score_parts

        if self.rule is None:
            return {}
        _, scores, anomalous, group_ids = self.found.table()
        if self.rule.goal == "recall":
            if anomalous.all() or not anomalous.any():
                logger.warning("no threshold is set: evaluation.threshold=recall needs good and anomalous images")
                return {}
            rows, labels = np.stack([-scores, scores], axis=1), anomalous.astype(np.int64)
            parts = score_parts(rows, labels, group_ids, aggregation=self.config.evaluation.part_aggregate)
            points = {
                IMAGE: threshold_from_labelled(scores, anomalous, group_ids=group_ids, recall=self.rule.target),
                PART: threshold_from_labelled(
                    np.asarray(parts.probabilities)[:, 1], np.asarray(parts.labels) == 1, recall=self.rule.target
                ),
            }
            return _as_thresholds(points, self.good_pixels)
        groups = np.array(group_ids)
        good = ~np.isin(groups, groups[anomalous])
        try:
            points = good_points(
                scores[good],
                groups[good].tolist(),
                self.config,
                false_alarm_rate=self.rule.target,
                margin=self.settings.margin,
            )
        except ValueError as error:
            logger.warning("no threshold is set: %s", error)
            return {}
        return _as_thresholds(points, self.good_pixels)

    def scores(self) -> "Mapping[str, Scores]":
        from dinov2.eval.metrics.classification import Scores

        limits = (self.used[IMAGE], self.used[PART]) if IMAGE in self.used and PART in self.used else None
        levels = self.found.levels(aggregation=self.config.evaluation.part_aggregate, thresholds=limits)
        return {AnomalyTask.name: Scores(**{name: level.scores() for name, level in levels.items()})}

    def predictions(self) -> "PredictionTable":
        from dinov2.eval.anomaly.evaluation import ScoredImages

        index, scores, anomalous, group_ids = self.found.table()
        return ScoredImages(
            paths=[self.name_of(number) for number in index.tolist()],
            group_ids=group_ids,
            labels=anomalous.astype(np.int64),
            scores=scores,
            threshold=self.used.get(IMAGE),
        )
