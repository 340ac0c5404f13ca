"""Judging the teacher while it is being trained."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from dinov2.checkpoint.sharding import full_state_dict
from dinov2.config import Config, as_pair, render_config
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.eval.features import common_classes, make_eval_transform
from dinov2.eval.knn import eval_knn
from dinov2.eval.results import RESULTS_FILE, EvaluationResults
from dinov2.fsdp import release_gathered_parameters
from dinov2.logging import read_metrics
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import shown_fault, sidecar, write_text_atomically, write_with_checksum
from dinov2.utils.seeds import RandomState

METRICS_FILE = "metrics.jsonl"
TEACHER_FILE = "teacher_checkpoint.pth"
LOGGED_FIGURES = ("accuracy", "balanced_accuracy", "auroc", "top5")  # the rest is in the results' file


def evaluation_folder(output_dir: Path, iteration: int) -> Path:
    """Where the teacher after an iteration, and its scores, lie."""
    return output_dir / "eval" / f"training_{iteration}"


def evaluation_is_due(config: Config, iteration: int) -> bool:
    """Whether the teacher is written and scored after an iteration: every period, and at the end."""
    period = config.evaluation.eval_period_iterations
    last = iteration + 1 == config.optim.epochs * config.train.OFFICIAL_EPOCH_LENGTH
    return last or (period > 0 and (iteration + 1) % period == 0)


def evaluation_is_done(config: Config, output_dir: Path, iteration: int) -> bool:
    """Whether the evaluation after an iteration has left its files, undamaged, and figures; the main process looks."""
    files = [TEACHER_FILE] + ([RESULTS_FILE] if config.evaluation.train_dataset_path else [])
    folder = evaluation_folder(output_dir, iteration)
    done = False
    if is_main_process():
        done = all((folder / name).is_file() for name in files) and not shown_fault(folder / TEACHER_FILE)
        done = done and _is_recorded(config, output_dir / METRICS_FILE, iteration)
    return all_gather_objects(done)[0]


def _is_recorded(config: Config, metrics: Path, iteration: int) -> bool:
    """Whether the metrics hold the figures of an evaluation, or it gives none, or there are no metrics any more."""
    gives_figures = bool(config.evaluation.train_dataset_path) or config.evaluation.probe_images > 1
    if not gives_figures or not metrics.is_file():
        return True
    return any("evaluation" in record and record.get("iteration") == iteration for record in read_metrics(metrics))


def evaluation_size(config: Config) -> tuple[int, int]:
    """Height and width of the images that the teacher is judged on."""
    return as_pair(config.evaluation.image_size or config.crops.global_crops_size)


def open_evaluation_sets(config: Config) -> tuple[ImageDataset, ImageDataset] | None:
    """Opens the labelled bank and the images to classify; None where ``evaluation`` names none.

    Raises:
        FileNotFoundError, ValueError: when a set is missing or wrong, lacks labels, or has other classes than the
            other.
    """
    settings = config.evaluation
    if not settings.train_dataset_path:
        return None
    transform = make_eval_transform(evaluation_size(config), whole_image=settings.whole_image)
    bank = make_dataset(dataset_str=settings.train_dataset_path, transform=transform)
    queries = make_dataset(dataset_str=settings.val_dataset_path, transform=transform)
    common_classes(bank, queries)
    return bank, queries


def save_teacher(model: SSLMetaArch, folder: Path, config: Config | None = None) -> Path:
    """Writes the whole teacher, backbone and heads, as ``{"teacher": state dict}`` into one file, with its checksum.

    The options of the run, where given, are kept beside it as YAML under ``config``: whoever loads the file can then
    build the network.

    Raises:
        OSError: the file cannot be written; raised by all processes together.
    """
    release_gathered_parameters(model.teacher)
    state = full_state_dict(model.teacher)
    path = folder / TEACHER_FILE

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"teacher": state} | ({} if config is None else {"config": render_config(config)})
        write_with_checksum(path, lambda file: torch.save(content, file))

    _write_on_main(write, f"the teacher {path}")
    return path


def write_results(results: EvaluationResults, folder: Path) -> None:
    """Writes the results of an evaluation as JSON and CSV.

    Raises:
        OSError: they cannot be written; raised by all processes together.
    """
    _write_on_main(partial(results.write, folder), f"the results in {folder}")


def _write_on_main(write: Callable[[], object], what: str) -> None:
    fault = ""
    if is_main_process():
        try:
            write()
        except OSError as error:
            fault = str(error)
    if fault := all_gather_objects(fault)[0]:
        raise OSError(f"{what} cannot be written: {fault}")


def evaluate_teacher(
    config: Config, model: SSLMetaArch, device: torch.device, *, weights: str
) -> EvaluationResults | None:
    """Scores the teacher's backbone by k-NN on the sets of ``config.evaluation``.

    Args:
        config: options of the run.
        model: the method; its teacher may be sharded.
        device: where to compute.
        weights: name of the weights, kept in the results.

    Returns:
        All figures, the same in every process; None when no sets are named.

    Raises:
        ValueError: an image cannot be read, or features are not finite; raised by all processes together.
    """
    settings = config.evaluation
    sets = open_evaluation_sets(config)
    if sets is None:
        return None
    try:
        with random_state_untouched():
            return eval_knn(
                model.teacher_backbone,
                *sets,
                nb_knn=settings.nb_knn,
                temperature=settings.temperature,
                batch_size=settings.batch_size,
                num_workers=config.train.num_workers,
                device=device,
                features=settings.features,
                num_resamples=0,
                seed=config.train.seed,
                weights=weights,
                settings={
                    "image_size": list(evaluation_size(config)),
                    "whole_image": settings.whole_image,
                    "train_dataset": settings.train_dataset_path,
                    "val_dataset": settings.val_dataset_path,
                },
            )
    finally:
        model.train()
        release_gathered_parameters(model.teacher)


def flat_figures(results: EvaluationResults) -> dict[str, float]:
    """One entry per figure: ``knn_{image|part}_{metric}_k{k}``."""
    figures: dict[str, float] = {}
    for variant, scores in results.scores.items():
        for level, scored in (("image", scores.image), ("part", scores.part)):
            for name in LOGGED_FIGURES:
                if name in scored.metrics:
                    figures[f"knn_{level}_{name}_{variant.replace('=', '')}"] = scored.metrics[name].value
    return figures


@contextmanager
def random_state_untouched() -> Iterator[None]:
    """A run with evaluation draws the same numbers as one without."""
    state = RandomState()
    before = state.state_dict()
    try:
        yield
    finally:
        state.load_state_dict(before)


logger = logging.getLogger("dinov2")

BEST_FILE = "best.json"
DEFAULT_METRICS = ("part_auroc", "part_balanced_accuracy")  # the first that there is: AUROC needs two classes


@dataclass(frozen=True)
class BestTeacher:
    """What ``best.json`` holds.

    Attributes:
        iteration: after which the teacher was taken.
        metric: figure that decided, such as ``part_auroc``, the mean over all k, or ``part_auroc_k10``.
        score: its value; more is better.
        teacher: the file of this teacher among all those of the run, relative to the run's folder.
    """

    iteration: int
    metric: str
    score: float
    teacher: str


def score_of(figures: Mapping[str, float], metric: str = "") -> tuple[str, float] | None:
    """Picks the figure that decides which teacher is best.

    Args:
        figures: by name, such as ``knn_part_auroc_k10``.
        metric: ``part_auroc_k10`` for one k, ``part_auroc`` for the mean over all k, which is steadier; empty for
            ``part_auroc`` where there are two classes, else ``part_balanced_accuracy``.

    Returns:
        Name and value; None where there is no such figure.
    """
    for name in (metric,) if metric else DEFAULT_METRICS:
        pattern = re.compile(rf"knn_{re.escape(name)}" + ("" if re.search(r"_k\d+$", name) else r"_k\d+"))
        values = [value for key, value in figures.items() if pattern.fullmatch(key)]
        if values:
            return name, sum(values) / len(values)
    return None


def keep_best(
    folder: Path, teacher: Path, iteration: int, figures: Mapping[str, float], *, metric: str = ""
) -> BestTeacher | None:
    """Keeps a teacher if it is better than the best so far, which is read back from ``best.json``.

    The file, and its checksum if it has one, are linked where the file system can, and copied elsewhere; a crash leaves
    the former best or the new one. Only the main process may call it.

    Args:
        folder: ``OUT/eval/best``.
        teacher: the teacher's file, ``OUT/eval/training_{iteration}/teacher_checkpoint.pth``.
        iteration: after which it was taken.
        figures: its scores.
        metric: see `score_of`.

    Returns:
        The best teacher now, None where there is no figure to judge by.
    """
    found = score_of(figures, metric)
    if found is None:
        if figures:
            logger.warning(
                "no best teacher is kept: evaluation.best_metric=%s names none of the figures %s",
                metric or " or ".join(DEFAULT_METRICS),
                ", ".join(name.removeprefix("knn_") for name in figures),
            )
        return None
    name, score = found
    former = read_best(folder)
    if former is not None and former.metric == name and former.iteration < iteration and former.score >= score:
        return former
    best = BestTeacher(iteration, name, score, str(teacher.relative_to(folder.parents[1])))
    folder.mkdir(parents=True, exist_ok=True)
    # The record goes first: a crash between the two leaves none, so the next evaluation is kept whatever its score.
    # The checksum goes before the teacher and comes after it: it is never that of another one.
    (folder / BEST_FILE).unlink(missing_ok=True)
    sidecar(folder / teacher.name).unlink(missing_ok=True)
    _put(teacher, folder / teacher.name)
    if sidecar(teacher).is_file():
        _put(sidecar(teacher), sidecar(folder / teacher.name))
    write_text_atomically(folder / BEST_FILE, json.dumps(asdict(best), indent=2) + "\n")
    logger.info("best teacher so far: %s %.4f after iteration %d, kept in %s", name, score, iteration, folder)
    return best


def read_best(folder: Path) -> BestTeacher | None:
    """What ``best.json`` says; None where there is none, or none that can be read, or its teacher is missing."""
    try:
        values = json.loads((folder / BEST_FILE).read_text(encoding="utf-8"))
        best = BestTeacher(int(values["iteration"]), values["metric"], float(values["score"]), values["teacher"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return best if (folder / Path(best.teacher).name).is_file() else None


def forget_later_best(folder: Path, start: int) -> None:
    """Forgets a best teacher of iteration ``start`` or later: a run that starts from there again made it void."""
    best = read_best(folder)
    if best is not None and best.iteration >= start:
        (folder / BEST_FILE).unlink()


def _put(source: Path, target: Path) -> None:
    """Makes ``target`` the same file as ``source``, or a copy of it, at once."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
