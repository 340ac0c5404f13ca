"""Low-rank additions to linear layers: fine-tuning with few parameters, which can be merged away afterwards.

Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models (2021), section 4.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT_TARGETS = ("qkv", "proj")


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trainable product of two thin matrices: ``W x + b + (alpha / rank) B A x``.

    ``weight`` and ``bias`` are those of the layer it is made from, under the same names, so weights of the plain
    network load as before; ``lora_a [rank, in]`` and ``lora_b [out, rank]`` come beside them. ``B`` starts at zero: the
    output is that of the plain layer until the first step.

    Args:
        base: the layer to add to; its parameters are shared and frozen.
        rank: width of the addition, 1 to the smaller side of the layer.
        alpha: strength of the addition, above 0; its factor is ``alpha / rank``.
        dropout: share of the addition's inputs that are zeroed in training, in [0, 1).

    Raises:
        ValueError: for a value out of range, or a layer that already has an addition.
    """

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float = 0.0) -> None:
        _check(base, rank, alpha, dropout)
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.rank = rank
        self.scaling = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., in]`` to ``[..., out]``."""
        addition = F.linear(F.linear(self.dropout(x), self.lora_a), self.lora_b)
        return F.linear(x, self.weight, self.bias) + self.scaling * addition

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """A plain layer with the same output, up to rounding; trainable like any new layer."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        # On the processor: not every device computes in float64, and the sum should be rounded once.
        a, b, weight = (parameter.cpu().double() for parameter in (self.lora_a, self.lora_b, self.weight))
        plain.weight = nn.Parameter((weight + self.scaling * (b @ a)).to(self.weight))
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone())
        return plain.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scaling={self.scaling:g}"


def apply_lora(
    module: nn.Module,
    targets: Sequence[str] = DEFAULT_TARGETS,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
) -> list[str]:
    """Gives every linear layer whose last name is among ``targets`` a low-rank addition, in place.

    Load the weights of the plain network first. All other parameters stay trainable or frozen as they are.

    Args:
        module: such as a backbone.
        targets: last parts of layers' names, such as ``qkv`` for ``blocks.0.attn.qkv``.
        rank: see `LoRALinear`, like the following.
        alpha: strength.
        dropout: in training.

    Returns:
        Names of the layers that were changed.

    Raises:
        ValueError: when a target names no linear layer, or for values that `LoRALinear` refuses; nothing is changed.
    """
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name}
    known = sorted({_last(name) for name in linear})
    unknown = sorted(set(targets) - set(known))
    if unknown or not targets:
        raise ValueError(
            f"no linear layer is named {', '.join(map(repr, unknown)) or 'by no target at all'}; "
            f"{type(module).__name__} has {', '.join(known) or 'none'}"
        )
    chosen = {name: layer for name, layer in linear.items() if _last(name) in targets}
    for layer in chosen.values():
        _check(layer, rank, alpha, dropout)
    for name, layer in chosen.items():
        module.set_submodule(name, LoRALinear(layer, rank=rank, alpha=alpha, dropout=dropout))
    return list(chosen)


def merge_lora(module: nn.Module) -> list[str]:
    """Replaces every `LoRALinear` inside ``module`` by a plain layer of the same output; returns their names.

    The result is an ordinary network: its state dict has the names of the plain one.
    """
    names = [name for name, layer in module.named_modules() if isinstance(layer, LoRALinear) and name]
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, LoRALinear)
        module.set_submodule(name, layer.merged())
    return names


def lora_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of all low-rank additions inside ``module``."""
    for layer in module.modules():
        if isinstance(layer, LoRALinear):
            yield layer.lora_a
            yield layer.lora_b


def _check(base: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
    if isinstance(base, LoRALinear):
        raise ValueError("a linear layer has a low-rank addition already: merge it first")
    largest = min(base.in_features, base.out_features)
    if not 1 <= rank <= largest:
        sizes = f"{base.in_features} to {base.out_features} channels"
        raise ValueError(f"rank must lie in 1..{largest} for a layer from {sizes}, got {rank}")
    if alpha <= 0 or not 0 <= dropout < 1:
        raise ValueError(f"alpha must be above 0 and dropout in [0, 1), got alpha={alpha} and dropout={dropout}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]
