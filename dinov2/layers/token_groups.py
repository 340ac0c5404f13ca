"""Tokens of images of several sizes laid out as one matrix, so that per-token layers run once over all of them.

A group is a batch of ``B`` images with ``N`` tokens each. Groups are concatenated row by row: group after group, image
after image within a group, token after token within an image. What describes the layout is the tuple of ``(B, N)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

GroupShapes = tuple[tuple[int, int], ...]


def pack_groups(groups: Sequence[Tensor]) -> tuple[Tensor, GroupShapes]:
    """Concatenates groups ``[B, N, D]`` into one matrix ``[sum of B * N, D]`` and returns it with the shapes."""
    shapes = tuple((group.shape[0], group.shape[1]) for group in groups)
    return torch.cat([group.flatten(0, 1) for group in groups]), shapes


def split_groups(rows: Tensor, shapes: GroupShapes) -> list[Tensor]:
    """Views the rows ``[sum of B * N, ...]`` as one tensor ``[B, N, ...]`` per group."""
    parts = torch.split(rows, [batch * tokens for batch, tokens in shapes])
    return [part.view(*shape, *rows.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]
