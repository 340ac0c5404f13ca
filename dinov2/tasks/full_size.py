"""Dense predictions brought to the size of the photo, in bands of rows, so that large photos need little memory."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_NUMBERS_AT_ONCE = 2**22  # 16 MiB of float32: larger blocks cost more to get from the system than they save


def full_size_bands(
    maps: Tensor, size: tuple[int, int], *, numbers_at_once: int = _NUMBERS_AT_ONCE
) -> Iterator[Tensor]:
    """Resizes maps bilinearly (corners not aligned), as ``F.interpolate`` does; what gets smaller is averaged.

    Args:
        maps: float ``[C, h, w]``.
        size: height and width wanted.
        numbers_at_once: how many numbers a band may hold; it has one row at least.

    Yields:
        ``[C, rows, W]`` from top to bottom, ``H`` rows together.
    """
    height, width = size
    smaller = min(maps.shape[1], height), min(maps.shape[2], width)
    if smaller != maps.shape[1:]:
        maps = F.interpolate(maps[None], smaller, mode="bilinear", antialias=True)[0]
    places = (torch.arange(height, dtype=torch.float64) + 0.5) * (smaller[0] / height) - 0.5
    places = places.clamp(min=0)
    upper = places.floor().long()
    lower = (upper + 1).clamp(max=smaller[0] - 1)
    share = (places - upper).to(maps)[:, None]
    upper, lower = upper.to(maps.device), lower.to(maps.device)
    num_rows = max(numbers_at_once // (maps.shape[0] * width), 1)
    for top in range(0, height, num_rows):
        rows = slice(top, top + num_rows)
        band = torch.lerp(maps[:, upper[rows]], maps[:, lower[rows]], share[rows])
        yield F.interpolate(band[None], (band.shape[1], width), mode="bilinear")[0]
