"""The released depth heads for NYU Depth V2 and KITTI on the released backbones: linear and DPT.

Reference: Oquab et al., DINOv2 (2023), section 7.4.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypedDict, Unpack

from dinov2.hub.backbones import released_address, released_architecture
from dinov2.hub.task_models import check_choice, make_task_model
from dinov2.models.heads.depth import DepthBins, DPTHead, LinearDepthHead, ReluDepth
from dinov2.models.task_model import TaskModel

# Metres that the heads of each dataset were trained for.
DEPTH_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType({"nyu": (0.001, 10.0), "kitti": (0.001, 80.0)})


class DPTOptions(TypedDict, total=False):
    """Options of every DPT depth model; see `make_dpt_depther`."""

    head_dataset: str
    depth_range: tuple[float, float] | None
    pretrained: bool
    backbone_weights: str | Path | None
    head_weights: str | Path | None


class LinearDepthOptions(DPTOptions, total=False):
    """Options of every linear depth model; see `make_linear_depther`."""

    layers: int


def dinov2_vits14_ld(**options: Unpack[LinearDepthOptions]) -> TaskModel:
    """Linear depth head on ViT-S/14; see `make_linear_depther`."""
    return make_linear_depther("vits14", **options)


def dinov2_vitb14_ld(**options: Unpack[LinearDepthOptions]) -> TaskModel:
    """Linear depth head on ViT-B/14; see `make_linear_depther`."""
    return make_linear_depther("vitb14", **options)


def dinov2_vitl14_ld(**options: Unpack[LinearDepthOptions]) -> TaskModel:
    """Linear depth head on ViT-L/14; see `make_linear_depther`."""
    return make_linear_depther("vitl14", **options)


def dinov2_vitg14_ld(**options: Unpack[LinearDepthOptions]) -> TaskModel:
    """Linear depth head on ViT-g/14; see `make_linear_depther`."""
    return make_linear_depther("vitg14", **options)


def dinov2_vits14_dd(**options: Unpack[DPTOptions]) -> TaskModel:
    """DPT depth head on ViT-S/14; see `make_dpt_depther`."""
    return make_dpt_depther("vits14", **options)


def dinov2_vitb14_dd(**options: Unpack[DPTOptions]) -> TaskModel:
    """DPT depth head on ViT-B/14; see `make_dpt_depther`."""
    return make_dpt_depther("vitb14", **options)


def dinov2_vitl14_dd(**options: Unpack[DPTOptions]) -> TaskModel:
    """DPT depth head on ViT-L/14; see `make_dpt_depther`."""
    return make_dpt_depther("vitl14", **options)


def dinov2_vitg14_dd(**options: Unpack[DPTOptions]) -> TaskModel:
    """DPT depth head on ViT-g/14; see `make_dpt_depther`."""
    return make_dpt_depther("vitg14", **options)


def make_linear_depther(
    name: str,
    *,
    layers: int = 4,
    head_dataset: str = "nyu",
    depth_range: tuple[float, float] | None = None,
    pretrained: bool = True,
    backbone_weights: str | Path | None = None,
    head_weights: str | Path | None = None,
) -> TaskModel:
    """Builds a depth model with a linear head over 256 bins.

    Args:
        name: ``vits14``, ``vitb14``, ``vitl14`` or ``vitg14``.
        layers: 1 for the last block, 4 for four blocks spread over the depth.
        head_dataset: "nyu" or "kitti": which released head, and its depth range.
        depth_range: smallest and largest depth in place of the dataset's (0.001 to 10 or 80 metres). Bins lie in it, so
            with released weights another range scales what is predicted. Upstream's hub ignores it and gives every head
            bins to 80: ``(0.001, 80.0)`` reproduces its numbers.
        pretrained: whether released weights are fetched for what has no file below; without, it is random.
        backbone_weights: a file or URL in place of the released backbone; a task file of ours is understood.
        head_weights: a file or URL in place of the released head; a task file of ours is understood.

    Returns:
        A network in evaluation mode from images ``[B, 3, H, W]``, normalised as in pretraining, to depth
        ``[B, 1, H, W]`` within the range.

    Raises:
        FileNotFoundError: when a file does not exist.
        ValueError: for options out of range, or weights of another backbone or head.
        urllib.error.URLError: when a download fails.
    """
    check_choice("layers", layers, (1, 4))
    check_choice("head_dataset", head_dataset, tuple(DEPTH_RANGES))
    architecture = released_architecture(name)
    bins = DepthBins(*(depth_range or DEPTH_RANGES[head_dataset]))
    return make_task_model(
        name,
        LinearDepthHead(architecture.embed_dim, bins, num_blocks=layers),
        blocks=architecture.last_blocks(1) if layers == 1 else architecture.spread_blocks,
        norm=False,
        released_head=released_address(name, f"{head_dataset}_linear{'' if layers == 1 else layers}_head"),
        pretrained=pretrained,
        backbone_weights=backbone_weights,
        head_weights=head_weights,
    )


def make_dpt_depther(
    name: str,
    *,
    head_dataset: str = "nyu",
    depth_range: tuple[float, float] | None = None,
    pretrained: bool = True,
    backbone_weights: str | Path | None = None,
    head_weights: str | Path | None = None,
) -> TaskModel:
    """Builds a depth model with a DPT head.

    Args:
        name: ``vits14``, ``vitb14``, ``vitl14`` or ``vitg14``.
        head_dataset: "nyu" or "kitti": which released head, and its depth range.
        depth_range: smallest and largest depth in place of the dataset's (0.001 to 10 or 80 metres); depth is cut off
            there, and the smallest is added to what the network says.
        pretrained: see `make_linear_depther`.
        backbone_weights: see `make_linear_depther`.
        head_weights: see `make_linear_depther`.

    Returns:
        As `make_linear_depther`.

    Raises:
        FileNotFoundError: when a file does not exist.
        ValueError: for options out of range, or weights of another backbone or head.
        urllib.error.URLError: when a download fails.
    """
    check_choice("head_dataset", head_dataset, tuple(DEPTH_RANGES))
    architecture = released_architecture(name)
    output = ReluDepth(*(depth_range or DEPTH_RANGES[head_dataset]))
    return make_task_model(
        name,
        DPTHead(architecture.embed_dim, output),
        blocks=architecture.spread_blocks,
        norm=False,
        released_head=released_address(name, f"{head_dataset}_dpt_head"),
        pretrained=pretrained,
        backbone_weights=backbone_weights,
        head_weights=head_weights,
    )
