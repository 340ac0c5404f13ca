"""Door: draws what the patch features of a backbone see in photos of a dataset."""

from dataclasses import dataclass

from torch import nn

from dinov2.config import load_config
from dinov2.config.command_line import option, parse
from dinov2.data.loaders import make_dataset
from dinov2.distributed import choose_device
from dinov2.eval.backbone_setup import build_frozen_backbone
from dinov2.eval.feature_pictures import draw_patch_pca, sample_photos
from dinov2.utils.errors import exit_with


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """Options of the command."""

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config_file: str | None = option(None, help="YAML file that describes the backbone", aliases=("--config",))
    pretrained_weights: str = option("", help="weights of the backbone; without them it is random")
    dataset: str = option(help="photos, as a dataset string")
    num_images: int = option(8, help="photos to draw, taken evenly from every class")
    image_size: int | None = option(None, help="square in pixels (usually the size of the global crops)")
    compare_random: bool = option(True, help="also draw the same backbone with random weights")
    output: str = option("features.png", help="PNG file to write")


def main() -> int:
    """Draws the picture and names it."""
    options = parse(
        PictureOptions,
        description="Draws the first three principal components of patch features as colours beside the photos.",
        example=(
            "python tools/visualize_features.py --config-file configs/eval/vitl14_pretrain.yaml "
            "--pretrained-weights W.pth --dataset GroupedJSON:split=VAL:root=/data/parts --output features.png"
        ),
    )
    draw(options)
    print(options.output)
    return 0


def draw(options: PictureOptions) -> None:
    """Draws what the options describe."""
    config = load_config(options.config_file, options.overrides)
    device = choose_device(config.train.device)
    photos, titles = sample_photos(make_dataset(dataset_str=options.dataset), options.num_images)
    models: dict[str, nn.Module] = {}
    if options.compare_random or not options.pretrained_weights:
        models["random"] = build_frozen_backbone(config, "", device)
    if options.pretrained_weights:
        models["pretrained"] = build_frozen_backbone(config, options.pretrained_weights, device)
    image_size = options.image_size or config.crops.global_crops_size
    draw_patch_pca(models, photos, image_size=image_size, path=options.output, titles=titles, device=device)


if __name__ == "__main__":
    exit_with(main)
