"""Linear classifiers of a frozen backbone: their features, the grid of settings, parameters and files."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.eval.features import Features
from dinov2.eval.metrics.classification import (
    CHOICE_METRICS,
    FloatArray,
    IntArray,
    choice_key,
    classification_metrics,
)
from dinov2.models.pretrained import read_checkpoint
from dinov2.utils.files import write_atomically
from dinov2.utils.seeds import derive_seed

BlockTokens = Sequence[tuple[Tensor, Tensor]]  # per block: patch tokens [B, N, D] and class token [B, D]
# As published; each is multiplied by the images of a step / 256.
LEARNING_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
N_LAST_BLOCKS = (1, 4)
INITIAL_STD = 0.01
METRICS = CHOICE_METRICS
ROWS_AT_A_TIME = 8192
HEAD_FILE = "linear_head.pth"
CHECKPOINT_KEYS = ("classifiers", "settings", "trainer", "probe")
HEAD_KEYS = ("weight", "bias", "blocks", "avgpool", "classes")


@dataclass(frozen=True, order=True)
class FeatureKind:
    """The stretch of an image's row of features (see `join_block_tokens`) that a classifier takes.

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
    """Joins the tokens of several blocks into one row per image, of which every `FeatureKind` is a stretch.

    Args:
        tokens: of the last blocks, the last one last.

    Returns:
        The class tokens in the order of the blocks, then the mean of the last block's patch tokens:
        ``[B, (blocks + 1) * D]``.
    """
    patches, _ = tokens[-1]
    return torch.cat([*(cls for _, cls in tokens), patches.mean(dim=1)], dim=1)


class LastBlocks(nn.Module):
    """A backbone whose output joins the tokens of its last blocks.

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
class ClassifierSettings:
    """One classifier of the grid.

    Attributes:
        kind: its features.
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
    """The classifiers of one kind of features: one matrix product serves all of them.

    Attributes:
        kind: of their features.
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

    A classifier's weights depend on the seed and its settings alone, not on the rest of the grid.

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
    """Puts classifiers, each of weight ``[C, F]`` and bias ``[C]``, into stacks by their kind of features."""
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


@dataclass(frozen=True, eq=False)
class EvaluatedSet:
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


def probabilities_of(stack: ClassifierStack, place: int, evaluated: EvaluatedSet) -> FloatArray:
    """Class probabilities ``[N, C]`` of one classifier, over the classes of the set; NaN where it has diverged."""
    device = stack.weight.device
    mapping = None if evaluated.class_mapping is None else torch.from_numpy(evaluated.class_mapping)
    chunks = []
    for rows in evaluated.features.embeddings.split(ROWS_AT_A_TIME):
        logits = stack.logits_of(place, rows.to(device)).cpu()
        chunks.append((logits if mapping is None else logits[:, mapping]).double().softmax(dim=1))
    return np.asarray(torch.cat(chunks).numpy())


def all_probabilities(
    stacks: Sequence[ClassifierStack], evaluated: EvaluatedSet
) -> Iterator[tuple[ClassifierSettings, FloatArray | None]]:
    """Every classifier with its probabilities ``[N, C]``; None for one that has diverged."""
    for stack in stacks:
        for place, settings in enumerate(stack.settings):
            probabilities = probabilities_of(stack, place, evaluated)
            yield settings, probabilities if np.isfinite(probabilities).all() else None


def best_of(stacks: Sequence[ClassifierStack], evaluated: EvaluatedSet, metric: str) -> tuple[str, float]:
    """Name and value of the classifier that `choose` takes, by metrics over images.

    Raises:
        ValueError: when all have diverged.
    """
    values = {
        settings.name: classification_metrics(probabilities, evaluated.labels)
        for settings, probabilities in all_probabilities(stacks, evaluated)
        if probabilities is not None
    }
    best = choose(values, metric)
    return best, values[best][metric]


def choose(values: Mapping[str, Mapping[str, float]], metric: str) -> str:
    """Name of the classifier with the largest value of a metric.

    Of equal ones, the first. Where the metric only ranks, many are perfect on few images and differ by whether their
    scores lie on the right sides of one half: of equal ones the balanced accuracy decides first.

    Args:
        values: metrics by name of the classifier.
        metric: that decides.

    Raises:
        ValueError: when there is no classifier.
    """
    if not values:
        raise ValueError("every classifier has diverged: lower the learning rates")
    return max(values, key=lambda name: choice_key(values[name], metric))


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


def write_head(folder: str | Path, stack: ClassifierStack, place: int, classes: tuple[str, ...]) -> None:
    """Writes one classifier alone into ``linear_head.pth``.

    The file holds ``weight`` ``[C, F]``, ``bias`` ``[C]``, ``blocks`` and ``avgpool`` (see `FeatureKind`), and the
    names of its ``classes``.
    """
    content = {
        "weight": stack.weight[place].detach().cpu().clone(),
        "bias": stack.bias[place].detach().cpu().clone(),
        "blocks": stack.kind.blocks,
        "avgpool": stack.kind.avgpool,
        "classes": list(classes),
    }
    write_atomically(Path(folder) / HEAD_FILE, lambda file: torch.save(content, file))


def read_classifiers(path: str | Path) -> tuple[dict[ClassifierSettings, tuple[Tensor, Tensor]], tuple[str, ...]]:
    """Reads trained classifiers and the names of their classes, from a checkpoint or the file of one alone.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged or holds something else.
    """
    content = read_checkpoint(path)
    if "classifiers" in content:
        check_keys(content, CHECKPOINT_KEYS, path)
        check_keys(content["settings"], ("classes",), path)
        entries, classes = content["classifiers"].values(), content["settings"]["classes"]
    else:
        check_keys(content, HEAD_KEYS, path)
        entries, classes = [content], content["classes"]
    classifiers = {}
    types = {"weight": Tensor, "bias": Tensor, "blocks": int, "avgpool": bool}
    for entry in entries:
        complete = isinstance(entry, Mapping) and all(isinstance(entry.get(key), types[key]) for key in types)
        if not complete or entry["blocks"] < 1:
            raise ValueError(
                f"{path} is damaged: a classifier must have the tensors weight and bias, blocks and avgpool"
            )
        kind = FeatureKind(entry["blocks"], entry["avgpool"])
        classifiers[ClassifierSettings(kind, entry.get("learning_rate"))] = (entry["weight"], entry["bias"])
        fits = entry["weight"].ndim == 2 and entry["weight"].shape[1] % kind.width(1) == 0
        if not fits or entry["bias"].shape != entry["weight"].shape[:1] or len(entry["weight"]) != len(classes):
            raise ValueError(
                f"{path}: weight {tuple(entry['weight'].shape)} and bias {tuple(entry['bias'].shape)} do not fit "
                f"{len(classes)} classes and features of {kind}"
            )
    return classifiers, tuple(classes)


def check_keys(content: Mapping[str, Any], keys: tuple[str, ...], path: str | Path) -> None:
    """Raises ValueError for a file of something else."""
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path} is no file of linear classifiers: it lacks {', '.join(missing)}")
