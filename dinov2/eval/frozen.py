"""A frozen backbone as evaluators see it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ModelWithNormalize(nn.Module):
    """A backbone whose output rows have unit length.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Returns features ``[B, D]`` of unit Euclidean length, in float32 (half precision cannot hold the unit)."""
        return F.normalize(self.model(images).float(), dim=1, p=2.0)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter (or buffer) lies; the CPU for a model that has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode and no gradients are kept; afterwards each has its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not `inference_mode`: a sharded model would keep inference tensors, and could not be trained on afterwards.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
