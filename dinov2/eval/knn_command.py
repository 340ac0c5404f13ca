"""The command ``knn``: from a config, weights and two labelled datasets to a table and a JSON file."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dinov2.config import Config, as_pair, load_config
from dinov2.config.command_line import option, parse
from dinov2.data.loaders import make_dataset
from dinov2.distributed import get_rank
from dinov2.distributed.session import distributed_session
from dinov2.eval.backbone_setup import build_frozen_backbone
from dinov2.eval.knn import eval_knn
from dinov2.eval.results import KnnResults
from dinov2.eval.transforms import make_eval_transform
from dinov2.logging import logging_to
from dinov2.utils.seeds import seed_everything

logger = logging.getLogger("dinov2")

AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST_WORKERS = 8


@dataclass(frozen=True)
class KnnOptions:
    """Options of the command; those that are not given come from the config's section ``evaluation``."""

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config_file: str | None = option(None, help="YAML file that describes the backbone", aliases=("--config",))
    pretrained_weights: str = option("", help="weights of the backbone; without them it is random")
    output_dir: str = option(".", help="folder for the log and results_eval_knn.json")
    train_dataset: str | None = option(None, help="bank of labelled images, as a dataset string")
    val_dataset: str | None = option(None, help="labelled images to classify, as a dataset string")
    nb_knn: tuple[int, ...] | None = option(None, help="numbers of neighbours (usually 10 20 100 200)")
    temperature: float | None = option(None, help="temperature of the neighbours' votes (usually 0.07)")
    features: str | None = option(None, help="cls (usually), patch_mean, or cls_patch_mean")
    image_size: int | None = option(None, help="square image in pixels (usually the size of the global crops)")
    whole_image: bool | None = option(None, help="squeeze the whole image into the square instead of cropping it")
    batch_size: int | None = option(None, help="images per process and forward pass (usually 64)")
    num_workers: int | None = option(None, help="image-decoding processes per process (usually one per core, up to 8)")
    autocast: str = option("none", help="precision of the forward pass", choices=tuple(AUTOCAST))
    gather_on_cpu: bool = option(False, help="keep the bank in host memory, for one larger than the GPU")
    seed: int = option(0, help="seed of random weights")


FLAG_OF_CONFIG = {
    "train_dataset_path": "train_dataset",
    "val_dataset_path": "val_dataset",
    "nb_knn": "nb_knn",
    "temperature": "temperature",
    "features": "features",
    "image_size": "image_size",
    "whole_image": "whole_image",
    "batch_size": "batch_size",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the words after its name; returns the exit code."""
    options = parse(
        KnnOptions,
        argv,
        description="Scores a frozen backbone by weighted nearest-neighbour classification, per image and per part.",
        example=(
            "python eval/knn.py --config-file configs/eval/vitl14_pretrain.yaml --pretrained-weights W.pth "
            "--train-dataset GroupedJSON:split=TRAIN:root=/data/parts "
            "--val-dataset GroupedJSON:split=VAL:root=/data/parts --output-dir outputs/knn"
        ),
    )
    config = load_config(options.config_file, [*options.overrides, *_pairs(options)])
    with distributed_session(config.train.device) as device, logging_to(Path(options.output_dir), get_rank()):
        run_knn(options, config, device)
    return 0


def run_knn(options: KnnOptions, config: Config, device: torch.device) -> KnnResults:
    """Evaluates what the options and the config describe, inside a session of processes.

    Raises:
        ValueError: when a dataset is not named, the image size does not fit the patches, or as in `eval_knn`.
    """
    settings = config.evaluation
    if not settings.train_dataset_path or not settings.val_dataset_path:
        raise ValueError("k-NN needs --train-dataset and --val-dataset")
    image_size = settings.image_size or config.crops.global_crops_size
    _check_image_size(as_pair(image_size), as_pair(config.student.patch_size))
    seed_everything(options.seed)
    transform = make_eval_transform(image_size, whole_image=settings.whole_image)
    train_dataset, val_dataset = (
        make_dataset(dataset_str=name, transform=transform)
        for name in (settings.train_dataset_path, settings.val_dataset_path)
    )
    return eval_knn(
        build_frozen_backbone(config, options.pretrained_weights, device, seed=options.seed),
        train_dataset,
        val_dataset,
        nb_knn=settings.nb_knn,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        num_workers=_num_workers(options),
        device=device,
        autocast_dtype=AUTOCAST[options.autocast],
        gather_on_cpu=options.gather_on_cpu,
        features=settings.features,
        output_dir=options.output_dir,
        weights=options.pretrained_weights,
    )


def _pairs(options: KnnOptions) -> list[str]:
    """The flags that were given, as pairs for the config, whose checks then hold for them too."""
    pairs = []
    for name, flag in FLAG_OF_CONFIG.items():
        value = getattr(options, flag)
        if value is not None:
            pairs.append(f"evaluation.{name}={list(value) if isinstance(value, tuple) else value}")
    return pairs


def _check_image_size(size: tuple[int, int], patch: tuple[int, int]) -> None:
    if size[0] % patch[0] or size[1] % patch[1]:
        raise ValueError(
            f"images of {size[0]}x{size[1]} pixels cannot be cut into patches of {patch[0]}x{patch[1]} (height x width)"
        )


def _num_workers(options: KnnOptions) -> int:
    return min(os.cpu_count() or 1, MOST_WORKERS) if options.num_workers is None else options.num_workers
