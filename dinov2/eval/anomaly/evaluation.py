"""Anomaly detection evaluated: taught with good parts, scored per pixel, image and part."""

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.base import ImageDataset, ImageSelection
from dinov2.data.datasets.dense_targets import MaskSource
from dinov2.data.preprocessing import Placement
from dinov2.distributed import is_main_process
from dinov2.eval.anomaly.memory import MemoryOrigin, PatchGaussian, PatchMemory, Scorer
from dinov2.eval.anomaly.operating_point import (
    MIN_CALIBRATION,
    OperatingPoint,
    check_good_class,
    find_good_parts,
    threshold_from_good,
)
from dinov2.eval.anomaly.patches import (
    SMOOTHING,
    PatchFeatures,
    PatchStatistics,
    Turned,
    anomaly_map,
    find_foreground,
    fingerprint,
    grid_of,
)
from dinov2.eval.command import EvaluatorOptions, evaluator_session, find_origins
from dinov2.eval.features import TRAIN, VAL, check_labels, device_of, extract_features, warn_of_shared_parts
from dinov2.eval.metrics.anomaly import AnomalyMetrics
from dinov2.eval.metrics.classification import (
    LEVELS,
    Float64Array,
    IntArray,
    LevelScores,
    MetricValue,
    ResampledLevel,
    Scores,
    ScoringSettings,
    score_parts,
    too_few_parts,
)
from dinov2.eval.results import Comparison, EvaluationResults
from dinov2.eval.yardsticks import CHANCE, RANDOM_BACKBONE, compare, guess
from dinov2.models.heads.anomaly import CLASSES, FOREGROUNDS
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import HeldFolder, output_folder
from dinov2.utils.untrusted_text import table_cell

logger = logging.getLogger("dinov2")

MEMORY = "memory"  # the variant
PATCH_STATISTICS = "patch statistics"
MEMORY_FILE = "memory.safetensors"
COMPARED = {"image": ("auroc", "pixel_average_precision", "pixel_aupro_0.3"), "part": ("auroc",)}
IMAGES_AT_A_TIME = 128  # whose patches are in memory while a set is scored


