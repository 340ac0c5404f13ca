"""Pictures of what a backbone makes of images: patch features, attention, nearest neighbours, and a map of features."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from dinov2.config.command_line import option, parse, run_as
from dinov2.data.datasets.base import ImageDataset, ImageSelection, spread_positions, whole_parts
from dinov2.data.loaders import make_dataset
from dinov2.data.preprocessing import Chain
from dinov2.data.transforms import IMAGENET_MEAN, as_rgb
from dinov2.distributed import choose_device
from dinov2.eval.command import build_frozen_backbone, flag_pairs, load_backbone_config, trained_on
from dinov2.eval.feature_map import MAP_LEVELS, MAP_METHODS, class_name, draw_part_map, principal_components
from dinov2.eval.features import (
    FEATURES,
    Features,
    ModelWithFeatures,
    ModelWithNormalize,
    evaluating,
    extract_features,
    make_eval_transform,
)
from dinov2.eval.neighbours import nearest_neighbours
from dinov2.layers.attention import Attention
from dinov2.layers.patch_embed import PatchEmbed
from dinov2.logging import logging_to
from dinov2.logging.plots import RIGHT, WRONG, Panel, draw_panels, save_png
from dinov2.models.vision_transformer import DinoVisionTransformer

logger = logging.getLogger("dinov2")

BATCH_SIZE = 8


def sample_images(dataset: ImageDataset, num_images: int) -> tuple[list[Image.Image], list[str]]:
    """At most ``num_images`` images (see `spread_positions`), and a title for each: its class and its file's name."""
    titles = []
    chosen = spread_positions(dataset, num_images)
    for index in chosen:
        name, target = dataset.get_image_path(index).name, dataset.get_target(index)
        titles.append(name if target is None or not dataset.classes else f"{dataset.classes[target]}\n{name}")
    return [dataset.get_image(index) for index in chosen], titles


# From images to features of their patches.


def stretch(image: Image.Image, image_size: int | tuple[int, int], model: nn.Module | None = None) -> Image.Image:
    """An image of any size and mode in one size: height and width, or one number for both.

    It is RGB, but for a ``model`` of other channels, which sees the image's own.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    embeddings = [part for part in ([] if model is None else model.modules()) if isinstance(part, PatchEmbed)]
    is_rgb = all(part.proj.in_channels == len(IMAGENET_MEAN) for part in embeddings)
    return (as_rgb(image) if is_rgb else image).resize((width, height), Image.Resampling.BICUBIC)


def patch_grid(model: nn.Module, image: Image.Image) -> tuple[int, int]:
    """Rows and columns of patches ``(h, w)`` that an image has for a model with ``patch_size``.

    Raises:
        ValueError: when the image does not divide into patches.
    """
    assert isinstance(model.patch_size, tuple)
    patch_height, patch_width = model.patch_size
    if image.height % patch_height or image.width % patch_width:
        raise ValueError(
            f"image_size {image.height}x{image.width} must be a multiple of the patch size "
            f"{patch_height}x{patch_width} (height x width)"
        )
    return image.height // patch_height, image.width // patch_width


def image_batches(model: nn.Module, images: Sequence[Image.Image]) -> Iterator[Tensor]:
    """Yields images of one size as normalised batches ``[b, C, H, W]`` of the model's dtype, where the model lies."""
    preprocess = make_eval_transform((images[0].height, images[0].width), whole_image=True)
    parameter = next(model.parameters())
    for start in range(0, len(images), BATCH_SIZE):
        batch = torch.stack([preprocess(image) for image in images[start : start + BATCH_SIZE]])
        yield batch.to(parameter.device, parameter.dtype)


# Principal components of patch features as colours.

_OVERLAY_PIXELS, _OVERLAY_SHARE = 448, 0.6
_WIDE_PANEL = 4.0  # inches: three of them stand side by side on a screen


