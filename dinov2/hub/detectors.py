"""Detectors on the released backbones: a dense head (``_yolo``), or queries (``_detr``). No head was released."""

import logging
from typing import Unpack

from torch import nn

from dinov2.hub.backbones import entry_point, make_backbone
from dinov2.hub.task_models import WeightOptions, load_head_weights
from dinov2.models.heads.dense_detection import DenseDetectionHead
from dinov2.models.heads.set_detection import SetDetectionHead
from dinov2.models.released import released_backbone
from dinov2.models.task_model import TaskModel

logger = logging.getLogger("dinov2")

_NUM_BLOCKS = 4


def make_dense_detector(
    name: str, *, num_classes: int = 80, channels: int = 128, output_stride: int = 8, **weights: Unpack[WeightOptions]
) -> TaskModel:
    """Builds a detector that boxes objects from every position of an image.

    Args:
        name: of a released backbone, such as ``dinov2_vits14``.
        num_classes: classes; there is none for the background.
        channels: width of the head's maps.
        output_stride: pixels per position of its finest map.
        **weights: see `WeightOptions`. No head was released: without ``head_weights``, such as the ``best.pth`` of a
            run, it is random.

    Returns:
        A network in evaluation mode from images ``[B, 3, H, W]``, normalised as in pretraining, whose sides are
        multiples of 14, to ``boxes`` ``[B, N, 4]`` (x0, y0, x1, y1 in pixels), ``scores`` ``[B, N, C]`` (logits) and
        what its loss needs. Boxes overlap: `torchvision.ops.batched_nms` keeps the best ones.

    Raises:
        ConnectionError: when a download fails.
        FileNotFoundError: when a file does not exist.
        ValueError: for weights of another backbone, head or number of classes.
    """
    head = DenseDetectionHead(
        released_backbone(name).embed_dim,
        num_classes,
        num_blocks=_NUM_BLOCKS,
        channels=channels,
        output_stride=output_stride,
    )
    return _join(name, head, **weights)


def make_set_detector(
    name: str,
    *,
    num_classes: int = 80,
    num_queries: int = 300,
    channels: int = 128,
    output_stride: int = 8,
    **weights: Unpack[WeightOptions],
) -> TaskModel:
    """Builds a detector whose queries name each object once.

    Args:
        name: of a released backbone, such as ``dinov2_vits14``.
        num_classes: classes; there is none for the background.
        num_queries: most objects of an image.
        channels: width of the head's maps and queries, a multiple of 8.
        output_stride: pixels per value of its finest map.
        **weights: as of `make_dense_detector`.

    Returns:
        As `make_dense_detector`, with a box per query; nothing has to be suppressed.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: as `make_dense_detector`.
    """
    head = SetDetectionHead(
        released_backbone(name).embed_dim,
        num_classes,
        num_blocks=_NUM_BLOCKS,
        channels=channels,
        output_stride=output_stride,
        num_queries=num_queries,
    )
    return _join(name, head, **weights)


def _join(name: str, head: nn.Module, **weights: Unpack[WeightOptions]) -> TaskModel:
    head_weights, backbone_weights = weights.get("head_weights"), weights.get("backbone_weights")
    if head_weights is None:
        logger.warning("%s: the head is random, for none was released; train it, or name head_weights", name)
    else:
        load_head_weights(head, head_weights)
    pretrained = weights.get("pretrained", True) or backbone_weights is not None
    backbone = make_backbone(name, pretrained=pretrained, weights=backbone_weights)
    return TaskModel(backbone, head, blocks=released_backbone(name).last_blocks(_NUM_BLOCKS)).eval()


dinov2_vits14_yolo = entry_point(make_dense_detector, "dinov2_vits14", "_yolo")
dinov2_vitb14_yolo = entry_point(make_dense_detector, "dinov2_vitb14", "_yolo")
dinov2_vitl14_yolo = entry_point(make_dense_detector, "dinov2_vitl14", "_yolo")
dinov2_vitg14_yolo = entry_point(make_dense_detector, "dinov2_vitg14", "_yolo")
dinov2_vits14_detr = entry_point(make_set_detector, "dinov2_vits14", "_detr")
dinov2_vitb14_detr = entry_point(make_set_detector, "dinov2_vitb14", "_detr")
dinov2_vitl14_detr = entry_point(make_set_detector, "dinov2_vitl14", "_detr")
dinov2_vitg14_detr = entry_point(make_set_detector, "dinov2_vitg14", "_detr")
