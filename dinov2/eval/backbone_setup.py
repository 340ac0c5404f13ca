"""A frozen backbone from a config and weights, as every evaluator starts with."""

import logging

import torch

from dinov2.config import Config
from dinov2.models.build import build_backbone
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger("dinov2")


def build_frozen_backbone(
    config: Config, weights: str, device: torch.device | str, *, seed: int = 0
) -> DinoVisionTransformer:
    """Builds the backbone of a config, loads weights, and freezes it.

    Args:
        config: its ``student`` section describes the backbone, ``crops.global_crops_size`` the images that its position
            embedding is made for.
        weights: released file, teacher checkpoint, or any known layout; empty for random weights, whose class token
            hardly sees the image unless ``student.layerscale`` is near 1.
        device: where the backbone goes.
        seed: of the random weights.

    Returns:
        The backbone in evaluation mode, without gradients, in float32.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the weights do not belong to this backbone or fill it only in part.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(config.student, img_size=config.crops.global_crops_size)
    if weights:
        # A mask token is of no use to an evaluation; anything else that stays random would spoil it.
        missing = set(load_pretrained_backbone(backbone, weights).missing) - {"mask_token"}
        if missing:
            raise ValueError(
                f"{weights} lacks {len(missing)} parameters of the backbone that the config describes: "
                f"{', '.join(sorted(missing)[:5])}{', …' if len(missing) > 5 else ''}"
            )
    else:
        logger.warning("no pretrained weights were given: the backbone is random (seed %d)", seed)
    return backbone.requires_grad_(False).eval().to(device)
