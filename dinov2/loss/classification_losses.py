"""Losses of the class of an image, and of several classes at once."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.loss.teacher_targets import at_least_float32


def positive_weights(**weights: float) -> dict[str, float]:
    """The terms that count.

    Raises:
        ValueError: a weight is negative or not finite, or none is above 0.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight {name} must be 0 or above, found {weight}")
    counted = {name: weight for name, weight in weights.items() if weight > 0}
    if not counted:
        raise ValueError(f"one of the weights {', '.join(weights)} must be above 0")
    return counted


def class_weight_tensor(weights: Sequence[float] | None, name: str) -> Tensor | None:
    """Weights of classes as float32 ``[C]``; None stays None.

    Raises:
        ValueError: a weight is negative or not finite, or none is above 0.
    """
    if weights is None:
        return None
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(f"{name} must be 0 or above, and one of them above 0, found {list(weights)}")
    return torch.tensor(weights, dtype=torch.float32)


def matching_weights(weights: Tensor | None, logits: Tensor, name: str) -> Tensor | None:
    """The weights of the classes on axis 1 of the logits, in their dtype and on their device; None stays None.

    Raises:
        ValueError: there is not one weight per class.
    """
    if weights is not None and weights.shape != (logits.shape[1],):
        raise ValueError(f"{name} has shape {list(weights.shape)}, but the model has {logits.shape[1]} classes")
    return None if weights is None else weights.to(logits)


def mean_cross_entropy(
    logits: Tensor, labels: Tensor, class_weights: Tensor | None, ignore_index: int, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy averaged over what has a label, weighted where classes have weights.

    Args:
        logits: ``[B, C, ...]``, float32 or wider.
        labels: int64 ``[B, ...]``, ``ignore_index`` where there is none.
        class_weights: ``[C]``, or None for all 1.
        ignore_index: value of labels that do not count.
        label_smoothing: share of the target that goes to all classes evenly.

    Returns:
        Scalar; 0 with gradients of 0 where nothing counts.

    Raises:
        ValueError: there is not one weight per class.
    """
    weights = matching_weights(class_weights, logits, "class_weights")
    total = F.cross_entropy(
        logits, labels, weights, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    known = labels != ignore_index
    if weights is None:
        return total / known.sum().clamp_min(1)
    weight = weights[labels.where(known, 0)].where(known, 0.0).sum()
    return total / weight.where(weight > 0, 1.0)


MISSING = -1  # target of an image, or of one class of an image, that nobody has labelled


class ClassificationLoss(nn.Module):
    """Cross-entropy of one class per image; images without a label do not count.

    Args:
        label_smoothing: share of the target that goes to all classes evenly, in [0, 1).
        class_weights: one per class, 0 or above; the average over the images is weighted by them too. Default: all 1.

    Raises:
        ValueError: a setting is out of range.

    Reference:
        Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7.
    """

    class_weights: Tensor | None

    def __init__(self, *, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), found {label_smoothing}")
        self.label_smoothing = label_smoothing
        # Not in the state dict: they are settings, which the options of a resumed run give again.
        self.register_buffer("class_weights", class_weight_tensor(class_weights, "class_weights"), persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Computes the loss.

        Args:
            outputs: logits ``[B, C]``, any floating dtype.
            targets: integers ``[B]`` in ``[0, C)``, or -1 for a missing label.

        Returns:
            ``cross_entropy``: scalar, float32 or wider; 0 with gradients of 0 where no image counts.

        Raises:
            ValueError: the sizes differ, or there is not one weight per class.
        """
        if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
            raise ValueError(
                f"logits must be [B, C] and labels [B], found {list(outputs.shape)} and {list(targets.shape)}"
            )
        with torch.autocast(outputs.device.type, enabled=False):
            logits, labels = at_least_float32(outputs), targets.long()
            return {
                "cross_entropy": mean_cross_entropy(logits, labels, self.class_weights, MISSING, self.label_smoothing)
            }


class MultiLabelLoss(nn.Module):
    """Binary cross-entropy of each class by itself; classes of an image that nobody has labelled do not count.

    Args:
        positive_weights: one per class, 0 or above: how much an image that has the class weighs against one that has
            not. Default: all 1.

    Raises:
        ValueError: a weight is negative, or all are 0.
    """

    positive_weights: Tensor | None

    def __init__(self, *, positive_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = class_weight_tensor(positive_weights, "positive_weights")
        self.register_buffer("positive_weights", weights, persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Computes the loss.

        Args:
            outputs: logits ``[B, C]``, any floating dtype.
            targets: ``[B, C]`` of any dtype: 1 where the image has the class, 0 where not, -1 where unknown.

        Returns:
            ``binary_cross_entropy``: mean over all known entries, scalar, float32 or wider; 0 with gradients of 0
            where none is known.

        Raises:
            ValueError: the sizes differ, or there is not one weight per class.
        """
        if outputs.ndim != 2 or targets.shape != outputs.shape:
            raise ValueError(
                f"logits and labels must both be [B, C], found {list(outputs.shape)} and {list(targets.shape)}"
            )
        with torch.autocast(outputs.device.type, enabled=False):
            logits = at_least_float32(outputs)
            weights = matching_weights(self.positive_weights, logits, "positive_weights")
            known = targets != MISSING
            losses = F.binary_cross_entropy_with_logits(
                logits, targets.where(known, 0).to(logits.dtype), pos_weight=weights, reduction="none"
            )
            return {"binary_cross_entropy": losses.where(known, 0.0).sum() / known.sum().clamp_min(1)}
