"""What the commands of all evaluators share: options, set-up, and what their scores come from."""

import hashlib
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinov2.config import Config, as_pair, load_config
from dinov2.config.command_line import option
from dinov2.data.datasets.base import MISSING_TARGET, ImageDataset
from dinov2.data.datasets.registry import named_light, named_value_range, with_value_range
from dinov2.data.loaders import make_dataset
from dinov2.data.preprocessing import Chain
from dinov2.data.shared_images import warn_of_shared_images
from dinov2.data.value_range import ValueRange
from dinov2.distributed import all_gather_objects, get_rank, is_main_process
from dinov2.distributed.session import distributed_session
from dinov2.eval.features import TRAIN, VAL, make_eval_transform
from dinov2.eval.metrics.classification import AGGREGATIONS, check_aggregation
from dinov2.logging import logging_to
from dinov2.models.build import build_backbone
from dinov2.models.description import config_of_weights
from dinov2.models.pretrained import load_pretrained_backbone
from dinov2.models.released import fetch_weights
from dinov2.models.vision_transformer import DinoVisionTransformer
from dinov2.utils.files import HeldFolder, file_digest, remove_unfinished
from dinov2.utils.seeds import seed_everything

logger = logging.getLogger("dinov2")


def load_backbone_config(config_file: str | None, weights: str, pairs: Sequence[str]) -> Config:
    """The options of a file, or where none is named, those that describe the weights; see `config_of_weights`.

    Raises:
        ConnectionError, FileNotFoundError, ValueError: the file or the weights are missing or wrong.
    """
    told = config_of_weights(weights) if weights and config_file is None else None
    return load_config(told or config_file, pairs)


def build_frozen_backbone(
    config: Config, weights: str, device: torch.device | str, *, seed: int = 0
) -> DinoVisionTransformer:
    """Builds the backbone of a config, loads weights, and freezes it.

    Args:
        config: its ``student`` section describes the backbone, ``crops.global_crops_size`` the images that its position
            embedding is made for.
        weights: released file, teacher checkpoint, or any known layout; empty for random weights, whose class token
            hardly sees the image unless ``student.layerscale`` is near 1.
        device: where the backbone goes.
        seed: of the random weights.

    Returns:
        The backbone in evaluation mode, without gradients, in float32.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the weights do not belong to this backbone or fill it only in part.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(config.student, img_size=config.crops.global_crops_size)
    if weights:
        load_pretrained_backbone(backbone, weights)
    else:
        logger.warning("no pretrained weights were given: the backbone is random (seed %d)", seed)
    return backbone.requires_grad_(False).eval().to(device)


def build_random_backbone(config: Config, device: torch.device | str, *, seed: int = 0) -> DinoVisionTransformer:
    """Builds the backbone of a config with random weights, as a yardstick.

    LayerScale is left out: near its usual 1e-5, the blocks do next to nothing and the class token does not see the
    image, which everything beats.

    Args:
        config: see `build_frozen_backbone`.
        device: where the backbone goes.
        seed: of the weights.

    Returns:
        The backbone in evaluation mode, without gradients, in float32.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = replace(config.student, layerscale=0.0)
        backbone = build_backbone(options, img_size=config.crops.global_crops_size)
    return backbone.requires_grad_(False).eval().to(device)


class TrainedOn(NamedTuple):
    """How the images were prepared that a backbone was trained on.

    Attributes:
        value_range: became black and white; None where it saw levels of 8 or 16 bits only.
        light: ``original`` or ``standardized``, as in dataset strings.
        preprocessing: steps that they went through.
    """

    value_range: ValueRange | None
    light: str
    preprocessing: Chain

    def choose_preprocessing(self, other: Chain | None, source: str, in_channels: int) -> Chain:
        """The steps for the images of a run: those of training, or others that were named, with a warning.

        Args:
            other: what was named; None for nothing.
            source: what named it.
            in_channels: of the network.

        Raises:
            ConfigError: they give other channels.
        """
        if other is None:
            self.preprocessing.check_channels(in_channels, "the preprocessing of the weights (--preprocessing)")
            return self.preprocessing
        other.check_channels(in_channels, source)
        if other != self.preprocessing and is_main_process():
            logger.warning(
                "%s takes the place of the preprocessing that the backbone was trained with: %s instead of %s",
                *(source, other.to_values() or "none", self.preprocessing.to_values() or "none"),
            )
        return other

    def warn_of_light(self, name: str, dataset: ImageDataset) -> None:
        """Logs a warning where a set is not standardised, as the images of training were."""
        if self.light == "standardized" != dataset.light and is_main_process():
            logger.warning(
                "%s: the backbone was trained on light=standardized images, and these are not; add :light=standardized",
                name,
            )


