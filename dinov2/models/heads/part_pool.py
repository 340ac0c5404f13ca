"""Joining the photos of a part by attention, so that a part gets one row of classes.

Reference: Ilse et al., Attention-based Deep Multiple Instance Learning (2018), section 2.4 (gated attention).
"""

import torch
from torch import Tensor, nn

from dinov2.models.heads.classification import ClassificationHead
from dinov2.models.heads.features import Features


class PartAttentionPool(nn.Module):
    """Weighted mean of the photos of a part, with weights that depend on the photos.

    Fresh weights are equal: training starts at the mean of the photos. The result does not depend on the order of the
    photos, and not at all on photos that are not valid.

    Args:
        embed_dim: width ``D`` of the row of a photo.
        hidden_dim: width of the network that rates a photo.
    """

    def __init__(self, embed_dim: int, hidden_dim: int = 128) -> None:
        super().__init__()
        self.content = nn.Linear(embed_dim, hidden_dim)
        self.gate = nn.Linear(embed_dim, hidden_dim)
        self.rating = nn.Linear(hidden_dim, 1, bias=False)  # a bias would cancel in the softmax
        nn.init.zeros_(self.rating.weight)

    def weights(self, photos: Tensor, valid: Tensor) -> Tensor:
        """Weight of every photo ``[parts, photos]``: at least 0, sums to 1 over a part, 0 where not valid.

        Args:
            photos: ``[parts, photos, D]``.
            valid: bool ``[parts, photos]``.

        Raises:
            ValueError: when shapes do not fit together, or a part has no valid photo.
        """
        if valid.dtype != torch.bool or valid.shape != photos.shape[:2]:
            raise ValueError(
                f"photos of shape {list(photos.shape)} need a bool mask {list(photos.shape[:2])}, "
                f"got {valid.dtype} {list(valid.shape)}"
            )
        empty = (~valid.any(dim=1)).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"every part needs a valid photo; those at the positions {empty[:8]} of the batch have none"
            )
        photos = photos.masked_fill(~valid.unsqueeze(-1), 0)
        ratings: Tensor = self.rating(torch.tanh(self.content(photos)) * torch.sigmoid(self.gate(photos))).squeeze(-1)
        return ratings.masked_fill(~valid, -torch.inf).softmax(dim=1)

    def forward(self, photos: Tensor, valid: Tensor) -> Tensor:
        """Maps photos ``[parts, photos, D]`` and their bool mask ``[parts, photos]`` to parts ``[parts, D]``."""
        weights = self.weights(photos, valid).unsqueeze(-1)
        # Rows of missing photos may hold anything, also NaN, which a weight of 0 would not remove.
        return (weights * photos.masked_fill(~valid.unsqueeze(-1), 0)).sum(dim=1)


class PartClassifier(nn.Module):
    """A classification head whose rows are joined over the photos of a part.

    Args:
        classifier: pools the tokens of a photo and classifies the joined row.
        hidden_dim: see `PartAttentionPool`.
    """

    def __init__(self, classifier: ClassificationHead, hidden_dim: int = 128) -> None:
        super().__init__()
        self.classifier = classifier
        self.part_pool = PartAttentionPool(classifier.in_features, hidden_dim)

    def forward(self, features: Features, valid: Tensor | None = None) -> Tensor:
        """Maps the features of photos to logits per part.

        Args:
            features: of ``V`` photos: those that are valid, part after part. Others need not be computed.
            valid: bool ``[parts, photos]`` with ``V`` true entries; None when every photo is a part of its own.

        Returns:
            Logits ``[parts, C]``.

        Raises:
            ValueError: when the number of photos does not fit, or a part has no valid photo.
        """
        rows = self.classifier.pool(features)
        if valid is None:
            return self.classifier.classify(rows)
        if int(valid.sum()) != len(rows):
            raise ValueError(f"the mask marks {int(valid.sum())} photos as valid, and features came of {len(rows)}")
        photos = rows.new_zeros(*valid.shape, rows.shape[-1])
        photos[valid] = rows
        return self.classifier.classify(self.part_pool(photos, valid))
