"""The command that draws what a backbone sees in photos: from a config, weights and a dataset to PNG files."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torchvision.transforms.v2.functional as TF
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from dinov2.config import Config, load_config
from dinov2.config.command_line import option, parse
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.distributed import choose_device
from dinov2.eval.command import build_frozen_backbone
from dinov2.eval.features import (
    FEATURES,
    Features,
    ModelWithFeatures,
    ModelWithNormalize,
    device_of,
    evaluating,
    extract_features,
    make_eval_transform,
)
from dinov2.eval.neighbours import nearest_neighbours
from dinov2.layers.attention import Attention
from dinov2.logging import logging_to
from dinov2.logging.plots import RIGHT, WRONG, Panel, draw_panels, save_png
from dinov2.models.vision_transformer import DinoVisionTransformer

BATCH_SIZE = 8


def resize_photos(images: Sequence[Image.Image], image_size: int | tuple[int, int]) -> list[Image.Image]:
    """Stretches photos of any size and mode to RGB of one size: height and width, or one number for both."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return [TF.resize(image.convert("RGB"), [height, width], InterpolationMode.BICUBIC) for image in images]


def patch_grid(model: nn.Module, photo: Image.Image) -> tuple[int, int]:
    """Rows and columns of patches ``(h, w)`` that a photo has for a model with ``patch_size``.

    Raises:
        ValueError: when the photo does not divide into patches.
    """
    width, height = photo.size
    patch_height, patch_width = _patch_size(model)
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"image_size {height}x{width} must be a multiple of the patch size {patch_height}x{patch_width} "
            "(height x width)"
        )
    return height // patch_height, width // patch_width


def photo_batches(model: nn.Module, photos: Sequence[Image.Image]) -> Iterator[Tensor]:
    """Yields photos of one size as normalised batches ``[b, 3, H, W]`` of the model's dtype, where the model lies."""
    width, height = photos[0].size
    preprocess = make_eval_transform((height, width), whole_image=True)
    parameter = next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    for start in range(0, len(photos), BATCH_SIZE):
        batch = torch.stack([preprocess(photo) for photo in photos[start : start + BATCH_SIZE]])
        yield batch.to(device_of(model), dtype)


def _patch_size(model: nn.Module) -> tuple[int, int]:
    size = model.patch_size
    if isinstance(size, int):
        return size, size
    assert isinstance(size, tuple)
    height, width = size
    return int(height), int(width)


class PhotoSelection(ImageDataset):
    """The photos at some positions of a dataset, as a dataset with the same transforms.

    Args:
        dataset: where the photos come from.
        positions: of the photos, in the order wanted.
    """

    def __init__(self, dataset: ImageDataset, positions: Sequence[int]) -> None:
        super().__init__(transform=dataset.transform, target_transform=dataset.target_transform)
        self.dataset = dataset
        self.positions = list(positions)
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.positions)

    def get_image_path(self, index: int) -> Path:
        return self.dataset.get_image_path(self.positions[index])

    def get_target(self, index: int) -> int | None:
        return self.dataset.get_target(self.positions[index])

    def get_image(self, index: int) -> Image.Image:
        return self.dataset.get_image(self.positions[index])

    def get_group_ids(self) -> list[str]:
        """Group of every photo, as the dataset names it."""
        groups = self.dataset.get_group_ids()
        return [groups[position] for position in self.positions]


def spread_positions(dataset: ImageDataset, num_images: int) -> list[int]:
    """Positions of photos spread evenly over a dataset, as many of each class as of the others where there are enough.

    Raises:
        ValueError: when ``num_images`` is below 1 or the dataset is empty.
    """
    if num_images < 1 or len(dataset) == 0:
        raise ValueError(f"cannot choose {num_images} photos from a dataset of {len(dataset)}")
    targets = dataset.get_targets()
    members = [np.flatnonzero(targets == target) for target in np.unique(targets)]
    shares = [len(share) for share in np.array_split(np.arange(num_images), len(members))]
    return [
        int(member[position])
        for member, share in zip(members, shares, strict=True)
        for position in np.linspace(0, len(member) - 1, min(share, len(member))).round().astype(int)
    ]