@dataclass(frozen=True, kw_only=True)
class AnomalySettings(ScoringSettings):
    """Everything but model and images that decides the metrics.

    Attributes:
        blocks: whose features are joined; empty for the block after three quarters and the last.
        coreset: share of the good patches that the memory keeps.
        max_centres: limits them.
        projection: dimensions in which the coreset is chosen; 0 for all.
        rotations: how often every good image is shown, turned by equal angles; for few good images.
        smoothing: of maps, see `anomaly_map`.
        calibration_share: share of the good parts of ``train`` that stay out of the memory and set the thresholds.
        false_alarm_rate: wanted, see `threshold_from_good`.
        margin: raises the thresholds by this share.
        foreground: one of `FOREGROUNDS`: with ``pca`` background is neither learnt nor scored, see `find_foreground`;
            yardsticks look at whole images.
    """

    blocks: tuple[int, ...] = ()
    coreset: float = 0.1
    max_centres: int = 10_000
    projection: int = 0
    rotations: int = 1
    smoothing: float = SMOOTHING
    calibration_share: float = 0.2
    false_alarm_rate: float = 0.05
    margin: float = 0.0
    foreground: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.foreground not in FOREGROUNDS:
            raise ValueError(f"foreground must be one of {', '.join(FOREGROUNDS)}, found {self.foreground!r}")
        for name, allowed, right in (
            ("coreset", "in (0, 1]", 0 < self.coreset <= 1),
            ("max_centres", "at least 1", self.max_centres >= 1),
            ("projection", "at least 0", self.projection >= 0),
            ("rotations", "at least 1", self.rotations >= 1),
            ("smoothing", "at least 0", 0 <= self.smoothing < np.inf),
            ("calibration_share", "in [0, 1)", 0 <= self.calibration_share < 1),
            ("false_alarm_rate", "in (0, 1)", 0 < self.false_alarm_rate < 1),
            ("margin", "at least 0", 0 <= self.margin < np.inf),
        ):
            if not right:
                raise ValueError(f"{name} must be {allowed}, found {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Detector:
    """Describes patches and scores them.

    Attributes:
        describer: `PatchFeatures` or `PatchStatistics`.
        scorer: what has learnt from good patches.
        image_size: that is described, (height, width).
        smoothing: of maps.
        extraction: arguments of `extract_features`.
    """

    describer: PatchFeatures | PatchStatistics
    scorer: Scorer
    image_size: tuple[int, int]
    smoothing: float
    extraction: Mapping[str, Any]

    def score(self, dataset: ImageDataset, positions: Sequence[int]) -> Iterator[tuple[int, float, Tensor]]:
        """Position, score and scores of patches ``[N]`` of images, a hundred or so in memory at a time.

        Where an image has a region of interest, its score is the less, the less of the map's peak lies in it.
        """
        for start in range(0, len(positions), IMAGES_AT_A_TIME):
            some = positions[start : start + IMAGES_AT_A_TIME]
            rows = extract_features(
                self.describer, ImageSelection(dataset, some), name=f"{start} and more", **self.extraction
            ).embeddings
            scores, images = self.scorer.score(rows.view(len(some), self._grid[0] * self._grid[1], -1))
            for position, score, patches in zip(some, images.tolist(), scores, strict=True):
                region = _region(dataset, position)
                share = 1.0 if region is None else region.share_that_counts(self.map(patches, region.size))
                yield position, score * share, patches

    def map(self, scores: Tensor, size: tuple[int, int]) -> npt.NDArray[np.float32]:
        """The map of an image, (height, width), from the scores of its patches ``[N]``."""
        return anomaly_map(scores.view(self._grid), self.image_size, size, self.smoothing)

    @property
    def _grid(self) -> tuple[int, int]:
        return grid_of(self.image_size, self.describer.patch_size)


def extract_patches(
    describer: PatchFeatures | PatchStatistics,
    dataset: ImageDataset,
    positions: Sequence[int],
    rotations: int,
    **extraction: Any,
) -> Tensor:
    """Patches ``[N, D]`` of images, turned by equal angles so many times."""
    pieces = []
    grid = grid_of(_image_size(dataset), describer.patch_size)
    for number in range(rotations):
        selection = ImageSelection(dataset, positions)
        degrees = 360 * number / rotations
        if number and dataset.transform is not None:
            selection.transform = Turned(dataset.transform, degrees)
        name = f"good parts, turned by {degrees:g} degrees" if number else "good parts"
        rows = extract_features(describer, selection, name=name, **extraction).embeddings
        pieces.append(rows.view(len(rows) * grid[0] * grid[1], -1))
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def find_thresholds(
    detector: Detector, dataset: ImageDataset, positions: Sequence[int], settings: AnomalySettings
) -> dict[str, Any]:
    """Operating points of images and parts, and the threshold of pixels, from good parts.

    The threshold of pixels is their mean and three standard deviations over it.

    Returns:
        ``image`` and ``part`` as `OperatingPoint.as_dict` gives them, ``pixel`` as a number.

    Reference:
        Heckler-Kram et al., "The MVTec AD 2 Dataset", 2025 (thresholds of SegF1).
    """
    groups = dataset.get_group_ids()
    scores, sums, count = np.zeros(len(positions)), np.zeros(2), 0
    for row, (position, score, patches) in enumerate(detector.score(dataset, positions)):
        scores[row] = score
        region = _region(dataset, position)
        pixels = detector.map(patches, detector.image_size if region is None else region.size).astype(np.float64)
        pixels = pixels if region is None or region.valid is None else pixels[region.valid]
        sums += [pixels.sum(), np.square(pixels).sum()]
        count += pixels.size
    mean = sums[0] / count
    joined = score_parts(
        np.stack([-scores, scores], axis=1),
        np.zeros(len(scores), dtype=np.int64),
        [groups[position] for position in positions],
        aggregation=settings.part_aggregation,
        top_k=settings.part_top_k,
    )
    choose = partial(threshold_from_good, false_alarm_rate=settings.false_alarm_rate, margin=settings.margin)
    return {
        "image": choose(scores, group_ids=[groups[position] for position in positions]).as_dict(),
        "part": choose(np.asarray(joined.probabilities)[:, 1]).as_dict(),
        "pixel": float(mean + 3 * np.sqrt(max(sums[1] / count - mean**2, 0.0))),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredImages:
    """What was found in the images of a set, for ``predictions.csv``."""

    paths: Sequence[str]
    group_ids: Sequence[str]
    labels: IntArray
    scores: Float64Array
    threshold: float | None

    def to_csv(self, classes: Sequence[str]) -> str:
        """A line per image: ``image``, ``part``, ``label``, ``prediction`` (empty without a threshold), ``score``."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "part", "label", "prediction", "score"])
        for row, (path, part) in enumerate(zip(self.paths, self.group_ids, strict=True)):
            score = float(self.scores[row])
            found = "" if self.threshold is None else classes[int(score > self.threshold)]
            cells = (path, part, classes[int(self.labels[row])], found, f"{score:.6g}")
            writer.writerow(map(table_cell, cells))
        return text.getvalue()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Evaluated:
    """What one detector gives on ``val``."""

    levels: Mapping[str, ResampledLevel]
    scores: Float64Array
    thresholds: Mapping[str, Any]

    def as_scores(self) -> Scores:
        return Scores(**{name: level.scores() for name, level in self.levels.items()})


def eval_anomaly(
    model: DinoVisionTransformer,
    train_dataset: ImageDataset,
    val_dataset: ImageDataset,
    settings: AnomalySettings | None = None,
    *,
    good_class: int = 0,
    memory: PatchMemory | None = None,
    batch_size: int = 64,
    num_workers: int = 4,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    image_statistics: bool = True,
    random_backbone: DinoVisionTransformer | None = None,
    output_dir: str | Path | HeldFolder | None = None,
    weights: str = "",
    more_settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores images by how unlike good parts their patches are, and measures how well that finds what is not good.

    Args:
        model: frozen backbone.
        train_dataset: its good parts teach; parts with any other image are left out and counted. Its transform squeezes
            the whole image.
        val_dataset: the images to evaluate on; with masks also pixel by pixel, at the size of the masks.
        settings: see `AnomalySettings`.
        good_class: label of good images; with another than 0, masks are not used, for they mark defects.
        memory: what was learnt before, to which the good parts of ``train`` are added; it is not changed itself.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run.
        device: where to compute; by default where the model lies.
        autocast_dtype: precision of the forward pass; by default that of the model.
        image_statistics: shows beside the scores those of `PatchStatistics` by Mahalanobis distance.
        random_backbone: shows beside the scores those of this network.
        output_dir: folder that gets ``results.json``, ``predictions.csv`` and ``memory.safetensors``.
        weights: file of the weights, for the results.
        more_settings: further plain values for the results.

    Raises:
        ValueError: ``train`` has no good part, labels of ``val`` are missing or of other classes, images cannot be
            read or do not fit the patches, or settings are out of range.
    """
    settings = settings or AnomalySettings()
    device = device_of(model) if device is None else torch.device(device)
    labels = val_dataset.get_targets()
    check_labels(labels, "validation")
    anomalous = (labels != good_class).astype(np.int64)
    if train_dataset.classes and not 0 <= good_class < len(train_dataset.classes):
        raise ValueError(f"good_class must be a label of {list(train_dataset.classes)}, found {good_class}")
    check_good_class(good_class, train_dataset, val_dataset)
    good = find_good_parts(train_dataset, good_class, settings.calibration_share, settings.seed)
    warn_of_shared_parts(train_dataset.get_group_ids(), val_dataset.get_group_ids())
    if is_main_process():
        logger.info("good parts of train: %s", ", ".join(f"{count} {name}" for name, count in good.counts.items()))
        if not good.calibration and settings.calibration_share:
            logger.warning(
                "%g of the good parts are fewer than %d: no threshold is set",
                settings.calibration_share,
                MIN_CALIBRATION,
            )
        if len(np.unique(anomalous)) < 2:
            logger.warning("val shows only %s images: nothing says whether they are told apart", CLASSES[anomalous[0]])
    extraction = {
        "batch_size": batch_size,
        "num_workers": num_workers,
        "device": device,
        "autocast_dtype": autocast_dtype,
    }
    masks = mask_source(val_dataset) if good_class == 0 else None
    image_size = _image_size(train_dataset)
    if image_size != _image_size(val_dataset):
        raise ValueError(
            f"images of train are {list(image_size)} (height, width), of val {list(_image_size(val_dataset))}"
        )
    grid = grid_of(image_size, model.patch_size)

    def evaluate(describer: PatchFeatures | PatchStatistics, learn: Any) -> tuple[_Evaluated, Any]:
        patches = extract_patches(describer, train_dataset, good.memory, settings.rotations, **extraction)
        detector = Detector(
            describer=describer,
            scorer=learn(patches.to(device)),
            image_size=image_size,
            smoothing=settings.smoothing,
            extraction=extraction,
        )
        thresholds: Mapping[str, Any] = {}
        if good.calibration:
            thresholds = find_thresholds(detector, train_dataset, good.calibration, settings)
        return _score_set(detector, val_dataset, anomalous, masks, thresholds, settings), detector.scorer

    described = PatchFeatures(model, settings.blocks)
    origin = MemoryOrigin(
        backbone=fingerprint(model),
        image_size=image_size,
        blocks=described.blocks,
        light=train_dataset.light,
        value_range=tuple(train_dataset.value_range.ends) if train_dataset.value_range else (),
        preprocessing=json.dumps(train_dataset.preprocessing.to_values()) if train_dataset.preprocessing.steps else "",
    )

    def learn(patches: Tensor, origin: MemoryOrigin, foreground: str = "none") -> PatchMemory:
        return PatchMemory.fit(
            patches,
            origin,
            share=settings.coreset,
            max_centres=settings.max_centres,
            projection=settings.projection or None,
            seed=settings.seed,
            foreground=find_foreground(patches, grid) if foreground == "pca" else None,
        )

    if memory is not None:
        memory.origin.check(origin, "the memory of good parts")
        if (memory.foreground is None) != (settings.foreground == "none"):
            told = "none" if memory.foreground is None else "pca"
            raise ValueError(
                f"foreground={settings.foreground}, and the memory of good parts was built with {told}: name that, or "
                "build another"
            )
    learn_own = partial(learn, origin=origin, foreground=settings.foreground)
    found, learnt = evaluate(described, learn_own if memory is None else memory.add)
    learnt = replace(learnt, thresholds=found.thresholds)
    references: dict[str, _Evaluated] = {}
    if image_statistics:
        references[PATCH_STATISTICS], _ = evaluate(PatchStatistics(model.patch_size), PatchGaussian.fit)
    if random_backbone is not None:
        other = PatchFeatures(random_backbone, described.blocks)
        references[RANDOM_BACKBONE], _ = evaluate(other, partial(learn, origin=origin))
    chance, comparisons = _compare(found, references, anomalous, val_dataset.get_group_ids())
    datasets = {TRAIN: train_dataset, VAL: val_dataset}
    paths = [str(val_dataset.get_image_path(index)) for index in range(len(val_dataset))]
    point = found.thresholds.get("image")
    results = EvaluationResults(
        evaluator="anomaly",
        settings={
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(settings).items()},
            "blocks": list(described.blocks),
            "good_class": good_class,
            **(more_settings or {}),
        },
        classes=CLASSES,
        scores={MEMORY: found.as_scores()},
        chosen=MEMORY,
        extra={
            **good.counts,
            "num_centres": len(learnt.centres),
            "num_patches": learnt.num_patches,
            "thresholds": dict(found.thresholds),
        },
        predictions=ScoredImages(
            paths=paths,
            group_ids=val_dataset.get_group_ids(),
            labels=anomalous,
            scores=found.scores,
            threshold=point["threshold"] if point else None,
        ),
        yardsticks={CHANCE: chance, **{name: one.as_scores() for name, one in references.items()}},
        comparisons=comparisons,
        notes=_notes(found, good.counts),
        **find_origins(datasets, weights),
    )
    if output_dir is not None and is_main_process():
        learnt.save(output_folder(output_dir) / MEMORY_FILE)
    results.publish(output_dir)
    return results


def _score_set(
    detector: Detector,
    dataset: ImageDataset,
    anomalous: IntArray,
    masks: MaskSource | None,
    thresholds: Mapping[str, Any],
    settings: AnomalySettings,
) -> _Evaluated:
    """Scores all images of a set, with their pixels where there are masks."""
    metrics = AnomalyMetrics(pixel_threshold=thresholds.get("pixel"))
    groups = dataset.get_group_ids()
    scores = np.zeros(len(dataset))
    for index, score, patches in detector.score(dataset, range(len(dataset))):
        scores[index] = score
        mask = None if masks is None else masks.get_mask(index)
        pixels = None if mask is None else _pixels(detector, dataset, index, patches, (mask.shape[0], mask.shape[1]))
        metrics.update(index, score, bool(anomalous[index]), groups[index], pixels, mask)
    levels = metrics.levels(
        aggregation=settings.part_aggregation,
        top_k=settings.part_top_k,
        thresholds=(thresholds["image"]["threshold"], thresholds["part"]["threshold"]) if thresholds else None,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
    )
    return _Evaluated(levels=levels, scores=scores, thresholds=thresholds)


def _region(dataset: ImageDataset, index: int) -> Placement | None:
    """Which pixels of a preprocessed image count; None where all do."""
    return None if dataset.counted_region(index) is None else dataset.get_placed_image(index).placement


def _pixels(
    detector: Detector, dataset: ImageDataset, index: int, patches: Tensor, size: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """The map of an image in its own size (height, width), also where a step of preprocessing has cut it."""
    placement = dataset.get_placed_image(index).placement if dataset.preprocessing.steps else None
    if placement is None:
        return detector.map(patches, size)
    return np.asarray(placement.to_image_map(detector.map(patches, placement.size)), dtype=np.float32)


def _compare(
    found: _Evaluated, references: Mapping[str, _Evaluated], anomalous: IntArray, group_ids: Sequence[str]
) -> tuple[Scores, list[Comparison]]:
    """What guessing gives, and the memory beside it and the other yardsticks."""
    parts = score_parts(np.zeros((len(anomalous), 2)), anomalous, group_ids).labels
    of_level = {"image": anomalous, "part": parts}
    chance = Scores(
        **{
            level: LevelScores(
                count=len(of_level[level]),
                metrics={
                    name: metric
                    for name, metric in guess(of_level[level], 2).metrics.items()
                    if name not in ("accuracy", "balanced_accuracy")
                },
            )
            for level in LEVELS
        }
    )
    comparisons = []
    for level in LEVELS if len(parts) < len(anomalous) else LEVELS[:1]:
        own, scored = found.levels[level], found.levels[level].scores().metrics
        for metric in COMPARED[level]:
            if metric not in scored:
                continue
            rows: dict[str, tuple[MetricValue, MetricValue | None]] = {}
            if metric == "auroc":
                rows[CHANCE] = (getattr(chance, level).metrics["auroc"], None)
            for name, reference in references.items():
                other = reference.levels[level]
                rows[name] = (other.scores().metrics[metric], own.less(other)[metric])
            comparisons += [
                compare(
                    MEMORY,
                    name,
                    level,
                    metric,
                    scored[metric],
                    value,
                    difference=difference,
                    too_few=too_few_parts(parts),
                )
                for name, (value, difference) in rows.items()
            ]
    return chance, comparisons


def _notes(found: _Evaluated, counts: Mapping[str, int]) -> list[str]:
    """Lines below the table: what was learnt from, what the thresholds promise, and what good ones of val did."""
    notes = ["good parts: " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())]
    for level in LEVELS if found.thresholds else ():
        point = OperatingPoint.from_dict(found.thresholds[level])
        notes.append(
            f"threshold per {level} {point.threshold:.4g}, from {point.num_good} good ones (worth "
            f"{point.num_independent} independent ones): {point.promise()} are to be expected"
        )
        confusion = found.levels[level].confusion
        num_good = sum(confusion[0]) if confusion else 0
        if num_good:
            low, high = point.predict(num_good)
            notes.append(
                f"  of {num_good} good ones of val {confusion[0][1] / num_good:.1%} are above it; for so many "
                f"[{low:.1%}, {high:.1%}] was to be expected"
            )
    return notes


def mask_source(dataset: ImageDataset) -> MaskSource | None:
    """The set, where it knows pixels."""
    if not isinstance(dataset, MaskSource):
        return None
    try:
        return dataset if dataset.mask_classes else None
    except ValueError:  # a kind of set that may have masks, and has none
        return None


def _image_size(dataset: ImageDataset) -> tuple[int, int]:
    """Height and width of the transformed images; none is read for it.

    Raises:
        ValueError: the set has no transform to tensors.
    """
    image = None if dataset.transform is None else dataset.transform(Image.new("RGB", (64, 64)))
    if not isinstance(image, Tensor):
        raise ValueError("the sets need a transform to tensors [3, H, W] of one size, see make_eval_transform")
    return int(image.shape[-2]), int(image.shape[-1])


@dataclass(frozen=True)
class AnomalyOptions(EvaluatorOptions):
    """Options of the command."""

    blocks: tuple[int, ...] = option((), help="blocks whose features are joined, from 0 (usually 3/4 and the last)")
    coreset: float = option(0.1, help="share of the good patches that the memory keeps")
    max_centres: int = option(10_000, help="how many it keeps at most")
    projection: int = option(0, help="dimensions in which they are chosen, for speed; 0: all")
    rotations: int = option(1, help="times that every good image is shown, turned by equal angles; for few good images")
    smoothing: float = option(SMOOTHING, help="standard deviation in pixels by which maps are smoothed")
    good_class: int = option(0, help="label of good images")
    calibration_share: float = option(
        0.2, help="share of the good training parts that sets thresholds; 0: no thresholds"
    )
    false_alarm_rate: float = option(0.05, help="share of good parts that may score above the threshold")
    margin: float = option(0.0, help="raises thresholds by this share of them")
    foreground: str = option(
        "none", help="pca: what lies around the parts is told apart and neither learnt nor scored", choices=FOREGROUNDS
    )
    memory: str | None = option(None, help="memory file of an earlier run, to which the good parts are added")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    options = parse(
        AnomalyOptions,
        argv,
        description="Finds anomalies by the features of good parts alone, per pixel, image and part.",
        example=(
            "python eval/anomaly.py --pretrained-weights dinov2_vits14 --image-size 224 "
            "--train-dataset GroupedJSON:split=TRAIN:root=/data/parts "
            "--val-dataset GroupedJSON:split=VAL:root=/data/parts --output-dir outputs/anomaly"
        ),
    )
    if options.whole_image is False:
        raise ValueError("anomaly detection looks at the whole image: --no-whole-image is not possible")
    if options.features is not None:
        logger.warning("--features has no effect: anomalies are found by the features of patches, see --blocks")
    names = AnomalySettings.__dataclass_fields__
    with evaluator_session(options, extra_pairs=["evaluation.whole_image=true"]) as setup:
        settings = AnomalySettings(**{name: getattr(options, name) for name in names})
        eval_anomaly(
            setup.backbone,
            setup.train_dataset,
            setup.val_dataset,
            settings,
            good_class=options.good_class,
            memory=None if options.memory is None else PatchMemory.load(options.memory, device=setup.device),
            **setup.yardsticks,
            **setup.extraction,
            output_dir=setup.output_dir,
            weights=setup.weights,
            more_settings=setup.settings,
        )
    return 0


if __name__ == "__main__":
    run_as("anomaly")
