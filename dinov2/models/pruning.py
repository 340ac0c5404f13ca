"""Structured pruning: whole attention heads, hidden units and blocks are taken out of a vision transformer.

Every block keeps as many heads and units as every other, each its own best ones, so that the result is an ordinary
network, which the options ``student.depth``, ``student.num_heads`` and ``student.ffn_hidden_dim`` describe.

Reference: heads: Michel et al., Are Sixteen Heads Really Better than One? (2019); blocks: Men et al., ShortGPT (2024).
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinov2.config.schema import StudentOptions
from dinov2.layers.block import Block, LayerScale
from dinov2.layers.feed_forward import Mlp, SwiGLUFFN, plain_hidden_dim
from dinov2.models.build import build_backbone
from dinov2.models.vision_transformer import DinoVisionTransformer

PARTS = ("heads", "mlp", "depth")
CRITERIA = ("magnitude", "activation")
UNITS = 8  # hidden widths are multiples of it, which kernels like and gated networks have anyway
ALIKE = 0.02  # of the FLOPs: networks that are no smaller than this beside the largest count as equally large


@dataclass(frozen=True, order=True)
class BackboneSize:
    """What pruning makes smaller: blocks, heads per block, and hidden units of each feed-forward layer."""

    depth: int
    num_heads: int
    hidden_dim: int

    @classmethod
    def of(cls, backbone: DinoVisionTransformer) -> "BackboneSize":
        """That of a network.

        Raises:
            ValueError: it has no feed-forward layers.
        """
        _, last = feed_forward_layers(_blocks(backbone)[0])
        return cls(backbone.n_blocks, backbone.num_heads, last.in_features)


@dataclass(frozen=True)
class Costs:
    """Floating-point operations of one image: of what is never pruned, of a head, and of a hidden unit."""

    fixed: int
    head: float
    unit: float

    @classmethod
    def of(cls, backbone: DinoVisionTransformer, image_size: tuple[int, int]) -> "Costs":
        """Counts those of images of so many pixels (height, width)."""
        size, block = BackboneSize.of(backbone), _blocks(backbone)[0]
        grid = backbone.patch_embed.grid_size(*image_size)
        tokens = torch.empty(1, 1 + backbone.num_register_tokens + grid[0] * grid[1], backbone.embed_dim)
        attention, feed_forward = _count(block.attn, tokens), _count(block.mlp, tokens)
        fixed = count_flops(backbone, image_size) - size.depth * (attention + feed_forward)
        return cls(fixed, attention / size.num_heads, feed_forward / size.hidden_dim)

    def total(self, size: BackboneSize) -> float:
        """Those of a network of this size."""
        return self.fixed + size.depth * (self.head * size.num_heads + self.unit * size.hidden_dim)


def count_flops(backbone: DinoVisionTransformer, image_size: tuple[int, int]) -> int:
    """Floating-point operations of the products in one forward pass of one image, a multiplication and addition two."""
    return _count(backbone, torch.empty(1, backbone.patch_embed.proj.in_channels, *image_size))


def _count(module: nn.Module, given: Tensor) -> int:
    # Shapes are enough, and on no device is attention a kernel that hides its products.
    counted = copy.deepcopy(module).to("meta").float().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted(given.to("meta"))
    return int(counter.get_total_flops())


def feed_forward_layers(block: Block) -> tuple[nn.Linear, nn.Linear]:
    """The linear layers of a block before and behind its hidden units.

    Raises:
        ValueError: it has no such layers.
    """
    if isinstance(block.mlp, Mlp):
        return block.mlp.fc1, block.mlp.fc2
    if isinstance(block.mlp, SwiGLUFFN):
        return block.mlp.w12, block.mlp.w3
    raise ValueError(f"a feed-forward layer of {type(block.mlp).__name__} has no hidden units to prune")


def choose_size(costs: Costs, size: BackboneSize, parts: Sequence[str], fraction: float) -> BackboneSize:
    """The size that is left of a network.

    Of all sizes that cost at most ``fraction`` of it, those are looked at whose cost is within `ALIKE` of the largest;
    among them the one is taken that keeps parts most alike: whose fractions of blocks, heads and units, of those that
    may be pruned, differ least. With heads and units both are thus thinned alike, as far as whole heads allow.

    Args:
        costs: of the network.
        size: of it.
        parts: what may be pruned, among `PARTS`.
        fraction: of the operations, in (0, 1).

    Raises:
        ValueError: for a fraction or parts out of range, or where the parts hold too little to get there.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction of FLOPs must lie between 0 and 1, found {fraction}")
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts to prune are among {', '.join(PARTS)}; found {', '.join(parts) or 'none'}")
    whole = costs.total(size)
    depths = range(1, size.depth + 1) if "depth" in parts else (size.depth,)
    heads = range(1, size.num_heads + 1) if "heads" in parts else (size.num_heads,)
    least = min(UNITS, size.hidden_dim) if "mlp" in parts else size.hidden_dim
    fitting = []
    for depth in depths:
        for num_heads in heads:
            hidden = size.hidden_dim
            room = (fraction * whole - costs.total(BackboneSize(depth, num_heads, 0))) / (depth * costs.unit)
            if "mlp" in parts and room < hidden:
                hidden = max(int(room) // UNITS * UNITS, least)
            if costs.total(found := BackboneSize(depth, num_heads, hidden)) <= fraction * whole:
                fitting.append(found)
    if not fitting:
        smallest = costs.total(BackboneSize(min(depths), min(heads), least)) / whole
        others = [part for part in PARTS if part not in parts]
        raise ValueError(
            f"{fraction:.0%} of the FLOPs is not reached by pruning {' and '.join(parts)}: one of each in every block "
            f"leaves {smallest:.0%}" + (f"; prune {' or '.join(others)} too" if others else "")
        )
    largest = max(map(costs.total, fitting))
    fitting = [found for found in fitting if costs.total(found) >= largest - ALIKE * whole]

    def inequality(found: BackboneSize) -> tuple[float, float]:
        kept = {
            "depth": found.depth / size.depth,
            "heads": found.num_heads / size.num_heads,
            "mlp": found.hidden_dim / size.hidden_dim,
        }
        fractions = [kept[part] for part in parts]
        return max(fractions) - min(fractions), -costs.total(found)

    return min(fitting, key=inequality)


@dataclass(frozen=True, eq=False)
class Scores:
    """How much is lost with each head, unit and block, and what stands in for it.

    Attributes:
        heads: per block ``[heads]``.
        units: per block ``[units]``.
        mean_heads: per block what each head gives to the projection on the average, ``[heads, head_dim]``; 0 where a
            head that is taken out gives nothing.
        mean_units: per block the same of units, ``[units, 1]``.
        blocks: one minus the mean cosine of tokens before and after each block; None where no images were looked at.
    """

    heads: Sequence[Tensor]
    units: Sequence[Tensor]
    mean_heads: Sequence[Tensor]
    mean_units: Sequence[Tensor]
    blocks: Sequence[float] | None = None


def score_by_magnitude(backbone: DinoVisionTransformer) -> Scores:
    """Scores heads and units by the L2 norm of all weights and biases that would go with them."""
    heads, units = [], []
    size = BackboneSize.of(backbone)
    for block in _blocks(backbone):
        heads.append(_norms(block.attn.qkv, block.attn.proj, size.num_heads))
        units.append(_norms(*feed_forward_layers(block), size.hidden_dim))
    head_dim = _blocks(backbone)[0].attn.proj.in_features // size.num_heads
    no_heads, no_units = torch.zeros(size.num_heads, head_dim), torch.zeros(size.hidden_dim, 1)
    return Scores(heads, units, mean_heads=[no_heads] * size.depth, mean_units=[no_units] * size.depth)


def _norms(before: nn.Linear, behind: nn.Linear, groups: int) -> Tensor:
    """Norm of each group's rows before, their biases, and its columns behind."""
    rows = before.weight.detach().double().square().sum(1)
    if before.bias is not None:
        rows = rows + before.bias.detach().double().square()
    columns = behind.weight.detach().double().square().sum(0)
    return (rows.view(-1, columns.numel()).sum(0) + columns).view(groups, -1).sum(1).sqrt().cpu()


class _Moments:
    """First and second moments of what each group gives to a linear layer, over all tokens."""

    def __init__(self, layer: nn.Linear, groups: int, scale: nn.Module) -> None:
        gains = scale.gamma.detach() if isinstance(scale, LayerScale) else torch.ones(layer.out_features)
        weight = gains.double().cpu().unsqueeze(1) * layer.weight.detach().double().cpu()
        self.groups, self.has_bias = groups, layer.bias is not None
        self.weight = weight.view(len(weight), groups, -1)  # [D, groups, d]
        self.count = 0
        self.sums = torch.zeros(self.weight.shape[1:], dtype=torch.float64)
        self.products = torch.zeros(*self.sums.shape, self.sums.shape[1], dtype=torch.float64)

    def add(self, layer: nn.Module, arguments: tuple[Tensor]) -> None:
        """Before a forward pass of the layer."""
        del layer
        given = arguments[0].detach().float().flatten(0, -2).unflatten(-1, (self.groups, -1)).transpose(0, 1)
        self.count += given.shape[1]
        self.sums += given.sum(1).double().cpu()
        self.products += (given.mT @ given).double().cpu()

    @property
    def mean(self) -> Tensor:
        """``[groups, d]``, which the layer's bias can stand in for; 0 where it has none."""
        return self.sums / self.count if self.has_bias else torch.zeros_like(self.sums)

    def lost(self) -> Tensor:
        """``[groups]``: root mean square of what tokens lose with each group, once its mean is made up for."""
        second = self.products / self.count - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)
        weight = self.weight.transpose(0, 1)  # [groups, D, d]
        return ((weight @ second) * weight).sum((1, 2)).clamp(min=0).sqrt()


