"""Random block masks for masked image modelling."""

import math
import random

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

_TRIES_PER_BLOCK = 10


def max_patches_cap(img_size: int | tuple[int, int], patch_size: int | tuple[int, int]) -> int:
    """The largest block area that the published recipe allows: half the grid, rounded down at every division.

    On grids with an odd side this is less than half: 21 instead of 24 patches at 7 x 7.

    Args:
        img_size: Side of the crop in pixels, or (height, width).
        patch_size: Side of a patch in pixels, or (height, width).
    """
    height, width = _pair(img_size)
    patch_height, patch_width = _pair(patch_size)
    return int(0.5 * height // patch_height * width // patch_width)


class MaskingGenerator:
    """Draws masks as unions of random rectangles.

    A block's area is uniform between ``min_num_patches`` and what is left to mask (at most ``max_num_patches``), its
    log aspect ratio uniform; a block must be smaller than the grid in both directions. Ten tries are made for each
    block, and a mask is finished early when they all fail, so some masks hold fewer patches than requested, never more.

    Args:
        input_size: Height and width of the patch grid; one number for a square.
        min_num_patches: Smallest target area of a block.
        max_num_patches: Largest target area of a block; None for no limit (see ``max_patches_cap``).
        min_aspect: Smallest height / width of a block.
        max_aspect: Largest height / width; None for ``1 / min_aspect``.
        exact: Whether single random patches are added until the requested number is reached.

    Reference: BEiT (Bao et al. 2022), section 2.3, algorithm 1; iBOT (Zhou et al. 2022), section 4.1.
    """

    def __init__(
        self,
        input_size: int | tuple[int, int],
        *,
        min_num_patches: int = 4,
        max_num_patches: int | None = None,
        min_aspect: float = 0.3,
        max_aspect: float | None = None,
        exact: bool = False,
    ) -> None:
        self.height, self.width = _pair(input_size)
        if self.height < 1 or self.width < 1:
            raise ValueError(f"input_size must be positive, got {input_size}")
        if min_num_patches < 1:
            raise ValueError(f"min_num_patches must be at least 1, got {min_num_patches}")
        max_aspect = 1 / min_aspect if max_aspect is None and min_aspect > 0 else max_aspect
        if max_aspect is None or not 0 < min_aspect <= max_aspect:
            raise ValueError(f"need 0 < min_aspect <= max_aspect, got {min_aspect} and {max_aspect}")
        self.min_num_patches = min_num_patches
        self.max_num_patches = self.num_patches if max_num_patches is None else max_num_patches
        self.log_aspect = (math.log(min_aspect), math.log(max_aspect))
        self.exact = exact

    @property
    def num_patches(self) -> int:
        """Number of patches in the grid."""
        return self.height * self.width

    def __call__(self, num_masking_patches: int, rng: random.Random) -> Mask:
        """Draws one mask ``[h, w]``, True where a patch is masked.

        Args:
            num_masking_patches: How many patches to mask, 0..h*w.
            rng: Source of all randomness.
        """
        if not 0 <= num_masking_patches <= self.num_patches:
            raise ValueError(f"can mask 0..{self.num_patches} patches, {num_masking_patches} were requested")
        mask = np.zeros((self.height, self.width), dtype=np.bool_)
        missing = num_masking_patches
        while missing > 0:
            added = self._add_block(mask, min(missing, self.max_num_patches), rng)
            if added == 0:
                break
            missing -= added
        if self.exact and missing > 0:
            free = np.flatnonzero(~mask).tolist()
            mask.reshape(-1)[rng.sample(free, missing)] = True
        return mask

    def _add_block(self, mask: Mask, limit: int, rng: random.Random) -> int:
        """Masks one more rectangle with 1..limit new patches; returns how many were new, 0 if no try succeeded."""
        for _ in range(_TRIES_PER_BLOCK):
            area = rng.uniform(self.min_num_patches, limit)
            aspect = math.exp(rng.uniform(*self.log_aspect))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if height >= self.height or width >= self.width:
                continue
            top = rng.randint(0, self.height - height)
            left = rng.randint(0, self.width - width)
            block = mask[top : top + height, left : left + width]
            added = height * width - int(np.count_nonzero(block))
            if 0 < added <= limit:
                block[:] = True
                return added
        return 0


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