def whole_parts(dataset: ImageDataset, most_photos: int) -> list[int]:
    """Positions of all photos of evenly chosen parts, in the dataset's order; of all parts where ``most_photos`` allow.

    A first part with more photos than allowed is taken nevertheless.

    Raises:
        ValueError: when ``most_photos`` is below 1 or the dataset is empty.
    """
    if most_photos < 1 or len(dataset) == 0:
        raise ValueError(f"cannot choose {most_photos} photos from a dataset of {len(dataset)}")
    if len(dataset) <= most_photos:
        return list(range(len(dataset)))
    members: dict[str, list[int]] = {}
    for position, group in enumerate(dataset.get_group_ids()):
        members.setdefault(group, []).append(position)
    parts = list(members.values())
    chosen: list[int] = []
    for number in _scattered(len(parts)):
        if chosen and len(chosen) + len(parts[number]) > most_photos:
            continue
        chosen += parts[number]
    return sorted(chosen)


def _scattered(count: int) -> list[int]:
    """The numbers below ``count`` in an order of which every beginning is spread evenly (steps of the golden ratio)."""
    places = np.arange(count) * 0.6180339887498949 % 1.0
    ranks: list[int] = places.argsort(kind="stable").argsort(kind="stable").tolist()
    return ranks


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
    images: Sequence[Image.Image],
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
    save_png(draw_panels(rows, row_titles=titles, aspect=photos[0].height / photos[0].width), path)


def _first_query_probabilities(attention: Attention, tokens: Tensor) -> Tensor:
    """Softmax of the first token's query over the keys of all tokens ``[B, T, D]``: ``[B, heads, T]`` float32."""
    query, key, _ = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    scores = torch.einsum("bhd,bthd->bht", query[:, 0].float(), key.float())
    return torch.softmax(scores * query.shape[-1] ** -0.5, dim=-1)


def _brighten(values: Tensor) -> Tensor:
    """Values ``[N]`` over their 99th percentile, at most 1."""
    brightest = values.quantile(_ROBUST)
    return (values / brightest).clamp_max(1) if brightest > 0 else torch.zeros_like(values)


_PANEL_PIXELS = 192
_LONGEST_NAME = 24


@dataclass(frozen=True)
class Neighbour:
    """A photo of the bank: its place there, and its cosine similarity to the query in [-1, 1]."""

    position: int
    similarity: float


def find_neighbours(
    queries: Features, bank: Features, num_neighbours: int, *, other_parts: bool = True
) -> list[list[Neighbour]]:
    """Finds the nearest photos of every query, never the query's own photo (the same path).

    Args:
        queries: embeddings ``[M, D]`` of unit length.
        bank: embeddings ``[N, D]`` of unit length; may hold the queries.
        num_neighbours: at least 1.
        other_parts: whether photos of the query's own part are passed over; they are alike without any knowledge of
            defects.

    Returns:
        For every query at most ``num_neighbours`` photos, the nearest first; of equally near ones, the bank's first.
    """
    places: dict[str, set[int]] = {}
    for names in (bank.paths, bank.group_ids) if other_parts else (bank.paths,):
        for position, name in enumerate(names):
            places.setdefault(name, set()).add(position)
    nothing: set[int] = set()
    passed_over = [
        places.get(path, nothing) | (places.get(part, nothing) if other_parts else nothing)
        for path, part in zip(queries.paths, queries.group_ids, strict=True)
    ]
    asked = min(len(bank), num_neighbours + max(map(len, passed_over)))
    similarities, positions = nearest_neighbours(queries.embeddings, bank.embeddings, asked)
    found = []
    for row, own in enumerate(passed_over):
        pairs = zip(positions[row].tolist(), similarities[row].tolist(), strict=True)
        found.append([Neighbour(*pair) for pair in pairs if pair[0] not in own][:num_neighbours])
    return found


