"""The vision transformer of DINOv2: images to class, register and patch tokens.

Reference: Dosovitskiy et al., An Image is Worth 16x16 Words (2020); Oquab et al., DINOv2 (2023), section 5;
registers: Darcet et al., Vision Transformers Need Registers (2023).
"""

from collections.abc import Sequence
from itertools import islice
from typing import Any, TypedDict, overload

import torch
from torch import Tensor, nn

from dinov2.layers.attention import pack_groups, split_groups
from dinov2.layers.block import LAYER_NORM_EPS, Block, LayerScale
from dinov2.layers.patch_embed import PatchEmbed, Size, as_pair, interpolate_position_embedding


class BackboneOutput(TypedDict):
    """Tokens of one batch: ``B`` images, ``R`` registers, ``N`` patches, width ``D``.

    ``x_norm_clstoken [B, D]``, ``x_norm_regtokens [B, R, D]`` and ``x_norm_patchtokens [B, N, D]`` went through the
    final norm; ``x_prenorm [B, 1 + R + N, D]`` did not. ``masks`` is what was passed in.
    """

    x_norm_clstoken: Tensor
    x_norm_regtokens: Tensor
    x_norm_patchtokens: Tensor
    x_prenorm: Tensor
    masks: Tensor | None


class DinoVisionTransformer(nn.Module):
    """Vision transformer with mask token, optional registers, and one forward pass over crops of several sizes.

    Args:
        img_size: pixels (height, width) that the position embedding is learned for; it is interpolated for others.
        patch_size: pixels (height, width) of a patch.
        in_chans: image channels.
        embed_dim: width ``D`` of the tokens.
        depth: number of blocks.
        num_heads: attention heads per block.
        head_dim: width of a head; None for ``embed_dim / num_heads``.
        mlp_ratio: hidden width of the feed-forward network over ``embed_dim``.
        ffn_hidden_dim: that width itself, in place of the ratio. A gated network ("swiglu") of it has two thirds of
            that, as many parameters.
        qkv_bias: bias of the query, key and value projection.
        ffn_bias: bias of the feed-forward network.
        proj_bias: bias of the attention's output projection.
        drop_path_rate: stochastic depth of the last block, in [0, 1).
        drop_path_uniform: the same rate in every block, instead of a linear rise from 0.
        init_values: start value of the layer scales; None or 0 for none.
        ffn_layer: "mlp", "swiglu", "swiglufused" or "identity".
        num_register_tokens: learned tokens between the class token and the patches.
        interpolate_antialias: see `interpolate_position_embedding`.
        interpolate_offset: see `interpolate_position_embedding`.
        attention_backend: "sdpa" or "xformers".

    Raises:
        ValueError: for sizes that do not divide, a rate or an offset out of range, or an unknown option name.
    """

    def __init__(
        self,
        *,
        img_size: Size = 224,
        patch_size: Size = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        ffn_hidden_dim: int | None = None,
        qkv_bias: bool = True,
        ffn_bias: bool = True,
        proj_bias: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_uniform: bool = False,
        init_values: float | None = None,
        ffn_layer: str = "mlp",
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
        attention_backend: str = "sdpa",
    ) -> None:
        super().__init__()
        if not 0 <= interpolate_offset < 1:
            raise ValueError(f"interpolate_offset must be in [0, 1), got {interpolate_offset}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_size = as_pair(patch_size)
        self.num_register_tokens = num_register_tokens
        self.n_blocks = depth
        self.interpolate_antialias = interpolate_antialias
        self.interpolate_offset = interpolate_offset

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.grid_size = self.patch_embed.grid_size(*as_pair(img_size))
        num_patches = self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + num_patches, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                head_dim=head_dim,
                mlp_ratio=mlp_ratio,
                ffn_hidden_dim=ffn_hidden_dim,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
                drop_path_rate=rate,
                init_values=init_values,
                ffn_layer=ffn_layer,
                attention_backend=attention_backend,
            )
            for rate in drop_path_rates(drop_path_rate, depth, uniform=drop_path_uniform)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=LAYER_NORM_EPS)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws the initial values of every parameter; also right after materialising from the meta device."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.zeros_(self.mask_token)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d | nn.LayerNorm | LayerScale):
                module.reset_parameters()

    def interpolate_pos_encoding(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding ``[1, 1 + h * w, D]`` for ``(h, w)`` patches; the parameter itself on its own grid."""
        return interpolate_position_embedding(
            self.pos_embed,
            self.grid_size,
            grid,
            antialias=self.interpolate_antialias,
            offset=self.interpolate_offset,
        )

    def prepare_tokens_with_masks(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Embeds images ``[B, 3, H, W]`` as the tokens ``[B, 1 + R + N, D]`` that enter the first block.

        Raises:
            ValueError: when the image does not divide into patches, or ``masks`` is not ``[B, N]``.
        """
        batch = x.shape[0]
        grid = self.patch_embed.grid_size(x.shape[-2], x.shape[-1])
        tokens: Tensor = self.patch_embed(x)
        if masks is not None:
            if masks.shape != tokens.shape[:2]:
                raise ValueError(
                    f"masks must have one entry per image and patch, {list(tokens.shape[:2])}; got {list(masks.shape)}"
                )
            tokens = torch.where(masks.unsqueeze(-1), self.mask_token.to(tokens.dtype).unsqueeze(0), tokens)
        tokens = torch.cat([self.cls_token.expand(batch, -1, -1), tokens], dim=1)
        tokens = tokens + self.interpolate_pos_encoding(grid)
        if self.register_tokens is None:
            return tokens
        registers = self.register_tokens.expand(batch, -1, -1)
        return torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)

    @overload
    def forward_features(self, x: Tensor, masks: Tensor | None = None) -> BackboneOutput: ...

    @overload
    def forward_features(
        self, x: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> list[BackboneOutput]: ...

    def forward_features(
        self, x: Tensor | Sequence[Tensor], masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> BackboneOutput | list[BackboneOutput]:
        """Computes all tokens of one batch, or of several batches of different image sizes at once.

        Args:
            x: images ``[B, 3, H, W]``, or one such batch per crop size. Linear layers and norms then run once over the
                tokens of all sizes; attention stays within each image.
            masks: bool ``[B, N]``, true where a patch is replaced by the mask token; for several batches one entry
                each, which may be None.

        Raises:
            ValueError: when an image does not divide into patches, or masks do not fit.
        """
        if isinstance(x, Tensor):
            assert masks is None or isinstance(masks, Tensor)
            tokens = self.prepare_tokens_with_masks(x, masks)
            for block in self.blocks:
                tokens = block(tokens)
            return self._split_tokens(tokens, self.norm(tokens), masks)

        masks_per_size = [None] * len(x) if masks is None else list(masks)
        if len(masks_per_size) != len(x):
            raise ValueError(f"{len(x)} batches of images need as many masks (or None), got {len(masks_per_size)}")
        rows, shapes = pack_groups(
            [self.prepare_tokens_with_masks(*pair) for pair in zip(x, masks_per_size, strict=True)]
        )
        for block in self.blocks:
            rows = block(rows, shapes)
        groups = zip(split_groups(rows, shapes), split_groups(self.norm(rows), shapes), masks_per_size, strict=True)
        return [self._split_tokens(*group) for group in groups]

    def _split_tokens(self, tokens: Tensor, normed: Tensor, masks: Tensor | None) -> BackboneOutput:
        first_patch = 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first_patch],
            "x_norm_patchtokens": normed[:, first_patch:],
            "x_prenorm": tokens,
            "masks": masks,
        }

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        is_training: bool = False,
    ) -> Tensor | list[Tensor] | BackboneOutput | list[BackboneOutput]:
        """Computes the normalised class token ``[B, D]``, or everything `forward_features` gives.

        Args:
            x: images ``[B, 3, H, W]``, or one such batch per crop size; the result is then a list.
            masks: see `forward_features`.
            is_training: whether all tokens are returned; stochastic depth follows ``train()`` and not this.
        """
        output: BackboneOutput | list[BackboneOutput] = self.forward_features(x, masks)  # type: ignore[arg-type]
        if is_training:
            return output
        if isinstance(output, list):
            return [entry["x_norm_clstoken"] for entry in output]
        return output["x_norm_clstoken"]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch tokens after several blocks; register tokens are left out.

        Args:
            x: images ``[B, 3, H, W]``.
            n: the last ``n`` blocks, or the numbers of the blocks, from 0; the result is in the order asked for.
            reshape: patches as maps ``[B, D, h, w]`` instead of ``[B, N, D]``.
            return_class_token: pairs ``(patches, class token [B, D])`` instead of patches.
            norm: whether the final norm is applied to each.

        Raises:
            ValueError: when a block asked for does not exist.
        """
        wanted = list(range(self.n_blocks - n, self.n_blocks)) if isinstance(n, int) else list(n)
        if not wanted or min(wanted) < 0 or max(wanted) >= self.n_blocks:
            raise ValueError(
                f"n={n!r} asks for blocks that do not exist; the model has blocks 0 to {self.n_blocks - 1}"
            )
        outputs: dict[int, Tensor] = {}
        tokens = self.prepare_tokens_with_masks(x)
        # A slice of a ModuleList is another one, which exported graphs would name blocks after.
        for index, block in enumerate(islice(self.blocks, max(wanted) + 1)):
            tokens = block(tokens)
            if index in wanted:
                outputs[index] = self.norm(tokens) if norm else tokens

        patches = [outputs[index][:, 1 + self.num_register_tokens :] for index in wanted]
        if reshape:
            grid = self.patch_embed.grid_size(x.shape[-2], x.shape[-1])
            patches = [entry.transpose(1, 2).reshape(x.shape[0], self.embed_dim, *grid) for entry in patches]
        if not return_class_token:
            return tuple(patches)
        return tuple(zip(patches, [outputs[index][:, 0] for index in wanted], strict=True))


def drop_path_rates(rate: float, depth: int, *, uniform: bool) -> list[float]:
    """Stochastic-depth rate of every block: the same everywhere, or rising linearly from 0 to ``rate``.

    Raises:
        ValueError: when ``rate`` is outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate must be in [0, 1), got {rate}")
    if uniform:
        return [rate] * depth
    return [rate * index / max(depth - 1, 1) for index in range(depth)]


