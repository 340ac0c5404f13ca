"""The released segmentation heads for Pascal VOC 2012 and ADE20K on the released backbones: one and four blocks.

Reference: Oquab et al., DINOv2 (2023), section 7.4.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TypedDict, Unpack

from dinov2.hub.backbones import released_address, released_architecture
from dinov2.hub.task_models import check_choice, make_task_model
from dinov2.models.heads.segmentation import BNHead
from dinov2.models.task_model import MultiScaleInference, TaskModel

# Classes of the datasets; those of ADE20K come without a background.
DATASET_CLASSES: Mapping[str, int] = MappingProxyType({"voc2012": 21, "ade20k": 150, "cityscapes": 19})
# The published scores on Cityscapes come without weights.
RELEASED_DATASETS = ("voc2012", "ade20k")


class SegmentorOptions(TypedDict, total=False):
    """Options of every linear segmentation model; see `make_linear_segmentor`."""

    head_dataset: str
    num_classes: int | None
    pretrained: bool
    backbone_weights: str | Path | None
    head_weights: str | Path | None


class MultiScaleSegmentorOptions(SegmentorOptions, total=False):
    """Options of every multi-scale segmentation model; see `make_multi_scale_segmentor`."""

    scales: Sequence[float] | None


def dinov2_vits14_ls(**options: Unpack[SegmentorOptions]) -> TaskModel:
    """Linear segmentation head on ViT-S/14; see `make_linear_segmentor`."""
    return make_linear_segmentor("vits14", **options)


def dinov2_vitb14_ls(**options: Unpack[SegmentorOptions]) -> TaskModel:
    """Linear segmentation head on ViT-B/14; see `make_linear_segmentor`."""
    return make_linear_segmentor("vitb14", **options)


def dinov2_vitl14_ls(**options: Unpack[SegmentorOptions]) -> TaskModel:
    """Linear segmentation head on ViT-L/14; see `make_linear_segmentor`."""
    return make_linear_segmentor("vitl14", **options)


def dinov2_vitg14_ls(**options: Unpack[SegmentorOptions]) -> TaskModel:
    """Linear segmentation head on ViT-g/14; see `make_linear_segmentor`."""
    return make_linear_segmentor("vitg14", **options)


def dinov2_vits14_ms(**options: Unpack[MultiScaleSegmentorOptions]) -> TaskModel | MultiScaleInference:
    """Multi-scale segmentation on ViT-S/14; see `make_multi_scale_segmentor`."""
    return make_multi_scale_segmentor("vits14", **options)


def dinov2_vitb14_ms(**options: Unpack[MultiScaleSegmentorOptions]) -> TaskModel | MultiScaleInference:
    """Multi-scale segmentation on ViT-B/14; see `make_multi_scale_segmentor`."""
    return make_multi_scale_segmentor("vitb14", **options)


def dinov2_vitl14_ms(**options: Unpack[MultiScaleSegmentorOptions]) -> TaskModel | MultiScaleInference:
    """Multi-scale segmentation on ViT-L/14; see `make_multi_scale_segmentor`."""
    return make_multi_scale_segmentor("vitl14", **options)


def dinov2_vitg14_ms(**options: Unpack[MultiScaleSegmentorOptions]) -> TaskModel | MultiScaleInference:
    """Multi-scale segmentation on ViT-g/14; see `make_multi_scale_segmentor`."""
    return make_multi_scale_segmentor("vitg14", **options)


def make_linear_segmentor(name: str, **options: Unpack[SegmentorOptions]) -> TaskModel:
    """Builds a segmentation model with batch norm and a linear layer on the patches of the last block.

    Args:
        name: ``vits14``, ``vitb14``, ``vitl14`` or ``vitg14``.
        **options: ``head_dataset``: "voc2012" (the default), "ade20k" or "cityscapes": which released head and how many
            classes; nothing was released for Cityscapes. ``num_classes``: in place of the dataset's, for heads of your
            own. ``pretrained`` (True): whether released weights are fetched for what has no file; without, it is
            random. ``backbone_weights``, ``head_weights``: a file or URL in place of the released one; task files of
            ours are understood.

    Returns:
        A network in evaluation mode from images ``[B, 3, H, W]``, normalised as in pretraining, to logits
        ``[B, C, H, W]``.

    Raises:
        FileNotFoundError: when a file does not exist.
        ValueError: for another dataset, weights that were not released, or those of another backbone, head or number of
            classes.
        urllib.error.URLError: when a download fails.
    """
    # in_index [3] of out_indices [8, 9, 10, 11] in dinov2_vits14_ade20k_linear_config.py: the last block alone.
    return _make_segmentor(name, "linear", num_blocks=1, **options)


def make_multi_scale_segmentor(
    name: str, *, scales: Sequence[float] | None = None, **options: Unpack[SegmentorOptions]
) -> TaskModel | MultiScaleInference:
    """Builds a segmentation model with batch norm and a linear layer on the patches of the last four blocks.

    Args:
        name: ``vits14``, ``vitb14``, ``vitl14`` or ``vitg14``.
        scales: factors on the image's sides whose predictions are averaged, each also mirrored: the published scores
            used `dinov2.models.task_model.PUBLISHED_SCALES` on images of 640 pixels. None predicts once.
        **options: as `make_linear_segmentor`.

    Returns:
        As `make_linear_segmentor`; with ``scales`` logarithms of probabilities.

    Raises:
        ValueError, FileNotFoundError, urllib.error.URLError: as `make_linear_segmentor`, and for scales not positive.
    """
    # "We concatenate the patch tokens of the 4 last layers" (Oquab et al., section 7.4); conv_seg of the released head
    # of ViT-S has 1536 = 4 * 384 inputs.
    model = _make_segmentor(name, "ms", num_blocks=4, **options)
    return model if scales is None else MultiScaleInference(model, scales=scales).eval()


def _make_segmentor(
    name: str,
    kind: str,
    *,
    num_blocks: int,
    head_dataset: str = "voc2012",
    num_classes: int | None = None,
    pretrained: bool = True,
    backbone_weights: str | Path | None = None,
    head_weights: str | Path | None = None,
) -> TaskModel:
    check_choice("head_dataset", head_dataset, tuple(DATASET_CLASSES))
    architecture = released_architecture(name)
    classes = DATASET_CLASSES[head_dataset] if num_classes is None else num_classes
    released = released_address(name, f"{head_dataset}_{kind}_head") if head_dataset in RELEASED_DATASETS else None
    return make_task_model(
        name,
        BNHead(architecture.embed_dim, classes, num_blocks=num_blocks),
        blocks=architecture.last_blocks(num_blocks),
        norm=True,
        released_head=released,
        pretrained=pretrained,
        backbone_weights=backbone_weights,
        head_weights=head_weights,
    )
