"""Cutting an image into patches and projecting each to a token."""

from torch import Tensor, nn


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Reads one number as height and width alike."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class PatchEmbed(nn.Module):
    """Projects non-overlapping patches of ``[B, C, H, W]`` to tokens ``[B, h * w, D]``, row by row.

    Args:
        patch_size: height and width of a patch in pixels; one number for a square.
        in_chans: number of image channels ``C``.
        embed_dim: width ``D`` of the tokens.
    """

    def __init__(self, patch_size: int | tuple[int, int] = 16, in_chans: int = 3, embed_dim: int = 768) -> None:
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
        patches: Tensor = self.proj(x)  # [B, D, h, w]
        return patches.flatten(2).transpose(1, 2)
