"""The command that draws what a backbone sees in photos: from a config, weights and a dataset to PNG files."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2.config import Config, load_config
from dinov2.config.command_line import option, parse
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.distributed import choose_device
from dinov2.eval.backbone_setup import build_frozen_backbone
from dinov2.eval.features import Features, extract_features
from dinov2.eval.frozen import FEATURES, ModelWithFeatures, ModelWithNormalize
from dinov2.eval.pictures.attention_maps import draw_cls_attention
from dinov2.eval.pictures.feature_pictures import draw_patch_pca, sample_photos
from dinov2.eval.pictures.neighbour_pictures import draw_neighbours
from dinov2.eval.pictures.part_map import MAP_LEVELS, MAP_METHODS, draw_part_map
from dinov2.eval.pictures.photo_selection import PhotoSelection, spread_positions, whole_parts
from dinov2.eval.transforms import make_eval_transform
from dinov2.logging import logging_to
from dinov2.models.vision_transformer import DinoVisionTransformer

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
    pretrained_weights: str = option("", help="weights of the backbone; without them it is random")
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
        features = {key: _describe(entry, shown, options, config) for key, entry in drawn.items()}
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


def _describe(model: DinoVisionTransformer, dataset: ImageDataset, options: PictureOptions, config: Config) -> Features:
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
        features_of_bank = _describe(model, bank, options, config)
    draw_neighbours(
        _describe(model, queries, options, config),
        features_of_bank,
        queries,
        bank,
        path=path,
        num_neighbours=options.num_neighbours,
        other_parts=options.other_parts,
    )
