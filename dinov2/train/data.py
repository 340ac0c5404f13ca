"""The pretraining data that a run's options describe."""

import hashlib
import logging
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from dinov2.config import Config, as_pair
from dinov2.config.schema import TrainOptions
from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.collate import PretrainingBatch, PretrainingCollate
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.datasets.registry import with_value_range
from dinov2.data.loaders import SamplerType, make_dataset, make_pretraining_loader
from dinov2.data.masking import MaskingGenerator, max_patches_cap
from dinov2.data.preprocessing import Chain
from dinov2.data.pretraining import CropSample, PretrainingDataset
from dinov2.data.reading import ByteCache
from dinov2.data.value_range import ValueRange
from dinov2.distributed import get_rank, get_world_size, is_main_process

logger = logging.getLogger("dinov2")

MAX_NAMES = 65536  # of a fingerprint, evenly spread over larger sets: one image more or less moves most of them
CROPS = "boxes that fit nowhere are at a random place, long images cut into pieces"  # what changes the stream of crops
_LOST = "DataLoader worker (pid"  # how torch begins to say that a process has gone


def build_pretraining_dataset(config: Config) -> PretrainingDataset:
    """Opens ``train.dataset_path`` and cuts crops from it, see ``crops``.

    Raises:
        FileNotFoundError: the dataset's root does not exist.
        ValueError: the dataset string or an annotation file is wrong, or there are no images.
    """
    dataset_path = config.train.dataset_path
    if dataset_path == TrainOptions().dataset_path:  # upstream's, which found the images by itself
        raise ValueError(
            f"train.dataset_path={dataset_path} lacks the images' folder: train.dataset_path=ImageFolder:root="
            f"/my/images:labels=none trains on all images below it; docs/own_data.md shows other layouts"
        )
    images = make_dataset(
        dataset_str=dataset_path,
        preprocessing=named_preprocessing(config),
        read_timeout=config.data.read_timeout_seconds,
    )
    if config.train.cache_dataset:
        # Every loading process keeps a cache of its own.
        share = config.data.cache_gib * 2**30 / max(config.train.num_workers, 1)
        images.cache = ByteCache(int(share))
    return PretrainingDataset(
        images,
        build_augmentation(config),
        seed=config.train.seed,
        part_positives=config.data.part_positives,
        read_timeout=config.data.read_timeout_seconds,
    )


def named_preprocessing(config: Config) -> Chain:
    """The steps of ``data.preprocessing``.

    Raises:
        ConfigError: naming the step that is wrong, or other channels than ``student.in_channels``.
    """
    chain = Chain.parse(config.data.preprocessing, "data.preprocessing")
    chain.check_channels(config.student.in_channels, "data.preprocessing")
    return chain


def name_value_range(config: Config, value_range: ValueRange | None) -> Config:
    """The options, with a range of values in all dataset strings that name none."""
    train, evaluation = config.train, config.evaluation
    return replace(
        config,
        train=replace(train, dataset_path=with_value_range(train.dataset_path, value_range)),
        evaluation=replace(
            evaluation,
            train_dataset_path=with_value_range(evaluation.train_dataset_path, value_range),
            val_dataset_path=with_value_range(evaluation.val_dataset_path, value_range),
            probe_dataset_path=with_value_range(evaluation.probe_dataset_path, value_range),
        ),
    )


def build_augmentation(config: Config) -> DataAugmentationDINO:
    """Multi-crop augmentation with the options of ``crops``."""
    crops = config.crops
    return DataAugmentationDINO(
        crops.global_crops_scale,
        crops.local_crops_scale,
        crops.local_crops_number,
        global_crops_size=as_pair(crops.global_crops_size),
        local_crops_size=as_pair(crops.local_crops_size),
        horizontal_flip_probability=crops.horizontal_flip_probability,
        vertical_flip_probability=crops.vertical_flip_probability,
        transpose_probability=crops.transpose_probability,
        max_tilt=crops.max_tilt,
        color_jitter_probability=crops.color_jitter_probability,
        color_jitter=crops.color_jitter,
        grayscale_probability=crops.grayscale_probability,
        solarize_probability=crops.solarize_probability,
        blur_probabilities=crops.blur_probabilities,
        num_channels=config.student.in_channels,
    )


