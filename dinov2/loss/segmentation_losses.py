"""Losses of a class for every pixel: cross-entropy, Dice and focal, and their weighted sum."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2.loss.classification_losses import (
    class_weight_tensor,
    matching_weights,
    mean_cross_entropy,
    positive_weights,
)
from dinov2.loss.teacher_targets import at_least_float32

IGNORE_INDEX = 255


def pixel_cross_entropy(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Cross-entropy of every pixel's class, averaged over the pixels of the batch that have one.

    Args:
        logits: ``[B, C, H, W]`` of any floating dtype. The predictions for each pixel.
        targets: integers ``[B, H, W]`` in ``[0, C)``, or ``ignore_index``. The class of each pixel.
        class_weights: float32 ``[C]``, 0 or above. Weight of each class; the average is weighted by them too.
            Default: all 1.
        ignore_index: value of the targets that do not count.

    Returns:
        Scalar, float32 or wider; 0 with gradients of 0 where no pixel counts.

    Raises:
        ValueError: the sizes differ, or there is not one weight per class.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, targets = _checked(logits, targets)
        return mean_cross_entropy(logits, targets, class_weights, ignore_index)


def soft_dice_loss(logits: Tensor, targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """1 less the overlap ``2 · sum(p · g) / (sum(p) + sum(g))`` of probabilities and targets, averaged over classes.

    The sums run over the pixels of the whole batch that have a class. A class that no pixel has is left out, as no
    overlap can be had there. Small classes weigh as much as large ones, which is what makes Dice fit small defects.

    Args:
        logits: ``[B, C, H, W]`` of any floating dtype. The predictions for each pixel.
        targets: integers ``[B, H, W]`` in ``[0, C)``, or ``ignore_index``. The class of each pixel.
        ignore_index: value of the targets that do not count.

    Returns:
        Scalar in [0, 1], float32 or wider; 0 with gradients of 0 where no pixel counts.

    Raises:
        ValueError: the sizes differ.

    Reference:
        Milletari et al., "V-Net" (2016), section 3, without its squares in the denominator.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits, targets = _checked(logits, targets)
        known = (targets != ignore_index)[:, None]  # [B, 1, H, W]
        one_hot = torch.zeros_like(logits, dtype=torch.bool)
        one_hot = one_hot.scatter_(1, targets[:, None].where(known, 0), True) & known
        probabilities = logits.softmax(dim=1) * known
        overlap = (probabilities * one_hot).sum(dim=(0, 2, 3))  # [C]
        num_true = one_hot.sum(dim=(0, 2, 3))
        # Of a class that is present at least one pixel is true, so the limit of 1 only keeps absent ones finite.
        dice = 2 * overlap / (probabilities.sum(dim=(0, 2, 3)) + num_true).clamp_min(1)
        present = num_true > 0
        return ((1 - dice) * present).sum() / present.sum().clamp_min(1)


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Cross-entropy in which pixels that are right already weigh little: ``-w · (1 - p)^gamma · log(p)``.

    Args:
        logits: ``[B, C, H, W]`` of any floating dtype. The predictions for each pixel; ``p`` is the softmax at the
            true class.
        targets: integers ``[B, H, W]`` in ``[0, C)``, or ``ignore_index``. The class of each pixel.
        gamma: exponent of the modulating factor, 0 or above; 0 gives cross-entropy.
        class_weights: float32 ``[C]``, the alpha of the paper. Weight of each class; unlike with `pixel_cross_entropy`
            the average over the pixels is not weighted by them. Default: all 1.
        ignore_index: value of the targets that do not count.

    Returns:
        Scalar, float32 or wider; 0 with gradients of 0 where no pixel counts.

    Raises:
        ValueError: the sizes differ, there is not one weight per class, or ``gamma`` is negative.

    Reference:
        Lin et al., "Focal Loss for Dense Object Detection" (2017), equation 5, with a softmax.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must be 0 or above, found {gamma}")
    with torch.autocast(logits.device.type, enabled=False):
        logits, targets = _checked(logits, targets)
        class_weights = matching_weights(class_weights, logits, "class_weights")
        known = targets != ignore_index
        classes = targets.where(known, 0)
        log_probability = logits.log_softmax(dim=1).gather(1, classes[:, None]).squeeze(1)  # [B, H, W]
        # Kept off 0, where the slope of the power is infinite for a gamma below 1.
        wrong = (-torch.expm1(log_probability)).clamp_min(torch.finfo(logits.dtype).tiny ** 0.5)
        weight = known if class_weights is None else class_weights[classes] * known
        return -(weight * wrong**gamma * log_probability).sum() / known.sum().clamp_min(1)


class SegmentationLoss(nn.Module):
    """Weighted sum of the losses of a class for every pixel; a term of weight 0 is not computed.

    Args:
        cross_entropy: weight of `pixel_cross_entropy`.
        dice: weight of `soft_dice_loss`.
        focal: weight of `focal_loss`.
        class_weights: one per class, for cross-entropy and focal. Default: all 1.
        focal_gamma: exponent of the focal loss.
        ignore_index: value of the targets that do not count.

    Raises:
        ValueError: no weight is above 0, one is negative, or ``focal_gamma`` is.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        cross_entropy: float = 1.0,
        dice: float = 0.0,
        focal: float = 0.0,
        *,
        class_weights: Sequence[float] | None = None,
        focal_gamma: float = 2.0,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        super().__init__()
        self.weights = positive_weights(cross_entropy=cross_entropy, dice=dice, focal=focal)
        if class_weights is not None and not {"cross_entropy", "focal"} & self.weights.keys():
            raise ValueError("class_weights have no effect: the weights of cross_entropy and focal are 0")
        if not focal_gamma >= 0:
            raise ValueError(f"focal_gamma must be 0 or above, found {focal_gamma}")
        # Not in the state dict: they are settings, which the options of a resumed run give again.
        self.register_buffer("class_weights", class_weight_tensor(class_weights, "class_weights"), persistent=False)
        self.focal_gamma = focal_gamma
        self.ignore_index = ignore_index

    def forward(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Computes the weighted terms, whose sum is the objective.

        Args:
            outputs: logits ``[B, C, H, W]``.
            targets: integers ``[B, H, W]`` in ``[0, C)``, or ``ignore_index``.

        Returns:
            Scalars by name of the argument that holds their weight, already multiplied by it.

        Raises:
            ValueError: the sizes differ, or there is not one weight per class.
        """
        terms = {}
        if "cross_entropy" in self.weights:
            terms["cross_entropy"] = pixel_cross_entropy(outputs, targets, self.class_weights, self.ignore_index)
        if "dice" in self.weights:
            terms["dice"] = soft_dice_loss(outputs, targets, self.ignore_index)
        if "focal" in self.weights:
            terms["focal"] = focal_loss(outputs, targets, self.focal_gamma, self.class_weights, self.ignore_index)
        return {name: self.weights[name] * term for name, term in terms.items()}


def _checked(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float32 or wider, targets as int64."""
    if logits.ndim != 4 or targets.shape != (logits.shape[0], *logits.shape[2:]):
        raise ValueError(
            f"logits must be [B, C, H, W] and targets [B, H, W], found {list(logits.shape)} and {list(targets.shape)}"
        )
    return at_least_float32(logits), targets.long()
