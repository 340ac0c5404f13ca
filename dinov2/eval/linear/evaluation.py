"""Linear classification of frozen features: a grid of classifiers, of which the best on the validation set is kept."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.distributed import is_main_process
from dinov2.eval.common_checks import (
    name_some,
    shared_parts,
    warn_of_idle_aggregation,
    warn_of_shared_parts,
    warn_of_unseen_classes,
)
from dinov2.eval.fingerprints import find_origins
from dinov2.eval.frozen import device_of
from dinov2.eval.linear.batches import BatchSource, CachedBatches, ImageBatches
from dinov2.eval.linear.checkpoint import LinearCheckpoint, read_classifiers
from dinov2.eval.linear.classifiers import ClassifierStack, init_classifiers, stack_classifiers
from dinov2.eval.linear.features import Extraction, LastBlocks
from dinov2.eval.linear.protocol import LinearProtocol
from dinov2.eval.linear.report import judge_classifiers
from dinov2.eval.linear.run import TrainingRun, train_classifiers
from dinov2.eval.linear.scoring import JudgedSet, check_metric
from dinov2.eval.linear.sets import TRAIN, VAL, LinearSets, check_sets
from dinov2.eval.results import EvaluationResults

__all__ = ["LinearProtocol", "eval_linear"]

logger = logging.getLogger("dinov2")

DECISIVE_SETTINGS = ("image_size", "whole_image", "autocast")  # of those in the results, what features depend on


def eval_linear(
    model: nn.Module,
    train_dataset: ImageDataset | None,
    val_dataset: ImageDataset,
    protocol: LinearProtocol | None = None,
    *,
    test_datasets: Mapping[str, ImageDataset] | None = None,
    class_mapping_fpaths: Mapping[str, str | Path] | None = None,
    train_transform: Callable[[Any], Tensor] | None = None,
    classifier_fpath: str | Path | None = None,
    resume: bool = True,
    extraction_batch_size: int | None = None,
    num_workers: int = 4,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    output_dir: str | Path | None = None,
    weights: str = "",
    settings: Mapping[str, Any] | None = None,
) -> EvaluationResults:
    """Scores a frozen backbone by the best of a grid of linear classifiers, on all processes of the run together.

    The classifier that does best on the validation set is chosen, so its figures there are a little too good; a test
    set gives the honest ones.

    By default, features are computed once and kept in the memory of every process: 4 bytes x images x width of the
    backbone x (blocks + 1). That suits an inspection with few labels: a random crop may leave out the very defect that
    the label speaks of, a flip may turn a good part into a wrong one, and training takes seconds. The published
    protocol augments: give a ``train_transform``, and features are computed anew for every step.

    Args:
        model: a vision transformer with ``get_intermediate_layers``.
        train_dataset: labelled images to learn from; None only with ``classifier_fpath``.
        val_dataset: labelled images to choose by; with two classes, class 1 is the positive one (a defect).
        protocol: the grid, its training, and how the best is chosen.
        test_datasets: further sets to judge the chosen classifier on, by the names that they have in the results.
        class_mapping_fpaths: by ``val`` or the name of a test set, a ``.npy`` file that says which of the training
            set's classes stands for each class of that set; the others are then not predicted there.
        train_transform: augmentation, from an RGB image to a tensor ``[3, H, W]``; by default none.
        classifier_fpath: trained classifiers (``linear_checkpoint.pth`` or ``linear_head.pth``) to judge instead of
            training new ones.
        resume: goes on from the checkpoint in ``output_dir``, if there is one.
        extraction_batch_size: images per process and forward pass; by default the protocol's batch size.
        num_workers: processes that decode images, per process of the run.
        device: where to compute; by default where the model lies.
        autocast_dtype: precision of the backbone; by default that of the model. The classifiers are float32.
        output_dir: folder that gets ``results.json``, ``predictions.csv`` (one more per test set), ``linear_head.pth``
            (the chosen classifier), ``linear_checkpoint.pth`` and ``linear_metrics.jsonl``; by default nothing is
            written.
        weights: file of the weights, for the results.
        settings: further plain values for the results, such as the image size.

    Raises:
        FileNotFoundError: for a missing class mapping or file of classifiers.
        ValueError: for missing labels, a training set of one class, sets whose classes differ, images that cannot be
            read, features that are not finite, a checkpoint of something else, or settings out of range. Labels and
            settings are checked before anything is computed, a checkpoint once there are features to compare.

    Reference: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", section B.3.
    """
    protocol = protocol or LinearProtocol()
    device = device_of(model) if device is None else torch.device(device)
    given, classes = (None, None) if classifier_fpath is None else read_classifiers(classifier_fpath)
    sets = check_sets(train_dataset, val_dataset, test_datasets or {}, class_mapping_fpaths or {}, classes)
    check_metric(protocol.val_metric, sets.judged[VAL].classes, sets.judged[VAL].dataset.get_targets())
    warn_of_idle_aggregation(protocol.part_aggregation, sets.classes)
    backbone = LastBlocks(model, max(classifier.kind.blocks for classifier in given or protocol.grid))
    extraction = Extraction(backbone, device, extraction_batch_size or protocol.batch_size, num_workers, autocast_dtype)
    origins = find_origins(sets.datasets, weights)
    extra = _warn_of_sets(sets)
    judged = {
        name: JudgedSet(extraction.of_dataset(entry.dataset), entry.classes, entry.class_mapping)
        for name, entry in sets.judged.items()
    }
    if given is not None:
        stacks = _fitting(stack_classifiers(given, device=device), judged[VAL], backbone, classifier_fpath)
        described: dict[str, Any] = {"classifier_fpath": str(classifier_fpath)}
    else:
        folder = None if output_dir is None else Path(output_dir)
        seen = {name: value for name, value in (settings or {}).items() if name in DECISIVE_SETTINGS}
        training = _Training(sets, judged[VAL], extraction, train_transform, protocol, {**seen, **_digests(origins)})
        stacks, described = training.run(folder, resume)
    verdict = judge_classifiers(stacks, judged, sets.classes, protocol)
    results = replace(
        verdict.results,
        settings={**described, **verdict.results.settings, **(settings or {})},
        extra={**verdict.results.extra, **extra},
        **origins,
    )
    if is_main_process():
        verdict = replace(verdict, results=results)
        logger.info("%s", verdict.table())
        if output_dir is not None:
            verdict.write(output_dir)
    return results


@dataclass(frozen=True)
class _Training:
    """What a training of the grid needs; see `eval_linear`. ``seen`` says what the features come from."""

    sets: LinearSets
    val: JudgedSet
    extraction: Extraction
    transform: Callable[[Any], Tensor] | None
    protocol: LinearProtocol
    seen: Mapping[str, Any]

    def run(self, folder: Path | None, resume: bool) -> tuple[tuple[ClassifierStack, ...], dict[str, Any]]:
        """Trains, with a checkpoint in the folder if there is one; returns classifiers and settings for the results."""
        classes = self.sets.classes
        run = TrainingRun.plan(self.protocol, self._dataset, len(classes))
        described = {**run.as_dict(), "augment": self.transform is not None}
        rows = self.val.features.embeddings
        embed_dim = rows.shape[1] // (self.extraction.backbone.num_blocks + 1)
        stacks = init_classifiers(
            self.protocol.grid, embed_dim, len(classes), seed=self.protocol.seed, device=self.extraction.device
        )
        checkpoint = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            decisive = {**described, "classes": list(classes), "embed_dim": embed_dim, **self.seen}
            checkpoint = LinearCheckpoint(folder, decisive, probe=rows[0])
        train_classifiers(stacks, self._source, run, self.val, checkpoint=checkpoint, resume=resume)
        return stacks, described

    @property
    def _dataset(self) -> ImageDataset:
        assert self.sets.train is not None, "sets without trained classifiers have a training set"
        return self.sets.train

    def _source(self) -> BatchSource:
        batch_size, seed = self.protocol.batch_size, self.protocol.seed
        if self.transform is not None:
            return ImageBatches(self.extraction, self._dataset, self.transform, batch_size=batch_size, seed=seed)
        features = self.extraction.of_dataset(self._dataset)
        return CachedBatches(features, batch_size=batch_size, seed=seed, device=self.extraction.device)


def _digests(origins: Mapping[str, Any]) -> dict[str, str]:
    """Which images and weights the features of the training set come from."""
    return {
        "train_dataset_sha256": origins["datasets"][TRAIN]["sha256"],
        "weights_sha256": origins["weights"].get("sha256", ""),
    }


def _fitting(
    stacks: tuple[ClassifierStack, ...], val: JudgedSet, backbone: LastBlocks, path: str | Path | None
) -> tuple[ClassifierStack, ...]:
    """The stacks, if they see features as wide as those of the backbone."""
    embed_dim = val.features.embeddings.shape[1] // (backbone.num_blocks + 1)
    if any(stack.embed_dim != embed_dim for stack in stacks):
        raise ValueError(f"{path} is for backbones of width {stacks[0].embed_dim}, this one has {embed_dim}")
    return stacks


def _warn_of_sets(sets: LinearSets) -> dict[str, Any]:
    """Says on the main process what about the sets makes figures worse or better than they should be."""
    if sets.train is None:
        return {}
    groups = {name: dataset.get_group_ids() for name, dataset in sets.datasets.items()}
    extra = {"num_parts_in_both": len(warn_of_shared_parts(groups[TRAIN], groups[VAL]))}
    warn_of_unseen_classes(sets.train.get_targets().tolist(), sets.classes)
    if not is_main_process():
        return extra
    for name in sets.judged:
        shared = [] if name == VAL else shared_parts([*groups[TRAIN], *groups[VAL]], groups[name])
        if shared:
            logger.warning(
                "%d parts of %s are in the training or the validation set too, so its scores are too good: %s",
                len(shared),
                name,
                name_some(shared),
            )
    return extra
