"""A learned gain per channel on a residual branch."""

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """Multiplies ``[..., D]`` by a learned vector ``gamma [D]`` that starts at a small constant.

    Reference: Touvron et al., Going deeper with Image Transformers (2021), section 2.
    """

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets every gain to ``init_values``."""
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, init_values={self.init_values}"
