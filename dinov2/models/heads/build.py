"""Building a task head from options."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from dinov2.config.schema import leaf
from dinov2.models.heads.classification import ClassificationHead, LinearClassifier, MLPClassifier, PartClassifier
from dinov2.models.heads.conv_decoder import ConvDecoder
from dinov2.models.heads.depth import (
    DepthBins,
    DepthFromScores,
    DepthOutput,
    DPTHead,
    LinearDepthHead,
    ReluDepth,
    SigmoidDepth,
    SoftplusDepth,
)
from dinov2.models.heads.segmentation import BNHead, MultiScaleHead

DEPTH_ACTIVATIONS: Mapping[str, Callable[[float, float], DepthOutput]] = MappingProxyType(
    {"softplus": SoftplusDepth, "sigmoid": SigmoidDepth, "relu": ReluDepth}
)


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Options that describe a head; `HEAD_OPTIONS` says which of them a kind of head reads."""

    kind: str = leaf(
        "auto",
        "auto: linear for classes, bn_linear for masks, linear_bins for depth.",
        choices=("auto", "linear", "mlp", "bn_linear", "multi_scale", "conv_decoder", "linear_bins", "dpt"),
    )
    pooling: str = leaf(
        "cls_mean",
        "Classification: class tokens of all blocks, these and the mean patch of the last, or mean patches.",
        choices=("cls", "cls_mean", "mean"),
    )
    standardize: bool = leaf(True, "Classification: pooled features are standardised by running statistics.")
    per_part: bool = leaf(False, "Classification: one answer per part, by attention over its images.")
    class_token: bool = leaf(False, "Dense heads: the class token beside every patch.")
    hidden_dim: int = leaf(512, "Width inside mlp.", minimum=1)
    channels: int = leaf(128, "Channels of multi_scale, conv_decoder and dpt.", minimum=1)
    dropout: float = leaf(0.0, "Before the last layer.", minimum=0, maximum=0.99)
    output_stride: int = leaf(4, "Pixels per prediction of conv_decoder, before it is enlarged.", minimum=1)
    upsample: int = leaf(4, "Enlargement of the patch map before linear_bins.", minimum=1)
    num_bins: int = leaf(256, "Depth bins of linear_bins.", minimum=2)
    bins: str = leaf(
        "UD",
        "Depth bins: UD evenly spaced, SID evenly in log depth; SID_upstream as upstream computes them.",
        choices=("UD", "SID", "SID_upstream"),
    )
    norm_strategy: str = leaf("linear", "How bin scores become weights.", choices=("linear", "softmax", "sigmoid"))
    depth_activation: str = leaf(
        "sigmoid",
        "How dpt and conv_decoder make a depth of a number; sigmoid begins amid the range, whatever the unit.",
        choices=("sigmoid", "softplus", "relu"),
    )
    min_depth: float = leaf(0.001, "Smallest depth that the head can predict, in the set's unit.", above=0)
    max_depth: float = leaf(10.0, "Largest depth that the head can predict.", above=0)


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """What a head must fit: the backbone below it and the task above.

    Attributes:
        embed_dim: width of the backbone.
        num_blocks: blocks whose features the head gets.
        num_outputs: classes; 1 for depth.
        patch_size: pixels (height, width) of a patch.
    """

    embed_dim: int
    num_blocks: int
    num_outputs: int
    patch_size: int | tuple[int, int]


def _linear(options: HeadOptions, sizes: HeadSizes) -> nn.Module:
    return _over_parts(
        LinearClassifier(
            sizes.embed_dim,
            sizes.num_outputs,
            num_blocks=sizes.num_blocks,
            pooling=options.pooling,
            dropout=options.dropout,
            standardize=options.standardize,
        ),
        options,
    )


def _mlp(options: HeadOptions, sizes: HeadSizes) -> nn.Module:
    return _over_parts(
        MLPClassifier(
            sizes.embed_dim,
            sizes.num_outputs,
            hidden_dim=options.hidden_dim,
            num_blocks=sizes.num_blocks,
            pooling=options.pooling,
            dropout=options.dropout,
            standardize=options.standardize,
        ),
        options,
    )


def _over_parts(classifier: ClassificationHead, options: HeadOptions) -> nn.Module:
    return PartClassifier(classifier) if options.per_part else classifier


def _bn_linear(options: HeadOptions, sizes: HeadSizes) -> nn.Module:
    return BNHead(
        sizes.embed_dim,
        sizes.num_outputs,
        num_blocks=sizes.num_blocks,
        class_token=options.class_token,
        dropout=options.dropout,
    )


def _multi_scale(options: HeadOptions, sizes: HeadSizes) -> nn.Module:
    return MultiScaleHead(
        sizes.embed_dim,
        sizes.num_outputs,
        num_blocks=sizes.num_blocks,
        channels=options.channels,
        class_token=options.class_token,
        dropout=options.dropout,
    )


