"""A frozen backbone as evaluators see it."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEATURES = ("cls", "patch_mean", "cls_patch_mean")


class ModelWithFeatures(nn.Module):
    """A backbone whose output is the chosen description of an image.

    The class token is what DINO trains to be the same for all crops of an image; the mean of the patches keeps more of
    what is somewhere in the image, such as a defect.

    Args:
        model: a vision transformer; only ``cls`` works with any network that maps images to ``[B, D]``.
        features: ``cls``, ``patch_mean``, or ``cls_patch_mean`` for both, concatenated.

    Raises:
        ValueError: for other features, or those of patches from a network that has none.
    """

    def __init__(self, model: nn.Module, features: str = "cls") -> None:
        super().__init__()
        if features not in FEATURES:
            raise ValueError(f"features {features!r} is not one of {', '.join(FEATURES)}")
        if features != "cls":
            check_has_patches(model, features)
        self.model = model
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to ``[B, D]``, or ``[B, 2D]`` for both."""
        if self.features == "cls":
            cls: Tensor = self.model(images)
            return cls
        tokens = self.model(images, is_training=True)
        mean: Tensor = tokens["x_norm_patchtokens"].float().mean(dim=1)
        if self.features == "patch_mean":
            return mean
        # Each half has unit length, so that neither outweighs the other.
        halves = (tokens["x_norm_clstoken"].float(), mean)
        return torch.cat([F.normalize(half, dim=1) for half in halves], dim=1)


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


def check_has_patches(model: nn.Module, features: str) -> None:
    """Raises ValueError for a network that cannot be asked for its patch tokens, which some features are made of."""
    parameters = inspect.signature(model.forward).parameters.values()
    if not any(parameter.name == "is_training" or parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(f"{type(model).__name__} gives no patch tokens, so features must be cls, found {features!r}")


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
