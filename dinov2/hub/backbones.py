"""The released DINOv2 backbones, with their weights or without.

Reference: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision"; Darcet et al., "Vision
Transformers Need Registers".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small

RELEASED_WEIGHTS = "https://dl.fbaipublicfiles.com/dinov2"
NUM_REGISTERS = 4


@dataclass(frozen=True, kw_only=True)
class ReleasedArchitecture:
    """Facts about a released backbone that its heads depend on.

    Attributes:
        embed_dim: width of the tokens.
        num_blocks: blocks.
        spread_blocks: the four blocks that the released 4-block linear and DPT depth heads see: ``out_index`` of
            upstream's hub/depthers.py and ``OUT_INDICES`` of its depth_estimation notebook.
    """

    embed_dim: int
    num_blocks: int
    spread_blocks: tuple[int, int, int, int]

    def last_blocks(self, count: int) -> tuple[int, ...]:
        """Numbers of the last ``count`` blocks."""
        return tuple(range(self.num_blocks - count, self.num_blocks))


ARCHITECTURES: Mapping[str, ReleasedArchitecture] = MappingProxyType(
    {
        "vits14": ReleasedArchitecture(embed_dim=384, num_blocks=12, spread_blocks=(2, 5, 8, 11)),
        "vitb14": ReleasedArchitecture(embed_dim=768, num_blocks=12, spread_blocks=(2, 5, 8, 11)),
        "vitl14": ReleasedArchitecture(embed_dim=1024, num_blocks=24, spread_blocks=(4, 11, 17, 23)),
        "vitg14": ReleasedArchitecture(embed_dim=1536, num_blocks=40, spread_blocks=(9, 19, 29, 39)),
    }
)


def released_architecture(name: str) -> ReleasedArchitecture:
    """Facts about a released backbone.

    Raises:
        ValueError: for a name that is not among those of `ARCHITECTURES`.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown backbone {name!r}; allowed: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def released_address(name: str, what: str, *, registers: bool = False) -> str:
    """Address of a released file, such as that of ``what="linear_head"`` for ``name="vits14"``."""
    suffix = f"_reg{NUM_REGISTERS}" if registers else ""
    return f"{RELEASED_WEIGHTS}/dinov2_{name}/dinov2_{name}{suffix}_{what}.pth"


def local_file(source: str | Path) -> Path:
    """The file itself, or that of a URL, downloaded once into torch's hub folder.

    Raises:
        urllib.error.URLError: when the download fails.
    """
    address = str(source)
    if "://" not in address:
        return Path(source)
    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rpartition("/")[2]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path))
    return path


_ARCHITECTURES = {"vits14": vit_small, "vitb14": vit_base, "vitl14": vit_large, "vitg14": vit_giant2}


def dinov2_vits14(*, pretrained: bool = True, weights: str | Path | None = None) -> DinoVisionTransformer:
    """ViT-S/14, width 384; see `make_backbone`."""
    return make_backbone("vits14", pretrained=pretrained, weights=weights)


def dinov2_vitb14(*, pretrained: bool = True, weights: str | Path | None = None) -> DinoVisionTransformer:
    """ViT-B/14, width 768; see `make_backbone`."""
    return make_backbone("vitb14", pretrained=pretrained, weights=weights)


def dinov2_vitl14(*, pretrained: bool = True, weights: str | Path | None = None) -> DinoVisionTransformer:
    """ViT-L/14, width 1024; see `make_backbone`."""
    return make_backbone("vitl14", pretrained=pretrained, weights=weights)


def dinov2_vitg14(*, pretrained: bool = True, weights: str | Path | None = None) -> DinoVisionTransformer:
    """ViT-g/14, width 1536, SwiGLU; see `make_backbone`."""
    return make_backbone("vitg14", pretrained=pretrained, weights=weights)


def dinov2_vits14_reg(*, pretrained: bool = True, weights: str | Path | None = None) -> DinoVisionTransformer:
    """ViT-S/14 with four registers; see `make_backbone`."""
    return make_backbone("vits14", registers=True, pretrained=pretrained, weights=weights)


def dinov2_vitb14_reg(*, pretrained: bool = True, weights: str | Path | None = None) -> DinoVisionTransformer:
    """ViT-B/14 with four registers; see `make_backbone`."""
    return make_backbone("vitb14", registers=True, pretrained=pretrained, weights=weights)


def dinov2_vitl14_reg(*, pretrained: bool = True, weights: str | Path | None = None) -> DinoVisionTransformer:
    """ViT-L/14 with four registers; see `make_backbone`."""
    return make_backbone("vitl14", registers=True, pretrained=pretrained, weights=weights)


def dinov2_vitg14_reg(*, pretrained: bool = True, weights: str | Path | None = None) -> DinoVisionTransformer:
    """ViT-g/14 with four registers; see `make_backbone`."""
    return make_backbone("vitg14", registers=True, pretrained=pretrained, weights=weights)


def make_backbone(
    name: str, *, registers: bool = False, pretrained: bool = True, weights: str | Path | None = None
) -> DinoVisionTransformer:
    """Builds a released backbone.

    Args:
        name: ``vits14``, ``vitb14``, ``vitl14`` or ``vitg14``.
        registers: whether it has four register tokens.
        pretrained: whether weights are loaded; without them it is random.
        weights: a file or URL in place of the released one; what is downloaded is kept in torch's hub folder.

    Returns:
        A network for images of 518 pixels (others are interpolated), which returns ``[B, D]`` class tokens.

    Raises:
        FileNotFoundError: when ``weights`` is a file that does not exist.
        ValueError: when the weights belong to another architecture, or to no backbone.
        urllib.error.URLError: when the download fails.
    """
    # Weights with registers were trained with another way of resizing position embeddings.
    interpolation = {"interpolate_antialias": True, "interpolate_offset": 0.0} if registers else {}
    model = _ARCHITECTURES[name](
        patch_size=14,
        num_register_tokens=NUM_REGISTERS if registers else 0,
        img_size=518,
        init_values=1.0,
        ffn_layer="swiglufused" if name == "vitg14" else "mlp",
        **interpolation,
    )
    if pretrained:
        source = weights or released_address(name, "pretrain", registers=registers)
        load_pretrained_backbone(model, local_file(source))
    return model
