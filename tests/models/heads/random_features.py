"""Features as a backbone would give them."""

import torch
from torch import Tensor

from dinov2.models.heads.features import BlockFeatures


def random_features(
    num_blocks: int, batch: int = 2, embed_dim: int = 16, grid: tuple[int, int] = (3, 5), seed: int = 0
) -> list[BlockFeatures]:
    """Normal features of ``num_blocks`` blocks, which keep gradients."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    return [(draw(batch, embed_dim, *grid), draw(batch, embed_dim)) for _ in range(num_blocks)]
