"""The two-layer feed-forward network of a transformer block."""

from torch import Tensor, nn


class Mlp(nn.Module):
    """Linear, GELU, linear on the last axis of ``[..., D]``."""

    def __init__(self, dim: int, hidden_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.act(self.fc1(x))
        output: Tensor = self.fc2(hidden)
        return output
