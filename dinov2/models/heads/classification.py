"""Heads that give an image its classes: a linear layer or a small perceptron on pooled tokens.

Reference: Oquab et al., DINOv2 (2023), appendix B.3 (linear evaluation on one and four blocks).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.heads.features import Features, check_num_blocks

INITIAL_STD = 0.01


def _class_tokens(features: Features) -> Tensor:
    return torch.cat([cls for _, cls in features], dim=1)


def _mean_patches(features: Features) -> Tensor:
    return torch.cat([patches.mean(dim=(2, 3)) for patches, _ in features], dim=1)


def _class_tokens_and_last_mean(features: Features) -> Tensor:
    return torch.cat([_class_tokens(features), _mean_patches(features[-1:])], dim=1)


# Name -> (rows [B, F] from features, F as a multiple of D for n blocks).
_POOLINGS: Mapping[str, tuple[Callable[[Features], Tensor], Callable[[int], int]]] = MappingProxyType(
    {
        "cls": (_class_tokens, lambda n: n),
        "cls_mean": (_class_tokens_and_last_mean, lambda n: n + 1),
        "mean": (_mean_patches, lambda n: n),
    }
)
POOLINGS = tuple(_POOLINGS)


def pool_tokens(features: Features, pooling: str) -> Tensor:
    """Pools the tokens of every image to one row.

    Args:
        features: of ``n`` blocks of width ``D``.
        pooling: "cls" for the class tokens of all blocks; "cls_mean" for these and then the mean patch of the last
            block, as in the released classifiers; "mean" for the mean patches of all blocks.

    Returns:
        ``[B, F]``, where ``F`` is `pooled_width`.
    """
    return _POOLINGS[pooling][0](features)


def pooled_width(embed_dim: int, num_blocks: int, pooling: str) -> int:
    """Width ``F`` of the rows of `pool_tokens`.

    Raises:
        ValueError: for an unknown pooling.
    """
    if pooling not in _POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}; allowed: {', '.join(POOLINGS)}")
    return embed_dim * _POOLINGS[pooling][1](num_blocks)


class Standardize(nn.BatchNorm1d):
    """Features with mean 0 and variance 1 over the images: those of the batch in training, running ones afterwards.

    What all images share outweighs what tells them apart in features of photos of one kind; without it, a linear layer
    learns the shared part for a long time. A batch of one image is standardised by the running statistics.

    Args:
        num_features: width of the rows.

    Reference: He et al., "Masked Autoencoders Are Scalable Vision Learners" (2022), appendix A.1, linear probing.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, affine=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Standardises rows ``[B, F]``, in float32 or wider."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        use_batch = self.training and len(rows) > 1
        return F.batch_norm(
            rows, self.running_mean, self.running_var, training=use_batch, momentum=self.momentum or 0.0, eps=self.eps
        )


class ClassificationHead(nn.Module, ABC):
    """Common part of the classification heads: pooled rows, then classes.

    The two steps can be called apart, so that the photos of a part can be joined in between.

    Args:
        embed_dim: width ``D`` of the backbone.
        num_blocks: blocks whose features come in.
        pooling: see `pool_tokens`.
        standardize: whether pooled rows are standardised, see `Standardize`.

    Raises:
        ValueError: for an unknown pooling.
    """

    def __init__(self, embed_dim: int, *, num_blocks: int, pooling: str, standardize: bool = False) -> None:
        super().__init__()
        self.num_blocks = num_blocks
        self.pooling = pooling
        self.in_features = pooled_width(embed_dim, num_blocks, pooling)
        self.standardize = Standardize(self.in_features) if standardize else nn.Identity()

    def pool(self, features: Features) -> Tensor:
        """Pools features to rows ``[B, in_features]``."""
        check_num_blocks(features, self.num_blocks, type(self).__name__)
        rows: Tensor = self.standardize(pool_tokens(features, self.pooling))
        return rows

    @abstractmethod
    def classify(self, rows: Tensor) -> Tensor:
        """Maps rows ``[B, in_features]`` to logits ``[B, C]``."""

    def forward(self, features: Features) -> Tensor:
        """Maps features to logits ``[B, C]``."""
        return self.classify(self.pool(features))


class LinearClassifier(ClassificationHead):
    """One linear layer on pooled tokens, with the parameter names ``weight`` and ``bias`` of the released heads.

    Args:
        embed_dim: width ``D`` of the backbone.
        num_classes: classes ``C``.
        num_blocks: blocks whose features come in; released heads use the last 1 or 4.
        pooling: see `pool_tokens`; released heads use "cls_mean".
        dropout: share of the pooled features set to zero in training, in [0, 1).
        standardize: see `ClassificationHead`; released heads do not.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        num_blocks: int = 1,
        pooling: str = "cls_mean",
        dropout: float = 0.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_blocks=num_blocks, pooling=pooling, standardize=standardize)
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.empty(num_classes, self.in_features))
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values: weights normal with standard deviation 0.01, biases 0."""
        nn.init.normal_(self.weight, std=INITIAL_STD)
        nn.init.zeros_(self.bias)

    def classify(self, rows: Tensor) -> Tensor:
        return F.linear(self.dropout(rows), self.weight, self.bias)


class MLPClassifier(ClassificationHead):
    """Layer norm, one hidden layer with GELU and dropout, then a linear layer, on pooled tokens.

    Args:
        embed_dim: width ``D`` of the backbone.
        num_classes: classes ``C``.
        hidden_dim: width of the hidden layer.
        num_blocks: blocks whose features come in.
        pooling: see `pool_tokens`.
        dropout: share of the hidden values set to zero in training, in [0, 1).
        standardize: see `ClassificationHead`; released heads do not.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        *,
        hidden_dim: int = 512,
        num_blocks: int = 1,
        pooling: str = "cls_mean",
        dropout: float = 0.0,
        standardize: bool = False,
    ) -> None:
        super().__init__(embed_dim, num_blocks=num_blocks, pooling=pooling, standardize=standardize)
        self.norm = nn.LayerNorm(self.in_features)
        self.fc1 = nn.Linear(self.in_features, hidden_dim)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden_dim, num_classes)

    def classify(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.fc2(self.dropout(self.act(self.fc1(self.norm(rows)))))
        return logits
