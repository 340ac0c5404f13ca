"""What is watched while a run trains: targets of every batch, features of a probe set, the best teacher, warnings."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2.config import Config, ConfigError
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.eval.representation_measures import (
    effective_rank,
    mean_cosine_similarity,
    patch_similarities,
    similarity_drift,
)
from dinov2.eval.transforms import make_eval_transform
from dinov2.fsdp import release_gathered_parameters
from dinov2.logging import read_metrics
from dinov2.train.best_teacher import forget_later_best, keep_best, score_of
from dinov2.train.collapse import RunWatch
from dinov2.train.evaluation import LOGGED_FIGURES, evaluation_size, random_state_untouched
from dinov2.train.probe import ProbeFeatures, ProbeSet, probe_features
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.train.target_measures import TargetMeasures
from dinov2.utils.checksums import shown_fault, write_with_checksum

logger = logging.getLogger("dinov2")

START_FILE = "probe_start.pth"  # under eval/


class Monitors:
    """Measures a run's teacher, keeps the best, and warns of collapse and overfitting.

    Nothing here changes a parameter or a random state. Every process must call every method: sharded networks need all
    of them for a forward pass. Figures, files and warnings are those of the main process.

    Args:
        config: options of the run.
        model: the method, whose teacher may be sharded.
        output_dir: folder of the run.
        device: where to compute.
        targets: measures of the batches.
        training_images: watched where the options name no other set.
        start: first iteration to come.

    Raises:
        ConfigError: an option of ``evaluation`` is wrong.
        FileNotFoundError, ValueError: the probe set is missing or wrong.
    """

    def __init__(
        self,
        config: Config,
        model: SSLMetaArch,
        output_dir: Path,
        device: torch.device,
        *,
        targets: TargetMeasures,
        training_images: ImageDataset,
        start: int,
    ) -> None:
        check_best_metric(config)
        self._config = config
        self._model = model
        self._output_dir = output_dir
        self._device = device
        self._targets = targets
        self._start = start
        settings = config.evaluation
        val = make_dataset(dataset_str=settings.val_dataset_path) if settings.val_dataset_path else None
        self._probe = open_probe(config, training_images if val is None else val)
        self._first: dict[str, Any] = {}  # what the first teacher made of the probe set; main process only
        per_image = settings.best_metric.startswith("image")
        num_scored = 0 if val is None else len(val) if per_image else len(set(val.get_group_ids()))
        self._watch = RunWatch(
            config.optim.warmup_epochs * config.train.OFFICIAL_EPOCH_LENGTH,
            config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH,
            model.teacher_backbone.embed_dim,
            num_scored,
        )
        self._warnings: list[str] = []

    def begin(self) -> dict[str, float]:
        """Measures the features that the run starts from, or reads what an earlier start of it measured.

        Must be called once, when records of iterations to come are gone from the metrics file.

        Returns:
            Figures of the features now; empty when they were read, or no image is watched.
        """
        if is_main_process():
            forget_later_best(self._output_dir / "eval" / "best", self._start)
            self._replay(read_metrics(self._output_dir / "metrics.jsonl"))
        if self._probe is None:
            return {}
        if is_main_process() and self._start > 0:
            self._first = self._read_first()
        if all_gather_objects(bool(self._first))[0]:
            return {}
        if self._start > 0:
            logger.info("patch_drift counts from iteration %d: no earlier measure of this run is there", self._start)
        figures = self._measure()
        if is_main_process():
            self._watch.see_evaluation(self._start - 1, figures, None)
        return figures

    def see_report(self, record: dict[str, Any]) -> None:
        """Adds the period's figures of the targets to a progress record, and the warnings that it raises."""
        record |= self._targets.close_period()
        if is_main_process():
            self._warn(self._watch.see_training(record))
            if warnings := self.take_warnings():
                record["warnings"] = warnings

    def see_evaluation(self, iteration: int, knn: Mapping[str, float], teacher: Path | None) -> dict[str, float]:
        """Measures the teacher's features after an iteration and keeps the teacher if it is the best so far.

        Args:
            iteration: just done.
            knn: figures of k-NN, empty without labelled sets.
            teacher: the teacher's file; None where it could not be written.

        Returns:
            ``knn`` and the figures of the probe set.
        """
        figures = {**knn, **self._measure()}
        if is_main_process():
            metric = self._config.evaluation.best_metric
            if teacher is not None:
                self._keep_best(teacher, iteration, knn)
            self._warn(self._watch.see_evaluation(iteration, figures, score_of(knn, metric)))
        return figures

    def _keep_best(self, teacher: Path, iteration: int, knn: Mapping[str, float]) -> None:
        folder = self._output_dir / "eval" / "best"
        try:
            keep_best(folder, teacher, iteration, knn, metric=self._config.evaluation.best_metric)
        except OSError as error:  # its own file is there
            logger.error("THE BEST TEACHER IS NOT KEPT in %s, training goes on: %s", folder, error)

    def take_warnings(self) -> list[str]:
        """Warnings since the last call; those of the main process."""
        taken, self._warnings = self._warnings, []
        return taken

    def _warn(self, warnings: Iterable[str]) -> None:
        for warning in warnings:
            logger.warning("%s", warning)
            self._warnings.append(warning)

    def _replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Shows the watch what the run has recorded before a resume; its warnings have been raised then."""
        for record in records:
            if "iteration" not in record:
                continue
            if "evaluation" in record:
                figures = record["evaluation"]
                score = score_of(_finite(figures), self._config.evaluation.best_metric)
                self._watch.see_evaluation(record["iteration"], figures, score)
            else:
                self._watch.see_training(record)

    def _measure(self) -> dict[str, float]:
        """Figures of the teacher's features now, the same on every process; empty where there are none."""
        if self._probe is None:
            return {}
        with random_state_untouched():
            try:
                features = probe_features(
                    self._model.teacher_backbone,
                    self._probe,
                    embed_dim=self._model.teacher_backbone.embed_dim,
                    batch_size=self._config.evaluation.batch_size,
                    num_workers=self._config.train.num_workers,
                    device=self._device,
                )
            except ValueError as error:  # on all processes alike; no reason to lose a run
                logger.warning("the probe set could not be measured: %s", error)
                features = None
        self._model.train()
        release_gathered_parameters(self._model.teacher)
        figures: dict[str, float] = {}
        if features is not None and is_main_process():
            figures = self._figures(features)
        return all_gather_objects(figures)[0]

    def _figures(self, features: ProbeFeatures) -> dict[str, float]:
        similarities = patch_similarities(features.patches)
        if not self._first:
            self._first = {
                "names": _names(features.paths), "readable": features.readable, "similarities": similarities
            }  # fmt: skip
            path = self._output_dir / "eval" / START_FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            write_with_checksum(path, lambda file: torch.save(self._first, file))
        usable = features.readable & self._first["readable"]
        if usable.sum() < 2:
            logger.warning("the probe set could not be measured: %d of its images can be read", int(usable.sum()))
            return {}
        first: Tensor = self._first["similarities"]
        return feature_figures(features.cls[usable], features.patches[usable], similarities[usable], first[usable])

    def _read_first(self) -> dict[str, Any]:
        """What an earlier start of this run kept; empty when there is none, or none of the same images and patches."""
        assert self._probe is not None
        path = self._output_dir / "eval" / START_FILE
        if not path.exists():
            return {}
        fault = shown_fault(path)
        try:
            first: dict[str, Any] = {} if fault else torch.load(path, weights_only=True)
        except Exception as error:  # bytes that are no file of torch make the unpickler raise almost anything
            fault = f"cannot be read: {error}"
        if fault:
            logger.error("%s %s: it is not used, and written anew", path, fault)
            return {}
        names = _names(str(self._probe.get_image_path(index)) for index in range(len(self._probe)))
        return first if first["names"] == names else {}


