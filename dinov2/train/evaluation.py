"""Judging the teacher while it is being trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dinov2.config import Config
from dinov2.data.loaders import make_dataset
from dinov2.distributed import barrier, is_main_process
from dinov2.eval.knn import eval_knn
from dinov2.eval.results import KnnResults
from dinov2.eval.transforms import make_eval_transform
from dinov2.fsdp import full_state_dict, release_gathered_parameters
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import write_atomically
from dinov2.utils.random_state import RandomState

TEACHER_FILE = "teacher_checkpoint.pth"


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
    if not settings.train_dataset_path:
        return {}
    transform = make_eval_transform(
        settings.image_size or config.crops.global_crops_size, whole_image=settings.whole_image
    )
    with _random_state_untouched():
        results = eval_knn(
            model.teacher_backbone,
            make_dataset(dataset_str=settings.train_dataset_path, transform=transform),
            make_dataset(dataset_str=settings.val_dataset_path, transform=transform),
            nb_knn=settings.nb_knn,
            temperature=settings.temperature,
            batch_size=settings.batch_size,
            num_workers=config.train.num_workers,
            device=device,
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
