"""Building a backbone from the options of a run."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from dinov2.config.schema import StudentOptions
from dinov2.layers.patch_embed import Size
from dinov2.models.vision_transformer import DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small, vit_tiny

ARCHITECTURES: Mapping[str, Callable[..., DinoVisionTransformer]] = MappingProxyType(
    {
        "vit_tiny": vit_tiny,
        "vit_small": vit_small,
        "vit_base": vit_base,
        "vit_large": vit_large,
        "vit_giant2": vit_giant2,
    }
)


def build_backbone(
    options: StudentOptions, *, img_size: Size, drop_path_rate: float | None = None
) -> DinoVisionTransformer:
    """Builds the backbone that the options describe, with random weights.

    Args:
        options: architecture and its settings. ``arch`` may carry upstream's suffix "_memeff", which names an attention
            kernel and not another network. How blocks are grouped for sharding (``block_chunks``) does not matter here.
        img_size: pixels (height, width) that the position embedding is learned for: the size of the global crops.
        drop_path_rate: in place of the options' rate; 0 for a teacher.

    Raises:
        ValueError: for an unknown architecture, or options that do not fit together.
    """
    name = options.arch.removesuffix("_memeff")
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {options.arch!r}; allowed: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name](
        img_size=img_size,
        patch_size=options.patch_size,
        init_values=options.layerscale,
        ffn_layer=options.ffn_layer,
        qkv_bias=options.qkv_bias,
        proj_bias=options.proj_bias,
        ffn_bias=options.ffn_bias,
        num_register_tokens=options.num_register_tokens,
        interpolate_antialias=options.interpolate_antialias,
        interpolate_offset=options.interpolate_offset,
        drop_path_rate=options.drop_path_rate if drop_path_rate is None else drop_path_rate,
        drop_path_uniform=options.drop_path_uniform,
        attention_backend=options.attention_backend,
    )
