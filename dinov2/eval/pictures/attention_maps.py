"""Where the class token of a vision transformer looks: its attention in the last block, head by head."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn

from dinov2.eval.frozen import evaluating
from dinov2.eval.pictures.photo_batches import patch_grid, photo_batches, resize_photos
from dinov2.eval.pictures.picture_grid import Panel, write_panels
from dinov2.layers.attention import Attention
from dinov2.models.vision_transformer import DinoVisionTransformer

_ROBUST = 0.99  # quantile of a map that is drawn brightest; single patches may stand out far above the rest


def cls_attention(model: DinoVisionTransformer, images: Tensor) -> Tensor:
    """Computes how much the class token attends to every token in the last block.

    The model's forward pass runs as it is, with whatever attention kernel it has; the probabilities, which kernels do
    not give away, are computed beside it from the input of the last attention.

    Args:
        model: a vision transformer; gets its modes back.
        images: ``[B, 3, H, W]``, in the model's dtype, on its device.

    Returns:
        Probabilities ``[B, heads, 1 + R + N]`` float32 on the CPU: of the class token itself, the ``R`` registers and
        the ``N`` patches, row by row of the image. They sum to 1.
    """
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(module, Attention)
        found.append(_first_query_probabilities(module, arguments[0]).cpu())

    last = model.blocks[-1]
    assert isinstance(last.attn, Attention)
    handle = last.attn.register_forward_pre_hook(keep)
    try:
        with evaluating(model):
            model(images)
    finally:
        handle.remove()
    assert len(found) == 1
    return found[0]


def draw_cls_attention(
    model: DinoVisionTransformer,
    images: Sequence[Image],
    *,
    image_size: int | tuple[int, int],
    path: str | Path,
    titles: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Draws one row per photo: the photo, the attention of the class token averaged over heads, and that of each head.

    Each map is drawn from dark (0) to bright (its own 99th percentile). The share above a head is how much of its
    attention, averaged over the photos, goes to patches at all; the rest goes to the class token and the registers.

    Args:
        model: moved to ``device``.
        images: photos of any size and mode; each is stretched to ``image_size`` as a whole.
        image_size: height and width in pixels, or one number for both; multiples of the patch size.
        path: PNG file to write; its folder is created where needed.
        titles: text beside each photo.
        device: where the model runs.

    Raises:
        ValueError: when there is no photo, titles and photos differ in number, or the size does not fit the patches.

    Reference:
        DINO (Caron et al. 2021), figure 1.
    """
    if not images or (titles is not None and len(titles) != len(images)):
        raise ValueError(f"one or more photos, and as many titles, are needed; got {len(images)} photos")
    photos = resize_photos(images, image_size)
    grid = patch_grid(model, photos[0])
    model = model.to(device)
    attention = torch.cat([cls_attention(model, batch) for batch in photo_batches(model, photos)])
    maps = attention[:, :, 1 + model.num_register_tokens :]  # [B, heads, N]
    maps = torch.cat([maps.mean(dim=1, keepdim=True), maps], dim=1)  # [B, 1 + heads, N]
    shares = maps.sum(dim=2).mean(dim=0).tolist()
    names = ["mean of heads", *(f"head {number + 1}" for number in range(model.num_heads))]
    headers = ["photo", *(f"{name}\n{100 * share:.0f} % on patches" for name, share in zip(names, shares, strict=True))]
    rows = []
    for number, (photo, row) in enumerate(zip(photos, maps, strict=True)):
        above = headers if number == 0 else [""] * len(headers)
        bright = [_brighten(entry).reshape(grid).numpy() for entry in row]
        panels = [Panel(picture=picture, title=title) for picture, title in zip(bright, above[1:], strict=True)]
        rows.append([Panel(picture=photo, title=above[0]), *panels])
    write_panels(path, rows, row_titles=titles, aspect=photos[0].height / photos[0].width)


def _first_query_probabilities(attention: Attention, tokens: Tensor) -> Tensor:
    """Softmax of the first token's query over the keys of all tokens ``[B, T, D]``: ``[B, heads, T]`` float32."""
    query, key, _ = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    scores = torch.einsum("bhd,bthd->bht", query[:, 0].float(), key.float())
    return torch.softmax(scores * query.shape[-1] ** -0.5, dim=-1)


def _brighten(values: Tensor) -> Tensor:
    """Values ``[N]`` over their 99th percentile, at most 1."""
    brightest = values.quantile(_ROBUST)
    return (values / brightest).clamp_max(1) if brightest > 0 else torch.zeros_like(values)