def draw_patch_pca(
    models: Mapping[str, nn.Module],
    images: Sequence[Image.Image],
    *,
    image_size: int | tuple[int, int],
    titles: Sequence[str] | None = None,
) -> Figure:
    """Draws one row per image: the image, then the colours of its patch features over it, one column per model.

    The components are fitted over all images of a model together, so equal colours in a column mean alike features.
    Colours of different columns cannot be compared.

    Args:
        models: backbones by name, with ``patch_size`` ``(h, w)``, whose ``model(x, is_training=True)`` holds
            ``x_norm_patchtokens`` ``[B, N, D]``.
        images: at least one, of any size and mode; each is stretched to ``image_size`` as a whole.
        image_size: height and width in pixels, or one number for both; multiples of every model's patch size.
        titles: text beside each image.

    Raises:
        ValueError: when a size does not fit the patches, or features are not finite.

    Reference:
        DINOv2 (Oquab et al. 2023), section 7.6, without its removal of the background.
    """
    stretched = [stretch(image, image_size) for image in images]
    rows = [[Panel(picture=image, title="" if number else "image")] for number, image in enumerate(stretched)]
    for name, model in models.items():
        grid = patch_grid(model, stretched[0])
        seen = [stretch(image, image_size, model) for image in images]
        with evaluating(model):
            tokens = [model(b, is_training=True)["x_norm_patchtokens"].cpu() for b in image_batches(model, seen)]
        colours, explained = patch_pca_colours(torch.cat(tokens).float().unflatten(1, grid))
        header = f"{name}\n{100 * explained:.0f} % of variance"
        for number, picture in enumerate(colours):
            drawn = lay_over(stretched[number], picture.numpy())
            rows[number].append(Panel(picture=drawn, title="" if number else header))
    return draw_panels(rows, row_titles=titles, aspect=stretched[0].height / stretched[0].width, widest=_WIDE_PANEL)


def lay_over(image: Image.Image, colours: npt.NDArray[np.floating]) -> Image.Image:
    """An image, in grey and faint, below the colours ``[h, w, 3]`` in [0, 1] of its patches, at its own size or larger.

    Small images are enlarged, so that drawn at their own size they can be read.
    """
    factor = max(1, round(_OVERLAY_PIXELS / max(image.size)))
    size = image.width * factor, image.height * factor
    patches = Image.fromarray((255 * np.asarray(colours, dtype=np.float64)).round().astype(np.uint8))
    grey = as_rgb(image).convert("L").convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return Image.blend(grey, patches.resize(size, Image.Resampling.NEAREST), _OVERLAY_SHARE)


def patch_pca_colours(tokens: Tensor) -> tuple[Tensor, float]:
    """Turns patch features into colours by their first three principal components over all images.

    Each component is stretched to [0, 1] between its 1st and 99th percentile. The same features always give the same
    colours.

    Args:
        tokens: ``[B, h, w, D]``.

    Returns:
        Colours ``[B, h, w, 3]`` float32 in [0, 1] on the CPU, and the share of variance that the three hold, in [0, 1].

    Raises:
        ValueError: when features are not finite.
    """
    if not tokens.isfinite().all():
        raise ValueError("patch features are NaN or infinite")
    components, explained = principal_components(tokens.flatten(0, 2), 3)  # [B·h·w, 3]
    # Nearest-rank quantiles; `torch.quantile` refuses more than 16 million values.
    ordered, last = components.sort(dim=0).values, len(components) - 1
    low, high = ordered[round(0.01 * last)], ordered[round(0.99 * last)]
    span = high - low
    drawn = span > 1e-3 * span.max()  # a component narrower than this carries no colour
    scaled = ((components - low) / span.where(drawn, torch.ones_like(span))).clamp(0, 1)
    return scaled.where(drawn, torch.full_like(scaled, 0.5)).float().reshape(*tokens.shape[:3], 3), explained


# Attention of the class token.

