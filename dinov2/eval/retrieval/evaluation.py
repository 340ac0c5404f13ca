"""Retrieval with frozen features: of images of a part, of images seen again, and on revisited Oxford and Paris."""

import csv
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.distributed import is_main_process
from dinov2.eval.command import EvaluatorOptions, evaluator_session, find_origins
from dinov2.eval.features import TRAIN, VAL
from dinov2.eval.metrics.classification import (
    LEVELS,
    MIN_PARTS,
    Float64Array,
    IntArray,
    LevelScores,
    MetricValue,
    Scores,
    draw_parts,
    interval,
    number_parts,
)
from dinov2.eval.results import Comparison, EvaluationResults, variant_on
from dinov2.eval.retrieval.describers import OURS, Describe, RetrievalSettings, make_describers
from dinov2.eval.retrieval.ranking import (
    IGNORED,
    KINDS,
    RELEVANT,
    RETRIEVAL_FEATURES,
    WRONG,
    QueryMeasures,
    count_relevant,
    expected_values,
    measure_names,
    measure_retrieval,
    patch_size_of,
)
from dinov2.eval.retrieval.revisited import PROTOCOLS, ResizeLongerSide, RevisitedImages, read_revisited
from dinov2.eval.retrieval.seen_again import ImagesSeenAgain
from dinov2.eval.yardsticks import CHANCE, compare
from dinov2.utils.untrusted_text import table_cell

logger = logging.getLogger("dinov2")

GALLERIES = ("val", "train+val")
REIDENTIFICATION = "reidentification"
COLUMNS = ("image", "part", "label", "score", "variant", "first_hit", "best_wrong_image")
NUMBERS_AT_A_TIME = 1_000_000


