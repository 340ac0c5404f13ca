"""Heads that give an image its classes: a linear layer or a small perceptron on pooled tokens.

Reference: Oquab et al., DINOv2 (2023), appendix B.3 (linear evaluation on one and four blocks).
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.models.heads.features import Features, check_num_blocks

INITIAL_STD = 0.01


POOLINGS = ("cls", "cls_mean", "mean")


def pool_tokens(features: Features, pooling: str) -> Tensor:
    """Pools the tokens of every image to one row.

    Args:
        features: of ``n`` blocks of width ``D``.
        pooling: "cls" for the class tokens of all blocks; "cls_mean" for these and then the mean patch of the last
            block, as in the released classifiers; "mean" for the mean patches of all blocks.

    Returns:
        ``[B, F]``, where ``F`` is `pooled_width`.
    """
    rows = [] if pooling == "mean" else [cls for _, cls in features]
    if pooling != "cls":
        averaged = features if pooling == "mean" else features[-1:]
        rows += [patches.mean(dim=(2, 3)) for patches, _ in averaged]
    return torch.cat(rows, dim=1)


def pooled_width(embed_dim: int, num_blocks: int, pooling: str) -> int:
    """Width ``F`` of the rows of `pool_tokens`.

    Raises:
        ValueError: for an unknown pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}; allowed: {', '.join(POOLINGS)}")
    return embed_dim * (num_blocks + (pooling == "cls_mean"))


class Standardize(nn.BatchNorm1d):
    """Features with mean 0 and variance 1 over the images: those of the batch in training, running ones afterwards.

    What all images share outweighs what tells them apart in features of images of one kind; without it, a linear layer
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

    The two steps can be called apart, so that the images of a part can be joined in between.

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


class PartAttentionPool(nn.Module):
    """Weighted mean over the images of a part, with weights that depend on the images (gated attention).

    Fresh weights are equal: training starts at the mean of the images. The result does not depend on the order of the
    images, and not at all on images that are not valid.

    Args:
        embed_dim: width ``D`` of the row of an image.
        hidden_dim: width of the network that rates an image.
    """

    def __init__(self, embed_dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.content = nn.Linear(embed_dim, hidden_dim)
        self.gate = nn.Linear(embed_dim, hidden_dim)
        self.rating = nn.Linear(hidden_dim, 1, bias=False)  # a bias would cancel in the softmax
        nn.init.zeros_(self.rating.weight)

    def weights(self, rows: Tensor, valid: Tensor) -> Tensor:
        """Weight of every image ``[parts, images]``: at least 0, sums to 1 over a part, 0 where not valid.

        Args:
            rows: ``[parts, images, D]``.
            valid: bool ``[parts, images]``.

        Raises:
            ValueError: when shapes do not fit together, or a part has no valid image.
        """
        if valid.dtype != torch.bool or valid.shape != rows.shape[:2]:
            raise ValueError(
                f"images of parts {list(rows.shape)} need a bool mask {list(rows.shape[:2])}, "
                f"got {valid.dtype} {list(valid.shape)}"
            )
        empty = (~valid.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"every part needs a valid image; those at the positions {empty[:8]} of the batch have none"
            )
        rows = rows.masked_fill(~valid.unsqueeze(-1), 0)
        ratings: Tensor = self.rating(torch.tanh(self.content(rows)) * torch.sigmoid(self.gate(rows))).squeeze(-1)
        return ratings.masked_fill(~valid, -torch.inf).softmax(dim=1)

    def forward(self, rows: Tensor, valid: Tensor) -> Tensor:
        """Maps images ``[parts, images, D]`` and their bool mask ``[parts, images]`` to parts ``[parts, D]``."""
        weights = self.weights(rows, valid).unsqueeze(-1)
        # Rows of missing images may hold anything, also NaN, which a weight of 0 would not remove.
        return (weights * rows.masked_fill(~valid.unsqueeze(-1), 0)).sum(dim=1)


class PartClassifier(nn.Module):
    """A classification head whose rows are joined over the images of a part.

    Args:
        classifier: pools the tokens of an image and classifies the joined row.
        hidden_dim: see `PartAttentionPool`.
    """

    def __init__(self, classifier: ClassificationHead, hidden_dim: int = 128) -> None:
        super().__init__()
        self.classifier = classifier
        self.part_pool = PartAttentionPool(classifier.in_features, hidden_dim)

    def forward(self, features: Features, valid: Tensor | None = None) -> Tensor:
        """Maps the features of images to logits per part.

        Args:
            features: of ``V`` images: those that are valid, part after part. Others need not be computed.
            valid: bool ``[parts, images]`` with ``V`` true entries; None when every image is a part of its own.

        Returns:
            Logits ``[parts, C]``.

        Raises:
            ValueError: when the number of images does not fit, or a part has no valid image.
        """
        rows = self.classifier.pool(features)
        if valid is None:
            return self.classifier.classify(rows)
        if int(valid.sum()) != len(rows):
            raise ValueError(f"the mask marks {int(valid.sum())} images as valid, and features came of {len(rows)}")
        padded = rows.new_zeros(*valid.shape, rows.shape[-1])
        padded[valid] = rows
        return self.classifier.classify(self.part_pool(padded, valid))
