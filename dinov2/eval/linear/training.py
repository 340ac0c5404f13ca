"""One optimisation of many linear classifiers at once."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from dinov2.data.datasets.base import ImageDataset
from dinov2.data.pretraining import SampleKey, isolated_random_state
from dinov2.data.samplers import ShardedInfiniteSampler
from dinov2.distributed import all_gather_objects, all_reduce_sum, get_rank, get_world_size, is_main_process
from dinov2.eval.features import MAX_NAMED, Features, evaluating, extract_features, name_some, report_progress
from dinov2.eval.metrics.classification import (
    FloatArray,
    IntArray,
    Scores,
    check_aggregation,
    check_num_resamples,
    classification_metrics,
    score_predictions,
)
from dinov2.logging import MetricsFile
from dinov2.models.pretrained import read_checkpoint
from dinov2.utils.files import write_atomically
from dinov2.utils.seeds import derive_seed

BlockTokens = Sequence[tuple[Tensor, Tensor]]  # per block: patch tokens [B, N, D] and class token [B, D]


@dataclass(frozen=True, order=True)
class FeatureKind:
    """Which part of an image's row (see `join_block_tokens`) a classifier sees.

    Attributes:
        blocks: how many of the last blocks give their class token.
        avgpool: whether the mean of the last block's patch tokens follows them.
    """

    blocks: int
    avgpool: bool

    def width(self, embed_dim: int) -> int:
        """Number of features of this kind."""
        return embed_dim * (self.blocks + self.avgpool)

    def select(self, rows: Tensor, embed_dim: int) -> Tensor:
        """The columns of this kind ``[B, width]`` of rows ``[B, (blocks + 1) * D]``, without a copy.

        Raises:
            ValueError: when the rows hold fewer blocks.
        """
        num_blocks = rows.shape[1] // embed_dim - 1
        if not 1 <= self.blocks <= num_blocks:
            raise ValueError(f"features of {self.blocks} blocks cannot be taken from rows of {num_blocks} blocks")
        start = (num_blocks - self.blocks) * embed_dim
        return rows[:, start : start + self.width(embed_dim)]


def join_block_tokens(tokens: BlockTokens) -> Tensor:
    """Joins what several blocks make of an image into one row, of which every `FeatureKind` is a stretch.

    Args:
        tokens: of the last blocks, the last one last.

    Returns:
        The class tokens in the order of the blocks, then the mean of the last block's patch tokens:
        ``[B, (blocks + 1) * D]``.
    """
    patches, _ = tokens[-1]
    return torch.cat([*(cls for _, cls in tokens), patches.mean(dim=1)], dim=1)


class LastBlocks(nn.Module):
    """A backbone whose output joins what its last blocks make of an image.

    Args:
        model: a vision transformer with ``get_intermediate_layers``.
        num_blocks: how many of its last blocks.

    Raises:
        ValueError: for a model that cannot give the tokens of several blocks, or no block at all.
    """

    def __init__(self, model: nn.Module, num_blocks: int) -> None:
        super().__init__()
        if not callable(getattr(model, "get_intermediate_layers", None)):
            raise ValueError(f"{type(model).__name__} has no get_intermediate_layers; give a vision transformer")
        depth = getattr(model, "n_blocks", num_blocks)
        if not 1 <= num_blocks <= depth:
            raise ValueError(f"cannot take the last {num_blocks} blocks of a model of {depth}")
        self.model = model
        self.num_blocks = num_blocks

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to rows ``[B, (num_blocks + 1) * D]`` in float32; see `join_block_tokens`."""
        layers = self.model.get_intermediate_layers(images, self.num_blocks, return_class_token=True)  # type: ignore[operator]
        tokens = cast(BlockTokens, layers)
        # A mean of many patches needs more digits than half precision has.
        return join_block_tokens([(patches.float(), cls.float()) for patches, cls in tokens])


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

    def of_batch(self, images: Tensor) -> Tensor:
        """Rows ``[B, (blocks + 1) * D]`` of images ``[B, 3, H, W]``, on the device."""
        autocast = torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)
        with evaluating(self.backbone), autocast:
            rows: Tensor = self.backbone(images.to(self.device, non_blocking=True))
        return rows


Batch = tuple[Tensor, Tensor]