_MAX_HEADS = 4


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

    def keep(attention: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(attention, Attention)
        query, key, _ = attention.qkv(arguments[0]).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
        scores = torch.einsum("bhd,bthd->bht", query[:, 0].float(), key.float())
        found.append(torch.softmax(scores * query.shape[-1] ** -0.5, dim=-1).cpu())

    last = model.blocks[-1]
    assert isinstance(last.attn, Attention)
    handle = last.attn.register_forward_pre_hook(keep)
    try:
        with evaluating(model):
            model(images)
    finally:
        handle.remove()
    (probabilities,) = found
    return probabilities


def draw_cls_attention(
    model: DinoVisionTransformer,
    images: Sequence[Image.Image],
    *,
    image_size: int | tuple[int, int],
    titles: Sequence[str] | None = None,
) -> Figure:
    """Draws one row per image: the image, and over it the attention of the class token, of heads together and alone.

    Of more than four heads the four that send the largest share to patches are drawn. Each map is drawn from dark (0)
    to bright (its own 99th percentile: single patches may stand out far above the rest). The share above a head is how
    much of its attention, averaged over the images, goes to patches at all; the rest goes to the class token and the
    registers.

    Args:
        model: a vision transformer.
        images: see `draw_patch_pca`, as what follows.
        image_size: height and width in pixels.
        titles: text beside each image.

    Raises:
        ValueError: when the size does not fit the patches.

    Reference:
        DINO (Caron et al. 2021), figure 1.
    """
    stretched = [stretch(image, image_size) for image in images]
    grid = patch_grid(model, stretched[0])
    seen = [stretch(image, image_size, model) for image in images]
    attention = torch.cat([cls_attention(model, batch) for batch in image_batches(model, seen)])
    maps = attention[:, :, 1 + model.num_register_tokens :]  # [B, heads, N]
    maps = torch.cat([maps.mean(dim=1, keepdim=True), maps], dim=1)  # [B, 1 + heads, N]
    brightest = maps.quantile(0.99, dim=2, keepdim=True)
    bright = torch.where(brightest > 0, maps / brightest, 0.0).clamp_max(1).unflatten(2, grid).numpy()
    shares = 100 * maps.sum(dim=2).mean(dim=0)  # [1 + heads]
    heads = shares[1:].argsort(descending=True, stable=True)[:_MAX_HEADS].sort().values.tolist()
    names = {0: "mean of heads", **{1 + head: f"head {1 + head}" for head in heads}}
    headers = ["image", *(f"{name}\n{shares[place]:.0f} % on patches" for place, name in names.items())]
    rows = [
        [Panel(picture=image), *(Panel(picture=lay_over(image, _heat(row[place]))) for place in names)]
        for image, row in zip(stretched, bright, strict=True)
    ]
    rows[0] = [Panel(picture=panel.picture, title=title) for panel, title in zip(rows[0], headers, strict=True)]
    return draw_panels(rows, row_titles=titles, aspect=stretched[0].height / stretched[0].width, widest=_WIDE_PANEL)


def _heat(values: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Colours ``[h, w, 3]`` of values ``[h, w]`` from 0 (dark) to 1 (bright)."""
    return np.asarray(colormaps["inferno"](values)[..., :3])


# Nearest neighbours.

_PANEL_PIXELS = 192
_MAX_NAME_LENGTH = 24


def find_neighbours(
    queries: Features, bank: Features, num_neighbours: int, *, other_parts: bool = True
) -> list[list[tuple[int, float]]]:
    """Finds the nearest images of every query, never the query's own image (the same path).

    Args:
        queries: embeddings ``[M, D]`` of unit length.
        bank: embeddings ``[N, D]`` of unit length; may hold the queries.
        num_neighbours: at least 1.
        other_parts: whether images of the query's own part are passed over; they are alike without any knowledge of
            defects.

    Returns:
        For every query the places in the bank and cosine similarities in [-1, 1] of at most ``num_neighbours`` images,
        the nearest first; of equally near ones, the bank's first.
    """
    kinds = [(queries.paths, bank.paths), *([(queries.group_ids, bank.group_ids)] if other_parts else [])]
    passed_over: list[set[int]] = [set() for _ in queries.paths]
    for own_names, names in kinds:
        places: dict[str, set[int]] = {}
        for place, name in enumerate(names):
            places.setdefault(name, set()).add(place)
        for own, name in zip(passed_over, own_names, strict=True):
            own |= places.get(name, set())
    asked = min(len(bank), num_neighbours + max(map(len, passed_over)))
    similarities, found = nearest_neighbours(queries.embeddings, bank.embeddings, asked)
    rows = zip(passed_over, found.tolist(), similarities.tolist(), strict=True)
    return [
        [pair for pair in zip(places, values, strict=True) if pair[0] not in own][:num_neighbours]
        for own, places, values in rows
    ]


def draw_neighbours(
    queries: Features,
    bank: Features,
    query_images: ImageDataset,
    bank_images: ImageDataset,
    *,
    num_neighbours: int = 6,
    other_parts: bool = True,
) -> Figure:
    """Draws one row per query: the query, then its nearest images with similarity, class and part above them.

    A frame is blue where the neighbour has the query's class, orange where it has another, and absent where one of the
    two has no label.

    Args:
        queries: features of ``query_images``, of unit length.
        bank: features of ``bank_images``, of unit length.
        query_images: gives the images and names the classes.
        bank_images: the same for the bank; its classes must be those of the queries.
        num_neighbours: images beside each query.
        other_parts: see `find_neighbours`.

    Raises:
        ValueError: when classes differ, or ``num_neighbours`` is below 1.
    """
    classes = query_images.classes
    if classes != bank_images.classes:
        raise ValueError(f"the classes differ: queries {list(classes)}, bank {list(bank_images.classes)}")
    if num_neighbours < 1:
        raise ValueError(f"cannot draw {num_neighbours} neighbours of {len(queries)} queries")

    def panel(features: Features, images: ImageDataset, place: int, first_line: str, frame: str | None = None) -> Panel:
        """With class and part in the title; with the file's name where the image is a part of its own."""
        label, part = int(features.labels[place]), features.group_ids[place]
        name = Path(part).name if part == features.paths[place] else f"part {part}"
        # Ends of names differ, beginnings often do not.
        lines = [
            line if len(line) <= _MAX_NAME_LENGTH else "…" + line[1 - _MAX_NAME_LENGTH :]
            for line in (class_name(classes, label), name)
        ]
        picture = stretch(images.get_image(place), _PANEL_PIXELS)
        return Panel(picture=picture, title="\n".join([first_line, *lines]), frame=frame)

    rows: list[list[Panel | None]] = []
    for row, neighbours in enumerate(find_neighbours(queries, bank, num_neighbours, other_parts=other_parts)):
        own = int(queries.labels[row])
        panels: list[Panel | None] = [panel(queries, query_images, row, "query")]
        for place, similarity in neighbours:
            label = int(bank.labels[place])
            frame = None if min(own, label) < 0 else RIGHT if own == label else WRONG
            panels.append(panel(bank, bank_images, place, f"{similarity:.3f}", frame))
        rows.append([*panels, *[None] * (1 + num_neighbours - len(panels))])
    heading = "images nearest to each query" + (", of other parts" if other_parts else "")
    heading = f"{heading} (blue frame: same class, orange: another; number: cosine similarity)"
    return draw_panels(rows, heading=heading)


# The command.

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
    config_file: str | None = option(
        None, help="YAML file that describes the backbone; none: told from the weights", aliases=("--config",)
    )
    pretrained_weights: str = option("", help="weights of the backbone; without them it is random")
    dataset: str = option(help="images, as a dataset string")
    preprocessing: Path | None = option(
        None, help="YAML file with steps for all images (usually those that the backbone was trained with)"
    )
    kinds: tuple[str, ...] = option((), help="pictures to draw (usually all)", choices=tuple(FILES))
    num_images: int = option(8, help="images to draw, taken evenly from every class; queries of the neighbours")
    image_size: int | None = option(None, help="square in pixels (usually the size of the global crops)")
    compare_random: bool = option(True, help="also draw the same backbone with random weights (PCA and map)")
    bank_dataset: str = option("", help="images among which neighbours are sought; by default those of --dataset")
    num_neighbours: int = option(6, help="neighbours beside each query")
    other_parts: bool = option(True, help="seek neighbours among images of other parts only")
    map_method: str = option("pca", help="how features become places on the map", choices=MAP_METHODS)
    map_level: str = option("photo", help="what a point of the map is", choices=MAP_LEVELS)
    max_images: int = option(
        300,
        help="images in the map and among the neighbours; of more, evenly chosen parts",
        aliases=("--most-photos",),
    )
    features: str | None = option(
        None, help="what describes an image in the map and to neighbours", choices=tuple(FEATURES)
    )
    batch_size: int = option(32, help="images per forward pass")
    num_workers: int = option(2, help="processes that decode images")
    seed: int = option(0, help="seed of random weights and of t-SNE")
    output: str = option("features", help="folder for the pictures, or one PNG file: then --kinds names one (or pca)")


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the pictures and names them; returns the exit code."""
    options = parse(
        PictureOptions,
        argv,
        description=(
            "Draws what a backbone makes of images: principal components of patch features as colours, attention of "
            "the class token, nearest neighbours, and a map of parts."
        ),
        example=(
            "python tools/visualize_features.py --config-file configs/eval/vitl14_pretrain.yaml "
            "--pretrained-weights W.pth --dataset GroupedJSON:split=VAL:root=/data/parts --output features"
        ),
    )
    with logging_to(None):
        for path in _draw_pictures(options):
            sys.stdout.write(f"{path}\n")
    return 0


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


def _draw_pictures(options: PictureOptions) -> list[Path]:
    """Draws what the options describe; returns the files."""
    paths = picture_paths(Path(options.output), options.kinds)
    pairs = flag_pairs(options, {"features": "features", "image_size": "image_size"})
    pairs = [*options.overrides, *pairs]
    config = load_backbone_config(options.config_file, options.pretrained_weights, pairs)
    image_size = config.evaluation.image_size or config.crops.global_crops_size
    transform = make_eval_transform(image_size, whole_image=config.evaluation.whole_image)
    trained = trained_on(options.pretrained_weights, config)
    named_chain = None if options.preprocessing is None else Chain.read(options.preprocessing)
    dataset = make_dataset(
        dataset_str=options.dataset,
        transform=transform,
        value_range=trained.value_range,
        preprocessing=trained.choose_preprocessing(
            named_chain, f"--preprocessing {options.preprocessing}", config.student.in_channels
        ),
    )
    trained.warn_of_light(options.dataset, dataset)
    device = choose_device(config.train.device)
    models = {}
    if options.compare_random or not options.pretrained_weights:
        models["random"] = build_frozen_backbone(config, "", device, seed=options.seed)
    if options.pretrained_weights:
        models["pretrained"] = build_frozen_backbone(config, options.pretrained_weights, device)
    last, model = list(models.items())[-1]  # the one that matters

    def describe(backbone: DinoVisionTransformer, images: ImageDataset) -> Features:
        normalized = ModelWithNormalize(ModelWithFeatures(backbone, config.evaluation.features))
        return extract_features(normalized, images, batch_size=options.batch_size, num_workers=options.num_workers)

    def some_parts(images: ImageDataset) -> ImageSelection:
        chosen = ImageSelection(images, whole_parts(images, options.max_images))
        if len(chosen) < len(images):
            message = (
                "the map and the neighbours are of %d of %d images, of evenly chosen parts; --max-images allows more"
            )
            logger.info(message, len(chosen), len(images))
        return chosen

    if "pca" in paths or "attention" in paths:
        images, titles = sample_images(dataset, options.num_images)
        if "pca" in paths:
            save_png(draw_patch_pca(models, images, image_size=image_size, titles=titles), paths["pca"])
        if "attention" in paths:
            save_png(draw_cls_attention(model, images, image_size=image_size, titles=titles), paths["attention"])
    if "neighbours" in paths or "map" in paths:
        bank = some_parts(dataset)
        drawn = models if "map" in paths else {last: model}
        features = {name: describe(backbone, bank) for name, backbone in drawn.items()}
        if "map" in paths:
            figure = draw_part_map(
                features,
                dataset.classes,
                method=options.map_method,
                level=options.map_level,
                seed=options.seed,
            )
            save_png(figure, paths["map"])
        if "neighbours" in paths:
            features_of_bank = features[last]
            if options.bank_dataset:
                other = make_dataset(
                    dataset_str=options.bank_dataset,
                    transform=transform,
                    value_range=dataset.value_range,
                    preprocessing=dataset.preprocessing,
                )
                bank = some_parts(other)
                features_of_bank = describe(model, bank)
            queries = ImageSelection(dataset, spread_positions(dataset, options.num_images))
            figure = draw_neighbours(
                describe(model, queries),
                features_of_bank,
                queries,
                bank,
                num_neighbours=options.num_neighbours,
                other_parts=options.other_parts,
            )
            save_png(figure, paths["neighbours"])
    return list(paths.values())


if __name__ == "__main__":
    run_as("visualize_features")
