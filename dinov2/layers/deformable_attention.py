"""Attention of queries to a few places, which they choose themselves, on maps of several strides."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MapSizes = Sequence[tuple[int, int]]
"""Height and width of every map."""


def sample_maps(values: Tensor, sizes: MapSizes, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of values read bilinearly; outside of a map everything is 0.

    Rows are gathered by number, which every exporter and engine can do; `torch.nn.functional.grid_sample` is not one of
    those operations.

    Args:
        values: ``[B, S, heads, d]``, the positions of all maps one after another, each row by row.
        sizes: of the ``L`` maps; their areas add up to ``S``.
        places: ``[B, Q, heads, L, P, 2]``, (x, y) in shares of the image: 0 and 1 are its edges, not centres of pixels.
        weights: ``[B, Q, heads, L, P]``.

    Returns:
        ``[B, Q, heads * d]``.
    """
    batch, num_values, num_heads, width = values.shape
    extents = torch.tensor([[columns, rows] for rows, columns in sizes], device=values.device)[:, None, None]
    areas = [rows * columns for rows, columns in sizes]
    starts = torch.tensor([sum(areas[:level]) for level in range(len(areas))], device=values.device)[:, None, None]
    steps = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=values.device)  # to the four pixels around a place

    pixels = (places * extents[:, 0] - 0.5)[..., None, :]  # [B, Q, heads, L, P, 1, 2]
    corner = pixels.detach().floor()
    shares = 1 - steps + (2 * steps - 1) * (pixels - corner)  # of the four, in x and in y
    corners = corner + steps
    inside = ((corners >= 0) & (corners < extents)).all(dim=-1)
    shares = (shares[..., 0] * shares[..., 1] * inside * weights[..., None]).flatten(3).to(values.dtype)

    # Clamped as whole numbers: whatever NaN becomes is then a row that exists, and the loss can say that it is NaN.
    column, row = torch.minimum(corners.long().clamp(min=0), extents - 1).unbind(dim=-1)
    positions = starts + row * extents[..., 0] + column  # [B, Q, heads, L, P, 4]
    images = torch.arange(batch, device=values.device).view(-1, 1, 1, 1)
    heads = torch.arange(num_heads, device=values.device).view(-1, 1)
    numbers = (images * num_values + positions.flatten(3)) * num_heads + heads
    gathered = F.embedding(numbers, values.reshape(-1, width))  # [B, Q, heads, 4 * L * P, d]
    return (shares[..., None, :] @ gathered).flatten(2)


class DeformableAttention(nn.Module):
    """Every query reads ``num_points`` places of every map, around a box and in proportion to it.

    Args:
        channels: width ``D`` of queries and maps.
        num_levels: maps ``L``.
        num_heads: heads; divides ``channels``.
        num_points: places ``P`` per head and map.

    Raises:
        ValueError: when ``num_heads`` does not divide ``channels``.

    Reference:
        Zhu et al., "Deformable DETR" (2021), section 4.1 and appendix A.4 (boxes as references).
    """

    def __init__(self, channels: int, *, num_levels: int, num_heads: int = 8, num_points: int = 4) -> None:
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{num_heads} heads do not divide {channels} channels")
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(channels, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(channels, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Every head begins by looking in a direction of its own, each of its points a step further from the centre."""
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)  # onto the edge of a square
        lengths = torch.arange(1, self.num_points + 1)
        offsets = directions[:, None, None] * lengths[:, None]  # [heads, 1, P, 2]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for zero in (self.sampling_offsets.weight, self.attention_weights.weight, self.attention_weights.bias):
            nn.init.zeros_(zero)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, queries: Tensor, boxes: Tensor, memory: Tensor, sizes: MapSizes) -> Tensor:
        """Reads the maps around boxes.

        Args:
            queries: ``[B, Q, D]``, with what tells their places.
            boxes: ``[B, Q, 4]``, (cx, cy, w, h) in shares of the image.
            memory: ``[B, S, D]``, the positions of all maps one after another.
            sizes: of the maps.

        Returns:
            ``[B, Q, D]``.
        """
        batch, count, channels = queries.shape
        grid = (batch, count, self.num_heads, self.num_levels, self.num_points)
        values = self.value_proj(memory).view(batch, -1, self.num_heads, channels // self.num_heads)
        centre, size = boxes[:, :, None, None, None].split(2, dim=-1)
        places = centre + self.sampling_offsets(queries).view(*grid, 2) * size * (0.5 / self.num_points)
        weights = self.attention_weights(queries).view(*grid[:3], -1).softmax(dim=-1).view(grid)
        output: Tensor = self.output_proj(sample_maps(values, sizes, places, weights))
        return output
