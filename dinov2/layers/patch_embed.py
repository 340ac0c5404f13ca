"""Cutting an image into patches and projecting each to a token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = int | tuple[int, int]  # one number for a square, or height and width


def as_pair(size: Size) -> tuple[int, int]:
    """Reads one number as height and width alike."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class PatchEmbed(nn.Module):
    """Projects non-overlapping patches of ``[B, C, H, W]`` to tokens ``[B, h * w, D]``, row by row.

    Args:
        patch_size: height and width of a patch in pixels; one number for a square.
        in_chans: number of image channels ``C``.
        embed_dim: width ``D`` of the tokens.
    """

    def __init__(self, patch_size: Size = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
        super().__init__()
        self.patch_size = as_pair(patch_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Number of patches down and across an image of ``height`` by ``width`` pixels.

        Raises:
            ValueError: when the image does not divide into whole patches.
        """
        patch_height, patch_width = self.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"an image of {height} x {width} pixels (height x width) does not divide into patches of "
                f"{patch_height} x {patch_width}: use multiples of these sizes"
            )
        return height // patch_height, width // patch_width

    def forward(self, x: Tensor) -> Tensor:
        self.grid_size(x.shape[-2], x.shape[-1])
        if x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"images have {x.shape[1]} channels, the network takes {self.proj.in_channels} "
                f"(student.in_channels): let preprocessing end with channels: {{count: {self.proj.in_channels}}}"
            )
        patches: Tensor = self.proj(x)  # [B, D, h, w]
        return patches.flatten(2).transpose(1, 2)


def adapt_input_channels(weight: Tensor, in_chans: int) -> Tensor:
    """Weights of a patch embedding for images of another number of channels.

    Every channel gets the mean of the weights that there were, scaled so that an image whose channels are all equal
    gives the tokens that it gave before: from RGB to grey that is their sum.

    Args:
        weight: ``[D, C, p, p]``.
        in_chans: channels wanted.

    Returns:
        ``[D, in_chans, p, p]``, in the same dtype; ``weight`` itself where it has so many.
    """
    if weight.shape[1] == in_chans:
        return weight
    total = weight.float().sum(dim=1, keepdim=True)
    return (total / in_chans).expand(-1, in_chans, -1, -1).to(weight.dtype).contiguous()


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
