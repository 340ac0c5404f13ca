"""Building a backbone from the options of a run, and telling the options from the weights of one."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2.config.schema import StudentOptions
from dinov2.layers.feed_forward import plain_hidden_dim, swiglu_hidden_dim
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
    sizes = {"depth": options.depth, "num_heads": options.num_heads, "ffn_hidden_dim": options.ffn_hidden_dim}
    return ARCHITECTURES[name](
        **{size: value for size, value in sizes.items() if value},
        img_size=img_size,
        patch_size=options.patch_size,
        in_chans=options.in_channels,
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


class _Shape(NamedTuple):
    """Sizes of an architecture: widths of tokens, of a head, and of the hidden layer of a plain feed-forward layer."""

    embed_dim: int
    depth: int
    num_heads: int
    head_dim: int
    hidden_dim: int


@functools.cache
def _shape_of(make: Callable[..., DinoVisionTransformer]) -> _Shape:
    with torch.device("meta"):
        model = make(img_size=16, patch_size=16)
    parameters = dict(model.named_parameters())
    inner = parameters["blocks.0.attn.proj.weight"].shape[1]
    hidden = parameters["blocks.0.mlp.fc1.weight"].shape[0]
    return _Shape(model.embed_dim, model.n_blocks, model.num_heads, inner // model.num_heads, hidden)


def student_options_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The options of the section ``student`` that decide the shapes and names of a backbone's parameters.

    Args:
        tensors: parameters by our names, such as those of `dinov2.models.layouts.extract_backbone`.

    Returns:
        Options by name, as far as the parameters tell; ``arch`` names one of `ARCHITECTURES`, or says the width and
        the number of blocks where none is so: then nothing tells how its heads are divided. Empty for what is no
        vision transformer.
    """
    patches = tensors.get("patch_embed.proj.weight")
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    if patches is None or patches.ndim != 4 or not blocks:
        return {}
    shape = patches.shape[0], 1 + max(blocks)
    fitting = [name for name, make in ARCHITECTURES.items() if _shape_of(make)[:2] == shape]
    height, width = patches.shape[2:]
    gated = any(".mlp.w12." in name for name in tensors)
    options: dict[str, Any] = {
        "arch": fitting[0] if fitting else f"(none of ours: width {shape[0]}, {shape[1]} blocks)",
        "patch_size": height if height == width else [height, width],
        "in_channels": patches.shape[1],
        "ffn_layer": "swiglufused" if gated else "mlp",
        "layerscale": 1e-5 if any(name.endswith(".ls1.gamma") for name in tensors) else 0.0,
    }
    for option, ending in (("qkv_bias", ".attn.qkv.bias"), ("proj_bias", ".attn.proj.bias")):
        options[option] = any(name.endswith(ending) for name in tensors)
    if fitting:
        options |= _pruned_widths(tensors, _shape_of(ARCHITECTURES[fitting[0]]), gated=gated)
    options["ffn_bias"] = any(".mlp." in name and name.endswith(".bias") for name in tensors)
    registers = tensors.get("register_tokens")
    options["num_register_tokens"] = 0 if registers is None else registers.shape[-2]
    return options


def _pruned_widths(tensors: Mapping[str, Tensor], shape: _Shape, *, gated: bool) -> dict[str, int]:
    """The options ``num_heads`` and ``ffn_hidden_dim``; 0 where they are as the architecture has them."""
    proj, last = (tensors.get(f"blocks.0.{name}.weight") for name in ("attn.proj", "mlp.w3" if gated else "mlp.fc2"))
    heads = 0 if proj is None else proj.shape[-1] // shape.head_dim
    usual = swiglu_hidden_dim(shape.hidden_dim) if gated else shape.hidden_dim
    hidden = usual if last is None else last.shape[-1]
    return {
        "num_heads": 0 if heads == shape.num_heads else heads,
        "ffn_hidden_dim": 0 if hidden == usual else plain_hidden_dim(hidden) if gated else hidden,
    }