class BatchSource(Protocol):
    """Gives the batches of a training run; those of an iteration depend on nothing but the seed and its number.

    All processes follow one stream of images, of which iteration ``i`` takes the next ``batch_size`` times the number
    of processes; a set that is smaller than that is gone through several times.
    """

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Rows ``[B, (blocks + 1) * D]`` and labels ``[B]`` of this process for iterations ``start`` to ``stop``."""
        ...


class CachedBatches:
    """Batches of features that are already there; see `BatchSource`.

    Args:
        features: of the training set, with all labels.
        batch_size: images per process.
        seed: of the order.
        device: where the batches go.
    """

    def __init__(self, features: Features, *, batch_size: int, seed: int, device: torch.device) -> None:
        self.features = features
        self.batch_size = batch_size
        self.seed = seed
        self.device = device

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        indices = iter(_order(len(self.features), self.seed, start * self.batch_size))
        for _ in range(start, stop):
            chosen = torch.tensor(list(itertools.islice(indices, self.batch_size)))
            rows, labels = self.features.embeddings[chosen], self.features.labels[chosen]
            yield rows.to(self.device), labels.to(self.device)


class ImageBatches:
    """Batches of features of augmented images, computed when they are asked for; see `BatchSource`.

    Args:
        extraction: makes the features.
        dataset: with all labels; its own transform is left aside.
        transform: maps an RGB image to a tensor ``[3, H, W]``; what it draws depends on the seed and the image's place
            in the stream.
        batch_size: images per process.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        extraction: Extraction,
        dataset: ImageDataset,
        transform: Callable[[Any], Tensor],
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        self.extraction = extraction
        self.images = _AugmentedImages(dataset, transform, seed)
        self.batch_size = batch_size
        self.seed = seed

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """See `BatchSource`.

        Raises:
            ValueError: for an image that cannot be read, or features that are not finite; the images are named.
        """
        keys = _Keys(len(self.images), self.seed, start * self.batch_size, stop * self.batch_size)
        device = self.extraction.device
        loader: DataLoader[Any] = DataLoader(
            self.images,
            sampler=keys,
            batch_size=self.batch_size,
            num_workers=self.extraction.num_workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a seed; the caller's generator must not notice
        )
        for images, labels, paths, problems in loader:
            if problems:
                distinct = list(dict.fromkeys(problems))  # a small set comes several times in a batch
                raise ValueError(f"the training set needs every image, but {'; '.join(distinct[:MAX_NAMED])}")
            rows = self.extraction.of_batch(images)
            finite = rows.isfinite().all(dim=1)
            if not bool(finite.all()):
                bad = [path for path, good in zip(paths, finite.tolist(), strict=True) if not good]
                raise ValueError(f"features of {len(bad)} training images are NaN or infinite: {name_some(bad)}")
            yield rows, labels.to(device)


class _Keys(Sampler[SampleKey]):
    """This process's share of the stream, from one of its samples to another."""

    def __init__(self, num_images: int, seed: int, start: int, stop: int) -> None:
        self.num_images = num_images
        self.seed = seed
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[SampleKey]:
        world_size = get_world_size()
        positions = range(self.start * world_size + get_rank(), self.stop * world_size, world_size)
        return map(SampleKey, positions, _order(self.num_images, self.seed, self.start))


class _AugmentedImages(Dataset[tuple[Tensor | None, int, str, str]]):
    """Image, label, path, and what kept the image from being read, empty where nothing did."""

    def __init__(self, dataset: ImageDataset, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.labels = dataset.get_targets()

    def __len__(self) -> int:
        return len(self.dataset)

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
        seed=derive_seed(seed, "linear order") % 2**32,
        advance=advance,
        use_new_shuffle_tensor_slice=True,
    )


# As published; each is multiplied by the images of a step / 256.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
N_LAST_BLOCKS = (1, 4)
INITIAL_STD = 0.01


@dataclass(frozen=True)
class ClassifierSettings:
    """What tells one classifier of the grid from the others.

    Attributes:
        kind: the features that it sees.
        learning_rate: of the grid, before it is scaled by the batch size; None where it is not known.
    """

    kind: FeatureKind
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """Its name, such as ``blocks=4 avgpool lr=0.001``; the number is exact, so names differ where settings do."""
        pooled = " avgpool" if self.kind.avgpool else ""
        rate = "" if self.learning_rate is None else f" lr={self.learning_rate!r}"
        return f"blocks={self.kind.blocks}{pooled}{rate}"