def feature_figures(cls: Tensor, patches: Tensor, similarities: Tensor, first: Tensor) -> dict[str, float]:
    """Figures of features of at least two images.

    Args:
        cls: class tokens ``[N, D]``.
        patches: ``[N, P, D]``.
        similarities: of these patches, ``[N, P, P]``.
        first: of the same patches when the run started.

    Returns:
        ``probe_cls_rank`` and ``probe_patch_rank``, effective ranks; ``probe_cls_cosine``, mean cosine between images;
        with more than one patch ``probe_patch_cosine``, mean cosine between patches of an image, and
        ``probe_patch_drift``, mean absolute change of those cosines since the start.
    """
    figures = {
        "probe_cls_rank": effective_rank(cls),
        "probe_patch_rank": effective_rank(patches.flatten(0, 1)),
        "probe_cls_cosine": float(mean_cosine_similarity(cls)),
    }
    if patches.shape[1] > 1:
        figures["probe_patch_cosine"] = float(mean_cosine_similarity(patches).mean())
        figures["probe_patch_drift"] = similarity_drift(similarities, first)
    return figures


def open_probe(config: Config, default: ImageDataset) -> ProbeSet | None:
    """Opens the images on which features are watched.

    Args:
        config: options of the run.
        default: taken where they name no set.

    Returns:
        The set; None where none is wanted, or there are no two images to compare.

    Raises:
        ConfigError: the image size is no multiple of the patch.
        FileNotFoundError, ValueError: the set is missing or wrong.
    """
    settings = config.evaluation
    size = evaluation_size(config)
    source = make_dataset(dataset_str=settings.probe_dataset_path) if settings.probe_dataset_path else default
    if min(settings.probe_images, len(source)) < 2:
        if settings.probe_images > 0:
            logger.warning("features are not watched: that takes two images at least")
        return None
    transform = make_eval_transform(size, whole_image=settings.whole_image)
    return ProbeSet(source, settings.probe_images, transform, size, read_timeout=config.data.read_timeout_seconds)


def check_best_metric(config: Config) -> None:
    """Checks ``evaluation.best_metric``.

    Raises:
        ConfigError: it names no figure of k-NN.
    """
    metric = config.evaluation.best_metric
    match = re.fullmatch(r"(image|part)_(?P<figure>[a-z0-9_]+?)(_k(?P<k>\d+))?", metric)
    if metric and (match is None or match["figure"] not in LOGGED_FIGURES):
        names = ", ".join(LOGGED_FIGURES)
        raise ConfigError(
            f"evaluation.best_metric={metric!r} must be image_ or part_ and one of {names}, with _k and a number of "
            f"neighbours or without, such as part_auroc or image_accuracy_k10"
        )


def _finite(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if isinstance(value, int | float)}


def _names(paths: Iterable[str]) -> list[str]:
    """Names of files without their folders: a set may be moved between two starts of a run."""
    return [Path(path).name for path in paths]