@torch.no_grad()
def score_by_activation(backbone: DinoVisionTransformer, batches: Iterable[Tensor]) -> Scores:
    """Scores heads and units by what they add to tokens, and blocks by how little they turn them.

    A head or unit that always adds the same is made up for by a bias, so that its score is how what it adds differs
    from its mean: the root mean square over all tokens of the images. Without biases it is what it adds itself.

    Args:
        backbone: in evaluation mode.
        batches: images ``[B, 3, H, W]``, of the backbone's own.

    Raises:
        ValueError: there is no batch.
    """
    size, blocks = BackboneSize.of(backbone), _blocks(backbone)
    heads = [_Moments(block.attn.proj, size.num_heads, block.ls1) for block in blocks]
    units = [_Moments(feed_forward_layers(block)[1], size.hidden_dim, block.ls2) for block in blocks]
    cosines = torch.zeros(size.depth, dtype=torch.float64)
    tokens = 0
    handles = [block.attn.proj.register_forward_pre_hook(found.add) for block, found in zip(blocks, heads, strict=True)]
    for block, found in zip(blocks, units, strict=True):
        handles.append(feed_forward_layers(block)[1].register_forward_pre_hook(found.add))

    def compare(index: int, block: nn.Module, arguments: tuple[Tensor], after: Tensor) -> None:
        del block
        cosines[index] += F.cosine_similarity(arguments[0].float(), after.float(), dim=-1).sum().double().cpu()

    handles += [block.register_forward_hook(partial(compare, index)) for index, block in enumerate(blocks)]
    try:
        for batch in batches:
            output = backbone.forward_features(batch.to(backbone.cls_token.device))
            tokens += output["x_prenorm"].shape[:2].numel()
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ValueError("scores by activation need images, and there is none")
    return Scores(
        heads=[found.lost() for found in heads],
        units=[found.lost() for found in units],
        mean_heads=[found.mean for found in heads],
        mean_units=[found.mean for found in units],
        blocks=(1 - cosines / tokens).tolist(),
    )


