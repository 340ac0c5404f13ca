"""Made-up inputs that tests of several losses share."""

import torch
from torch import Tensor


def depth_maps(*shape: int, seed: int = 0, unknown: float = 0.3) -> tuple[Tensor, Tensor]:
    """Predictions and targets above 0, float64, some targets NaN."""
    generator = torch.Generator().manual_seed(seed)
    predictions = 0.2 + 9 * torch.rand(shape, generator=generator, dtype=torch.float64)
    targets = 0.2 + 9 * torch.rand(shape, generator=generator, dtype=torch.float64)
    return predictions, targets.where(torch.rand(shape, generator=generator) >= unknown, torch.nan)