def eval_retrieval(
    model: nn.Module,
    train_dataset: ImageDataset | None,
    val_dataset: ImageDataset,
    *,
    gallery: str = "val",
    reidentification: bool = False,
    settings: RetrievalSettings | None = None,
    image_statistics: bool = True,
    random_backbone: nn.Module | None = None,
    output_dir: str | Path | None = None,
    weights: str = "",
    more_settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores a frozen backbone by whether an image finds the others of its part; labels are not looked at.

    Every image of the validation set whose part has another one in the gallery is a query, and is left out of its own
    ranking. Images that are alone stay in the gallery. A file that the sets name twice counts once.

    For re-identification, parts are not needed: every image of the validation set is turned, cropped and relit (see
    `ImagesSeenAgain`; the seed is that of the settings), and has to find itself in the gallery as it was; other images
    of its part are left out of its ranking.

    Args:
        model: a vision transformer; with ``cls`` features, any network that maps images to ``[B, D]``.
        train_dataset: further images of the gallery ``train+val``; unused otherwise.
        val_dataset: the queries, and the gallery's first images.
        gallery: ``val`` or ``train+val``.
        reidentification: images seek themselves.
        settings: how images are described and rankings measured; by default the usual.
        image_statistics: shows beside the scores those of ten statistics of brightness; images are decoded once more.
        random_backbone: shows beside the scores those of this network.
        output_dir: folder that gets ``results.json`` and ``predictions.csv``; by default nothing is written.
        weights: file of the weights, for the results.
        more_settings: further plain values for the results, such as the image size.

    Returns:
        The variant ``parts`` (or ``reidentification``) with ``map``, ``mp@k``, ``recall@k`` and ``hit@k`` (see
        `measure_names`): means over queries (image), and over the means of parts (part).

    Raises:
        ValueError: when no part has two images (or there are no two parts), for settings out of range, images that
            cannot be read, or features that are not finite.
    """
    settings = settings or RetrievalSettings()
    if gallery not in GALLERIES:
        raise ValueError(f"gallery {gallery!r} is not one of {', '.join(GALLERIES)}")
    sets = {VAL: val_dataset}
    if gallery == "train+val":
        if train_dataset is None:
            raise ValueError("the gallery train+val needs a training set")
        sets[TRAIN] = train_dataset
    all_paths = [str(dataset.get_image_path(index)) for dataset in sets.values() for index in range(len(dataset))]
    all_groups = [group for dataset in sets.values() for group in dataset.get_group_ids()]
    first = {path: row for row, path in reversed(list(enumerate(all_paths)))}
    kept = sorted(first.values())
    paths, groups = [all_paths[row] for row in kept], [all_groups[row] for row in kept]
    if len(kept) < len(all_paths) and is_main_process():
        logger.warning("%d images are named twice in the gallery; each counts once", len(all_paths) - len(kept))
    _, parts = number_parts(groups)
    num_images = sum(row < len(val_dataset) for row in kept)  # of the validation set, which comes first
    counts = np.bincount(parts, minlength=1)
    queries = np.arange(num_images) if reidentification else np.flatnonzero(counts[parts[:num_images]] > 1)
    if reidentification and len(counts) < 2:
        raise ValueError("images can only be told apart from those of other parts, and the gallery holds no two parts")
    if len(queries) == 0:
        raise ValueError(
            "no part of the validation set has a second image in the gallery, so there is nothing to find: images of "
            "one part need the same group_id"
        )
    of_part, of_itself = (IGNORED, RELEVANT) if reidentification else (RELEVANT, IGNORED)

    def relevance(rows: IntArray) -> npt.NDArray[np.int8]:
        own = queries[rows]
        values = np.where(parts[own][:, None] == parts, of_part, WRONG).astype(np.int8)
        values[np.arange(len(rows)), own] = of_itself
        return values

    asking = ImagesSeenAgain(val_dataset, settings.seed) if reidentification else None
    device = settings.device_for(model)
    targets = val_dataset.get_targets()[[kept[row] for row in queries]].tolist()
    names = dict(enumerate(val_dataset.classes)) or {target: str(target) for target in targets if target >= 0}
    query_groups = [groups[row] for row in queries]

    def measure(describe: Describe) -> dict[str, Rankings]:
        features = torch.cat([describe(dataset) for dataset in sets.values()])[kept]
        asked = features[queries] if asking is None else describe(asking)[kept[:num_images]]
        rankings = Rankings(
            measures=measure_retrieval(asked, features, relevance, settings.ks, device=device),
            queries=[paths[row] for row in queries],
            parts=query_groups,
            labels=[names.get(target, "") for target in targets],
            gallery=paths,
            num_skipped=num_images - len(queries),
            chance=expected_values(*count_relevant(relevance, len(queries), len(paths)), settings.ks),
        )
        return {"parts" if asking is None else REIDENTIFICATION: rankings}

    describers = make_describers(
        model,
        settings,
        settings.batch_size,
        query_groups,
        sets if asking is None else {**sets, REIDENTIFICATION: asking},
        image_statistics,
        random_backbone,
        pixels=asking is not None and image_statistics,
    )
    results = _score_variants({name: measure(one) for name, one in describers.items()}, settings, sets, weights)
    seen_again = {} if asking is None else {REIDENTIFICATION: asking.as_dict()}
    more = {
        "gallery": gallery,
        **seen_again,
        "num_files_named_twice": len(all_paths) - len(kept),
        **(more_settings or {}),
    }
    results = replace(results, settings={**more, **results.settings})
    results.publish(output_dir)
    return results


def eval_revisited(
    model: nn.Module,
    path: str | Path,
    *,
    longer_side: int = 1024,
    settings: RetrievalSettings | None = None,
    image_statistics: bool = True,
    random_backbone: nn.Module | None = None,
    output_dir: str | Path | None = None,
    weights: str = "",
    more_settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores a frozen backbone on the revisited Oxford or Paris benchmark.

    Args:
        model: a vision transformer; with ``cls`` features, any network that maps images of any size to ``[B, D]``.
        path: of the benchmark, see `read_revisited`.
        longer_side: pixels to which images are scaled, see `ResizeLongerSide`.
        settings: how images are described and rankings measured; by default the usual. The images of the whitening's
            set must be tensors, of whatever sizes.
        image_statistics: shows beside the scores those of ten statistics of brightness; images are decoded once more.
        random_backbone: shows beside the scores those of this network.
        output_dir: folder that gets ``results.json`` and ``predictions.csv``; by default nothing is written.
        weights: file of the weights, for the results.
        more_settings: further plain values for the results.

    Returns:
        The variants ``easy``, ``medium`` and ``hard`` with the measures of `measure_names`. Queries without positives
        are left out and counted. Intervals are from resampled queries: several show one landmark, so they are somewhat
        too narrow.

    Raises:
        FileNotFoundError: when the ground truth or an image is missing.
        ValueError: when the ground truth is damaged, for a box outside its image, for settings out of range, images
            that cannot be read, or features that are not finite.
    """
    settings = settings or RetrievalSettings()
    benchmark = read_revisited(path)
    resize = ResizeLongerSide(longer_side, patch_size_of(model))
    sets: dict[str, ImageDataset] = {
        "queries": RevisitedImages(benchmark.queries, resize, benchmark.boxes),
        "gallery": RevisitedImages(benchmark.gallery, resize),
    }
    device = settings.device_for(model)

    def measure(describe: Describe) -> dict[str, Rankings]:
        queries, gallery = (describe(dataset) for dataset in sets.values())
        variants = {}
        for protocol in PROTOCOLS:
            relevance = benchmark.relevance(protocol)
            measures = measure_retrieval(queries, gallery, relevance, settings.ks, device=device)
            measured = np.flatnonzero(measures.first_hit)  # those that have anything to find
            relevant, candidates = count_relevant(relevance, len(queries), len(gallery))
            names = [str(benchmark.queries[row]) for row in measured]
            variants[protocol] = Rankings(
                measures=measures.select(measured),
                queries=names,
                parts=names,
                labels=[""] * len(names),
                gallery=[str(path) for path in benchmark.gallery],
                num_skipped=len(queries) - len(measured),
                chance=expected_values(relevant[measured], candidates[measured], settings.ks),
            )
        return variants

    describers = make_describers(model, settings, 1, [], sets, image_statistics, random_backbone)
    results = _score_variants({name: measure(one) for name, one in describers.items()}, settings, sets, weights)
    more = {**(more_settings or {}), "benchmark": benchmark.name, "longer_side": longer_side}
    results = replace(results, settings={**more, **results.settings})
    results.publish(output_dir)
    return results


@dataclass(frozen=True, kw_only=True)
class Rankings:
    """Measures of the queries that have something to find.

    Attributes:
        measures: of ``Q`` queries.
        queries: their paths.
        parts: with which a resample draws them.
        labels: names of their classes, empty where they have none; nothing is decided by them.
        gallery: paths of what was ranked.
        num_skipped: queries that have nothing to find.
        chance: what random rankings give on average, see `expected_values`.
    """

    measures: QueryMeasures
    queries: Sequence[str]
    parts: Sequence[str]
    labels: Sequence[str]
    gallery: Sequence[str]
    num_skipped: int
    chance: Float64Array


@dataclass(frozen=True)
class RankedQueries:
    """Measures of every query under every variant, for ``predictions.csv``."""

    variants: Mapping[str, Rankings]

    def to_csv(self, classes: Sequence[str]) -> str:
        """One line per query and variant, with the columns `COLUMNS`.

        The score is the average precision, ``first_hit`` the rank of the first relevant image, from 1; the wrong image
        is that of the best rank.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for variant, rankings in self.variants.items():
            measures = rankings.measures
            described = zip(rankings.queries, rankings.parts, rankings.labels, strict=True)
            for row, (query, part, label) in enumerate(described):
                wrong = int(measures.best_wrong[row])
                name = rankings.gallery[wrong] if wrong >= 0 else ""
                score = f"{measures.average_precision[row]:.6f}"
                cells = (query, part, label, score, variant, int(measures.first_hit[row]), name)
                writer.writerow(map(table_cell, cells))
        return text.getvalue()


def _score_variants(
    measured: Mapping[str, Mapping[str, Rankings]],
    settings: RetrievalSettings,
    sets: Mapping[str, ImageDataset],
    weights: str,
) -> EvaluationResults:
    """Scores per query (image) and per part, with resampled intervals, yardsticks, and predictions of all variants.

    Args:
        measured: rankings of every variant, by the backbone (`OURS`) and yardsticks.
        settings: of the evaluation.
        sets: by name, for the fingerprints.
        weights: file of the weights.
    """
    variants = measured[OURS]
    names = measure_names(settings.ks)
    scores: dict[str, Scores] = {}
    yardsticks: dict[str, Scores] = {}
    comparisons: list[Comparison] = []
    notes: list[str] = []
    for variant, rankings in variants.items():
        score = partial(
            score_rankings, parts=rankings.parts, names=names, num_resamples=settings.num_resamples, seed=settings.seed
        )
        values = rankings.measures.values(settings.ks)
        scores[variant] = score(values)
        if rankings.num_skipped:
            asked = rankings.num_skipped + len(rankings.queries)
            notes.append(f"{variant}: {rankings.num_skipped} of {asked} queries have nothing to find and are left out")
        if len(values) == 0:
            continue
        beside = {name: found[variant].measures.values(settings.ks) for name, found in measured.items() if name != OURS}
        num_parts = len(set(rankings.parts))
        for yardstick, reference in {CHANCE: rankings.chance, **beside}.items():
            of_yardstick, differences = score(reference), score(values - reference)
            yardsticks[variant_on(yardstick, VAL if len(variants) == 1 else variant)] = of_yardstick
            comparisons += [
                compare(
                    variant,
                    yardstick,
                    level,
                    metric,
                    getattr(scores[variant], level).metrics[metric],
                    getattr(of_yardstick, level).metrics[metric],
                    difference=getattr(differences, level).metrics[metric],
                    too_few=f"{num_parts} that ask" if num_parts < MIN_PARTS else "",
                )
                for level in (LEVELS if num_parts < len(values) else LEVELS[:1])
                for metric in (names[0], "recall@1")[: 2 if variant == REIDENTIFICATION and 1 in settings.ks else 1]
            ]
    whitening = {} if settings.whitening is None else {"whitening": settings.whitening}
    return EvaluationResults(
        evaluator="retrieval",
        settings=settings.as_dict(),
        classes=(),
        scores=scores,
        predictions=RankedQueries(variants),
        extra={
            "num_gallery": {name: len(rankings.gallery) for name, rankings in variants.items()},
            "num_queries": {name: len(rankings.queries) for name, rankings in variants.items()},
            "num_skipped_queries": {name: rankings.num_skipped for name, rankings in variants.items()},
        },
        yardsticks=yardsticks,
        comparisons=comparisons,
        notes=notes,
        **find_origins({**sets, **whitening}, weights),
    )


def score_rankings(
    values: Float64Array, *, parts: Sequence[str], names: Sequence[str], num_resamples: int, seed: int
) -> Scores:
    """Means over queries (image) and over the means of parts (part), with intervals from resampled parts.

    Args:
        values: ``[Q, F]`` of queries that all have something to find, see `QueryMeasures.values`.
        parts: of the queries.
        names: of the ``F`` values.
        num_resamples: each draws whole parts with replacement; 0 gives no intervals, and neither does a single part.
        seed: of the resamples.
    """
    if len(values) == 0:
        return Scores(image=LevelScores(count=0, metrics={}), part=LevelScores(count=0, metrics={}))
    part_of_query = number_parts(parts)[1]
    counts = np.bincount(part_of_query)
    columns = [np.bincount(part_of_query, weights=column) for column in values.T]
    sums = np.stack(columns, axis=1, dtype=np.float64)  # [P, F]
    draws = draw_parts(len(counts) if len(counts) > 1 else 0, num_resamples, seed)

    def level(count: int, means: Float64Array, sums: Float64Array, counts: IntArray) -> LevelScores:
        """From sums ``[P, F]`` and counts ``[P]`` of parts, which resamples draw with these."""
        at_a_time = max(1, NUMBERS_AT_A_TIME // len(counts))
        pieces = [draws[start : start + at_a_time].astype(np.float64) for start in range(0, len(draws), at_a_time)]
        resampled = [(piece @ sums) / (piece @ counts)[:, None] for piece in pieces]
        columns = np.concatenate(resampled or [np.empty((0, len(names)))]).T
        metrics = {
            name: MetricValue(value=float(mean), low=low, high=high)
            for name, mean, (low, high) in zip(names, means, map(interval, columns), strict=True)
        }
        return LevelScores(count=count, metrics=metrics)

    of_parts = sums / counts[:, None]
    return Scores(
        image=level(len(values), values.mean(axis=0), sums, counts),
        part=level(len(counts), of_parts.mean(axis=0), of_parts, np.ones_like(counts)),
    )


@dataclass(frozen=True)
class RetrievalOptions(EvaluatorOptions):
    """Options of the command."""

    output_dir: str = option(".", help="folder for the log, results.json and predictions.csv")
    train_dataset: str | None = option(None, help="further images of the gallery train+val, as a dataset string")
    val_dataset: str | None = option(None, help="images that find the others of their part, as a dataset string")
    features: str | None = option(
        None, help="cls (usually), patch_mean, cls_patch_mean, cls_patch_statistics, or gem", choices=RETRIEVAL_FEATURES
    )
    gem_power: float = option(3.0, help="power of the generalised mean, for features gem; 1: the mean")
    scales: tuple[float, ...] = option((1.0,), help="sizes of an image whose features are summed (1 0.7071 1.4142)")
    whitening: str | None = option(None, help="images to fit a whitening on, as a dataset string")
    whitening_kind: str = option("pca", help="learned looks at the parts of that set", choices=KINDS)
    whitening_dim: int | None = option(None, help="width of whitened features (usually all that is possible)")
    ks: tuple[int, ...] = option((1, 5, 10), help="first ranks at which precision, recall and hits are measured")
    gallery: str = option("val", help="what is ranked", choices=GALLERIES)
    reidentification: bool = option(
        False, help="every image, turned, cropped and relit (--seed), has to find itself: needs no parts or labels"
    )
    revisited: Path | None = option(
        None, help="folder with gnd_roxford5k.pkl or gnd_rparis6k.pkl and jpg/: that benchmark instead of parts"
    )
    longer_side: int = option(1024, help="pixels to which the benchmark's images are scaled")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    options = parse(
        RetrievalOptions,
        argv,
        description=(
            "Scores a frozen backbone by whether an image finds the others of its part, or itself after it was turned, "
            "cropped and relit (--reidentification), or on the revisited Oxford and Paris benchmarks."
        ),
        example=(
            "python eval/retrieval.py --config-file configs/eval/vitl14_pretrain.yaml --pretrained-weights W.pth "
            "--val-dataset GroupedJSON:split=VAL:root=/data/parts --output-dir outputs/retrieval"
        ),
    )
    # The config knows the features that all evaluators have.
    shared = replace(options, features=None) if options.features == "gem" else options
    needed = () if options.revisited else (TRAIN, VAL) if options.gallery == "train+val" else (VAL,)
    with evaluator_session(shared, needed=needed) as setup:
        transform = setup.transform
        if options.revisited is not None:
            transform = ResizeLongerSide(options.longer_side, patch_size_of(setup.backbone))
        settings = RetrievalSettings(
            features=options.features or setup.config.evaluation.features,
            gem_power=options.gem_power,
            scales=options.scales,
            whitening=make_dataset(
                dataset_str=options.whitening,
                transform=transform,
                value_range=setup.value_range,
                preprocessing=setup.preprocessing,
            )
            if options.whitening
            else None,
            whitening_kind=options.whitening_kind,
            whitening_dim=options.whitening_dim,
            ks=options.ks,
            num_resamples=options.num_resamples,
            seed=options.seed,
            **setup.extraction,
        )
        defaults = {field.name: field.default for field in fields(options)}
        idle = ["part_aggregation", "part_top_k"]
        idle += [] if settings.features == "gem" else ["gem_power"]
        idle += ["whitening_kind", "whitening_dim"] if settings.whitening is None else []
        if options.revisited is None:
            idle += ["longer_side"] + ([] if options.gallery == "train+val" else ["train_dataset"])
        else:
            idle += [
                "gallery",
                "reidentification",
                "train_dataset",
                "val_dataset",
                "preprocessing",
                "image_size",
                "whole_image",
                "batch_size",
            ]
        given = [name for name in idle if getattr(options, name) != defaults[name]]
        if given and is_main_process():
            logger.warning("without effect here: %s", ", ".join(f"--{name.replace('_', '-')}" for name in given))
        described = {"whitening_dataset": options.whitening} if options.whitening else {}
        with_train = options.gallery == "train+val"
        unused = [] if with_train else ["train_dataset"]
        if options.revisited is not None:
            unused = ["image_size", "whole_image", "train_dataset", "val_dataset"]
        described |= {name: value for name, value in setup.settings.items() if name not in unused}
        reporting: dict[str, Any] = {
            "output_dir": setup.output_dir,
            "weights": setup.weights,
            "more_settings": described,
            **setup.yardsticks,
        }
        if options.revisited is not None:
            eval_revisited(
                setup.backbone, options.revisited, longer_side=options.longer_side, settings=settings, **reporting
            )
        else:
            train = setup.train_dataset if with_train else None
            eval_retrieval(
                setup.backbone,
                train,
                setup.val_dataset,
                gallery=options.gallery,
                reidentification=options.reidentification,
                settings=settings,
                **reporting,
            )
    return 0


if __name__ == "__main__":
    run_as("retrieval")