@dataclass(frozen=True, eq=False)
class KeptBlock:
    """What stays of a block: its number, and those of its heads and units, in order."""

    index: int
    heads: Tensor
    units: Tensor


def choose_kept(scores: Scores, size: BackboneSize) -> list[KeptBlock]:
    """The best blocks, and in each the best heads and units, as many as a size has.

    Raises:
        ValueError: blocks are to go, and no images were looked at.
    """
    indices = list(range(len(scores.heads)))
    if size.depth < len(indices):
        if scores.blocks is None:
            raise ValueError("which blocks change features least is seen on images only, and there is none")
        indices = sorted(_best(torch.tensor(scores.blocks), size.depth).tolist())
    return [
        KeptBlock(index, _best(scores.heads[index], size.num_heads), _best(scores.units[index], size.hidden_dim))
        for index in indices
    ]


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def prune_backbone(
    backbone: DinoVisionTransformer, student: StudentOptions, size: BackboneSize, scores: Scores
) -> tuple[DinoVisionTransformer, StudentOptions, list[KeptBlock]]:
    """Builds a network of what scores best.

    It computes what the given one does without the blocks that are left out, and with the means of `Scores` in place of
    what the other heads and units give to the layers behind them.

    Args:
        backbone: to be pruned; not changed.
        student: options that describe it.
        size: of the new network.
        scores: of the given one.

    Returns:
        The new network, in evaluation mode, on the same device; the options that describe it; what was kept.
    """
    before, kept = BackboneSize.of(backbone), choose_kept(scores, size)
    gated = isinstance(_blocks(backbone)[0].mlp, SwiGLUFFN)
    hidden = plain_hidden_dim(size.hidden_dim) if gated else size.hidden_dim
    options = replace(
        student,
        depth=student.depth if size.depth == before.depth else size.depth,
        num_heads=student.num_heads if size.num_heads == before.num_heads else size.num_heads,
        ffn_hidden_dim=student.ffn_hidden_dim if size.hidden_dim == before.hidden_dim else hidden,
    )
    state = {name: tensor for name, tensor in backbone.state_dict().items() if not name.startswith("blocks.")}
    for number, entry in enumerate(kept):
        block = copy.deepcopy(_blocks(backbone)[entry.index])
        _, behind = layers = feed_forward_layers(block)
        _make_up(block.attn.proj, entry.heads, scores.mean_heads[entry.index])
        _make_up(behind, entry.units, scores.mean_units[entry.index])
        _narrow(block.attn.qkv, block.attn.proj, entry.heads, before.num_heads)
        _narrow(*layers, entry.units, before.hidden_dim)
        state |= {f"blocks.{number}.{name}": tensor for name, tensor in block.state_dict().items()}
    height, width = backbone.patch_size
    image_size = backbone.grid_size[0] * height, backbone.grid_size[1] * width
    pruned = build_backbone(options, img_size=image_size, drop_path_rate=0.0)
    pruned.load_state_dict(state)
    return pruned.eval().requires_grad_(False).to(backbone.cls_token.device), options, kept