def classifier_grid(
    learning_rates: Iterable[float] = LEARNING_RATES,
    n_last_blocks: Iterable[int] = N_LAST_BLOCKS,
    avgpool: Iterable[bool] = (False, True),
) -> tuple[ClassifierSettings, ...]:
    """All combinations; by default the 52 that were published.

    Upstream names a classifier by its scaled learning rate with five decimals, so that at a batch of 128 four of the 52
    replace others of the same name, and at 16 twelve. Here none is lost.

    Raises:
        ValueError: for learning rates that are not positive, numbers of blocks below 1, an empty list, or one value
            given twice.
    """
    rates, blocks = [float(rate) for rate in learning_rates], list(n_last_blocks)
    for name, values in (("learning rates", rates), ("numbers of last blocks", blocks)):
        if not values or not all(value > 0 and math.isfinite(value) for value in values):
            raise ValueError(f"the {name} must be one or more positive numbers, found {values}")
        if len(set(values)) < len(values):
            raise ValueError(f"the {name} hold a value twice: {values}")
    pooled = tuple(avgpool)
    return tuple(ClassifierSettings(FeatureKind(n, pool), rate) for n in blocks for pool in pooled for rate in rates)


class ClassifierStack:
    """The classifiers that see the same features: one matrix product serves all of them.

    Attributes:
        kind: the features that they see.
        settings: of the ``L`` classifiers.
        weight: ``[L, C, F]``.
        bias: ``[L, C]``.
    """

    def __init__(self, settings: Sequence[ClassifierSettings], weight: Tensor, bias: Tensor) -> None:
        """Takes over the parameters, which are trained in place.

        Raises:
            ValueError: when shapes and settings do not fit together.
        """
        self.settings = tuple(settings)
        self.kind = self.settings[0].kind
        if {setting.kind for setting in settings} != {self.kind}:
            raise ValueError("the classifiers of a stack must see the same features")
        if weight.ndim != 3 or len(weight) != len(self.settings) or bias.shape != weight.shape[:2]:
            raise ValueError(
                f"{len(self.settings)} classifiers need weights [L, C, F] and biases [L, C], found "
                f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        self.weight = weight
        self.bias = bias

    @property
    def embed_dim(self) -> int:
        """Width of the backbone."""
        return self.weight.shape[2] // (self.kind.blocks + self.kind.avgpool)

    def logits(self, rows: Tensor) -> Tensor:
        """Maps rows ``[B, (blocks + 1) * D]`` to the logits ``[B, L, C]`` of every classifier."""
        features = self.kind.select(rows, self.embed_dim)
        flat = F.linear(features, self.weight.flatten(0, 1), self.bias.flatten())
        return flat.view(len(rows), *self.bias.shape)

    def logits_of(self, place: int, rows: Tensor) -> Tensor:
        """Maps rows ``[B, (blocks + 1) * D]`` to the logits ``[B, C]`` of the classifier at one place of the stack."""
        return F.linear(self.kind.select(rows, self.embed_dim), self.weight[place], self.bias[place])


def init_classifiers(
    grid: Sequence[ClassifierSettings],
    embed_dim: int,
    num_classes: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[ClassifierStack, ...]:
    """Builds the classifiers of a grid: weights normal with standard deviation 0.01, biases 0.

    The weights of a classifier depend on the seed and its settings alone, not on the rest of the grid.

    Returns:
        One stack per kind of features, in the order in which the kinds come in the grid.
    """
    tensors = {}
    for settings in grid:
        generator = torch.Generator().manual_seed(derive_seed(seed, "linear classifier", settings.name))
        weight = torch.randn(num_classes, settings.kind.width(embed_dim), generator=generator) * INITIAL_STD
        tensors[settings] = (weight, torch.zeros(num_classes))
    return stack_classifiers(tensors, device=device)


def stack_classifiers(
    tensors: Mapping[ClassifierSettings, tuple[Tensor, Tensor]], *, device: torch.device | str = "cpu"
) -> tuple[ClassifierStack, ...]:
    """Puts classifiers, each of weight ``[C, F]`` and bias ``[C]``, into stacks by the features that they see."""
    stacks = []
    for kind in dict.fromkeys(settings.kind for settings in tensors):
        members = [settings for settings in tensors if settings.kind == kind]
        weight, bias = (torch.stack([tensors[settings][part].float() for settings in members]) for part in range(2))
        stacks.append(ClassifierStack(members, weight.to(device), bias.to(device)))
    return tuple(stacks)


def unstack(stacks: Iterable[ClassifierStack]) -> dict[str, dict[str, Any]]:
    """Every classifier by name: ``weight`` ``[C, F]`` and ``bias`` ``[C]`` on the CPU, and its settings."""
    return {
        settings.name: {
            # Copies: a file would otherwise hold the whole stack once per classifier.
            "weight": stack.weight[place].detach().cpu().clone(),
            "bias": stack.bias[place].detach().cpu().clone(),
            "blocks": settings.kind.blocks,
            "avgpool": settings.kind.avgpool,
            "learning_rate": settings.learning_rate,
        }
        for stack in stacks
        for place, settings in enumerate(stack.settings)
    }


METRICS = ("accuracy", "balanced_accuracy", "auroc", "average_precision")
ROWS_AT_A_TIME = 8192


@dataclass(frozen=True, eq=False)
class JudgedSet:
    """Features of a labelled set, and what its labels mean to the classifiers.

    Attributes:
        features: with all labels.
        classes: of the labels.
        class_mapping: ``[len(classes)]``, the classifiers' class that stands for each; None where they are the same.
    """

    features: Features
    classes: tuple[str, ...]
    class_mapping: IntArray | None = None

    @property
    def labels(self) -> IntArray:
        """``[N]``."""
        return np.asarray(self.features.labels.numpy(), dtype=np.int64)


def probabilities_of(stack: ClassifierStack, place: int, judged: JudgedSet) -> FloatArray:
    """Class probabilities ``[N, C]`` of one classifier, over the classes of the set; NaN where it has diverged."""
    device = stack.weight.device
    mapping = None if judged.class_mapping is None else torch.from_numpy(judged.class_mapping)
    chunks = []
    for rows in judged.features.embeddings.split(ROWS_AT_A_TIME):
        logits = stack.logits_of(place, rows.to(device)).cpu()
        chunks.append((logits if mapping is None else logits[:, mapping]).double().softmax(dim=1))
    return np.asarray(torch.cat(chunks).numpy())


def judge_all(
    stacks: Sequence[ClassifierStack], judged: JudgedSet
) -> Iterator[tuple[ClassifierSettings, FloatArray | None]]:
    """Every classifier with its probabilities ``[N, C]``; None for one that has diverged."""
    for stack in stacks:
        for place, settings in enumerate(stack.settings):
            probabilities = probabilities_of(stack, place, judged)
            yield settings, probabilities if np.isfinite(probabilities).all() else None


def best_of(stacks: Sequence[ClassifierStack], judged: JudgedSet, metric: str) -> tuple[str, float]:
    """Name and figure of the classifier with the largest metric over images; of equal ones the first.

    Raises:
        ValueError: when all have diverged.
    """
    figures = {
        settings.name: classification_metrics(probabilities, judged.labels)[metric]
        for settings, probabilities in judge_all(stacks, judged)
        if probabilities is not None
    }
    best = choose(figures)
    return best, figures[best]


def score_all(
    stacks: Sequence[ClassifierStack], judged: JudgedSet, *, aggregation: str, top_k: int
) -> tuple[dict[str, Scores], list[str]]:
    """Scores of every classifier, without intervals, and the names of those that have diverged and have none."""
    scores, diverged = {}, []
    for settings, probabilities in judge_all(stacks, judged):
        if probabilities is None:
            diverged.append(settings.name)
            continue
        scores[settings.name] = score_predictions(
            probabilities,
            judged.labels,
            judged.features.group_ids,
            aggregation=aggregation,
            top_k=top_k,
            num_resamples=0,
        )
    return scores, diverged


def choose(figures: Mapping[str, float]) -> str:
    """Name of the largest figure; of equal ones the first.

    Raises:
        ValueError: when there is none.
    """
    if not figures:
        raise ValueError("every classifier has diverged: lower the learning rates")
    return max(figures, key=lambda name: figures[name])


def check_metric(metric: str, classes: Sequence[str], labels: IntArray) -> None:
    """Checks that a metric exists on the set by which the best classifier is chosen.

    Raises:
        ValueError: for an unknown metric, or one that needs two classes that both occur.
    """
    if metric not in METRICS:
        raise ValueError(f"the metric {metric!r} is not one of {', '.join(METRICS)}")
    if metric in ("auroc", "average_precision") and (len(classes) != 2 or len(np.unique(labels)) != 2):
        raise ValueError(
            f"{metric} needs two classes that both occur in the validation set; it shows "
            f"{len(np.unique(labels))} of {len(classes)}: choose by accuracy or balanced_accuracy"
        )


MOMENTUM = 0.9
REFERENCE_BATCH = 256
CLASS_WEIGHTINGS = ("none", "balanced")


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
        self._base_rates = [_rates(stack, global_batch_size) for stack in self.stacks for _ in range(2)]
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
        gradients = torch.autograd.grad(losses.sum(), self._parameters)
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        self._update(_average(gradients))
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

    def _update(self, gradients: Sequence[Tensor]) -> None:
        factor = self.learning_rate_factor(self.iteration)
        for parameter, momentum, gradient, rates in zip(
            self._parameters, self._momentum, gradients, self._base_rates, strict=True
        ):
            momentum.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(momentum * (rates * factor).view(-1, *[1] * (parameter.ndim - 1)))


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


def _rates(stack: ClassifierStack, global_batch_size: int) -> Tensor:
    rates = [scaled_learning_rate(settings, global_batch_size) for settings in stack.settings]
    return torch.tensor(rates, device=stack.weight.device)


def _average(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Means over all processes, by one collective."""
    if get_world_size() == 1:
        return gradients
    mean = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / get_world_size()
    pieces = mean.split([gradient.numel() for gradient in gradients])
    return [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]


CHECKPOINT_FILE = "linear_checkpoint.pth"
HEAD_FILE = "linear_head.pth"
CHECKPOINT_KEYS = ("classifiers", "settings", "trainer", "probe")
HEAD_KEYS = ("weight", "bias", "blocks", "avgpool", "classes")

_ANEW = "start anew (--no-resume) or in another folder (--output-dir)"

Classifiers = dict[ClassifierSettings, tuple[Tensor, Tensor]]


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
            _check_keys(content, CHECKPOINT_KEYS, self.path)
            self._check_same(content)
            try:
                trainer.load_state_dict(content["trainer"], content["classifiers"])
            except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{self.path} is damaged, its classifiers and their training do not fit ({error!r}): {_ANEW}"
                ) from error
        if len(iterations := set(all_gather_objects(trainer.iteration))) > 1:
            raise ValueError(f"not all processes see the same {self.path}: they would start at {sorted(iterations)}")
        return trainer.iteration > 0

    def _check_same(self, content: Mapping[str, Any]) -> None:
        saved = content["settings"]
        differing = [
            f"{name} is {saved.get(name)!r} there and {self.settings.get(name)!r} now"
            for name in dict.fromkeys([*saved, *self.settings])
            if saved.get(name) != self.settings.get(name)
        ]
        same_shape = content["probe"].shape == self.probe.shape
        if not differing and not (same_shape and torch.allclose(content["probe"], self.probe, rtol=0.05, atol=0.05)):
            differing = ["the features of the first validation image differ, so the backbone is another"]
        if differing:
            raise ValueError(f"{self.path} cannot be resumed from, as {'; '.join(differing)}: {_ANEW}")


def write_head(folder: str | Path, stack: ClassifierStack, place: int, classes: tuple[str, ...]) -> None:
    """Writes one classifier alone into ``linear_head.pth``.

    The file holds ``weight`` ``[C, F]``, ``bias`` ``[C]``, ``blocks`` and ``avgpool`` (the features that it sees, see
    `FeatureKind`), and the names of its ``classes``.
    """
    content = {
        "weight": stack.weight[place].detach().cpu().clone(),
        "bias": stack.bias[place].detach().cpu().clone(),
        "blocks": stack.kind.blocks,
        "avgpool": stack.kind.avgpool,
        "classes": list(classes),
    }
    write_atomically(Path(folder) / HEAD_FILE, lambda file: torch.save(content, file))


def read_classifiers(path: str | Path) -> tuple[Classifiers, tuple[str, ...]]:
    """Reads trained classifiers and the names of their classes, from a checkpoint or the file of one alone.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged or holds something else.
    """
    content = read_checkpoint(path)
    if "classifiers" in content:
        _check_keys(content, CHECKPOINT_KEYS, path)
        _check_keys(content["settings"], ("classes",), path)
        entries, classes = content["classifiers"].values(), content["settings"]["classes"]
    else:
        _check_keys(content, HEAD_KEYS, path)
        entries, classes = [content], content["classes"]
    classifiers = {}
    for entry in entries:
        _check_types(entry, path)
        kind = FeatureKind(entry["blocks"], entry["avgpool"])
        classifiers[ClassifierSettings(kind, entry.get("learning_rate"))] = (entry["weight"], entry["bias"])
        fits = entry["weight"].ndim == 2 and entry["weight"].shape[1] % kind.width(1) == 0
        if not fits or entry["bias"].shape != entry["weight"].shape[:1] or len(entry["weight"]) != len(classes):
            raise ValueError(
                f"{path}: weight {tuple(entry['weight'].shape)} and bias {tuple(entry['bias'].shape)} do not fit "
                f"{len(classes)} classes and features of {kind}"
            )
    return classifiers, tuple(classes)


def _check_types(entry: Any, path: str | Path) -> None:
    kinds = {"weight": Tensor, "bias": Tensor, "blocks": int, "avgpool": bool}
    is_classifier = isinstance(entry, Mapping) and all(isinstance(entry.get(key), kinds[key]) for key in kinds)
    if not is_classifier or entry["blocks"] < 1:
        raise ValueError(f"{path} is damaged: a classifier must have the tensors weight and bias, blocks and avgpool")


def _check_keys(content: Mapping[str, Any], keys: tuple[str, ...], path: str | Path) -> None:
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path} is no file of linear classifiers: it lacks {', '.join(missing)}")


LEAST_EPOCH_LENGTH = 400


@dataclass(frozen=True, kw_only=True)
class LinearProtocol:
    """What decides the figures of a linear evaluation, beside the backbone and the images.

    Attributes:
        learning_rates: of the grid, for 256 images per step.
        n_last_blocks: of the grid; every number is tried with and without the mean patch token.
        epochs: how many.
        epoch_length: iterations of an epoch (published: 1250); by default one pass over the training set, at least 400
            iterations, as the few steps of a small set would leave the classifiers near where they started.
        eval_period_iterations: iterations between two looks at the validation set, each with a checkpoint; by default
            an epoch.
        batch_size: images of a step per process.
        class_weighting: ``none``, or ``balanced`` so that rare classes count as much as frequent ones.
        val_metric: by which the best classifier is chosen, see `METRICS`.
        part_aggregation: how a part joins its photos, see `score_parts`.
        part_top_k: photos that count with ``topk_mean``.
        num_resamples: resamples of parts behind the intervals; 0 for none.
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
    val_metric: str = "accuracy"
    part_aggregation: str = "max"
    part_top_k: int = 3
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        classifier_grid(self.learning_rates, self.n_last_blocks)
        check_aggregation(self.part_aggregation, self.part_top_k)
        for name in ("epochs", "epoch_length", "eval_period_iterations", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        check_num_resamples(self.num_resamples)
        for name, allowed in (("class_weighting", CLASS_WEIGHTINGS), ("val_metric", METRICS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @property
    def grid(self) -> tuple[ClassifierSettings, ...]:
        """The classifiers."""
        return classifier_grid(self.learning_rates, self.n_last_blocks)

    def length_of_epoch(self, num_images: int, global_batch_size: int) -> int:
        """Iterations of an epoch over so many images."""
        if self.epoch_length is not None:
            return self.epoch_length
        return max(-(-num_images // global_batch_size), LEAST_EPOCH_LENGTH)

    def judging(self) -> dict[str, Any]:
        """What decides how trained classifiers are chosen and scored, as plain values."""
        names = ("val_metric", "part_aggregation", "part_top_k", "num_resamples", "seed")
        return {name: getattr(self, name) for name in names}


logger = logging.getLogger("dinov2")

METRICS_FILE = "linear_metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What a protocol means for a training set and a number of processes.

    Attributes:
        protocol: the same on every process.
        labels: ``[N]`` of the training set.
        num_classes: that the classifiers know.
        epoch_length: iterations of an epoch.
        global_batch_size: images of a step over all processes.
    """

    protocol: LinearProtocol
    labels: IntArray
    num_classes: int
    epoch_length: int
    global_batch_size: int

    @classmethod
    def plan(cls, protocol: LinearProtocol, dataset: ImageDataset, num_classes: int) -> "TrainingRun":
        """Plans the training on a dataset, and says so in the log."""
        global_batch_size = protocol.batch_size * get_world_size()
        run = cls(
            protocol=protocol,
            labels=dataset.get_targets(),
            num_classes=num_classes,
            epoch_length=protocol.length_of_epoch(len(dataset), global_batch_size),
            global_batch_size=global_batch_size,
        )
        if is_main_process():
            logger.info(
                "%d linear classifiers: %d epochs of %d iterations of %d images (%.4g passes over %d images)",
                len(protocol.grid),
                protocol.epochs,
                run.epoch_length,
                global_batch_size,
                run.num_iterations * global_batch_size / len(dataset),
                len(dataset),
            )
        return run

    @property
    def num_iterations(self) -> int:
        """Steps of the whole training."""
        return self.protocol.epochs * self.epoch_length

    @property
    def eval_period(self) -> int:
        """Steps between two looks at the validation set."""
        return self.protocol.eval_period_iterations or self.epoch_length

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
    make_source: Callable[[], BatchSource],
    run: TrainingRun,
    val: JudgedSet,
    *,
    checkpoint: LinearCheckpoint | None = None,
    resume: bool = True,
) -> None:
    """Trains classifiers in place, on all processes of the run together.

    Args:
        stacks: fresh classifiers.
        make_source: gives the source of the batches; not called when there is nothing left to do.
        run: the plan.
        val: looked at during the training for the log alone; nothing is decided by it here.
        checkpoint: written at every look, and beside it ``linear_metrics.jsonl``; by default nothing is written.
        resume: whether to go on from the checkpoint if its file is there.

    Raises:
        ValueError: when the file cannot be resumed from, or every classifier diverges.
    """
    trainer = LinearTrainer(
        stacks,
        num_iterations=run.num_iterations,
        global_batch_size=run.global_batch_size,
        class_weights=class_weights(run.labels, run.num_classes, run.protocol.class_weighting),
    )
    if checkpoint is not None and resume and checkpoint.resume(trainer) and is_main_process():
        logger.info("going on from %s, iteration %d of %d", checkpoint.path, trainer.iteration, run.num_iterations)
    if trainer.iteration == run.num_iterations:
        return
    remaining = run.num_iterations - trainer.iteration
    with ExitStack() as stack:
        metrics = None
        if checkpoint is not None and is_main_process():
            metrics = stack.enter_context(_open_metrics(checkpoint.path.parent, trainer.iteration))
        batches = make_source().batches(trainer.iteration, run.num_iterations)
        for rows, labels in report_progress(
            batches, "linear training", run.global_batch_size, remaining * run.global_batch_size
        ):
            losses = trainer.step(rows, labels)
            if trainer.iteration % run.eval_period == 0 or trainer.iteration == run.num_iterations:
                record = _look(trainer, losses.cpu().numpy(), run, val)
                if metrics is not None:
                    metrics.append(record)
                if checkpoint is not None:
                    checkpoint.save(trainer)


def _look(trainer: LinearTrainer, losses: np.ndarray[Any, Any], run: TrainingRun, val: JudgedSet) -> dict[str, Any]:
    """What there is to say after a step, which the main process puts into the log."""
    metric = run.protocol.val_metric
    best, figure = best_of(trainer.stacks, val, metric)
    finite = losses[np.isfinite(losses)]
    record = {
        "iteration": trainer.iteration,
        "lowest_loss": float(finite.min()) if len(finite) else None,
        "num_diverged": len(losses) - len(finite),
        "best": best,
        metric: figure,
    }
    if is_main_process():
        logger.info(
            "iteration %d of %d: lowest loss %.4f; best %s on the validation set %.4f (%s)",
            trainer.iteration,
            run.num_iterations,
            finite.min() if len(finite) else float("nan"),
            metric.replace("_", " "),
            figure,
            best,
        )
    return record


def _open_metrics(folder: Path, iteration: int) -> MetricsFile:
    """The file of numbers, without what a training that went further than this one wrote."""
    metrics = MetricsFile(folder / METRICS_FILE)
    metrics.truncate_after(iteration if iteration else -1)
    return metrics