def _conv_decoder(options: HeadOptions, sizes: HeadSizes) -> nn.Module:
    return ConvDecoder(
        sizes.embed_dim,
        sizes.num_outputs,
        num_blocks=sizes.num_blocks,
        patch_size=sizes.patch_size,
        output_stride=options.output_stride,
        channels=options.channels,
        class_token=options.class_token,
        dropout=options.dropout,
    )


def _linear_bins(options: HeadOptions, sizes: HeadSizes) -> nn.Module:
    bins = DepthBins(
        options.min_depth,
        options.max_depth,
        num_bins=options.num_bins,
        spacing=options.bins,
        norm=options.norm_strategy,
    )
    return LinearDepthHead(
        sizes.embed_dim,
        bins,
        num_blocks=sizes.num_blocks,
        class_token=options.class_token,
        upsample=options.upsample,
    )


def _dpt(options: HeadOptions, sizes: HeadSizes) -> nn.Module:
    if sizes.num_blocks != 4:
        raise ValueError(f"a dpt head fuses the features of 4 blocks, got {sizes.num_blocks}")
    return DPTHead(sizes.embed_dim, _depth_output(options), channels=options.channels)


def _conv_depth(options: HeadOptions, sizes: HeadSizes) -> nn.Module:
    return DepthFromScores(_conv_decoder(options, sizes), _depth_output(options))


def _depth_output(options: HeadOptions) -> DepthOutput:
    if options.depth_activation not in DEPTH_ACTIVATIONS:
        raise ValueError(
            f"unknown depth_activation {options.depth_activation!r}; allowed: {', '.join(DEPTH_ACTIVATIONS)}"
        )
    return DEPTH_ACTIVATIONS[options.depth_activation](options.min_depth, options.max_depth)


_Builder = Callable[[HeadOptions, HeadSizes], nn.Module]
_RANGE = ("depth_activation", "min_depth", "max_depth")
_DECODER = ("channels", "class_token", "dropout", "output_stride")
# Task -> kind -> (builder, options that it reads beside the kind).
_HEADS: Mapping[str, Mapping[str, tuple[_Builder, tuple[str, ...]]]] = MappingProxyType(
    {
        "classification": {
            "linear": (_linear, ("pooling", "standardize", "per_part", "dropout")),
            "mlp": (_mlp, ("pooling", "standardize", "per_part", "hidden_dim", "dropout")),
        },
        "segmentation": {
            "bn_linear": (_bn_linear, ("class_token", "dropout")),
            "multi_scale": (_multi_scale, ("channels", "class_token", "dropout")),
            "conv_decoder": (_conv_decoder, _DECODER),
        },
        "depth": {
            "linear_bins": (
                _linear_bins,
                ("class_token", "upsample", "num_bins", "bins", "norm_strategy", "min_depth", "max_depth"),
            ),
            "dpt": (_dpt, ("channels", *_RANGE)),
            "conv_decoder": (_conv_depth, (*_DECODER, *_RANGE)),
        },
    }
)

HEAD_OPTIONS: Mapping[str, Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        task: MappingProxyType({kind: frozenset(read) for kind, (_, read) in kinds.items()})
        for task, kinds in _HEADS.items()
    }
)
"""Task -> kind of head -> names of the options that have an effect on it."""


def build_head(
    options: HeadOptions,
    *,
    task: str,
    embed_dim: int,
    num_blocks: int,
    num_outputs: int,
    patch_size: int | tuple[int, int],
) -> nn.Module:
    """Builds the head that the options describe, with random weights.

    Args:
        options: kind of head and its settings.
        task: "classification", "segmentation" or "depth".
        embed_dim: width of the backbone.
        num_blocks: blocks whose features the head gets.
        num_outputs: classes; 1 for depth.
        patch_size: pixels (height, width) of a patch.

    Returns:
        A head for `TaskModel`.

    Raises:
        ValueError: for an unknown task, a kind of head that the task does not have, or options that do not fit.
    """
    if task not in _HEADS:
        raise ValueError(f"unknown task {task!r}; allowed: {', '.join(_HEADS)}")
    kinds = _HEADS[task]
    if options.kind not in kinds:
        raise ValueError(f"unknown head {options.kind!r} for {task}; allowed: {', '.join(kinds)}")
    if num_outputs < 1 or (task == "depth" and num_outputs != 1):
        raise ValueError(
            f"num_outputs counts classes (at least 1) and must be 1 for depth; got {num_outputs} for {task}"
        )
    build, _ = kinds[options.kind]
    sizes = HeadSizes(embed_dim=embed_dim, num_blocks=num_blocks, num_outputs=num_outputs, patch_size=patch_size)
    return build(options, sizes)
