"""Pictures of what patch features see: their first three principal components as colours, beside the photo."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn

from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.frozen import evaluating
from dinov2.eval.pictures.photo_batches import patch_grid, photo_batches, resize_photos
from dinov2.eval.pictures.photo_selection import spread_positions
from dinov2.eval.pictures.picture_grid import Panel, write_panels
from dinov2.eval.pictures.principal_components import principal_components

_ROBUST = 0.01  # share of tokens that may saturate at either end of a colour channel
_SMALLEST_SPAN = 1e-3  # a component narrower than this share of the first one carries no colour


def draw_patch_pca(
    model: nn.Module | Mapping[str, nn.Module],
    images: Sequence[Image],
    *,
    image_size: int | tuple[int, int],
    path: str | Path,
    titles: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Draws one row per photo: the photo, then the colours of its patch features, one column per model.

    The components are fitted over all photos of a model together, so equal colours in a column mean alike features.
    Colours of different columns cannot be compared.

    Args:
        model: a backbone with ``patch_size`` ``(h, w)`` whose ``model(x, is_training=True)`` holds
            ``x_norm_patchtokens`` ``[B, N, D]``; several to compare are given by name. Moved to ``device``.
        images: photos of any size and mode; each is stretched to ``image_size`` as a whole.
        image_size: height and width in pixels, or one number for both; multiples of every model's patch size.
        path: PNG file to write; its folder is created where needed.
        titles: text beside each photo.
        device: where features are computed.

    Raises:
        ValueError: when there is no photo or no model, titles and photos differ in number, a size does not fit the
            patches, or features are not finite.

    Reference:
        DINOv2 (Oquab et al. 2023), section 7.6, without its removal of the background.
    """
    models = {"patch features": model} if isinstance(model, nn.Module) else dict(model)
    if not images or not models:
        raise ValueError(f"at least one photo and one model are needed, got {len(images)} and {len(models)}")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles were given for {len(images)} photos")
    photos = resize_photos(images, image_size)
    rows = [[Panel(picture=photo, title="" if number else "photo")] for number, photo in enumerate(photos)]
    for name, backbone in models.items():
        colours, explained = patch_pca_colours(_patch_tokens(backbone.to(device), photos))
        header = f"{name}\n{100 * explained:.0f} % of variance"
        for number, picture in enumerate(colours):
            rows[number].append(Panel(picture=picture.numpy(), title="" if number else header))
    write_panels(path, rows, row_titles=titles, aspect=photos[0].height / photos[0].width)


def sample_photos(dataset: ImageDataset, num_images: int) -> tuple[list[Image], list[str]]:
    """Chooses photos spread evenly over a dataset, as many of each class as of the others where there are enough.

    Returns:
        At most ``num_images`` photos, and a title for each: its class, where it has one, and the file's name.

    Raises:
        ValueError: when ``num_images`` is below 1 or the dataset is empty.
    """
    titles = []
    chosen = spread_positions(dataset, num_images)
    for index in chosen:
        name, target = dataset.get_image_path(index).name, dataset.get_target(index)
        titles.append(name if target is None or not dataset.classes else f"{dataset.classes[target]}\n{name}")
    return [dataset.get_image(index) for index in chosen], titles


def patch_pca_colours(tokens: Tensor) -> tuple[Tensor, float]:
    """Turns patch features into colours by their first three principal components over all images.

    Each component is stretched to [0, 1] between its 1st and 99th percentile. The same features always give the same
    colours.

    Args:
        tokens: ``[B, h, w, D]``, D at least 3.

    Returns:
        Colours ``[B, h, w, 3]`` float32 in [0, 1] on the CPU, and the share of variance that the three hold, in [0, 1].

    Raises:
        ValueError: when features are fewer than three or not finite.
    """
    if tokens.shape[-1] < 3:
        raise ValueError(f"three components need features of width 3 or more, got {tokens.shape[-1]}")
    if not tokens.isfinite().all():
        raise ValueError("patch features are NaN or infinite")
    components, variances = principal_components(tokens.flatten(0, 2), 3)  # [B·h·w, 3], [D]
    low, high = (_quantile(components, share) for share in (_ROBUST, 1 - _ROBUST))
    span = high - low
    drawn = span > _SMALLEST_SPAN * span.max()
    scaled = ((components - low) / span.where(drawn, torch.ones_like(span))).clamp(0, 1)
    colours = scaled.where(drawn, torch.full_like(scaled, 0.5)).float().reshape(*tokens.shape[:3], 3)
    total = float(variances.sum())
    return colours, float(variances[:3].sum()) / total if total > 0 else 0.0


def _quantile(rows: Tensor, share: float) -> Tensor:
    """Nearest-rank quantile of every column; ``torch.quantile`` refuses more than 16 million values."""
    return rows.sort(dim=0).values[round(share * (len(rows) - 1))]


def _patch_tokens(model: nn.Module, photos: Sequence[Image]) -> Tensor:
    """Normalised patch features ``[B, h, w, D]`` float32 on the CPU, rows and columns of patches as in the photo."""
    grid = patch_grid(model, photos[0])
    with evaluating(model):
        tokens = [
            model(batch, is_training=True)["x_norm_patchtokens"].float().cpu() for batch in photo_batches(model, photos)
        ]
    return torch.cat(tokens).reshape(len(photos), *grid, -1)
