"""Multi-head self-attention."""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GroupShapes = tuple[tuple[int, int], ...]


def pack_groups(groups: Sequence[Tensor]) -> tuple[Tensor, GroupShapes]:
    """Concatenates groups ``[B, N, D]`` into one matrix ``[sum of B * N, D]`` and returns it with the shapes."""
    shapes = tuple((group.shape[0], group.shape[1]) for group in groups)
    return torch.cat([group.flatten(0, 1) for group in groups]), shapes


def split_groups(rows: Tensor, shapes: GroupShapes) -> list[Tensor]:
    """Views the rows ``[sum of B * N, ...]`` as one tensor ``[B, N, ...]`` per group."""
    parts = torch.split(rows, [batch * tokens for batch, tokens in shapes])
    return [part.view(*shape, *rows.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]


ATTENTION_BACKENDS = ("sdpa", "xformers")
_LONGEST_WRITTEN_OUT = 1024  # tokens of an image whose attention matrix is held whole on a processor


class AttentionBackend(Protocol):
    """Softmax attention over the tokens of each image."""

    def attend(self, qkv: Tensor) -> Tensor:
        """Maps ``[B, N, 3, heads, head_dim]`` to ``[B, N, heads, head_dim]``."""
        ...

    def attend_groups(self, qkv: Tensor, shapes: GroupShapes) -> Tensor:
        """Maps packed ``[sum of B * N, 3, heads, head_dim]`` to ``[sum of B * N, heads, head_dim]``."""
        ...


class SdpaBackend:
    """Attention through `torch.nn.functional.scaled_dot_product_attention`, one call per image size."""

    def attend(self, qkv: Tensor) -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, N, head_dim]
        if _is_faster_written_out(query):
            return _written_out(query, key, value)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    def attend_groups(self, qkv: Tensor, shapes: GroupShapes) -> Tensor:
        return torch.cat([self.attend(group).flatten(0, 1) for group in split_groups(qkv, shapes)])


class WrittenOutBackend(SdpaBackend):
    """Attention as plain matrix products and a softmax, whatever the device: operations that every exporter knows."""

    def attend(self, qkv: Tensor) -> Tensor:
        return _written_out(*qkv.permute(2, 0, 3, 1, 4).unbind(0))


class XFormersBackend:
    """Attention through `xformers.ops.memory_efficient_attention`, one call whatever the number of image sizes.

    Raises:
        ValueError: on construction when xFormers is not installed; on use when the tensors are not on a CUDA device.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("xformers") is None:
            raise ValueError(
                "attention_backend='xformers' needs xFormers, which is not installed: run `pip install "
                "'dinov2[xformers]'`, or choose attention_backend='sdpa'"
            )

    def attend(self, qkv: Tensor) -> Tensor:
        return self._attention(qkv, None)

    def attend_groups(self, qkv: Tensor, shapes: GroupShapes) -> Tensor:
        return self._attention(qkv.unsqueeze(0), shapes).squeeze(0)  # one sequence of all tokens

    def _attention(self, qkv: Tensor, shapes: GroupShapes | None) -> Tensor:
        _check_cuda(qkv)
        import xformers.ops

        mask = None if shapes is None else _block_diagonal_mask(shapes, qkv.device)
        output: Tensor = xformers.ops.memory_efficient_attention(*qkv.unbind(2), attn_bias=mask)
        return output


def make_attention_backend(name: str) -> AttentionBackend:
    """Builds the backend named by the option ``attention_backend``.

    Raises:
        ValueError: for a name that is not in `ATTENTION_BACKENDS`, or when the chosen library is not installed.
    """
    match name:
        case "sdpa":
            return SdpaBackend()
        case "xformers":
            return XFormersBackend()
    raise ValueError(f"unknown attention_backend {name!r}; allowed: {', '.join(ATTENTION_BACKENDS)}")


def _written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of ``[B, heads, N, head_dim]``, to ``[B, N, heads, head_dim]``."""
    scores: Tensor = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    attended: Tensor = scores.softmax(-1) @ value
    return attended.transpose(1, 2)


def _is_faster_written_out(query: Tensor) -> bool:
    """Whether plain matrix products beat torch's kernel: in half precision on a processor with bf16 instructions.

    There torch's fused kernel does not use them in backward: forward and backward of 64 images of 101 tokens took
    98 ms against 32 ms, of 16 images of 257 tokens 113 against 29 (one core, AMD EPYC with AVX-512 BF16, torch 2.14).
    In float32 the two are alike.
    """
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cpu" and half and query.shape[-2] <= _LONGEST_WRITTEN_OUT


def _check_cuda(qkv: Tensor) -> None:
    if qkv.device.type != "cuda":
        raise ValueError(
            f"attention_backend='xformers' computes on CUDA devices only, and the tensors are on "
            f"{qkv.device.type!r}; choose attention_backend='sdpa'"
        )


@lru_cache(maxsize=32)
def _block_diagonal_mask(shapes: GroupShapes, device: torch.device) -> object:
    """Mask that keeps tokens to their own image; remembered, as building one waits for a copy to the device."""
    from xformers.ops.fmha import BlockDiagonalMask

    # A mask first built by an evaluation in inference mode must also serve the backward pass of a later training step.
    with torch.inference_mode(False):
        lengths = [tokens for batch, tokens in shapes for _ in range(batch)]
        return BlockDiagonalMask.from_seqlens(lengths, device=device)


class Attention(nn.Module):
    """Self-attention among the tokens of each image.

    Args:
        dim: width of the tokens.
        num_heads: number of heads.
        head_dim: width of a head; None for ``dim / num_heads``.
        qkv_bias: whether the joint query, key and value projection has a bias.
        proj_bias: whether the output projection has a bias.
        backend: kernel, "sdpa" or "xformers".

    Raises:
        ValueError: when ``dim`` does not split into ``num_heads`` of no width of their own, or for an unknown or
            missing backend.

    Reference: Vaswani et al., Attention Is All You Need (2017), section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        backend: str = "sdpa",
        *,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % num_heads != 0:
            raise ValueError(f"the width {dim} does not split into {num_heads} heads of equal width")
        inner = num_heads * (dim // num_heads if head_dim is None else head_dim)
        self.num_heads = num_heads
        self.backend = make_attention_backend(backend)
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias)
        self.proj = nn.Linear(inner, dim, bias=proj_bias)

    def forward(self, x: Tensor, shapes: GroupShapes | None = None) -> Tensor:
        """Maps ``[B, N, D]`` to the same shape; with ``shapes``, packed tokens ``[sum of B * N, D]`` to the same."""
        qkv: Tensor = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        attended = self.backend.attend(qkv) if shapes is None else self.backend.attend_groups(qkv, shapes)
        output: Tensor = self.proj(attended.flatten(-2))
        return output