def draw_neighbours(
    queries: Features,
    bank: Features,
    query_photos: ImageDataset,
    bank_photos: ImageDataset,
    *,
    path: str | Path,
    num_neighbours: int = 6,
    other_parts: bool = True,
) -> None:
    """Draws one row per query: the query, then its nearest photos with class, part and similarity above them.

    A frame is blue where the neighbour has the query's class, orange where it has another, and absent where one of the
    two has no label.

    Args:
        queries: features of ``query_photos``, of unit length.
        bank: features of ``bank_photos``, of unit length.
        query_photos: gives the photos and names the classes.
        bank_photos: the same for the bank; its classes must be those of the queries.
        path: PNG file to write; its folder is created where needed.
        num_neighbours: photos beside each query.
        other_parts: see `find_neighbours`.

    Raises:
        ValueError: when features and photos differ in number, classes differ, there is no query, or
            ``num_neighbours`` is below 1.
    """
    if len(queries) != len(query_photos) or len(bank) != len(bank_photos):
        raise ValueError(
            f"features and photos must belong together: {len(queries)} and {len(query_photos)} queries, "
            f"{len(bank)} and {len(bank_photos)} in the bank"
        )
    if query_photos.classes != bank_photos.classes:
        raise ValueError(f"the classes differ: queries {list(query_photos.classes)}, bank {list(bank_photos.classes)}")
    if len(queries) == 0 or num_neighbours < 1:
        raise ValueError(f"cannot draw {num_neighbours} neighbours of {len(queries)} queries")
    rows: list[Sequence[Panel | None]] = []
    for row, neighbours in enumerate(find_neighbours(queries, bank, num_neighbours, other_parts=other_parts)):
        own = int(queries.labels[row])
        panels: list[Panel | None] = [_panel(query_photos, row, "query", _describe(queries, query_photos, row), None)]
        for neighbour in neighbours:
            label = int(bank.labels[neighbour.position])
            frame = None if min(own, label) < 0 else RIGHT if own == label else WRONG
            title = _describe(bank, bank_photos, neighbour.position)
            panels.append(_panel(bank_photos, neighbour.position, f"{neighbour.similarity:.3f}", title, frame))
        rows.append([*panels, *[None] * (1 + num_neighbours - len(panels))])
    heading = "photos nearest to each query" + (", of other parts" if other_parts else "")
    heading = f"{heading} (blue frame: same class, orange: another; number: cosine similarity)"
    save_png(draw_panels(rows, heading=heading), path)


def _panel(photos: ImageDataset, position: int, first_line: str, title: str, frame: str | None) -> Panel:
    picture = resize_photos([photos.get_image(position)], _PANEL_PIXELS)[0]
    return Panel(picture=picture, title=f"{first_line}\n{title}", frame=frame)


def _describe(features: Features, photos: ImageDataset, position: int) -> str:
    """Class and part of a photo; its file's name where it is a part of its own."""
    label, part = int(features.labels[position]), features.group_ids[position]
    name = Path(part).name if part == features.paths[position] else f"part {part}"
    if label < 0:
        kind = "no label"
    else:
        kind = photos.classes[label] if photos.classes else f"class {label}"
    return f"{_shorten(kind)}\n{_shorten(name)}"


def _shorten(name: str) -> str:
    """The name, or its end where it is long: ends of file names differ, beginnings often do not."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Projects rows on their first principal components.

    A component points where its largest loading is positive, so that the same rows always give the same values.

    Args:
        rows: ``[N, D]``, finite.
        count: how many components, at most D.

    Returns:
        The projections ``[N, count]``, and the variances along all components ``[D]`` from large to small, up to a
        common factor; both float64 on the CPU.
    """
    rows = rows.detach().cpu().double()
    rows = rows - rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(rows.T @ rows)  # ascending
    variances, directions = variances.clamp_min(0).flip(0), directions.flip(1)[:, :count]  # [D], [D, count]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))  # [1, count]
    return rows @ (directions * largest.sign()), variances


