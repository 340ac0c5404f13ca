"""One optimisation of all linear classifiers of a grid: its protocol, batches, steps and checkpoint."""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.pretraining import SampleKey
from dinov2.data.samplers import ShardedInfiniteSampler
from dinov2.distributed import all_gather_objects, all_reduce_sum, get_rank, get_world_size, is_main_process
from dinov2.eval.features import MAX_NAMED, Features, evaluating, extract_features, name_some, report_progress
from dinov2.eval.linear_classifiers import (
    CHECKPOINT_KEYS,
    LEARNING_RATES,
    METRICS,
    N_LAST_BLOCKS,
    ClassifierSettings,
    ClassifierStack,
    EvaluatedSet,
    LastBlocks,
    best_of,
    check_keys,
    classifier_grid,
    unstack,
)
from dinov2.eval.metrics.classification import IntArray, ScoringSettings
from dinov2.logging import MetricsFile
from dinov2.models.pretrained import read_checkpoint
from dinov2.utils.files import write_atomically
from dinov2.utils.seeds import derive_seed, isolated_random_state

logger = logging.getLogger("dinov2")

MOMENTUM = 0.9
REFERENCE_BATCH = 256
MIN_EPOCH_LENGTH = 400
CLASS_WEIGHTINGS = ("none", "balanced")
CHECKPOINT_FILE = "linear_checkpoint.pth"
METRICS_FILE = "linear_metrics.jsonl"
ANEW = "start anew (--no-resume) or in another folder (--output-dir)"

Batches = Iterator[tuple[Tensor, Tensor]]  # rows [B, (blocks + 1) * D] and labels [B] of this process


