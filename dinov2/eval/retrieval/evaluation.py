"""Retrieval with frozen features: of the photos of one part, and on the revisited Oxford and Paris benchmarks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process
from dinov2.eval.common_checks import name_some, shared_parts
from dinov2.eval.features import Features, extract_features
from dinov2.eval.frozen import device_of
from dinov2.eval.part_scores import number_parts
from dinov2.eval.results import EvaluationResults
from dinov2.eval.retrieval.measures import IGNORED, RELEVANT, WRONG, IntArray, check_ks, measure_retrieval
from dinov2.eval.retrieval.pooling import describe_images, patch_size_of
from dinov2.eval.retrieval.report import Rankings, make_results, write_and_log
from dinov2.eval.retrieval.revisited import PROTOCOLS, ResizeLongerSide, RevisitedImages, read_revisited
from dinov2.eval.retrieval.whitening import KINDS, fit_whitening
from dinov2.eval.scoring import check_num_resamples

logger = logging.getLogger("dinov2")

GALLERIES = ("val", "train+val")


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """How images become vectors, and how rankings are measured.

    Attributes:
        features: ``cls``, ``patch_mean``, ``cls_patch_mean`` or ``gem``.
        gem_power: of ``gem``.
        scales: sizes of an image, whose features are summed.
        whitening: a set to fit a whitening on; None for none.
        whitening_kind: ``pca`` or ``learned``.
        whitening_dim: width of whitened features; None for all.
        ks: first ranks at which precision and recall are measured.
        num_resamples: behind the intervals; 0 gives none.
        seed: of the resamples.
        batch_size: images per process and forward pass; the benchmarks, whose images differ in size, take one.
        num_workers: processes that decode images, per process of the run.
        device: where to compute; None for where the model lies.
        autocast_dtype: precision of the forward pass; None for that of the model.
    """

    features: str = "cls"
    gem_power: float = 3.0
    scales: tuple[float, ...] = (1.0,)
    whitening: ImageDataset | None = None
    whitening_kind: str = "pca"
    whitening_dim: int | None = None
    ks: tuple[int, ...] = (1, 5, 10)
    num_resamples: int = 1000
    seed: int = 0
    batch_size: int = 64
    num_workers: int = 4
    device: torch.device | str | None = None
    autocast_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_ks(self.ks)
        if self.whitening_kind not in KINDS:
            raise ValueError(f"whitening kind {self.whitening_kind!r} is not one of {', '.join(KINDS)}")
        check_num_resamples(self.num_resamples)

    def as_dict(self) -> dict[str, Any]:
        """Plain values of what decides the figures; the set of the whitening is among the results' datasets."""
        return {
            "features": self.features,
            **({"gem_power": self.gem_power} if self.features == "gem" else {}),
            "scales": list(self.scales),
            **(
                {}
                if self.whitening is None
                else {"whitening": self.whitening_kind, "whitening_dim": self.whitening_dim}
            ),
            "ks": list(self.ks),
            "equal_similarities": "in the order of the gallery",
            "num_resamples": self.num_resamples,
            "seed": self.seed,
        }


