"""Choosing the feed-forward network of a block by its option name."""

from torch import nn

from dinov2.layers.mlp import Mlp
from dinov2.layers.swiglu_ffn import SwiGLUFFN

FFN_LAYERS = ("mlp", "swiglu", "swiglufused", "identity")


def make_feed_forward(name: str, dim: int, hidden_dim: int, *, bias: bool = True) -> nn.Module:
    """Builds the network named by the option ``ffn_layer``; "swiglu" and "swiglufused" are the same network.

    Raises:
        ValueError: for a name that is not in `FFN_LAYERS`.
    """
    match name:
        case "mlp":
            return Mlp(dim, hidden_dim, bias=bias)
        case "swiglu" | "swiglufused":
            return SwiGLUFFN(dim, hidden_dim, bias=bias)
        case "identity":
            return nn.Identity()
    raise ValueError(f"unknown ffn_layer {name!r}; allowed: {', '.join(FFN_LAYERS)}")