def vit_mini(patch_size: Size = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """Width 192, 6 blocks, 3 heads (2.8 M parameters): half of ViT-Ti, for pretraining on a processor."""
    return _vit(192, 6, 3, patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)


def vit_tiny(patch_size: Size = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-Ti: width 192, 12 blocks, 3 heads (5.5 M parameters); not part of the released family."""
    return _vit(192, 12, 3, patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)


def vit_small(patch_size: Size = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-S: width 384, 12 blocks, 6 heads (21 M parameters)."""
    return _vit(384, 12, 6, patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)


def vit_base(patch_size: Size = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-B: width 768, 12 blocks, 12 heads (86 M parameters)."""
    return _vit(768, 12, 12, patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)


def vit_large(patch_size: Size = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-L: width 1024, 24 blocks, 16 heads (300 M parameters)."""
    return _vit(1024, 24, 16, patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)


def vit_giant2(patch_size: Size = 16, num_register_tokens: int = 0, **kwargs: Any) -> DinoVisionTransformer:
    """ViT-g: width 1536, 40 blocks, 24 heads (1.1 G parameters with ``ffn_layer="swiglufused"``, as released)."""
    return _vit(1536, 40, 24, patch_size=patch_size, num_register_tokens=num_register_tokens, **kwargs)


def _vit(embed_dim: int, depth: int, num_heads: int, /, **options: Any) -> DinoVisionTransformer:
    """With another number of heads, each is as wide as before."""
    shape = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "head_dim": embed_dim // num_heads}
    return DinoVisionTransformer(**shape | options)