def eval_retrieval(
    model: nn.Module,
    train_dataset: ImageDataset | None,
    val_dataset: ImageDataset,
    *,
    gallery: str = "val",
    settings: RetrievalSettings | None = None,
    output_dir: str | Path | None = None,
    weights: str = "",
    more_settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores a frozen backbone by whether a photo finds the other photos of its part; labels are not looked at.

    Every photo of the validation set whose part has another photo in the gallery is a query, and is left out of its own
    ranking. Photos that are alone stay in the gallery. A file that the sets name twice counts once.

    Args:
        model: a vision transformer; with ``cls`` features, any network that maps images to ``[B, D]``.
        train_dataset: further images of the gallery ``train+val``; unused otherwise.
        val_dataset: the queries, and the gallery's first images.
        gallery: ``val`` or ``train+val``.
        settings: how images are described and rankings measured; by default the usual.
        output_dir: folder that gets ``results.json`` and ``predictions.csv``; by default nothing is written.
        weights: file of the weights, for the results.
        more_settings: further plain values for the results, such as the image size.

    Returns:
        The variant ``parts`` with ``map``, ``mp@k`` and ``recall@k``: means over queries (image), and over the means of
        parts (part).

    Raises:
        ValueError: when no part has two photos, for settings out of range, images that cannot be read, or features that
            are not finite.
    """
    settings = settings or RetrievalSettings()
    sets = _gallery_sets(train_dataset, val_dataset, gallery)
    all_paths = [str(dataset.get_image_path(index)) for dataset in sets.values() for index in range(len(dataset))]
    kept = _first_of_each(all_paths)
    all_groups = [group for dataset in sets.values() for group in dataset.get_group_ids()]
    paths, groups = [all_paths[row] for row in kept], [all_groups[row] for row in kept]
    _, parts = number_parts(groups)
    num_photos = sum(row < len(val_dataset) for row in kept)  # of the validation set, which comes first
    queries = np.flatnonzero(np.bincount(parts)[parts[:num_photos]] > 1)
    if len(queries) == 0:
        raise ValueError("no part of the validation set has a second photo in the gallery, so there is nothing to find")
    describe = _describer(model, settings, settings.batch_size, groups)
    features = torch.cat([describe(dataset).embeddings for dataset in sets.values()])[kept]
    rankings = Rankings(
        measures=measure_retrieval(
            features[queries], features, _same_part(parts, queries), settings.ks, device=_device(model, settings)
        ),
        queries=[paths[row] for row in queries],
        parts=[groups[row] for row in queries],
        labels=_class_names(val_dataset, [kept[row] for row in queries]),
        gallery=paths,
        num_skipped=num_photos - len(queries),
    )
    return _report(
        {"parts": rankings},
        settings,
        {"gallery": gallery, "num_files_named_twice": len(all_paths) - len(kept), **(more_settings or {})},
        sets,
        weights,
        output_dir,
    )


def eval_revisited(
    model: nn.Module,
    path: str | Path,
    *,
    longer_side: int = 1024,
    settings: RetrievalSettings | None = None,
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
        output_dir: folder that gets ``results.json`` and ``predictions.csv``; by default nothing is written.
        weights: file of the weights, for the results.
        more_settings: further plain values for the results.

    Returns:
        The variants ``easy``, ``medium`` and ``hard`` with ``map`` and ``mp@k``. Queries without positives are left out
        and counted. Intervals are from resampled queries: several show one landmark, so they are somewhat too narrow.

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
    describe = _describer(model, settings, 1, [])
    queries, gallery = (describe(dataset) for dataset in sets.values())
    variants = {}
    for protocol in PROTOCOLS:
        measures = measure_retrieval(
            queries.embeddings,
            gallery.embeddings,
            benchmark.relevance(protocol),
            settings.ks,
            device=_device(model, settings),
        )
        measured = np.flatnonzero(measures.first_hit)  # those that have anything to find
        names = [queries.paths[row] for row in measured]
        variants[protocol] = Rankings(
            measures=measures.select(measured),
            queries=names,
            parts=names,
            labels=[""] * len(names),
            gallery=gallery.paths,
            num_skipped=len(queries) - len(measured),
        )
    more_settings = {**(more_settings or {}), "benchmark": benchmark.name, "longer_side": longer_side}
    return _report(variants, settings, more_settings, sets, weights, output_dir)


def _gallery_sets(train: ImageDataset | None, val: ImageDataset, gallery: str) -> dict[str, ImageDataset]:
    if gallery not in GALLERIES:
        raise ValueError(f"gallery {gallery!r} is not one of {', '.join(GALLERIES)}")
    if gallery == "val":
        return {"val": val}
    if train is None:
        raise ValueError("the gallery train+val needs a training set")
    return {"val": val, "train": train}


def _class_names(dataset: ImageDataset, rows: Sequence[int]) -> list[str]:
    """Names of the classes of some images, empty where an image has no label."""
    targets = dataset.get_targets()[rows].tolist()
    return [(dataset.classes[target] if dataset.classes else str(target)) if target >= 0 else "" for target in targets]


def _first_of_each(paths: Sequence[str]) -> list[int]:
    """Rows, ascending, that are the first with their path."""
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        first.setdefault(path, row)
    return list(first.values())


def _same_part(parts: IntArray, queries: IntArray) -> Callable[[IntArray], npt.NDArray[np.int8]]:
    """Relevance for `measure_retrieval` of a gallery ``[N]`` of parts, of which some positions ``[Q]`` are queries."""

    def of_queries(rows: IntArray) -> npt.NDArray[np.int8]:
        own = queries[rows]
        values = np.where(parts[own][:, None] == parts, RELEVANT, WRONG).astype(np.int8)
        values[np.arange(len(rows)), own] = IGNORED
        return values

    return of_queries


def _report(
    variants: Mapping[str, Rankings],
    settings: RetrievalSettings,
    more_settings: Mapping[str, Any],
    sets: Mapping[str, ImageDataset],
    weights: str,
    output_dir: str | Path | None,
) -> EvaluationResults:
    whitening = {} if settings.whitening is None else {"whitening": settings.whitening}
    results = make_results(
        variants,
        settings.ks,
        settings={**more_settings, **settings.as_dict()},
        sets={**sets, **whitening},
        weights=weights,
        num_resamples=settings.num_resamples,
        seed=settings.seed,
    )
    write_and_log(results, variants, output_dir)
    return results


def _device(model: nn.Module, settings: RetrievalSettings) -> torch.device:
    return device_of(model) if settings.device is None else torch.device(settings.device)


def _describer(
    model: nn.Module, settings: RetrievalSettings, batch_size: int, groups: Sequence[str]
) -> Callable[[ImageDataset], Features]:
    """What maps a dataset to features, whitened if asked for; ``groups`` are the parts that it will be used on."""
    describing = describe_images(model, settings.features, gem_power=settings.gem_power, scales=settings.scales)

    def describe(dataset: ImageDataset) -> Features:
        return extract_features(
            describing,
            dataset,
            batch_size=batch_size,
            num_workers=settings.num_workers,
            device=_device(model, settings),
            autocast_dtype=settings.autocast_dtype,
        )

    if settings.whitening is None:
        return describe
    fitted_on = describe(settings.whitening)
    shared = shared_parts(fitted_on.group_ids, groups)
    if shared and is_main_process():
        logger.warning(
            "the whitening is fitted on %d parts that are judged, so the scores are too good: %s",
            len(shared),
            name_some(shared),
        )
    whiten = fit_whitening(
        fitted_on.embeddings, fitted_on.group_ids, kind=settings.whitening_kind, dim=settings.whitening_dim
    )

    def describe_whitened(dataset: ImageDataset) -> Features:
        features = describe(dataset)
        return replace(features, embeddings=whiten(features.embeddings))

    return describe_whitened
