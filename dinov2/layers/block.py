"""The transformer block of the vision transformer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dinov2.layers.attention import Attention, GroupShapes, pack_groups
from dinov2.layers.feed_forward import make_feed_forward


def drop_path(residual: Tensor, rate: float) -> Tensor:
    """Zeroes each sample of ``[B, ...]`` with probability ``rate`` and scales the others by ``1 / (1 - rate)``."""
    keep = residual.new_empty((residual.shape[0],) + (1,) * (residual.ndim - 1)).bernoulli_(1 - rate)
    return residual * keep / (1 - rate)


def add_residual_of_subset(
    x: Tensor, shapes: GroupShapes, branch: Callable[[Tensor, GroupShapes], Tensor], rate: float
) -> Tensor:
    """Adds ``branch(x)`` to a random subset of samples; the branch is not computed for the others.

    Of every group exactly ``max(int(B * (1 - rate)), 1)`` samples are kept, and their residual is scaled by
    ``B / kept``. One permutation per group is drawn, in order, from the default generator of the device.

    Args:
        x: packed tokens ``[sum of B * N, D]``.
        shapes: ``(B, N)`` of every group.
        branch: maps packed tokens and their shapes to a residual of the same shape.
        rate: fraction of samples to leave out, in [0, 1).
    """
    rows: list[Tensor] = []
    kept_shapes: list[tuple[int, int]] = []
    scales: list[float] = []
    start = 0
    for batch, tokens in shapes:
        num_kept = max(int(batch * (1 - rate)), 1)
        kept = torch.randperm(batch, device=x.device)[:num_kept]
        within_image = torch.arange(start, start + tokens, device=x.device)
        rows.append((kept.unsqueeze(1) * tokens + within_image).flatten())
        kept_shapes.append((kept.shape[0], tokens))
        scales.append(batch / num_kept)
        start += batch * tokens

    index = torch.cat(rows)
    residual = branch(x.index_select(0, index), tuple(kept_shapes))
    # A Python number multiplies in float32 whatever the dtype; the `alpha` of `index_add` would be rounded to bfloat16.
    parts = torch.split(residual, [len(part) for part in rows])
    scaled = torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)])
    return x.index_add(0, index, scaled.to(x.dtype))


class LayerScale(nn.Module):
    """Multiplies ``[..., D]`` by a learned vector ``gamma [D]`` that starts at a small constant.

    Reference: Touvron et al., Going deeper with Image Transformers (2021), section 2.
    """

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every gain to ``init_values``."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, init_values={self.init_values}"


LAYER_NORM_EPS = 1e-6
# Up to this rate a single batch drops samples one by one: leaving so few out of the computation saves nothing.
MAX_PLAIN_DROP_PATH_RATE = 0.1


class Block(nn.Module):
    """Pre-norm block: attention, then the feed-forward network, each added to the tokens through a layer scale.

    Args:
        dim: width of the tokens.
        num_heads: number of attention heads.
        head_dim: width of a head; None for ``dim / num_heads``.
        mlp_ratio: hidden width of the feed-forward network over ``dim``.
        ffn_hidden_dim: that width itself, in place of the ratio.
        qkv_bias: bias of the query, key and value projection.
        proj_bias: bias of the attention's output projection.
        ffn_bias: bias of the feed-forward network.
        drop_path_rate: fraction of samples whose residual is left out while training, in [0, 1).
        init_values: start value of the layer scales; None or 0 for none.
        ffn_layer: "mlp", "swiglu", "swiglufused" or "identity".
        attention_backend: "sdpa" or "xformers".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        ffn_hidden_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        drop_path_rate: float = 0.0,
        init_values: float | None = None,
        ffn_layer: str = "mlp",
        attention_backend: str = "sdpa",
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias, attention_backend, head_dim=head_dim)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        hidden_dim = int(dim * mlp_ratio) if ffn_hidden_dim is None else ffn_hidden_dim
        self.mlp = make_feed_forward(ffn_layer, dim, hidden_dim, bias=ffn_bias)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor, shapes: GroupShapes | None = None) -> Tensor:
        """Maps tokens to tokens of the same shape.

        Args:
            x: ``[B, N, D]``, or packed tokens ``[sum of B * N, D]``.
            shapes: ``(B, N)`` of every group of packed tokens; None when ``x`` is one batch.
        """
        x = self._add_residual(x, shapes, self._attention_branch)
        return self._add_residual(x, shapes, self._feed_forward_branch)

    def _attention_branch(self, x: Tensor, shapes: GroupShapes | None) -> Tensor:
        residual: Tensor = self.ls1(self.attn(self.norm1(x), shapes))
        return residual

    def _feed_forward_branch(self, x: Tensor, shapes: GroupShapes | None) -> Tensor:
        residual: Tensor = self.ls2(self.mlp(self.norm2(x)))
        return residual

    def _add_residual(
        self, x: Tensor, shapes: GroupShapes | None, branch: Callable[[Tensor, GroupShapes | None], Tensor]
    ) -> Tensor:
        if not self.training or self.drop_path_rate == 0:
            return x + branch(x, shapes)
        if shapes is not None:
            return add_residual_of_subset(x, shapes, branch, self.drop_path_rate)
        if self.drop_path_rate <= MAX_PLAIN_DROP_PATH_RATE:
            return x + drop_path(branch(x, None), self.drop_path_rate)
        rows, shapes = pack_groups([x])
        return add_residual_of_subset(rows, shapes, branch, self.drop_path_rate).view_as(x)
