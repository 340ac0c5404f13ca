"""Building a backbone from the options of a run, and telling the options from the weights of one."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dinov2.config.schema import StudentOptions
from dinov2.layers.patch_embed import Size
from dinov2.models.vision_transformer import (
    DinoVisionTransformer,
    vit_base,
    vit_giant2,
    vit_large,
    vit_mini,
    vit_small,
    vit_tiny,
)

ARCHITECTURES: Mapping[str, Callable[..., DinoVisionTransformer]] = MappingProxyType(
    {
        "vit_mini": vit_mini,
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


@functools.cache
def _shape_of(make: Callable[..., DinoVisionTransformer]) -> tuple[int, int]:
    """Width and number of blocks of an architecture."""
    with torch.device("meta"):
        model = make(img_size=16, patch_size=16)
    return model.embed_dim, model.n_blocks


def student_options_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of the section ``student`` that decide the shapes and names of a backbone's parameters.

    Args:
        tensors: parameters by our names, such as those of `dinov2.models.layouts.extract_backbone`.

    Returns:
        Options by name, as far as the parameters tell; ``arch`` names one of `ARCHITECTURES`, or says the width and
        the number of blocks where none is so. Empty for what is no vision transformer.
    """
    patches = tensors.get("patch_embed.proj.weight")
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    if patches is None or patches.ndim != 4 or not blocks:
        return {}
    shape = patches.shape[0], 1 + max(blocks)
    fitting = [name for name, make in ARCHITECTURES.items() if _shape_of(make) == shape]
    height, width = patches.shape[2:]
    gated = any(".mlp.w12." in name for name in tensors)
    options: dict[str, Any] = {
        "arch": fitting[0] if fitting else f"(none of ours: width {shape[0]}, {shape[1]} blocks)",
        "patch_size": height if height == width else [height, width],
        "ffn_layer": "swiglufused" if gated else "mlp",
        "layerscale": 1e-5 if any(name.endswith(".ls1.gamma") for name in tensors) else 0.0,
    }
    for option, ending in (("qkv_bias", ".attn.qkv.bias"), ("proj_bias", ".attn.proj.bias")):
        options[option] = any(name.endswith(ending) for name in tensors)
    options["ffn_bias"] = any(".mlp." in name and name.endswith(".bias") for name in tensors)
    registers = tensors.get("register_tokens")
    options["num_register_tokens"] = 0 if registers is None else registers.shape[-2]
    return options
