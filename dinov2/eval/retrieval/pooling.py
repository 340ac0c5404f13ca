"""Descriptions of images for retrieval: pooled tokens of unit length, from one or several sizes of the image."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from dinov2.eval.frozen import FEATURES, ModelWithFeatures, ModelWithNormalize, check_has_patches

RETRIEVAL_FEATURES = (*FEATURES, "gem")


def generalized_mean(tokens: Tensor, power: float) -> Tensor:
    """Generalised mean over tokens ``[B, N, D]``, from the mean (1) towards the value farthest from zero (large).

    Published for values that are not negative. Normed patch tokens have signs, so each value keeps its own when it is
    raised to the power, and the mean its own under the root; at an odd power that is the published formula.

    Args:
        tokens: ``[B, N, D]``.
        power: above 0.

    Returns:
        ``[B, D]`` float32.

    Reference: Radenović et al., "Fine-tuning CNN Image Retrieval with no Human Annotation", section 3.2.
    """
    tokens = tokens.float()
    if power == 1:
        return tokens.mean(dim=1)
    # In units of the largest value, whose power then cannot overflow.
    largest = tokens.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    shares = tokens / largest
    mean = (shares.sign() * shares.abs() ** power).mean(dim=1)
    return mean.sign() * mean.abs() ** (1 / power) * largest[:, 0]


class ModelWithGeneralizedMean(nn.Module):
    """A vision transformer whose output is the generalised mean of its normed patch tokens.

    Args:
        model: a vision transformer.
        power: see `generalized_mean`.
    """

    def __init__(self, model: nn.Module, power: float) -> None:
        super().__init__()
        if not power > 0:
            raise ValueError(f"the power of the generalised mean must be above 0, found {power}")
        check_has_patches(model, "gem")
        self.model = model
        self.power = power

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to ``[B, D]``."""
        return generalized_mean(self.model(images, is_training=True)["x_norm_patchtokens"], self.power)


class ModelWithScales(nn.Module):
    """A model whose output is the sum of what it makes of several sizes of an image, again of unit length.

    Args:
        model: maps images ``[B, 3, H, W]`` to features ``[B, D]`` of unit length.
        scales: factors of height and width.
        patch_size: height and width to whose nearest multiple a scaled image is brought (at least one).

    Raises:
        ValueError: for no scale, one that is not above 0, or the same one twice.
    """

    def __init__(self, model: nn.Module, scales: Sequence[float], patch_size: tuple[int, int]) -> None:
        super().__init__()
        if not scales or not min(scales) > 0 or len(set(scales)) != len(scales):
            raise ValueError(f"scales must be one or more different factors above 0, found {list(scales)}")
        self.model = model
        self.scales = tuple(scales)
        self.patch_size = patch_size

    def forward(self, images: Tensor) -> Tensor:
        """Maps images ``[B, 3, H, W]`` to ``[B, D]`` of unit length."""
        features: Tensor = sum(self.model(self._scaled(images, scale)) for scale in self.scales)
        return F.normalize(features, dim=1)

    def _scaled(self, images: Tensor, scale: float) -> Tensor:
        height, width = images.shape[-2:]
        size = round_to_patches((height * scale, width * scale), self.patch_size)
        if scale == 1 or size == (height, width):
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def round_to_patches(size: tuple[float, float], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Nearest height and width in whole patches, at least one each."""
    height, width = (max(round(side / patch), 1) * patch for side, patch in zip(size, patch_size, strict=True))
    return height, width


def patch_size_of(model: nn.Module) -> tuple[int, int]:
    """Height and width of the patches of a vision transformer; 1 and 1 for another network, which takes any size."""
    height, width = getattr(model, "patch_size", (1, 1))
    return height, width


def describe_images(
    model: nn.Module,
    features: str = "cls",
    *,
    gem_power: float = 3.0,
    scales: Sequence[float] = (1.0,),
) -> nn.Module:
    """Wraps a backbone so that it maps images ``[B, 3, H, W]`` to descriptions ``[B, D]`` of unit length.

    Args:
        model: a vision transformer; only ``cls`` works with any network that maps images to ``[B, D]``.
        features: ``cls``, ``patch_mean``, ``cls_patch_mean`` or ``gem`` (see `generalized_mean`).
        gem_power: of ``gem``.
        scales: see `ModelWithScales`.

    Raises:
        ValueError: for unknown features, or settings out of range.
    """
    if features not in RETRIEVAL_FEATURES:
        raise ValueError(f"features {features!r} is not one of {', '.join(RETRIEVAL_FEATURES)}")
    pooled = ModelWithGeneralizedMean(model, gem_power) if features == "gem" else ModelWithFeatures(model, features)
    return ModelWithScales(ModelWithNormalize(pooled), scales, patch_size_of(model))
