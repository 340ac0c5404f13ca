"""Pictures of what patch features see: their first three principal components as colours, beside the photo."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL.Image import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from dinov2.data.datasets.base import ImageDataset
from dinov2.eval.frozen import evaluating
from dinov2.eval.transforms import make_eval_transform
from dinov2.utils.files import write_atomically

_ROBUST = 0.01  # share of tokens that may saturate at either end of a colour channel
_SMALLEST_SPAN = 1e-3  # a component narrower than this share of the first one carries no colour
_BATCH_SIZE = 8
_PANEL_INCHES = 2.4


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
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    photos = [TF.resize(image.convert("RGB"), [height, width], InterpolationMode.BICUBIC) for image in images]
    columns: dict[str, Sequence[Image | Tensor]] = {"photo": photos}
    for name, backbone in models.items():
        tokens = _patch_tokens(backbone.to(device), photos, torch.device(device))
        colours, explained = patch_pca_colours(tokens)
        columns[f"{name}\n{100 * explained:.0f} % of variance"] = list(colours)
    figure = _draw(columns, titles, height / width)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(figure.savefig, format="png"))


def sample_photos(dataset: ImageDataset, num_images: int) -> tuple[list[Image], list[str]]:
    """Chooses photos spread evenly over a dataset, as many of each class as of the others where there are enough.

    Returns:
        At most ``num_images`` photos, and a title for each: its class, where it has one, and the file's name.

    Raises:
        ValueError: when ``num_images`` is below 1 or the dataset is empty.
    """
    if num_images < 1 or len(dataset) == 0:
        raise ValueError(f"cannot choose {num_images} photos from a dataset of {len(dataset)}")
    targets = dataset.get_targets()
    members = [np.flatnonzero(targets == target) for target in np.unique(targets)]
    shares = [len(share) for share in np.array_split(np.arange(num_images), len(members))]
    chosen = [
        int(member[position])
        for member, share in zip(members, shares, strict=True)
        for position in np.linspace(0, len(member) - 1, min(share, len(member))).round().astype(int)
    ]
    titles = []
    for index in chosen:
        name, target = dataset.get_image_path(index).name, dataset.get_target(index)
        titles.append(name if target is None or not dataset.classes else f"{dataset.classes[target]}\n{name}")
    return [dataset.get_image(index) for index in chosen], titles


def patch_pca_colours(tokens: Tensor) -> tuple[Tensor, float]:
    """Turns patch features into colours by their first three principal components over all images.

    Each component is stretched to [0, 1] between its 1st and 99th percentile. A component points where its largest
    loading is positive, so that the same features always give the same colours.

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
    rows = tokens.detach().cpu().double().flatten(0, 2)  # [B·h·w, D]
    rows = rows - rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(rows.T @ rows)  # ascending
    variances, directions = variances.clamp_min(0).flip(0), directions.flip(1)[:, :3]  # [D], [D, 3]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))  # [1, 3]
    components = rows @ (directions * largest.sign())  # [B·h·w, 3]
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


def _patch_tokens(model: nn.Module, photos: Sequence[Image], device: torch.device) -> Tensor:
    """Normalised patch features ``[B, h, w, D]`` float32 on the CPU, rows and columns of patches as in the photo."""
    width, height = photos[0].size
    patch_height, patch_width = _patch_size(model)
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"image_size {height}x{width} must be a multiple of the patch size {patch_height}x{patch_width} "
            "(height x width)"
        )
    preprocess = make_eval_transform((height, width), whole_image=True)
    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    tokens = []
    with evaluating(model):
        for start in range(0, len(photos), _BATCH_SIZE):
            batch = torch.stack([preprocess(photo) for photo in photos[start : start + _BATCH_SIZE]])  # [b, 3, H, W]
            output = model(batch.to(device, dtype), is_training=True)
            tokens.append(output["x_norm_patchtokens"].float().cpu())
    grid = (height // patch_height, width // patch_width)
    return torch.cat(tokens).reshape(len(photos), *grid, -1)


def _patch_size(model: nn.Module) -> tuple[int, int]:
    size = model.patch_size
    if isinstance(size, int):
        return size, size
    assert isinstance(size, tuple)
    height, width = size
    return int(height), int(width)


def _draw(columns: Mapping[str, Sequence[Image | Tensor]], titles: Sequence[str] | None, aspect: float) -> Figure:
    """A grid of panels of one shape: a header above each column, a title left of each row."""
    count = len(next(iter(columns.values())))
    size = (_PANEL_INCHES * len(columns), _PANEL_INCHES * aspect * count + 0.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    for column, (header, pictures) in enumerate(columns.items()):
        for row, picture in enumerate(pictures):
            axes: Axes = figure.add_subplot(count, len(columns), row * len(columns) + column + 1)
            axes.imshow(picture.numpy() if isinstance(picture, Tensor) else picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(header, fontsize=10)
            if column == 0 and titles is not None:
                axes.set_ylabel(titles[row], fontsize=9)
    return figure
