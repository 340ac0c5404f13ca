"""Building a backbone from the options of a run."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

from dinov2.models.vision_transformer import DinoVisionTransformer, vit_base, vit_giant2, vit_large, vit_small, vit_tiny

ARCHITECTURES: Mapping[str, Callable[..., DinoVisionTransformer]] = MappingProxyType(
    {
        "vit_tiny": vit_tiny,
        "vit_small": vit_small,
        "vit_base": vit_base,
        "vit_large": vit_large,
        "vit_giant2": vit_giant2,
    }
)


class BackboneOptions(Protocol):
    """The options that describe a backbone; those of a run's student satisfy it.

    How blocks are grouped for sharding (``block_chunks``) is not among them: the network does not depend on it.
    """

    @property
    def arch(self) -> str: ...
    @property
    def patch_size(self) -> int | tuple[int, int]: ...
    @property
    def layerscale(self) -> float | None: ...
    @property
    def ffn_layer(self) -> str: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def proj_bias(self) -> bool: ...
    @property
    def ffn_bias(self) -> bool: ...
    @property
    def num_register_tokens(self) -> int: ...
    @property
    def interpolate_antialias(self) -> bool: ...
    @property
    def interpolate_offset(self) -> float: ...
    @property
    def drop_path_rate(self) -> float: ...
    @property
    def drop_path_uniform(self) -> bool: ...
    @property
    def attention_backend(self) -> str: ...


def build_backbone(
    student_options: BackboneOptions, *, img_size: int | tuple[int, int], drop_path_rate: float | None = None
) -> DinoVisionTransformer:
    """Builds the backbone that the options describe, with random weights.

    Args:
        student_options: architecture and its settings. ``arch`` may carry upstream's suffix "_memeff", which names an
            attention kernel and not another network.
        img_size: pixels (height, width) that the position embedding is learned for: the size of the global crops.
        drop_path_rate: in place of the options' rate; 0 for a teacher.

    Raises:
        ValueError: for an unknown architecture, or options that do not fit together.
    """
    name = student_options.arch.removesuffix("_memeff")
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {student_options.arch!r}; allowed: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name](
        img_size=img_size,
        patch_size=student_options.patch_size,
        init_values=student_options.layerscale,
        ffn_layer=student_options.ffn_layer,
        qkv_bias=student_options.qkv_bias,
        proj_bias=student_options.proj_bias,
        ffn_bias=student_options.ffn_bias,
        num_register_tokens=student_options.num_register_tokens,
        interpolate_antialias=student_options.interpolate_antialias,
        interpolate_offset=student_options.interpolate_offset,
        drop_path_rate=student_options.drop_path_rate if drop_path_rate is None else drop_path_rate,
        drop_path_uniform=student_options.drop_path_uniform,
        attention_backend=student_options.attention_backend,
    )