def build_collate(config: Config) -> PretrainingCollate:
    """Batches with block masks with the options of ``ibot``."""
    size, patch = as_pair(config.crops.global_crops_size), as_pair(config.student.patch_size)
    masks = MaskingGenerator(
        (size[0] // patch[0], size[1] // patch[1]),
        max_num_patches=max_patches_cap(size, patch),
        exact=config.ibot.exact_mask_counts,
    )
    return PretrainingCollate(
        mask_generator=masks,
        mask_ratio_min_max=config.ibot.mask_ratio_min_max,
        mask_probability=config.ibot.mask_sample_probability if config.ibot.loss_weight > 0 else 0.0,
        seed=config.train.seed,
    )


def build_pretraining_loader(
    config: Config, dataset: PretrainingDataset, *, samples_seen: int = 0, num_workers: int | None = None
) -> DataLoader[CropSample]:
    """The endless stream of batches, from the place in the run's order that a checkpoint holds.

    Args:
        config: options of the run.
        dataset: gives the crops.
        samples_seen: images that all processes together have trained on.
        num_workers: loading processes; by default ``train.num_workers``.

    Raises:
        ValueError: the dataset holds fewer images than one batch, or than there are processes.
    """
    return make_pretraining_loader(
        dataset=dataset,
        collate=build_collate(config),
        batch_size=config.train.batch_size_per_gpu,
        num_workers=config.train.num_workers if num_workers is None else num_workers,
        seed=config.train.seed,
        sampler_type=SamplerType[config.train.sampler_type],
        start_position=samples_seen,
    )


def is_loss_of_worker(error: RuntimeError) -> bool:
    """Whether a data loader reports the loss of one of its processes, most often killed for lack of memory."""
    return str(error).startswith(_LOST)


class Batches:
    """Endless iterator; when a loading process dies, this process loads the batch that is missing by itself.

    So the iteration can be finished and saved by all processes of the run, and `lost` says that it should end then:
    where memory is short, loading on in the same way would only be killed again.

    Args:
        config: options of the run.
        dataset: gives the crops.
        samples_seen: images that all processes together have trained on.

    Attributes:
        lost: what has happened to a loading process; empty as long as all is well.
    """

    def __init__(self, config: Config, dataset: PretrainingDataset, *, samples_seen: int) -> None:
        self.lost = ""
        self._config = config
        self._dataset = dataset
        self._position = samples_seen
        self._step = config.train.batch_size_per_gpu * get_world_size()
        self._loader = build_pretraining_loader(config, dataset, samples_seen=samples_seen)
        self._source: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[PretrainingBatch]:
        return self

    def __next__(self) -> PretrainingBatch:
        try:
            batch: PretrainingBatch = next(self._begin())
        except RuntimeError as error:
            if not is_loss_of_worker(error):
                raise
            self.lost = str(error).splitlines()[0]
            logger.error(
                "A DATA-LOADING PROCESS OF RANK %d IS LOST: %s. Most often the system killed it for lack of memory: "
                "lower train.num_workers (%d), data.cache_gib (%g) or the batch. This iteration is finished without it "
                "and saved, then the run ends; the same command goes on",
                *(get_rank(), self.lost, self._config.train.num_workers, self._config.data.cache_gib),
            )
            self._source, position = None, self._position
            self._loader = build_pretraining_loader(self._config, self._dataset, samples_seen=position, num_workers=0)
            batch = next(self._begin())
        self._position += self._step
        return batch

    def _begin(self) -> Iterator[Any]:
        if self._source is None:
            self._source = iter(self._loader)
            # Torch raises its error wherever the main thread is when a process dies, even between weights and teacher.
            # Without its handler, the loader itself finds out when it waits for the batch.
            handler = signal.getsignal(signal.SIGCHLD)
            if getattr(handler, "__module__", "").startswith("torch."):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return self._source

    def close(self) -> None:
        """Ends the loading processes.

        They ignore the signal by which the end of a program ends such processes, so it would wait for them for ever.
        """
        self._source = None  # the iterator tells its processes to end when it goes


def data_identity(train: TrainOptions, images: ImageDataset) -> dict[str, str]:
    """Fingerprint of the data order and its crops: seed, sampler, number and names of the images, rules of crops.

    The folder of the images may change.
    """
    digest = hashlib.sha256()
    for index in range(0, len(images), -(-len(images) // MAX_NAMES)):
        path = Path(images.get_image_path(index))
        digest.update(f"{path.parent.name}/{path.name}\0".encode(errors="surrogateescape"))
    return {
        "train.seed": str(train.seed),
        "train.sampler_type": train.sampler_type,
        "dataset": f"{len(images)} images, names {digest.hexdigest()[:16]}",
        "crops": CROPS,
    }


def warn_of_other_data(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Warns of what differs from the run that wrote the checkpoint."""
    changes = [f"{name} was {saved[name]} and is {now[name]}" for name in saved if saved[name] != now.get(name)]
    if changes and is_main_process():
        logger.warning(
            "THE ORDER OF THE DATA CHANGES from here on: %s. The position in the stream is kept, but images may come "
            "again or be left out in this pass",
            "; ".join(changes),
        )
    if saved and "crops" not in saved and is_main_process():
        logger.warning(
            "THE CROPS CHANGE from here on, where no box of the wanted area fits into an image or an image is long: "
            "the version that began this run cut them all from its middle. Other crops stay as they are, and so does "
            "the order of the images"
        )


def warn_of_other_preprocessing(saved: Sequence[Mapping[str, Any]], now: Chain) -> None:
    """Warns where images are prepared otherwise than in the run that wrote the checkpoint."""
    if list(saved) != now.to_values() and is_main_process():
        logger.warning(
            "THE PREPROCESSING CHANGES from here on: it was %s and is %s (data.preprocessing)",
            *(list(saved) or "none", now.to_values() or "none"),
        )
