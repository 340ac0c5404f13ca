"""The released linear classifiers of ImageNet-1k on the released backbones.

Reference: Oquab et al., DINOv2 (2023), section 7.1.
"""

from pathlib import Path
from typing import TypedDict, Unpack

from dinov2.hub.backbones import released_address, released_architecture
from dinov2.hub.task_models import check_choice, make_task_model
from dinov2.models.heads.classification import LinearClassifier
from dinov2.models.task_model import TaskModel


class ClassifierOptions(TypedDict, total=False):
    """Options of every classifier; see `make_classifier`."""

    layers: int
    num_classes: int
    pretrained: bool
    backbone_weights: str | Path | None
    head_weights: str | Path | None


def dinov2_vits14_lc(**options: Unpack[ClassifierOptions]) -> TaskModel:
    """Linear classifier on ViT-S/14; see `make_classifier`."""
    return make_classifier("vits14", **options)


def dinov2_vitb14_lc(**options: Unpack[ClassifierOptions]) -> TaskModel:
    """Linear classifier on ViT-B/14; see `make_classifier`."""
    return make_classifier("vitb14", **options)


def dinov2_vitl14_lc(**options: Unpack[ClassifierOptions]) -> TaskModel:
    """Linear classifier on ViT-L/14; see `make_classifier`."""
    return make_classifier("vitl14", **options)


def dinov2_vitg14_lc(**options: Unpack[ClassifierOptions]) -> TaskModel:
    """Linear classifier on ViT-g/14; see `make_classifier`."""
    return make_classifier("vitg14", **options)


def dinov2_vits14_reg_lc(**options: Unpack[ClassifierOptions]) -> TaskModel:
    """Linear classifier on ViT-S/14 with registers; see `make_classifier`."""
    return make_classifier("vits14", registers=True, **options)


def dinov2_vitb14_reg_lc(**options: Unpack[ClassifierOptions]) -> TaskModel:
    """Linear classifier on ViT-B/14 with registers; see `make_classifier`."""
    return make_classifier("vitb14", registers=True, **options)


def dinov2_vitl14_reg_lc(**options: Unpack[ClassifierOptions]) -> TaskModel:
    """Linear classifier on ViT-L/14 with registers; see `make_classifier`."""
    return make_classifier("vitl14", registers=True, **options)


def dinov2_vitg14_reg_lc(**options: Unpack[ClassifierOptions]) -> TaskModel:
    """Linear classifier on ViT-g/14 with registers; see `make_classifier`."""
    return make_classifier("vitg14", registers=True, **options)


def make_classifier(
    name: str,
    *,
    registers: bool = False,
    layers: int = 4,
    num_classes: int = 1000,
    pretrained: bool = True,
    backbone_weights: str | Path | None = None,
    head_weights: str | Path | None = None,
) -> TaskModel:
    """Builds a linear classifier.

    Args:
        name: ``vits14``, ``vitb14``, ``vitl14`` or ``vitg14``.
        registers: whether the backbone has four register tokens.
        layers: 1: class token and mean patch of the last block; 4: class tokens of the last four blocks and the mean
            patch of the last.
        num_classes: classes; the released heads know the 1,000 of ImageNet-1k.
        pretrained: whether released weights are fetched for what has no file below; without, it is random.
        backbone_weights: a file or URL in place of the released backbone; a task file of ours is understood.
        head_weights: a file or URL in place of the released head; a task file of ours is understood.

    Returns:
        A network in evaluation mode from images ``[B, 3, H, W]``, normalised as in pretraining, to logits ``[B, C]``.

    Raises:
        FileNotFoundError: when a file does not exist.
        ValueError: for another number of layers, or weights of another backbone, head or number of classes.
        urllib.error.URLError: when a download fails.
    """
    check_choice("layers", layers, (1, 4))
    architecture = released_architecture(name)
    return make_task_model(
        name,
        LinearClassifier(architecture.embed_dim, num_classes, num_blocks=layers, pooling="cls_mean"),
        blocks=architecture.last_blocks(layers),
        norm=True,
        released_head=released_address(name, "linear_head" if layers == 1 else "linear4_head", registers=registers),
        pretrained=pretrained,
        backbone_weights=backbone_weights,
        head_weights=head_weights,
        registers=registers,
    )