def _make_up(layer: nn.Linear, kept: Tensor, means: Tensor) -> None:
    """Moves what groups that go give on the average, ``[groups, d]``, into a layer's bias."""
    bias: Tensor | None = layer.bias
    if bias is not None:  # without one the means are 0
        means = means.clone()
        means[kept] = 0
        added = layer.weight.detach().double() @ means.flatten().double().to(layer.weight.device)
        layer.bias = nn.Parameter((bias.double() + added).to(bias.dtype), requires_grad=False)


def _narrow(before: nn.Linear, behind: nn.Linear, kept: Tensor, groups: int) -> None:
    """Keeps the rows before and columns behind of some groups."""
    width = behind.in_features
    columns = torch.arange(width).view(groups, -1)[kept].flatten().to(behind.weight.device)
    rows = torch.cat([columns + start for start in range(0, before.out_features, width)])  # of qkv, or of both gates
    before.weight = nn.Parameter(before.weight[rows], requires_grad=False)
    if before.bias is not None:
        before.bias = nn.Parameter(before.bias[rows], requires_grad=False)
    behind.weight = nn.Parameter(behind.weight[:, columns], requires_grad=False)


def _blocks(backbone: DinoVisionTransformer) -> list[Block]:
    return list(cast("Iterable[Block]", backbone.blocks))
