"""Judging the teacher while it is being trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dinov2.config import Config, ConfigError, as_pair
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.distributed import all_gather_objects, barrier, is_main_process
from dinov2.eval.knn import RESULTS_FILE, common_classes, eval_knn
from dinov2.eval.results import KnnResults
from dinov2.eval.transforms import make_eval_transform
from dinov2.fsdp import full_state_dict, release_gathered_parameters
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import write_atomically
from dinov2.utils.random_state import RandomState

TEACHER_FILE = "teacher_checkpoint.pth"


def evaluation_folder(output_dir: Path, iteration: int) -> Path:
    """Where the teacher after an iteration, and its scores, lie."""
    return output_dir / "eval" / f"training_{iteration}"


def evaluation_is_due(config: Config, iteration: int) -> bool:
    """Whether the teacher is written and scored after an iteration: every period, and at the end."""
    period = config.evaluation.eval_period_iterations
    last = iteration + 1 == config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH
    return last or (period > 0 and (iteration + 1) % period == 0)


def evaluation_is_done(config: Config, output_dir: Path, iteration: int) -> bool:
    """Whether the evaluation after an iteration has left its files; the main process looks for all."""
    files = [TEACHER_FILE] + ([RESULTS_FILE] if config.evaluation.train_dataset_path else [])
    folder = evaluation_folder(output_dir, iteration)
    return all_gather_objects(all((folder / name).is_file() for name in files))[0]


def open_evaluation_sets(config: Config) -> tuple[ImageDataset, ImageDataset] | None:
    """Opens the labelled bank and the images to classify; None where ``evaluation`` names none.

    Raises:
        FileNotFoundError, ValueError: when a set is missing or wrong, lacks labels, or has other classes than the
            other; `ConfigError` when the image size is no multiple of the patch.
    """
    settings = config.evaluation
    if not settings.train_dataset_path:
        return None
    patch = as_pair(config.student.patch_size)
    if settings.image_size % patch[0] or settings.image_size % patch[1]:
        raise ConfigError(
            f"evaluation.image_size={settings.image_size} is not divisible by student.patch_size={patch[0]}x{patch[1]}"
        )
    size = settings.image_size or as_pair(config.crops.global_crops_size)
    transform = make_eval_transform(size, whole_image=settings.whole_image)
    bank = make_dataset(dataset_str=settings.train_dataset_path, transform=transform)
    queries = make_dataset(dataset_str=settings.val_dataset_path, transform=transform)
    common_classes(bank, queries)
    return bank, queries


def save_teacher(model: SSLMetaArch, folder: Path) -> Path:
    """Writes the whole teacher, backbone and heads, as ``{"teacher": state dict}`` into one file."""
    release_gathered_parameters(model.teacher)
    state = full_state_dict(model.teacher)
    path = folder / TEACHER_FILE
    if is_main_process():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: torch.save({"teacher": state}, file))
    barrier()
    return path


def evaluate_teacher(
    config: Config, model: SSLMetaArch, folder: Path, device: torch.device, *, weights: str
) -> dict[str, float]:
    """Scores the teacher's backbone by k-NN on the sets of ``config.evaluation``.

    Args:
        config: options of the run.
        model: the method; its teacher may be sharded.
        folder: gets the results as JSON.
        device: where to compute.
        weights: name of the weights, kept in the results.

    Returns:
        Figures by name, such as ``knn_part_auroc_k10``; empty when no sets are named.
    """
    settings = config.evaluation
    sets = open_evaluation_sets(config)
    if sets is None:
        return {}
    with _random_state_untouched():
        results = eval_knn(
            model.teacher_backbone,
            *sets,
            nb_knn=settings.nb_knn,
            temperature=settings.temperature,
            batch_size=settings.batch_size,
            num_workers=config.train.num_workers,
            device=device,
            features=settings.features,
            output_dir=folder,
            weights=weights,
        )
    model.train()
    release_gathered_parameters(model.teacher)
    return flat_figures(results)


def flat_figures(results: KnnResults) -> dict[str, float]:
    """One entry per figure: ``knn_{image|part}_{metric}_k{k}``."""
    figures: dict[str, float] = {}
    for scores in results.scores:
        for level, metrics in (("image", scores.image), ("part", scores.part)):
            for name in ("accuracy", "balanced_accuracy", "auroc", "top5"):
                value = getattr(metrics, name)
                if value is not None:
                    figures[f"knn_{level}_{name}_k{scores.k}"] = value
    return figures


@contextmanager
def _random_state_untouched() -> Iterator[None]:
    """A run with evaluation draws the same numbers as one without."""
    state = RandomState()
    before = state.state_dict()
    try:
        yield
    finally:
        state.load_state_dict(before)