_FEATURE_PICTURES_ROBUST = 0.01  # share of tokens that may saturate at either end of a colour channel
_SMALLEST_SPAN = 1e-3  # a component narrower than this share of the first one carries no colour


def draw_patch_pca(
    model: nn.Module | Mapping[str, nn.Module],
    images: Sequence[Image.Image],
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
    save_png(draw_panels(rows, row_titles=titles, aspect=photos[0].height / photos[0].width), path)


def sample_photos(dataset: ImageDataset, num_images: int) -> tuple[list[Image.Image], list[str]]:
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
    low, high = (_quantile(components, share) for share in (_FEATURE_PICTURES_ROBUST, 1 - _FEATURE_PICTURES_ROBUST))
    span = high - low
    drawn = span > _SMALLEST_SPAN * span.max()
    scaled = ((components - low) / span.where(drawn, torch.ones_like(span))).clamp(0, 1)
    colours = scaled.where(drawn, torch.full_like(scaled, 0.5)).float().reshape(*tokens.shape[:3], 3)
    total = float(variances.sum())
    return colours, float(variances[:3].sum()) / total if total > 0 else 0.0


def _quantile(rows: Tensor, share: float) -> Tensor:
    """Nearest-rank quantile of every column; ``torch.quantile`` refuses more than 16 million values."""
    return rows.sort(dim=0).values[round(share * (len(rows) - 1))]


def _patch_tokens(model: nn.Module, photos: Sequence[Image.Image]) -> Tensor:
    """Normalised patch features ``[B, h, w, D]`` float32 on the CPU, rows and columns of patches as in the photo."""
    grid = patch_grid(model, photos[0])
    with evaluating(model):
        tokens = [
            model(batch, is_training=True)["x_norm_patchtokens"].float().cpu() for batch in photo_batches(model, photos)
        ]
    return torch.cat(tokens).reshape(len(photos), *grid, -1)


MAP_METHODS = ("pca", "tsne")
MAP_LEVELS = ("photo", "part")

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f4f24", "#6a4c93")
_MARKERS = "os^DvP*X"
_NO_LABEL = "#9aa0a6"
_MOST_NAMED = 16  # classes in the legend
_PERPLEXITY = 30.0
_FEWEST_FOR_TSNE = 4
_PANEL_INCHES = 6.0

Points = npt.NDArray[np.float64]  # [N, 2]
Labels = npt.NDArray[np.int64]  # [N], -1 where there is none


def map_points(embeddings: torch.Tensor, method: str = "pca", *, seed: int = 0) -> tuple[Points, float | None]:
    """Places features in the plane; the same features give the same places.

    Args:
        embeddings: ``[N, D]``, finite.
        method: ``pca`` keeps distances as far as two directions can; ``tsne`` keeps neighbourhoods, and its distances
            and sizes of groups mean nothing.
        seed: of t-SNE, which starts from the principal components.

    Returns:
        Places ``[N, 2]``, and the share of variance that they hold, in [0, 1]; None for t-SNE.

    Raises:
        ValueError: for no features, an unknown method, features that are not finite, or too few for t-SNE.
    """
    if method not in MAP_METHODS:
        raise ValueError(f"unknown method {method!r}; allowed: {', '.join(MAP_METHODS)}")
    if embeddings.ndim != 2 or 0 in embeddings.shape or not embeddings.isfinite().all():
        raise ValueError(f"features must be finite and of shape [N, D], found {tuple(embeddings.shape)}")
    if method == "tsne":
        return _tsne(embeddings, seed), None
    points, variances = principal_components(embeddings, min(2, embeddings.shape[1]))
    points = torch.nn.functional.pad(points, (0, 2 - points.shape[1]))
    total = float(variances.sum())
    return points.numpy(), float(variances[:2].sum()) / total if total > 0 else 0.0


def mean_features_of_parts(features: Features) -> Features:
    """One row per part, sorted by its id: the mean of its photos.

    A part's label is the largest among its photos: with two classes, it is defective where any photo is.
    """
    names, codes = np.unique(np.array(features.group_ids), return_inverse=True)
    index = torch.from_numpy(codes)
    sums = torch.zeros(len(names), features.embeddings.shape[1]).index_add_(0, index, features.embeddings)
    labels = torch.full((len(names),), -1).scatter_reduce_(0, index, features.labels, "amax")
    parts = [str(name) for name in names]
    return Features(sums / index.bincount()[:, None], labels, parts, parts)


def draw_part_map(
    features: Features | Mapping[str, Features],
    classes: Sequence[str],
    *,
    path: str | Path,
    method: str = "pca",
    level: str = "photo",
    seed: int = 0,
) -> None:
    """Draws one map per backbone side by side; colours and shapes of points are the classes.

    Args:
        features: of one backbone, or of several by name.
        classes: names by label; may be empty.
        path: PNG file to write; its folder is created where needed.
        method: see `map_points`.
        level: ``photo`` draws a point per photo and lines from the photos of a part to their middle, ``part`` a point
            per part (see `mean_features_of_parts`).
        seed: see `map_points`.

    Raises:
        ValueError: for an unknown level or as in `map_points`.
    """
    if level not in MAP_LEVELS:
        raise ValueError(f"unknown level {level!r}; allowed: {', '.join(MAP_LEVELS)}")
    named = {"": features} if isinstance(features, Features) else dict(features)
    figure = Figure(figsize=(_PANEL_INCHES * len(named), _PANEL_INCHES + 0.9), dpi=120, layout="constrained")
    for number, (name, drawn) in enumerate(named.items()):
        rows = mean_features_of_parts(drawn) if level == "part" else drawn
        points, explained = map_points(rows.embeddings, method, seed=seed)
        axes = figure.add_subplot(1, len(named), number + 1)
        if level == "photo":
            axes.add_collection(LineCollection(_spokes(points, rows.group_ids), colors="#8884", linewidths=0.7))
        _scatter(axes, points, rows.labels.numpy(), classes)
        how = "t-SNE" if explained is None else f"PCA, {100 * explained:.0f} % of variance"
        axes.set_title(f"{name}\n{how}".strip(), fontsize=11, parse_math=False)
        if explained is not None:  # distances on a t-SNE map mean nothing
            axes.set_aspect("equal", adjustable="datalim")
    things = f"{len(rows)} {'parts' if level == 'part' else 'photos, lines join those of a part'}"
    figure.suptitle(f"map of features: {things}", fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        legend = figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    save_png(figure, path)


def _tsne(embeddings: torch.Tensor, seed: int) -> Points:
    if len(embeddings) < _FEWEST_FOR_TSNE:
        raise ValueError(f"t-SNE needs {_FEWEST_FOR_TSNE} or more points, found {len(embeddings)}")
    from sklearn.manifold import TSNE  # slow to import, and seldom needed

    # A perplexity above a third of the points would ask for more neighbours than there are.
    perplexity = min(_PERPLEXITY, (len(embeddings) - 1) / 3)
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
    return np.asarray(tsne.fit_transform(embeddings.cpu().double().numpy()), dtype=np.float64)


def _spokes(points: Points, group_ids: Sequence[str]) -> list[Points]:
    """Lines ``[2, 2]`` from every photo to the middle of its part, for parts with several photos."""
    _, codes, counts = np.unique(np.array(group_ids), return_inverse=True, return_counts=True)
    middles = np.stack([np.bincount(codes, weights=points[:, axis]) / counts for axis in (0, 1)], axis=1)
    return [np.stack([point, middles[code]]) for point, code in zip(points, codes, strict=True) if counts[code] > 1]


def _scatter(axes: Axes, points: Points, labels: Labels, classes: Sequence[str]) -> None:
    counts = {int(label): int(count) for label, count in zip(*np.unique(labels, return_counts=True), strict=True)}
    for label, count in counts.items():
        rows = points[labels == label]
        if label < 0:
            colour, marker, name = _NO_LABEL, ".", "no label"
        else:
            colour = _COLOURS[label % len(_COLOURS)]
            marker = _MARKERS[(label + label // len(_COLOURS)) % len(_MARKERS)]
            name = classes[label] if classes else f"class {label}"
        # A legend leaves out what begins with an underscore.
        text = f"{' ' if name.startswith('_') else ''}{name} ({count})" if len(counts) <= _MOST_NAMED else None
        axes.scatter(rows[:, 0], rows[:, 1], s=22, c=colour, marker=marker, linewidths=0, alpha=0.8, label=text)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("#c8ccd0")
    if len(counts) > _MOST_NAMED:
        axes.set_xlabel(f"{len(counts)} classes; colours repeat", fontsize=9)


FILES = {
    "pca": "patch_pca.png",
    "attention": "cls_attention.png",
    "neighbours": "neighbours.png",
    "map": "part_map.png",
}


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Options of the command; ``features`` and ``whole_image`` follow the config's section ``evaluation``."""

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config_file: str | None = option(None, help="YAML file that describes the backbone", aliases=("--config",))
    pretrained_weights: str = option(
        "", help="weights: file, address or released name (dinov2_vits14_reg); none: random"
    )
    dataset: str = option(help="photos, as a dataset string")
    kinds: tuple[str, ...] = option((), help="pictures to draw (usually all)", choices=tuple(FILES))
    num_images: int = option(8, help="photos to draw, taken evenly from every class; queries of the neighbours")
    image_size: int | None = option(None, help="square in pixels (usually the size of the global crops)")
    compare_random: bool = option(True, help="also draw the same backbone with random weights (PCA and map)")
    bank_dataset: str = option("", help="photos among which neighbours are sought; by default those of --dataset")
    num_neighbours: int = option(6, help="neighbours beside each query")
    other_parts: bool = option(True, help="seek neighbours among photos of other parts only")
    map_method: str = option("pca", help="how features become places on the map", choices=MAP_METHODS)
    map_level: str = option("photo", help="what a point of the map is", choices=MAP_LEVELS)
    most_photos: int = option(3000, help="photos in the map and among the neighbours; of more, evenly chosen parts")
    features: str | None = option(None, help="what describes a photo in the map and to neighbours", choices=FEATURES)
    batch_size: int = option(32, help="photos per forward pass")
    num_workers: int = option(2, help="processes that decode photos")
    seed: int = option(0, help="seed of random weights and of t-SNE")
    output: str = option("features", help="folder for the pictures, or one PNG file: then --kinds names one (or pca)")


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the pictures and names them; returns the exit code."""
    options = parse(
        PictureOptions,
        argv,
        description=(
            "Draws what a backbone sees in photos: principal components of patch features as colours, attention of "
            "the class token, nearest neighbours, and a map of parts."
        ),
        example=(
            "python tools/visualize_features.py --config-file configs/eval/vitl14_pretrain.yaml "
            "--pretrained-weights W.pth --dataset GroupedJSON:split=VAL:root=/data/parts --output features"
        ),
    )
    with logging_to(None):
        for path in draw_pictures(options):
            sys.stdout.write(f"{path}\n")
    return 0


def draw_pictures(options: PictureOptions) -> list[Path]:
    """Draws what the options describe; returns the files.

    Raises:
        ValueError: when one PNG file is to hold several pictures, or as the pictures themselves raise.
    """
    paths = picture_paths(Path(options.output), options.kinds)
    config = load_config(options.config_file, _pairs(options))
    image_size = config.evaluation.image_size or config.crops.global_crops_size
    device = choose_device(config.train.device)
    transform = make_eval_transform(image_size, whole_image=config.evaluation.whole_image)
    dataset = make_dataset(dataset_str=options.dataset, transform=transform)
    models = _models(options, config, device)
    name, model = list(models.items())[-1]
    photos, titles = sample_photos(dataset, options.num_images)
    if "pca" in paths:
        draw_patch_pca(models, photos, image_size=image_size, path=paths["pca"], titles=titles, device=device)
    if "attention" in paths:
        draw_cls_attention(model, photos, image_size=image_size, path=paths["attention"], titles=titles, device=device)
    if "neighbours" in paths or "map" in paths:
        shown = PhotoSelection(dataset, whole_parts(dataset, options.most_photos))
        drawn = models if "map" in paths else {name: model}
        features = {key: _command_describe(entry, shown, options, config) for key, entry in drawn.items()}
        if "map" in paths:
            draw_part_map(
                features,
                dataset.classes,
                path=paths["map"],
                method=options.map_method,
                level=options.map_level,
                seed=options.seed,
            )
        if "neighbours" in paths:
            _draw_neighbours(options, config, dataset, shown, model, features[name], paths["neighbours"])
    return list(paths.values())


def picture_paths(output: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """File of every picture that is to be drawn, in the order of `FILES`.

    Args:
        output: a folder; or a PNG file, which takes one picture: by default the principal components.
        kinds: names of pictures; empty for all.

    Raises:
        ValueError: when one PNG file is to hold several pictures.
    """
    if output.suffix.lower() == ".png":
        if len(set(kinds)) > 1:
            raise ValueError(f"{output} can hold one picture, not {' and '.join(kinds)}: give a folder")
        return {kinds[0] if kinds else "pca": output}
    return {kind: output / file for kind, file in FILES.items() if not kinds or kind in kinds}


def _pairs(options: PictureOptions) -> list[str]:
    """The pairs that were given, and the flags that stand for some."""
    flags = {"features": options.features, "image_size": options.image_size}
    given = [f"evaluation.{name}={value}" for name, value in flags.items() if value is not None]
    return [*options.overrides, *given]


def _models(options: PictureOptions, config: Config, device: torch.device) -> dict[str, DinoVisionTransformer]:
    """The backbones to draw by name; the one that matters is the last."""
    models = {}
    if options.compare_random or not options.pretrained_weights:
        models["random"] = build_frozen_backbone(config, "", device, seed=options.seed)
    if options.pretrained_weights:
        models["pretrained"] = build_frozen_backbone(config, options.pretrained_weights, device)
    return models


def _command_describe(
    model: DinoVisionTransformer, dataset: ImageDataset, options: PictureOptions, config: Config
) -> Features:
    """Features of unit length of every photo."""
    return extract_features(
        ModelWithNormalize(ModelWithFeatures(model, config.evaluation.features)),
        dataset,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )


def _draw_neighbours(
    options: PictureOptions,
    config: Config,
    dataset: ImageDataset,
    shown: PhotoSelection,
    model: DinoVisionTransformer,
    features_of_shown: Features,
    path: Path,
) -> None:
    queries = PhotoSelection(dataset, spread_positions(dataset, options.num_images))
    bank, features_of_bank = shown, features_of_shown
    if options.bank_dataset:
        whole_bank = make_dataset(dataset_str=options.bank_dataset, transform=dataset.transform)
        bank = PhotoSelection(whole_bank, whole_parts(whole_bank, options.most_photos))
        features_of_bank = _command_describe(model, bank, options, config)
    draw_neighbours(
        _command_describe(model, queries, options, config),
        features_of_bank,
        queries,
        bank,
        path=path,
        num_neighbours=options.num_neighbours,
        other_parts=options.other_parts,
    )
