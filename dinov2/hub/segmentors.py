"""The released segmentation heads for Pascal VOC 2012 and ADE20K on the released backbones: one and four blocks.

Reference: Oquab et al., DINOv2 (2023), section 7.4.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Unpack

from dinov2.hub.backbones import entry_point
from dinov2.hub.task_models import WeightOptions, check_choice, make_task_model
from dinov2.models.heads.segmentation import BNHead
from dinov2.models.released import released_backbone
from dinov2.models.task_model import MultiScaleInference, TensorTaskModel

# Classes of the datasets; those of ADE20K come without a background.
DATASET_CLASSES: Mapping[str, int] = MappingProxyType({"voc2012": 21, "ade20k": 150, "cityscapes": 19})
# The published scores on Cityscapes come without weights.
RELEASED_DATASETS = ("voc2012", "ade20k")


def make_linear_segmentor(
    name: str,
    *,
    head_dataset: str = "voc2012",
    num_classes: int | None = None,
    **weights: Unpack[WeightOptions],
) -> TensorTaskModel:
    """Builds a segmentation model with batch norm and a linear layer on the patches of the last block.

    Args:
        name: of a released backbone, such as ``dinov2_vits14``.
        head_dataset: "voc2012", "ade20k" or "cityscapes": which released head and how many classes; nothing was
            released for Cityscapes.
        num_classes: in place of the dataset's, for heads of your own.
        **weights: see `WeightOptions`.

    Returns:
        A network in evaluation mode from images ``[B, 3, H, W]``, normalised as in pretraining, to logits
        ``[B, C, H, W]``.

    Raises:
        ConnectionError: when a download fails.
        FileNotFoundError: when a file does not exist.
        ValueError: for another dataset, weights that were not released, or those of another backbone, head or number of
            classes.
    """
    # in_index [3] of out_indices [8, 9, 10, 11] in dinov2_vits14_ade20k_linear_config.py: the last block alone.
    return _make_segmentor(name, "linear", 1, head_dataset, num_classes, **weights)


def make_multi_scale_segmentor(
    name: str,
    *,
    scales: Sequence[float] | None = None,
    head_dataset: str = "voc2012",
    num_classes: int | None = None,
    **weights: Unpack[WeightOptions],
) -> TensorTaskModel | MultiScaleInference:
    """Builds a segmentation model with batch norm and a linear layer on the patches of the last four blocks.

    Args:
        name: of a released backbone, such as ``dinov2_vits14``.
        scales: factors on the image's sides whose predictions are averaged, each also mirrored: the published scores
            used `dinov2.models.task_model.PUBLISHED_SCALES` on images of 640 pixels. None predicts once.
        head_dataset: as in `make_linear_segmentor`, like the following.
        num_classes: in place of the dataset's.
        **weights: see `WeightOptions`.

    Returns:
        As `make_linear_segmentor`; with ``scales`` logarithms of probabilities.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: as `make_linear_segmentor`, and for scales not positive.
    """
    # "We concatenate the patch tokens of the 4 last layers" (Oquab et al., section 7.4); conv_seg of the released head
    # of ViT-S has 1536 = 4 * 384 inputs.
    model = _make_segmentor(name, "ms", 4, head_dataset, num_classes, **weights)
    return model if scales is None else MultiScaleInference(model, scales=scales).eval()


def _make_segmentor(
    name: str,
    kind: str,
    num_blocks: int,
    head_dataset: str,
    num_classes: int | None,
    **weights: Unpack[WeightOptions],
) -> TensorTaskModel:
    check_choice("head_dataset", head_dataset, tuple(DATASET_CLASSES))
    backbone = released_backbone(name)
    classes = DATASET_CLASSES[head_dataset] if num_classes is None else num_classes
    return make_task_model(
        name,
        BNHead(backbone.embed_dim, classes, num_blocks=num_blocks),
        blocks=backbone.last_blocks(num_blocks),
        norm=True,
        released_head=backbone.address(f"{head_dataset}_{kind}_head") if head_dataset in RELEASED_DATASETS else None,
        **weights,
    )


dinov2_vits14_ls = entry_point(make_linear_segmentor, "dinov2_vits14", "_ls")
dinov2_vitb14_ls = entry_point(make_linear_segmentor, "dinov2_vitb14", "_ls")
dinov2_vitl14_ls = entry_point(make_linear_segmentor, "dinov2_vitl14", "_ls")
dinov2_vitg14_ls = entry_point(make_linear_segmentor, "dinov2_vitg14", "_ls")
dinov2_vits14_ms = entry_point(make_multi_scale_segmentor, "dinov2_vits14", "_ms")
dinov2_vitb14_ms = entry_point(make_multi_scale_segmentor, "dinov2_vitb14", "_ms")
dinov2_vitl14_ms = entry_point(make_multi_scale_segmentor, "dinov2_vitl14", "_ms")
dinov2_vitg14_ms = entry_point(make_multi_scale_segmentor, "dinov2_vitg14", "_ms")
