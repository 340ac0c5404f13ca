"""Many linear classifiers with settings of their own, computed together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.eval.linear.features import FeatureKind
from dinov2.utils.seeds import derive_seed

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
