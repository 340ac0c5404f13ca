"""The released DINOv2 backbones, with their weights or without.

Reference: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision"; Darcet et al., "Vision
Transformers Need Registers".
"""

from collections.abc import Callable
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from dinov2.config.schema import StudentOptions
from dinov2.models.build import build_backbone
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.models.released import released_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer

_Options = ParamSpec("_Options")
_Network = TypeVar("_Network")


def entry_point(
    make: Callable[Concatenate[str, _Options], _Network], backbone: str, ending: str = ""
) -> Callable[_Options, _Network]:
    """The constructor ``{backbone}{ending}``: ``make`` with its first argument, the name of the backbone, given."""

    def construct(*args: _Options.args, **options: _Options.kwargs) -> _Network:
        return make(backbone, *args, **options)

    construct.__name__ = construct.__qualname__ = f"{backbone}{ending}"
    construct.__module__ = make.__module__
    construct.__doc__ = f"Calls `{make.__name__}` for {backbone}; the options and the result are described there."
    return construct


def make_backbone(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
) -> DinoVisionTransformer:
    """Builds a released backbone.

    Args:
        name: such as ``dinov2_vits14``, or ``dinov2_vits14_reg`` with four register tokens; see `RELEASED_BACKBONES`.
        pretrained: whether weights are loaded; without them it is random.
        weights: a file or an address in place of the released one; see `fetch_weights`.
        backbone_weights: the same under the name that models with a head have for it.

    Returns:
        A network for images of 518 pixels (others are interpolated), which returns ``[B, D]`` class tokens.

    Raises:
        ConnectionError: when the download fails.
        FileNotFoundError: when ``weights`` is a file that does not exist.
        ValueError: for an unknown name, weights of another architecture or of no backbone, two different files, or a
            file with ``pretrained=False``.
    """
    if weights is not None and backbone_weights is not None and str(weights) != str(backbone_weights):
        raise ValueError(f"weights={weights} and backbone_weights={backbone_weights} mean the same: give one of them")
    source = backbone_weights if weights is None else weights
    if source is not None and not pretrained:
        raise ValueError(f"pretrained=False is for random weights, and weights={source} names a file: give one of them")
    options = StudentOptions(**released_backbone(name).student, layerscale=1.0, drop_path_rate=0.0)
    model = build_backbone(options, img_size=518)
    if pretrained:
        load_pretrained_backbone(model, source or name)
    return model


dinov2_vits14 = entry_point(make_backbone, "dinov2_vits14")
dinov2_vitb14 = entry_point(make_backbone, "dinov2_vitb14")
dinov2_vitl14 = entry_point(make_backbone, "dinov2_vitl14")
dinov2_vitg14 = entry_point(make_backbone, "dinov2_vitg14")
dinov2_vits14_reg = entry_point(make_backbone, "dinov2_vits14_reg")
dinov2_vitb14_reg = entry_point(make_backbone, "dinov2_vitb14_reg")
dinov2_vitl14_reg = entry_point(make_backbone, "dinov2_vitl14_reg")
dinov2_vitg14_reg = entry_point(make_backbone, "dinov2_vitg14_reg")
