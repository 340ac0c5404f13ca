"""The released linear classifiers of ImageNet-1k on the released backbones.

Reference: Oquab et al., DINOv2 (2023), section 7.1.
"""

from typing import Unpack

from dinov2.hub.backbones import entry_point
from dinov2.hub.task_models import WeightOptions, check_choice, make_task_model
from dinov2.models.heads.classification import LinearClassifier
from dinov2.models.released import released_backbone
from dinov2.models.task_model import TensorTaskModel


def make_classifier(
    name: str, *, layers: int = 4, num_classes: int = 1000, **weights: Unpack[WeightOptions]
) -> TensorTaskModel:
    """Builds a linear classifier.

    Args:
        name: of a released backbone, such as ``dinov2_vits14`` or ``dinov2_vits14_reg``.
        layers: 1: class token and mean patch of the last block; 4: class tokens of the last four blocks and the mean
            patch of the last.
        num_classes: classes; the released heads know the 1,000 of ImageNet-1k.
        **weights: see `WeightOptions`.

    Returns:
        A network in evaluation mode from images ``[B, 3, H, W]``, normalised as in pretraining, to logits ``[B, C]``.

    Raises:
        ConnectionError: when a download fails.
        FileNotFoundError: when a file does not exist.
        ValueError: for another number of layers, or weights of another backbone, head or number of classes.
    """
    check_choice("layers", layers, (1, 4))
    backbone = released_backbone(name)
    return make_task_model(
        name,
        LinearClassifier(backbone.embed_dim, num_classes, num_blocks=layers, pooling="cls_mean"),
        blocks=backbone.last_blocks(layers),
        norm=True,
        released_head=backbone.address("linear_head" if layers == 1 else "linear4_head"),
        **weights,
    )


dinov2_vits14_lc = entry_point(make_classifier, "dinov2_vits14", "_lc")
dinov2_vitb14_lc = entry_point(make_classifier, "dinov2_vitb14", "_lc")
dinov2_vitl14_lc = entry_point(make_classifier, "dinov2_vitl14", "_lc")
dinov2_vitg14_lc = entry_point(make_classifier, "dinov2_vitg14", "_lc")
dinov2_vits14_reg_lc = entry_point(make_classifier, "dinov2_vits14_reg", "_lc")
dinov2_vitb14_reg_lc = entry_point(make_classifier, "dinov2_vitb14_reg", "_lc")
dinov2_vitl14_reg_lc = entry_point(make_classifier, "dinov2_vitl14_reg", "_lc")
dinov2_vitg14_reg_lc = entry_point(make_classifier, "dinov2_vitg14_reg", "_lc")
