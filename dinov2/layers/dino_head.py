"""The projection head that turns tokens into prototype scores."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose weight rows are ``weight_g * weight_v / |weight_v|``.

    ``weight_g [out_dim, 1]`` starts at 1 and is trained; ``weight_v [out_dim, in_dim]`` starts as in torch.nn.Linear.

    Reference: Salimans and Kingma, Weight Normalization (2016).
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial values."""
        nn.init.ones_(self.weight_g)
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return F.linear(x, self.weight_v * (self.weight_g / norm))


class DINOHead(nn.Module):
    """Multi-layer perceptron, L2 normalisation, then scores against learned prototypes.

    Args:
        in_dim: width of the tokens.
        out_dim: number of prototypes.
        use_bn: batch normalisation after every linear layer of the perceptron but its last.
        nlayers: number of linear layers of the perceptron, at least 1.
        hidden_dim: width between these layers.
        bottleneck_dim: width that is normalised and compared with the prototypes.
        mlp_bias: whether the layers of the perceptron have a bias.

    Raises:
        ValueError: when ``nlayers`` is below 1.

    Reference: Caron et al., Emerging Properties in Self-Supervised Vision Transformers (2021), section 3.2.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        use_bn: bool = False,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        mlp_bias: bool = True,
    ) -> None:
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"the projection head needs at least 1 layer, got nlayers={nlayers}")
        widths = [in_dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for index in range(nlayers):
            layers.append(nn.Linear(widths[index], widths[index + 1], bias=mlp_bias))
            if index < nlayers - 1:
                layers += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if use_bn else [nn.GELU()]
        # A single layer is not wrapped: released heads name it "mlp.weight".
        self.mlp = layers[0] if nlayers == 1 else nn.Sequential(*layers)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the initial values of every parameter; also right after materialising from the meta device."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d | WeightNormLinear):
                module.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens ``[B, in_dim]`` to prototype scores ``[B, out_dim]`` in [-weight_g, weight_g]."""
        bottleneck: Tensor = self.mlp(x)
        # 1e-12 is zero in float16, and an all-zero row would then become NaN.
        eps = 1e-6 if bottleneck.dtype == torch.float16 else 1e-12
        scores: Tensor = self.last_layer(F.normalize(bottleneck, dim=-1, eps=eps))
        return scores
