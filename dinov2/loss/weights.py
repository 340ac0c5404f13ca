"""Weights of the terms of an objective, and of the classes within a term."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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
