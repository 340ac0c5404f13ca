"""Choosing the feed-forward network of a block by its option name."""

import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, GELU, linear on the last axis of ``[..., D]``."""

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.act(self.fc1(x))
        output: Tensor = self.fc2(hidden)
        return output


def swiglu_hidden_dim(hidden_dim: int) -> int:
    """Width of a gate that costs what an MLP of ``hidden_dim`` does: two thirds, rounded up to a multiple of 8."""
    return (int(hidden_dim * 2 / 3) + 7) // 8 * 8


def plain_hidden_dim(gate_dim: int) -> int:
    """Width of an MLP that a gate of ``gate_dim``, a multiple of 8, takes the place of; see `swiglu_hidden_dim`."""
    return gate_dim * 3 // 2


class SwiGLUFFN(nn.Module):
    """``w3(silu(x1) * x2)`` where ``x1, x2`` are the two halves of ``w12(x)``, on the last axis of ``[..., D]``.

    Args:
        dim: width of input and output.
        hidden_dim: hidden width of the plain MLP that this one replaces; see `swiglu_hidden_dim`.
        bias: whether both linear layers have one.

    Reference: Shazeer, GLU Variants Improve Transformer (2020).
    """

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        gate_dim = swiglu_hidden_dim(hidden_dim)
        self.w12 = nn.Linear(dim, 2 * gate_dim, bias=bias)
        self.w3 = nn.Linear(gate_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        output: Tensor = self.w3(F.silu(gate) * value)
        return output


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