@dataclass(frozen=True, kw_only=True)
class LinearProtocol(ScoringSettings):
    """Everything but the backbone and the images that decides the metrics of a linear evaluation.

    Attributes:
        learning_rates: of the grid, for 256 images per step.
        n_last_blocks: of the grid; every number is tried with and without the mean patch token.
        epochs: how many.
        epoch_length: iterations of an epoch (published: 1250); by default one pass over the training set, at least 400
            iterations, as the few steps of a small set would leave the classifiers near where they started.
        eval_period_iterations: iterations between two evaluations on the validation set, each with a checkpoint; by
            default an epoch.
        batch_size: images of a step per process.
        class_weighting: ``none``, or ``balanced`` so that rare classes count as much as frequent ones.
        val_metric: by which the best classifier is chosen, see `METRICS`; empty for the AUROC of two classes that both
            occur in the validation set, and the accuracy of more. Upstream takes the accuracy for all.
        seed: of initial weights, order, augmentation and resamples.

    Raises:
        ValueError: for values out of range.

    Reference: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", section B.3.
    """

    learning_rates: tuple[float, ...] = LEARNING_RATES
    n_last_blocks: tuple[int, ...] = N_LAST_BLOCKS
    epochs: int = 10
    epoch_length: int | None = None
    eval_period_iterations: int | None = None
    batch_size: int = 128
    class_weighting: str = "none"
    val_metric: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        classifier_grid(self.learning_rates, self.n_last_blocks)
        for name in ("epochs", "epoch_length", "eval_period_iterations", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        for name, allowed in (("class_weighting", CLASS_WEIGHTINGS), ("val_metric", ("", *METRICS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(filter(None, allowed))}")

    @property
    def grid(self) -> tuple[ClassifierSettings, ...]:
        """The classifiers."""
        return classifier_grid(self.learning_rates, self.n_last_blocks)


@dataclass(frozen=True)
class Extraction:
    """How images become rows of features.

    Attributes:
        backbone: frozen.
        device: where images are sent.
        batch_size: images per process and forward pass.
        num_workers: processes that decode images, per process of the run; 0 for this one.
        autocast_dtype: precision of the forward pass; by default that of the backbone.
    """

    backbone: LastBlocks
    device: torch.device
    batch_size: int
    num_workers: int
    autocast_dtype: torch.dtype | None = None

    def of_dataset(self, dataset: ImageDataset) -> Features:
        """Rows of all images of a dataset, by all processes together; see `extract_features`."""
        return extract_features(
            self.backbone,
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            device=self.device,
            autocast_dtype=self.autocast_dtype,
        )


# Batches. All processes follow one stream of images, of which iteration ``i`` takes the next ``batch_size`` times the
# number of processes; a set that is smaller than that is gone through several times. The batches of an iteration depend
# on nothing but the seed and its number.


def cached_batches(
    features: Features, start: int, stop: int, *, batch_size: int, seed: int, device: torch.device
) -> Batches:
    """Batches of features that are already there, of iterations ``start`` to ``stop``.

    Args:
        features: of the training set, with all labels.
        start: first iteration.
        stop: the iteration after the last.
        batch_size: images per process.
        seed: of the order.
        device: where the batches go.
    """
    indices = iter(_order(len(features), seed, start * batch_size))
    for _ in range(start, stop):
        chosen = torch.tensor(list(itertools.islice(indices, batch_size)))
        yield features.embeddings[chosen].to(device), features.labels[chosen].to(device)


def augmented_batches(
    extraction: Extraction,
    dataset: ImageDataset,
    transform: Callable[[Any], Tensor],
    start: int,
    stop: int,
    *,
    batch_size: int,
    seed: int,
) -> Batches:
    """Batches of features of augmented images, computed when they are asked for, of iterations ``start`` to ``stop``.

    Args:
        extraction: makes the features.
        dataset: with all labels; its own transform is left aside.
        transform: maps an RGB image to a tensor ``[3, H, W]``; what it draws depends on the seed and the image's place
            in the stream.
        start: first iteration.
        stop: the iteration after the last.
        batch_size: images per process.
        seed: of order and augmentation.

    Raises:
        ValueError: for an image that cannot be read, or features that are not finite; the images are named.
    """
    world_size = get_world_size()
    positions = range(start * batch_size * world_size + get_rank(), stop * batch_size * world_size, world_size)
    loader: DataLoader[Any] = DataLoader(
        _AugmentedImages(dataset, transform, seed),
        sampler=map(SampleKey, positions, _order(len(dataset), seed, start * batch_size)),
        batch_size=batch_size,
        num_workers=extraction.num_workers,
        collate_fn=_collate,
        pin_memory=extraction.device.type == "cuda",
        generator=torch.Generator(),  # the loader draws a seed; the caller's generator must not notice
    )
    for images, labels, paths, problems in loader:
        if problems:
            distinct = list(dict.fromkeys(problems))  # a small set comes several times in a batch
            raise ValueError(f"the training set needs every image, but {'; '.join(distinct[:MAX_NAMED])}")
        autocast = torch.autocast(
            extraction.device.type,
            dtype=extraction.autocast_dtype,
            enabled=extraction.autocast_dtype is not None,
        )
        with evaluating(extraction.backbone), autocast:
            rows: Tensor = extraction.backbone(images.to(extraction.device, non_blocking=True))
        finite = rows.isfinite().all(dim=1)
        if not bool(finite.all()):
            bad = [path for path, good in zip(paths, finite.tolist(), strict=True) if not good]
            raise ValueError(f"features of {len(bad)} training images are NaN or infinite: {name_some(bad)}")
        yield rows, labels.to(extraction.device)


class _AugmentedImages(Dataset[tuple[Tensor | None, int, str, str]]):
    """Image, label, path, and what kept the image from being read, empty where nothing did."""

    def __init__(self, dataset: ImageDataset, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.labels = dataset.get_targets()

    def __getitem__(self, key: SampleKey) -> tuple[Tensor | None, int, str, str]:
        path = str(self.dataset.get_image_path(key.index))
        label = int(self.labels[key.index])
        try:
            image = self.dataset.get_image(key.index)
        except OSError as error:
            return None, label, path, str(error) if path in str(error) else f"{path}: {error}"
        with isolated_random_state(derive_seed(self.seed, "augment", key.position)):
            return self.transform(image), label, path, ""


def _collate(items: list[tuple[Tensor | None, int, str, str]]) -> tuple[Tensor, Tensor, list[str], list[str]]:
    images, labels, paths, problems = zip(*items, strict=True)
    unread = [problem for problem in problems if problem]
    stacked = torch.empty(0) if unread else torch.stack(images)
    return stacked, torch.tensor(labels), list(paths), unread


def _order(num_images: int, seed: int, advance: int) -> Sampler[int]:
    """Endless indices for this process, after the ``advance`` that it has already taken."""
    return ShardedInfiniteSampler(
        sample_count=num_images,
        shuffle=True,
        start=get_rank(),
        step=get_world_size(),
        seed=derive_seed(seed, "linear order") % 2**32,
        advance=advance,
        use_new_shuffle_tensor_slice=True,
    )


class LinearTrainer:
    """Trains the classifiers of all stacks by SGD with momentum; their learning rates fall to 0 along a cosine.

    The gradient of a classifier does not depend on the others, so the numbers are those of one optimiser for each.
    Several processes average their gradients, and each ends with the same parameters.

    Args:
        stacks: the classifiers, changed in place.
        num_iterations: steps until the learning rates are 0.
        global_batch_size: images of one step over all processes; learning rates are multiplied by it / 256.
        class_weights: ``[C]``, what an image of a class weighs in the loss; by default 1.

    Attributes:
        iteration: how many steps were done.
    """

    def __init__(
        self,
        stacks: Sequence[ClassifierStack],
        *,
        num_iterations: int,
        global_batch_size: int,
        class_weights: Tensor | None = None,
    ) -> None:
        self.stacks = tuple(stacks)
        self.num_iterations = num_iterations
        self.iteration = 0
        self._parameters = [parameter for stack in self.stacks for parameter in (stack.weight, stack.bias)]
        self._momentum = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._base_rates = []
        for stack in self.stacks:
            rates = [scaled_learning_rate(settings, global_batch_size) for settings in stack.settings]
            self._base_rates += [torch.tensor(rates, device=stack.weight.device)] * 2
        self._class_weights = None if class_weights is None else class_weights.to(self._parameters[0].device)

    def learning_rate_factor(self, iteration: int) -> float:
        """What the scaled learning rates are multiplied by in a step, counted from 0."""
        return (1 + math.cos(math.pi * iteration / self.num_iterations)) / 2

    def step(self, rows: Tensor, labels: Tensor) -> Tensor:
        """One step of all classifiers.

        Args:
            rows: ``[B, (blocks + 1) * D]``, this process's share of the batch.
            labels: ``[B]`` int64.

        Returns:
            Loss of every classifier on this process's share before the step, in the order of the stacks.
        """
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        losses = torch.cat([self._losses(stack, rows, labels) for stack in self.stacks])
        gradients: Sequence[Tensor] = torch.autograd.grad(losses.sum(), self._parameters)
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        if get_world_size() > 1:  # means over all processes, by one collective
            mean = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / get_world_size()
            pieces = mean.split([gradient.numel() for gradient in gradients])
            gradients = [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
        factor = self.learning_rate_factor(self.iteration)
        for parameter, momentum, gradient, rates in zip(
            self._parameters, self._momentum, gradients, self._base_rates, strict=True
        ):
            momentum.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(momentum * (rates * factor).view(-1, *[1] * (parameter.ndim - 1)))
        self.iteration += 1
        return losses.detach()

    def state_dict(self) -> dict[str, Any]:
        """Number of steps and, by classifier, the momentum of its weight and bias; the classifiers are kept apart."""
        momentum = {}
        for number, stack in enumerate(self.stacks):
            weight, bias = self._momentum[2 * number : 2 * number + 2]
            for place, settings in enumerate(stack.settings):
                momentum[settings.name] = {"weight": weight[place].cpu().clone(), "bias": bias[place].cpu().clone()}
        return {"iteration": self.iteration, "momentum": momentum}

    def load_state_dict(self, state: Mapping[str, Any], classifiers: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes over the number of steps, the momentum and the classifiers of a checkpoint."""
        self.iteration = int(state["iteration"])
        for number, stack in enumerate(self.stacks):
            for offset, part in enumerate(("weight", "bias")):
                for place, settings in enumerate(stack.settings):
                    self._parameters[2 * number + offset][place] = classifiers[settings.name][part]
                    self._momentum[2 * number + offset][place] = state["momentum"][settings.name][part]

    def _losses(self, stack: ClassifierStack, rows: Tensor, labels: Tensor) -> Tensor:
        """Mean loss ``[L]`` of each classifier of a stack."""
        logits = stack.logits(rows)  # [B, L, C]
        count = logits.shape[1]
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.repeat_interleave(count), weight=self._class_weights, reduction="none"
        )
        # Not the weighted mean of torch: its divisor changes with the classes of a batch, and so with how many
        # processes share one.
        return losses.view(-1, count).mean(dim=0)


def scaled_learning_rate(settings: ClassifierSettings, global_batch_size: int) -> float:
    """The learning rate that a classifier starts with."""
    assert settings.learning_rate is not None, "a classifier without a learning rate cannot be trained"
    return settings.learning_rate * global_batch_size / REFERENCE_BATCH


def class_weights(labels: IntArray, num_classes: int, weighting: str) -> Tensor | None:
    """What an image of each class weighs in the loss.

    Args:
        labels: ``[N]`` of the training set.
        num_classes: width of the result.
        weighting: ``none``, or ``balanced`` for weights that give every class that occurs the same share of the loss,
            1 on average over the images.

    Returns:
        ``[C]`` float32, or None where every image weighs the same.

    Raises:
        ValueError: for another weighting.
    """
    if weighting not in CLASS_WEIGHTINGS:
        raise ValueError(f"class weighting {weighting!r} is not one of {', '.join(CLASS_WEIGHTINGS)}")
    if weighting == "none":
        return None
    counts = np.bincount(labels, minlength=num_classes)
    weights = len(labels) / ((counts > 0).sum() * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts > 0, weights, 0.0)).float()


class LinearCheckpoint:
    """The file from which a training of linear classifiers goes on, exactly as if it had not been stopped.

    Args:
        folder: of the run; its file is ``linear_checkpoint.pth``.
        settings: plain values that decide the classifiers; a file with others is not resumed from.
        probe: features of an image, by which another backbone of the same width is noticed.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any], probe: Tensor) -> None:
        self.path = Path(folder) / CHECKPOINT_FILE
        self.settings = dict(settings)
        self.probe = probe.clone()

    def save(self, trainer: LinearTrainer) -> None:
        """Writes the state of a training; to be called by every process, of which the main one writes."""
        if not is_main_process():
            return
        content = {
            "classifiers": unstack(trainer.stacks),
            "settings": self.settings,
            "trainer": trainer.state_dict(),
            "probe": self.probe,
        }
        write_atomically(self.path, lambda file: torch.save(content, file))

    def resume(self, trainer: LinearTrainer) -> bool:
        """Takes a training to where the file is; to be called by every process.

        Returns:
            Whether there is such a file.

        Raises:
            ValueError: when the file is damaged, of other settings or another backbone, or not seen by all processes.
        """
        if self.path.exists():
            content = read_checkpoint(self.path)
            check_keys(content, CHECKPOINT_KEYS, self.path)
            saved, probe = content["settings"], content["probe"]
            differing = [
                f"{name} is {saved.get(name)!r} there and {self.settings.get(name)!r} now"
                for name in dict.fromkeys([*saved, *self.settings])
                if saved.get(name) != self.settings.get(name)
            ]
            same_shape = probe.shape == self.probe.shape
            if not differing and not (same_shape and torch.allclose(probe, self.probe, rtol=0.05, atol=0.05)):
                differing = ["the features of the first validation image differ, so the backbone is another"]
            if differing:
                raise ValueError(f"{self.path} cannot be resumed from, as {'; '.join(differing)}: {ANEW}")
            try:
                trainer.load_state_dict(content["trainer"], content["classifiers"])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.path} is damaged, its classifiers and their training do not fit ({error!r}): {ANEW}"
                ) from error
        if len(iterations := set(all_gather_objects(trainer.iteration))) > 1:
            raise ValueError(f"not all processes see the same {self.path}: they would start at {sorted(iterations)}")
        return trainer.iteration > 0


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What a protocol means for a training set and a number of processes.

    Attributes:
        protocol: the same on every process.
        labels: ``[N]`` of the training set.
        num_classes: that the classifiers know.
        global_batch_size: images of a step over all processes.
    """

    protocol: LinearProtocol
    labels: IntArray
    num_classes: int
    global_batch_size: int

    @property
    def epoch_length(self) -> int:
        """Iterations of an epoch, see `LinearProtocol`."""
        one_pass = -(-len(self.labels) // self.global_batch_size)
        return self.protocol.epoch_length or max(one_pass, MIN_EPOCH_LENGTH)

    @property
    def num_iterations(self) -> int:
        """Steps of the whole training."""
        return self.protocol.epochs * self.epoch_length

    def as_dict(self) -> dict[str, Any]:
        """What decides the classifiers, beside the images and the backbone, as plain values."""
        return {
            "learning_rates": list(self.protocol.learning_rates),
            "n_last_blocks": list(self.protocol.n_last_blocks),
            "epochs": self.protocol.epochs,
            "epoch_length": self.epoch_length,
            "global_batch_size": self.global_batch_size,
            "class_weighting": self.protocol.class_weighting,
            "seed": self.protocol.seed,
        }


def train_classifiers(
    stacks: Sequence[ClassifierStack],
    make_batches: Callable[[int, int], Batches],
    run: TrainingRun,
    val: EvaluatedSet,
    *,
    checkpoint: LinearCheckpoint | None = None,
    resume: bool = True,
) -> None:
    """Trains classifiers in place, on all processes of the run together.

    Args:
        stacks: fresh classifiers.
        make_batches: gives the batches from one iteration to another; not called when there is nothing left to do.
        run: the plan.
        val: evaluated on during the training for the log alone; nothing is decided by it here.
        checkpoint: written at every evaluation, and beside it ``linear_metrics.jsonl``; by default nothing is written.
        resume: whether to go on from the checkpoint if its file is there.

    Raises:
        ValueError: when the file cannot be resumed from, or every classifier diverges.
    """
    num_iterations, batch = run.num_iterations, run.global_batch_size
    if is_main_process():
        logger.info(
            "%d linear classifiers: %d epochs of %d iterations of %d images (%.4g passes over %d images)",
            len(run.protocol.grid),
            run.protocol.epochs,
            run.epoch_length,
            batch,
            num_iterations * batch / len(run.labels),
            len(run.labels),
        )
    trainer = LinearTrainer(
        stacks,
        num_iterations=num_iterations,
        global_batch_size=batch,
        class_weights=class_weights(run.labels, run.num_classes, run.protocol.class_weighting),
    )
    if checkpoint is not None and resume and checkpoint.resume(trainer) and is_main_process():
        logger.info("going on from %s, iteration %d of %d", checkpoint.path, trainer.iteration, num_iterations)
    if trainer.iteration == num_iterations:
        return
    period = run.protocol.eval_period_iterations or run.epoch_length
    with ExitStack() as stack:
        metrics_file = None
        if checkpoint is not None and is_main_process():
            metrics_file = stack.enter_context(MetricsFile(checkpoint.path.parent / METRICS_FILE))
            # Without what a training that went further than this one wrote.
            metrics_file.truncate_after(trainer.iteration if trainer.iteration else -1)
        batches = make_batches(trainer.iteration, num_iterations)
        remaining = (num_iterations - trainer.iteration) * batch
        for rows, labels in report_progress(batches, "linear training", batch, remaining):
            losses = trainer.step(rows, labels)
            if trainer.iteration % period == 0 or trainer.iteration == num_iterations:
                metric = run.protocol.val_metric
                best, value = best_of(trainer.stacks, val, metric)
                finite = losses[losses.isfinite()].cpu().numpy()
                if is_main_process():
                    logger.info(
                        "iteration %d of %d: lowest loss %.4f; best %s on the validation set %.4f (%s)",
                        trainer.iteration,
                        num_iterations,
                        finite.min() if len(finite) else float("nan"),
                        metric.replace("_", " "),
                        value,
                        best,
                    )
                if metrics_file is not None:
                    record = {
                        "iteration": trainer.iteration,
                        "lowest_loss": float(finite.min()) if len(finite) else None,
                        "num_diverged": len(losses) - len(finite),
                        "best": best,
                        metric: value,
                    }
                    metrics_file.append(record)
                if checkpoint is not None:
                    checkpoint.save(trainer)
