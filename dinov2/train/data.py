"""The pretraining data that a run's options describe."""

from torch.utils.data import DataLoader

from dinov2.config import Config, as_pair
from dinov2.data.augmentations import DataAugmentationDINO
from dinov2.data.collate import PretrainingCollate
from dinov2.data.decoding import ByteCache
from dinov2.data.loaders import SamplerType, make_dataset, make_pretraining_loader
from dinov2.data.masking import MaskingGenerator, max_patches_cap
from dinov2.data.pretraining import CropSample, PretrainingDataset


def build_pretraining_dataset(config: Config) -> PretrainingDataset:
    """Opens ``train.dataset_path`` and cuts crops from it as ``crops`` says.

    Raises:
        FileNotFoundError: the dataset's root does not exist.
        ValueError: the dataset string or an annotation file is wrong, or there are no images.
    """
    images = make_dataset(dataset_str=config.train.dataset_path)
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


def build_augmentation(config: Config) -> DataAugmentationDINO:
    """Multi-crop augmentation as ``crops`` says."""
    crops = config.crops
    return DataAugmentationDINO(
        crops.global_crops_scale,
        crops.local_crops_scale,
        crops.local_crops_number,
        global_crops_size=as_pair(crops.global_crops_size),
        local_crops_size=as_pair(crops.local_crops_size),
        horizontal_flip_probability=crops.horizontal_flip_probability,
        vertical_flip_probability=crops.vertical_flip_probability,
        color_jitter_probability=crops.color_jitter_probability,
        color_jitter=crops.color_jitter,
        grayscale_probability=crops.grayscale_probability,
        solarize_probability=crops.solarize_probability,
        blur_probabilities=crops.blur_probabilities,
    )


def build_collate(config: Config) -> PretrainingCollate:
    """Batches with block masks as ``ibot`` says."""
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