def trained_on(weights: str | Path, config: Config, content: Mapping[str, Any] | None = None) -> TrainedOn:
    """What a file of weights says about the images of its training, else the options.

    Args:
        weights: a file, an address or a released name; empty for random ones.
        config: options that describe the backbone; of a run they name range and light in ``train.dataset_path``, and
            ``data.preprocessing``.
        content: of the file, where it was read already.

    Raises:
        ConfigError: the preprocessing has steps that this version does not know.
    """
    path = Path(weights)
    if content is None and weights and path.suffix != ".safetensors" and path.is_file():
        # Without its tensors; whether it is damaged is found out when they are loaded.
        with suppress(Exception):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    stored = content if isinstance(content, Mapping) else {}
    named = config.train.dataset_path
    light = (stored.get("light") or named_light(named)) if weights else ImageDataset.light
    chain = Chain.parse(stored.get("preprocessing") or config.data.preprocessing, f"{path}: preprocessing")
    return TrainedOn(ValueRange.of(stored.get("value_range")) or named_value_range(named), light, chain)


CODE = ("dinov2", "configs")  # folders of the checkout that decide results
NOT_A_FILE = -1


def find_origins(datasets: Mapping[str, ImageDataset], weights: str) -> dict[str, Any]:
    """What scores come from, found out by the main process for all; every process must call it.

    Args:
        datasets: by role, such as ``train`` and ``val``; one set in two roles is read once.
        weights: their file; empty for random ones.

    Returns:
        ``datasets`` (fingerprints by role), ``weights`` and ``revision``, as results have them.
    """
    found = None
    if is_main_process():
        distinct = {id(dataset): dataset for dataset in datasets.values()}
        fingerprints = {key: dataset_fingerprint(dataset) for key, dataset in distinct.items()}
        found = {
            "datasets": {role: fingerprints[id(dataset)] for role, dataset in datasets.items()},
            "weights": weights_fingerprint(weights),
            "revision": git_revision(),
        }
    origins = all_gather_objects(found)[0]
    assert origins is not None
    return origins


def git_revision(root: str | Path | None = None) -> str:
    """Commit of the checkout that this package was imported from, ``+dirty`` after it when its code was changed.

    Args:
        root: folder of the checkout; by default the one that holds the package.

    Returns:
        The 40 hexadecimal digits; empty where the package is no part of a checkout of its own, or there is no git.
    """
    folder = Path(__file__).parents[2] if root is None else Path(root)
    # A package that is installed somewhere inside another project's checkout must not name that project's commit.
    if not (folder / ".git").exists():
        return ""
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if not commit:
        return ""
    return f"{commit}+dirty" if _git(folder, "status", "--porcelain", "--", *CODE) else commit


def dataset_fingerprint(dataset: ImageDataset) -> dict[str, Any]:
    """Describes a dataset so that two results can be seen to be about the same images.

    Returns:
        ``num_images``, ``num_parts``, ``num_labelled``, ``classes``, ``value_range`` and
        ``preprocessing`` where there were any, and the ``sha256`` over the sorted rows of path,
        label, part and, where images are plain files, size. Paths count from the folder that all images share, so the
        place of the set and the order of its images do not matter; the images' content is not read.
    """
    paths = [str(dataset.get_image_path(index)) for index in range(len(dataset))]
    groups = list(dataset.get_group_ids())
    labels = dataset.get_targets()
    try:
        shared = os.path.commonpath({os.path.dirname(path) for path in paths})
    except ValueError:  # no paths, or absolute and relative ones
        shared = ""
    start = len(os.path.join(shared, "")) if shared else 0
    digest = hashlib.sha256()
    rows = (
        f"{path[start:]}\0{label}\0{path[start:] if group == path else group}\0{_size(path)}\n"
        for path, label, group in zip(paths, labels.tolist(), groups, strict=True)
    )
    for row in sorted(rows):
        digest.update(row.encode("utf-8", "surrogateescape"))
    return {
        "num_images": len(paths),
        "num_parts": len(set(groups)),
        "num_labelled": int((labels != MISSING_TARGET).sum()),
        "classes": list(dataset.classes),
        **({} if dataset.value_range is None else {"value_range": dataset.value_range.ends}),
        **({"preprocessing": dataset.preprocessing.to_values()} if dataset.preprocessing.steps else {}),
        "sha256": digest.hexdigest(),
    }


