"""Multi-head self-attention."""

from torch import Tensor, nn

from dinov2.layers.attention_backend import make_attention_backend
from dinov2.layers.token_groups import GroupShapes


class Attention(nn.Module):
    """Self-attention among the tokens of each image.

    Args:
        dim: width of the tokens, a multiple of ``num_heads``.
        num_heads: number of heads.
        qkv_bias: whether the joint query, key and value projection has a bias.
        proj_bias: whether the output projection has a bias.
        backend: kernel, "sdpa" or "xformers".

    Raises:
        ValueError: when ``dim`` does not split into ``num_heads``, or for an unknown or missing backend.

    Reference: Vaswani et al., Attention Is All You Need (2017), section 3.2.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, proj_bias: bool = True, backend: str = "sdpa"
    ) -> None:
        super().__init__()
        if dim % num_heads != 0:
            raise ValueError(f"the width {dim} does not split into {num_heads} heads of equal width")
        self.num_heads = num_heads
        self.backend = make_attention_backend(backend)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, shapes: GroupShapes | None = None) -> Tensor:
        """Maps ``[B, N, D]`` to the same shape; with ``shapes``, packed tokens ``[sum of B * N, D]`` to the same."""
        qkv: Tensor = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        attended = self.backend.attend(qkv) if shapes is None else self.backend.attend_groups(qkv, shapes)
        output: Tensor = self.proj(attended.flatten(-2))
        return output
