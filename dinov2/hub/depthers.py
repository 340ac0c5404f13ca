"""The released depth heads for NYU Depth V2 and KITTI on the released backbones: linear and DPT.

Reference: Oquab et al., DINOv2 (2023), section 7.4.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Unpack

from dinov2.hub.backbones import entry_point
from dinov2.hub.task_models import WeightOptions, check_choice, make_task_model
from dinov2.models.heads.depth import DepthBins, DPTHead, LinearDepthHead, ReluDepth
from dinov2.models.released import released_backbone
from dinov2.models.task_model import TensorTaskModel

# Metres that the heads of each dataset were trained for.
DEPTH_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType({"nyu": (0.001, 10.0), "kitti": (0.001, 80.0)})


def make_linear_depther(
    name: str,
    *,
    layers: int = 4,
    head_dataset: str = "nyu",
    depth_range: tuple[float, float] | None = None,
    **weights: Unpack[WeightOptions],
) -> TensorTaskModel:
    """Builds a depth model with a linear head over 256 bins.

    Args:
        name: of a released backbone, such as ``dinov2_vits14``.
        layers: 1 for the last block, 4 for four blocks spread over the depth.
        head_dataset: "nyu" or "kitti": which released head, and its depth range.
        depth_range: smallest and largest depth in place of the dataset's (0.001 to 10 or 80 metres). Bins lie in it, so
            with released weights another range scales what is predicted. Upstream's hub ignores it and gives every head
            bins to 80: ``(0.001, 80.0)`` reproduces its numbers.
        **weights: see `WeightOptions`.

    Returns:
        A network in evaluation mode from images ``[B, 3, H, W]``, normalised as in pretraining, to depth
        ``[B, 1, H, W]`` within the range.

    Raises:
        ConnectionError: when a download fails.
        FileNotFoundError: when a file does not exist.
        ValueError: for options out of range, or weights of another backbone or head.
    """
    check_choice("layers", layers, (1, 4))
    check_choice("head_dataset", head_dataset, tuple(DEPTH_RANGES))
    backbone = released_backbone(name)
    bins = DepthBins(*(depth_range or DEPTH_RANGES[head_dataset]))
    return make_task_model(
        name,
        LinearDepthHead(backbone.embed_dim, bins, num_blocks=layers),
        blocks=backbone.last_blocks(1) if layers == 1 else backbone.spread_blocks,
        norm=False,
        released_head=backbone.address(f"{head_dataset}_linear{'' if layers == 1 else layers}_head"),
        **weights,
    )


def make_dpt_depther(
    name: str,
    *,
    head_dataset: str = "nyu",
    depth_range: tuple[float, float] | None = None,
    **weights: Unpack[WeightOptions],
) -> TensorTaskModel:
    """Builds a depth model with a DPT head.

    Args:
        name: of a released backbone, such as ``dinov2_vits14``.
        head_dataset: "nyu" or "kitti": which released head, and its depth range.
        depth_range: smallest and largest depth in place of the dataset's (0.001 to 10 or 80 metres); depth is cut off
            there, and the smallest is added to what the network gives.
        **weights: see `WeightOptions`.

    Returns:
        As `make_linear_depther`.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: as `make_linear_depther`.
    """
    check_choice("head_dataset", head_dataset, tuple(DEPTH_RANGES))
    backbone = released_backbone(name)
    output = ReluDepth(*(depth_range or DEPTH_RANGES[head_dataset]))
    return make_task_model(
        name,
        DPTHead(backbone.embed_dim, output),
        blocks=backbone.spread_blocks,
        norm=False,
        released_head=backbone.address(f"{head_dataset}_dpt_head"),
        **weights,
    )


dinov2_vits14_ld = entry_point(make_linear_depther, "dinov2_vits14", "_ld")
dinov2_vitb14_ld = entry_point(make_linear_depther, "dinov2_vitb14", "_ld")
dinov2_vitl14_ld = entry_point(make_linear_depther, "dinov2_vitl14", "_ld")
dinov2_vitg14_ld = entry_point(make_linear_depther, "dinov2_vitg14", "_ld")
dinov2_vits14_dd = entry_point(make_dpt_depther, "dinov2_vits14", "_dd")
dinov2_vitb14_dd = entry_point(make_dpt_depther, "dinov2_vitb14", "_dd")
dinov2_vitl14_dd = entry_point(make_dpt_depther, "dinov2_vitl14", "_dd")
dinov2_vitg14_dd = entry_point(make_dpt_depther, "dinov2_vitg14", "_dd")
