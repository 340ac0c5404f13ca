"""Resampling a learned position embedding to another grid of patches."""

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate_position_embedding(
    pos_embed: Tensor,
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    antialias: bool = False,
    offset: float = 0.1,
) -> Tensor:
    """Resamples the patch positions bicubically; the class position stays as it is.

    The computation is in float32 whatever the dtype: released weights were trained and are used so. With a positive
    ``offset`` the sampling grid follows the scale factors ``(new + offset) / old`` and not the sizes; released weights
    without registers need 0.1 without antialiasing, those with registers 0 with antialiasing.

    Args:
        pos_embed: ``[1, 1 + h * w, D]``, class position first.
        grid: patches ``(h, w)`` that ``pos_embed`` was made for.
        new_grid: patches ``(h, w)`` wanted.
        antialias: whether to low-pass when shrinking.
        offset: what is added to the new sizes to form the scale factors, in [0, 1); 0 uses the sizes.

    Returns:
        ``[1, 1 + h * w, D]`` on the new grid, in the same dtype; ``pos_embed`` itself when the grids are equal.
    """
    if tuple(grid) == tuple(new_grid):
        return pos_embed
    class_position, patch_positions = pos_embed[:, :1], pos_embed[:, 1:]
    image = patch_positions.float().reshape(1, *grid, -1).permute(0, 3, 1, 2)  # [1, D, h, w]
    if offset > 0:
        factors = [(new + offset) / old for new, old in zip(new_grid, grid, strict=True)]
        resized = F.interpolate(image, scale_factor=factors, mode="bicubic", antialias=antialias)
    else:
        resized = F.interpolate(image, size=new_grid, mode="bicubic", antialias=antialias)
    assert tuple(resized.shape[-2:]) == tuple(new_grid), "offset must be below 1"
    return torch.cat([class_position, resized.flatten(2).transpose(1, 2).to(pos_embed.dtype)], dim=1)