def weights_fingerprint(path: str) -> dict[str, Any]:
    """Describes a file of weights.

    Args:
        path: of the file, its address, or the name of a released backbone; empty for random weights.

    Returns:
        ``path``, ``sha256`` and ``bytes``; for random weights ``{"path": "", "random": True}``, and the path alone
        where it names no file.
    """
    if not path:
        return {"path": "", "random": True}
    file = fetch_weights(path)
    if not file.is_file():
        return {"path": path}
    return {"path": path, "sha256": file_digest(file), "bytes": file.stat().st_size}


def _git(folder: Path, *words: str) -> str:
    """The output of git; empty when it fails or is not there."""
    # A hook that runs us names its own repository in the environment; these options come before that.
    place = (f"--git-dir={folder / '.git'}", f"--work-tree={folder}", "--no-optional-locks")
    try:
        answer = subprocess.run(
            ["git", *place, *words], capture_output=True, text=True, timeout=60, check=False, cwd=folder
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return NOT_A_FILE


AUTOCAST = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_WORKERS = 8


@dataclass(frozen=True)
class EvaluatorOptions:
    """Options of every evaluator; those that are not given come from the config's section ``evaluation``."""

    overrides: tuple[str, ...] = option((), help="options of the config as key=value pairs", positional=True)
    config_file: str | None = option(
        None, help="YAML file that describes the backbone; none: told from the weights", aliases=("--config",)
    )
    pretrained_weights: str = option(
        "", help="weights: file, address or released name (dinov2_vits14_reg); none: random"
    )
    output_dir: str = option(".", help="folder for the log, results.json and predictions.csv")
    train_dataset: str | None = option(None, help="labelled images to learn from, as a dataset string")
    val_dataset: str | None = option(None, help="labelled images to evaluate on, as a dataset string")
    preprocessing: Path | None = option(
        None, help="YAML file with steps for all images (usually those that the backbone was trained with)"
    )
    features: str | None = option(None, help="cls (usually), patch_mean, cls_patch_mean, or cls_patch_statistics")
    image_size: int | None = option(None, help="square image in pixels (usually the size of the global crops)")
    whole_image: bool | None = option(None, help="squeeze the whole image into the square instead of cropping it")
    batch_size: int | None = option(None, help="images per process and forward pass (usually 64)")
    num_workers: int | None = option(None, help="image-decoding processes per process (usually one per core, up to 8)")
    autocast: str = option("none", help="precision of the forward pass", choices=tuple(AUTOCAST))
    seed: int = option(0, help="seed of random weights, resamples and everything that is drawn")
    part_aggregation: str = option("max", help="how a part joins its images (two classes)", choices=AGGREGATIONS)
    part_top_k: int = option(3, help="images of a part that count with topk_mean")
    num_resamples: int = option(1000, help="resamples of parts behind the 95 % intervals; 0: no intervals")
    image_statistics: bool = option(True, help="show beside it what ten statistics of brightness give")
    compare_random: bool = option(False, help="show beside it a random backbone of the same shape (--seed)")

    @property
    def scoring(self) -> dict[str, Any]:
        """The options of `ScoringSettings`."""
        return {name: getattr(self, name) for name in ("part_aggregation", "part_top_k", "num_resamples", "seed")}


CONFIG_OF_FLAG = {
    "features": "features",
    "image_size": "image_size",
    "whole_image": "whole_image",
    "batch_size": "batch_size",
}


@dataclass(frozen=True)
class EvaluatorSetup:
    """What an evaluator works with.

    Attributes:
        config: with the flags in its section ``evaluation``, but for the datasets.
        device: of this process.
        backbone: frozen, in evaluation mode, on the device.
        datasets: ``train`` and ``val``, as far as they were named.
        transform: of both sets.
        num_workers: image-decoding processes of this process.
        batch_size: images per process and forward pass.
        autocast_dtype: precision of the forward pass; None for that of the backbone.
        weights: path of the weights, empty for random ones.
        output_dir: folder for results, held open.
        image_statistics: whether the table shows what statistics of brightness give.
        compare_random: whether it shows a random backbone.
        value_range: of what was trained on, for sets whose string names none.
        preprocessing: steps that the images of all sets go through.
        settings: plain values for the results: the backbone, what images go through, the seed, the dataset strings.
    """

    config: Config
    device: torch.device
    backbone: DinoVisionTransformer
    datasets: Mapping[str, ImageDataset]
    transform: Any
    num_workers: int
    batch_size: int
    autocast_dtype: torch.dtype | None
    weights: str
    output_dir: HeldFolder
    image_statistics: bool
    compare_random: bool
    value_range: ValueRange | None
    preprocessing: Chain
    settings: Mapping[str, Any]

    @property
    def train_dataset(self) -> ImageDataset:
        """The set to learn from.

        Raises:
            ValueError: when none was named.
        """
        return self._dataset(TRAIN)

    @property
    def val_dataset(self) -> ImageDataset:
        """The set to evaluate on.

        Raises:
            ValueError: when none was named.
        """
        return self._dataset(VAL)

    @property
    def yardsticks(self) -> dict[str, Any]:
        """What the scores are compared with, as arguments of an evaluator; a random backbone is built here."""
        random = None
        if self.compare_random:
            random = build_random_backbone(self.config, self.device, seed=self.settings["seed"])
        return {"image_statistics": self.image_statistics, "random_backbone": random}

    @property
    def extraction(self) -> dict[str, Any]:
        """How features are computed, as arguments of an evaluator."""
        names = ("batch_size", "num_workers", "device", "autocast_dtype")
        return {name: getattr(self, name) for name in names}

    @property
    def reporting(self) -> dict[str, Any]:
        """What goes into the results and where they go, as arguments of an evaluator."""
        return {name: getattr(self, name) for name in ("output_dir", "weights", "settings")}

    def open_tests(self, dataset_strings: Sequence[str]) -> dict[str, ImageDataset]:
        """Opens further sets as ``test``, or ``test 1``, ``test 2``, … where there are several."""
        names = test_names(len(dataset_strings))
        tests = {
            name: make_dataset(
                dataset_str=text,
                transform=self.transform,
                value_range=self.value_range,
                preprocessing=self.preprocessing,
            )
            for name, text in zip(names, dataset_strings, strict=True)
        }
        for name, dataset in tests.items():
            for known, other in self.datasets.items():
                warn_of_shared_images({known: other, name: dataset})
        return tests

    def _dataset(self, name: str) -> ImageDataset:
        if name not in self.datasets:
            raise ValueError(f"--{name}-dataset is needed")
        return self.datasets[name]


@contextmanager
def evaluator_session(
    options: EvaluatorOptions,
    *,
    extra_pairs: Sequence[str] = (),
    needed: Sequence[str] = (TRAIN, VAL),
    any_of_them: bool = False,
) -> Iterator[EvaluatorSetup]:
    """Joins the processes of the run, opens the log, seeds everything, and builds what an evaluator works with.

    Args:
        options: the command's.
        extra_pairs: ``key=value`` pairs for the config from options that only this command has.
        needed: sets that must be named, in the flags or in the config.
        any_of_them: one of the needed sets is enough.

    Raises:
        ValueError: when a needed set is not named, the image size does not fit the patches, or options are wrong.
        FileNotFoundError: for a missing config, dataset or file of weights.
    """
    pairs = [*options.overrides, *flag_pairs(options, CONFIG_OF_FLAG), *extra_pairs]
    config = load_backbone_config(options.config_file, options.pretrained_weights, pairs)
    check_aggregation(options.part_aggregation, options.part_top_k)
    named_chain = None if options.preprocessing is None else Chain.read(options.preprocessing)
    # Not by pairs for the config, which takes only both sets together.
    flags = {TRAIN: options.train_dataset, VAL: options.val_dataset}
    named = {TRAIN: config.evaluation.train_dataset_path, VAL: config.evaluation.val_dataset_path}
    names = {name: named[name] if flag is None else flag for name, flag in flags.items()}
    missing = [name for name in needed if not names[name]]
    if missing and (not any_of_them or len(missing) == len(needed)):
        joint = " or " if any_of_them else " and "
        raise ValueError(f"this evaluation needs {joint.join(f'--{name}-dataset' for name in missing)}")
    compare_random = options.compare_random and bool(options.pretrained_weights)
    size = config.evaluation.image_size or config.crops.global_crops_size
    output_dir = Path(options.output_dir)
    with (
        distributed_session(config.train.device) as device,
        logging_to(output_dir, get_rank()),
        closing(HeldFolder(output_dir)) as held,
    ):
        if is_main_process():
            remove_unfinished(output_dir)  # of evaluations that were killed
        if options.compare_random and not compare_random:
            logger.warning("--compare-random has no effect without --pretrained-weights: the backbone is random itself")
        seed_everything(options.seed)
        transform = make_eval_transform(size, whole_image=config.evaluation.whole_image)
        # Before the weights, which take longer; two sets of the same name are the same object.
        trained = trained_on(options.pretrained_weights, config)
        value_range = trained.value_range
        chain = trained.choose_preprocessing(
            named_chain, f"--preprocessing {options.preprocessing}", config.student.in_channels
        )
        by_string: dict[str, ImageDataset] = {}
        for name in dict.fromkeys(filter(None, (names[TRAIN], names[VAL]))):
            dataset = make_dataset(dataset_str=name, transform=transform, value_range=value_range, preprocessing=chain)
            value_range = value_range or dataset.value_range
            by_string[name] = dataset
            trained.warn_of_light(name, dataset)
            if is_main_process() and (fault := dataset.describe_light()):
                logger.warning("%s: %s", name, fault)
        datasets = {key: by_string[name] for key, name in names.items() if name}
        warn_of_shared_images(datasets)
        yield EvaluatorSetup(
            config=config,
            device=device,
            datasets=datasets,
            backbone=build_frozen_backbone(config, options.pretrained_weights, device, seed=options.seed),
            transform=transform,
            num_workers=min(os.cpu_count() or 1, MAX_WORKERS) if options.num_workers is None else options.num_workers,
            batch_size=config.evaluation.batch_size,
            autocast_dtype=AUTOCAST[options.autocast],
            weights=options.pretrained_weights,
            output_dir=held,
            image_statistics=options.image_statistics,
            compare_random=compare_random,
            value_range=value_range,
            preprocessing=chain,
            settings={
                "arch": config.student.arch,
                "patch_size": config.student.patch_size,
                "image_size": list(as_pair(size)),
                "whole_image": config.evaluation.whole_image,
                "autocast": options.autocast,
                "seed": options.seed,
                **({"preprocessing": chain.to_values()} if chain.steps else {}),
                **{
                    f"{name}_dataset": with_value_range(value, by_string[value].value_range)
                    for name, value in names.items()
                    if value
                },
            },
        )


def test_names(count: int) -> list[str]:
    """Names of so many test sets: ``test``, or ``test 1``, ``test 2``, … where there are several."""
    return ["test"] if count == 1 else [f"test {number}" for number in range(1, count + 1)]


def name_tests(dataset_strings: Sequence[str], tests: Mapping[str, ImageDataset]) -> dict[str, str]:
    """The dataset strings of opened test sets by name, with the range of values that their images are read with."""
    pairs = zip(tests.items(), dataset_strings, strict=True)
    return {name: with_value_range(text, dataset.value_range) for (name, dataset), text in pairs}


def flag_pairs(options: object, config_of_flag: Mapping[str, str]) -> list[str]:
    """The flags that were given, as pairs for the config's section ``evaluation``, whose checks then hold for them.

    Args:
        options: the command's; a flag that is None was not given.
        config_of_flag: option of the config by the name of the flag.
    """
    pairs = []
    for flag, name in config_of_flag.items():
        value = getattr(options, flag)
        if value is not None:
            pairs.append(f"evaluation.{name}={list(value) if isinstance(value, tuple) else value}")
    return pairs
