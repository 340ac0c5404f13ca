"""What maps images to vectors for retrieval: the evaluated backbone, and what it is compared with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.features import device_of, extract_features, warn_of_shared_parts
from dinov2.eval.metrics.classification import check_num_resamples
from dinov2.eval.retrieval.ranking import KINDS, check_ks, describe_images, fit_whitening
from dinov2.eval.yardsticks import (
    IMAGE_STATISTICS,
    PIXELS,
    RANDOM_BACKBONE,
    extract_pixels,
    extract_statistics,
    standardize,
)

Describe = Callable[[ImageDataset], Tensor]
OURS = ""  # name of the evaluated backbone among what is compared


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings:
    """How images become vectors, and how rankings are measured.

    Attributes:
        features: one of `RETRIEVAL_FEATURES`.
        gem_power: of ``gem``.
        scales: sizes of an image, whose features are summed.
        whitening: a set to fit a whitening on; None for none.
        whitening_kind: ``pca`` or ``learned``.
        whitening_dim: width of whitened features; None for all.
        ks: first ranks at which precision, recall and hits are measured.
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
        """Plain values of what decides the metrics; the set of the whitening is among the results' datasets."""
        whitening = {"whitening": self.whitening_kind, "whitening_dim": self.whitening_dim}
        return {
            "features": self.features,
            **({"gem_power": self.gem_power} if self.features == "gem" else {}),
            "scales": list(self.scales),
            **(whitening if self.whitening is not None else {}),
            "ks": list(self.ks),
            "equal_similarities": "in the order of the gallery",
            "num_resamples": self.num_resamples,
            "seed": self.seed,
        }

    def device_for(self, model: nn.Module) -> torch.device:
        """Where to compute."""
        return device_of(model) if self.device is None else torch.device(self.device)


def make_describers(
    model: nn.Module,
    settings: RetrievalSettings,
    batch_size: int,
    query_groups: Sequence[str],
    sets: Mapping[str, ImageDataset],
    image_statistics: bool,
    random_backbone: nn.Module | None,
    *,
    pixels: bool = False,
) -> dict[str, Describe]:
    """What maps a dataset to vectors ``[N, D]`` of unit length: the backbone (`OURS`), and yardsticks by name.

    Args:
        model: the backbone.
        settings: how images become vectors.
        batch_size: images per process and forward pass.
        query_groups: the parts that ask.
        sets: all that will be described.
        image_statistics: adds ten statistics of brightness.
        random_backbone: adds this network.
        pixels: adds small grey images as they are.
    """
    describers = {OURS: _describer(model, settings, batch_size, query_groups)}
    options: dict[str, Any] = {"num_workers": settings.num_workers, "device": settings.device_for(model)}
    if image_statistics:
        rows = {id(dataset): extract_statistics(dataset, **options).embeddings for dataset in sets.values()}
        every = torch.cat(list(rows.values()))
        describers[IMAGE_STATISTICS] = lambda dataset: normalize(standardize(every, rows[id(dataset)]), dim=1)
    if pixels:
        describers[PIXELS] = lambda dataset: normalize(extract_pixels(dataset, **options).embeddings, dim=1)
    if random_backbone is not None:
        describers[RANDOM_BACKBONE] = _describer(random_backbone, settings, batch_size, query_groups)
    return describers


def _describer(model: nn.Module, settings: RetrievalSettings, batch_size: int, query_groups: Sequence[str]) -> Describe:
    """What maps a dataset to features, whitened if asked for; ``query_groups`` are the parts that ask."""
    extract = partial(
        extract_features,
        describe_images(model, settings.features, gem_power=settings.gem_power, scales=settings.scales),
        batch_size=batch_size,
        num_workers=settings.num_workers,
        device=settings.device_for(model),
        autocast_dtype=settings.autocast_dtype,
    )
    if settings.whitening is None:
        return lambda dataset: extract(dataset).embeddings
    fitted_on = extract(settings.whitening)
    # Images of the gallery may be among them, as is usual; those that ask may not.
    warn_of_shared_parts(fitted_on.group_ids, query_groups, "the set of the whitening and the queries")
    whiten = fit_whitening(
        fitted_on.embeddings, fitted_on.group_ids, kind=settings.whitening_kind, dim=settings.whitening_dim
    )
    return lambda dataset: whiten(extract(dataset).embeddings)
