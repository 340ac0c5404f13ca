"""Evaluation of the teacher while it is being trained: its file, its k-NN scores, and the best one so far."""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dinov2.checkpoint.sharding import full_state_dict
from dinov2.config import Config, ConfigError, as_pair
from dinov2.config.schema import EvaluationOptions
from dinov2.data.datasets.base import ImageDataset
from dinov2.data.loaders import make_dataset
from dinov2.data.preprocessing import Chain
from dinov2.data.shared_images import warn_of_shared_images
from dinov2.data.value_range import ValueRange
from dinov2.distributed import all_gather_objects, is_main_process
from dinov2.eval.features import common_classes, make_eval_transform
from dinov2.eval.knn import eval_knn
from dinov2.eval.learning import DEFAULT_METRICS, score_of
from dinov2.eval.results import EvaluationResults, has_results
from dinov2.fsdp import release_gathered_parameters
from dinov2.logging import read_metrics
from dinov2.train.data import named_preprocessing
from dinov2.train.ssl_meta_arch import SSLMetaArch
from dinov2.utils.files import (
    remove_with_checksum,
    shown_fault,
    sidecar,
    temporary_path,
    write_atomically,
    write_with_checksum,
)
from dinov2.utils.seeds import RandomState

logger = logging.getLogger("dinov2")

METRICS_FILE = "metrics.jsonl"
TEACHER_FILE = "teacher_checkpoint.pth"
BEST_FILE = "best.json"
LOGGED_METRICS = ("accuracy", "balanced_accuracy", "auroc", "top5")  # the rest is in the results' file


def evaluation_folder(output_dir: Path, iteration: int) -> Path:
    """Where the teacher after an iteration, and its scores, lie."""
    return output_dir / "eval" / f"training_{iteration}"


def evaluation_is_due(iteration: int, *, period: int, total_iterations: int) -> bool:
    """Whether the teacher is written and evaluated after an iteration: every period (0: never) and at the end."""
    return iteration + 1 == total_iterations or (period > 0 and (iteration + 1) % period == 0)


def evaluation_is_done(settings: EvaluationOptions, output_dir: Path, iteration: int) -> bool:
    """Whether the evaluation after an iteration has left its files, undamaged, and metrics; the main process looks."""
    folder, done = evaluation_folder(output_dir, iteration), False
    if is_main_process():
        done = (folder / TEACHER_FILE).is_file() and not shown_fault(folder / TEACHER_FILE)
        done = done and (not settings.train_dataset_path or has_results(folder))
        metrics = output_dir / METRICS_FILE
        if done and (settings.train_dataset_path or settings.probe_images > 1) and metrics.is_file():
            records = read_metrics(metrics)
            done = any("evaluation" in record and record.get("iteration") == iteration for record in records)
    return all_gather_objects(done)[0]


def evaluation_size(config: Config) -> tuple[int, int]:
    """Height and width of the images that the teacher is evaluated on."""
    return as_pair(config.evaluation.image_size or config.crops.global_crops_size)


def open_evaluation_sets(
    settings: EvaluationOptions,
    image_size: tuple[int, int],
    value_range: ValueRange | None = None,
    preprocessing: Chain = Chain(),
) -> tuple[ImageDataset, ImageDataset] | None:
    """Opens the labelled bank and the images to classify; None where ``evaluation`` names none.

    Args:
        settings: names them.
        image_size: height and width of images.
        value_range: of the training images, for sets whose string names none.
        preprocessing: of the training images.

    Raises:
        FileNotFoundError, ValueError: when a set is missing or wrong, lacks labels, or has other classes than the
            other.
    """
    if not settings.train_dataset_path:
        return None
    transform = make_eval_transform(image_size, whole_image=settings.whole_image)
    bank = make_dataset(
        dataset_str=settings.train_dataset_path,
        transform=transform,
        value_range=value_range,
        preprocessing=preprocessing,
    )
    queries = make_dataset(
        dataset_str=settings.val_dataset_path,
        transform=transform,
        value_range=value_range or bank.value_range,
        preprocessing=preprocessing,
    )
    common_classes(bank, queries)
    warn_of_shared_images({"evaluation.train": bank, "evaluation.val": queries})
    return bank, queries


def save_teacher(
    model: SSLMetaArch,
    folder: Path,
    options: str = "",
    value_range: ValueRange | None = None,
    light: str = "original",
    preprocessing: Chain = Chain(),
    *,
    check_folder: Callable[[], None] = lambda: None,
) -> Path:
    """Writes the whole teacher, backbone and heads, as ``{"teacher": state dict}`` into one file, with its checksum.

    Args:
        model: the method; its teacher may be sharded.
        folder: of the file, made if need be.
        check_folder: called before anything is written; an `OSError` counts as one of writing.
        options: of the run, as YAML; kept under ``config``, so that whoever loads the file can build the network.
        value_range: of the images that were trained on; kept under ``value_range``, so that others are read alike.
        light: of these, ``original`` or ``standardized``; kept likewise.
        preprocessing: of these; kept likewise.

    Raises:
        OSError: the file cannot be written; raised by all processes together.
    """
    release_gathered_parameters(model.teacher)
    content: dict[str, Any] = {"teacher": full_state_dict(model.teacher)} | ({"config": options} if options else {})
    if value_range is not None:
        content["value_range"] = value_range.ends
    if light != "original":
        content["light"] = light
    if preprocessing.steps:
        content["preprocessing"] = preprocessing.to_values()
    path = folder / TEACHER_FILE

    def write() -> None:
        for place in (folder.parent, folder):  # and not the run's folder
            place.mkdir(exist_ok=True)
        write_with_checksum(path, lambda file: torch.save(content, file))

    write_on_main(write, f"the teacher {path}", check_folder=check_folder)
    return path


def write_on_main(write: Callable[[], object], what: str, *, check_folder: Callable[[], None] = lambda: None) -> None:
    """Lets the main process write, after a look at the run's folder; all processes call it.

    Raises:
        OSError: it cannot be written; raised by all processes together.
    """
    fault = ""
    if is_main_process():
        try:
            check_folder()
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
        All metrics, the same in every process; None when no sets are named.

    Raises:
        ValueError: an image cannot be read, or features are not finite; raised by all processes together.
    """
    sets = open_evaluation_sets(config.evaluation, evaluation_size(config), preprocessing=named_preprocessing(config))
    if sets is None:
        return None
    try:
        with random_state_untouched():
            return evaluate_backbone(config, model.teacher_backbone, sets, device, weights=weights)
    finally:
        model.train()
        release_gathered_parameters(model.teacher)


def evaluate_backbone(
    config: Config,
    backbone: nn.Module,
    sets: tuple[ImageDataset, ImageDataset],
    device: torch.device,
    *,
    weights: str,
) -> EvaluationResults:
    """Scores a backbone by k-NN as the options of ``config.evaluation`` say; see `evaluate_teacher`."""
    settings = config.evaluation
    return eval_knn(
        backbone,
        *sets,
        nb_knn=settings.nb_knn,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        num_workers=config.train.num_workers,
        device=device,
        features=settings.features,
        num_resamples=0,
        image_statistics=False,
        seed=config.train.seed,
        weights=weights,
        settings={
            "image_size": list(evaluation_size(config)),
            "whole_image": settings.whole_image,
            "train_dataset": settings.train_dataset_path,
            "val_dataset": settings.val_dataset_path,
        },
    )


def flat_metrics(results: EvaluationResults) -> dict[str, float]:
    """One entry per metric: ``knn_{image|part}_{metric}_k{k}``."""
    return {
        f"knn_{level}_{name}_{variant.replace('=', '')}": scored.metrics[name].value
        for variant, scores in results.scores.items()
        for level, scored in (("image", scores.image), ("part", scores.part))
        for name in LOGGED_METRICS
        if name in scored.metrics
    }


@contextmanager
def random_state_untouched() -> Iterator[None]:
    """A run with evaluation draws the same numbers as one without."""
    state = RandomState()
    before = state.state_dict()
    try:
        yield
    finally:
        state.load_state_dict(before)


@dataclass(frozen=True)
class BestTeacher:
    """Content of ``best.json``.

    Attributes:
        iteration: after which the teacher was taken.
        metric: that decided, such as ``part_auroc``, the mean over all k, or ``part_auroc_k10``.
        score: its value; more is better.
        teacher: the file of this teacher among all those of the run, relative to the run's folder.
    """

    iteration: int
    metric: str
    score: float
    teacher: str


def tie_breaker(metrics: Mapping[str, float], name: str) -> float:
    """What decides between teachers that a metric holds equal; of those still equal the later one is the best.

    It is the balanced accuracy, or the accuracy where that is the metric itself, of the same images or parts, as the
    mean over all k; 0 where there is none.
    """
    level, _, rest = name.partition("_")
    second = "accuracy" if rest.startswith("balanced_accuracy") else "balanced_accuracy"
    found = score_of(metrics, f"{level}_{second}")
    return 0.0 if found is None else found[1]


def check_best_metric(metric: str) -> None:
    """Checks ``evaluation.best_metric``.

    Raises:
        ConfigError: it names no metric of k-NN.
    """
    match = re.fullmatch(r"(image|part)_(?P<name>[a-z0-9_]+?)(_k(?P<k>\d+))?", metric)
    if metric and (match is None or match["name"] not in LOGGED_METRICS):
        raise ConfigError(
            f"evaluation.best_metric={metric!r} must be image_ or part_ and one of {', '.join(LOGGED_METRICS)}, with "
            f"_k and a number of neighbours or without, such as part_auroc or image_accuracy_k10"
        )


def keep_best(
    folder: Path, teacher: Path, iteration: int, metrics: Mapping[str, float], *, metric: str = ""
) -> BestTeacher | None:
    """Keeps a teacher if it is better than the best so far, which is read back from ``best.json``.

    The file, and its checksum if it has one, are linked where the file system can, and copied elsewhere; a crash leaves
    the former best or the new one. Only the main process may call it.

    Args:
        folder: ``OUT/eval/best``.
        teacher: the teacher's file, ``OUT/eval/training_{iteration}/teacher_checkpoint.pth``.
        iteration: after which it was taken.
        metrics: its scores.
        metric: see `score_of`.

    Returns:
        The best teacher now, None where there is no metric to compare by.
    """
    found = score_of(metrics, metric)
    if found is None:
        if metrics:
            logger.warning(
                "no best teacher is kept: evaluation.best_metric=%s names none of the metrics %s",
                metric or " or ".join(DEFAULT_METRICS),
                ", ".join(name.removeprefix("knn_") for name in metrics),
            )
        return None
    name, score = found
    former, path = read_best(folder), folder.parents[1] / METRICS_FILE
    records = read_metrics(path) if path.is_file() else []
    if former is None and (folder / TEACHER_FILE).is_file():  # somebody, or a fault, took its record away
        former = mend_best(folder, records, metric)
    if former is not None and former.metric == name and former.iteration < iteration:
        known = _recorded_scores(records, metric, iteration).get(former.iteration)
        second = tie_breaker(metrics, name)
        former_second = second if known is None else known[2]
        if (former.score, former_second) > (score, second):
            return former
    best = BestTeacher(iteration, name, score, str(teacher.relative_to(folder.parents[1])))
    folder.mkdir(exist_ok=True)
    _put_best(folder, best)
    logger.info("best teacher so far: %s %.4f after iteration %d, kept in %s", name, score, iteration, folder)
    return best


def _put_best(folder: Path, best: BestTeacher) -> None:
    """Brings a teacher and its record into ``eval/best``.

    All that needs room on the disk comes first, so that a full one leaves the former best. Then the former record goes
    before its teacher: a crash between the two leaves none, and never that of another teacher; likewise the checksum.
    """
    teacher, target = folder.parents[1] / best.teacher, folder / TEACHER_FILE
    new = temporary_path(target)

    def place() -> None:
        try:
            _link_or_copy(teacher, new)
            has_checksum = sidecar(teacher).is_file()
            if has_checksum:
                _link_or_copy(sidecar(teacher), sidecar(new))
            (folder / BEST_FILE).unlink(missing_ok=True)
            sidecar(target).unlink(missing_ok=True)
            os.replace(new, target)
            if has_checksum:
                os.replace(sidecar(new), sidecar(target))
        finally:
            remove_with_checksum(new)

    text = json.dumps(asdict(best), indent=2) + "\n"
    write_atomically(folder / BEST_FILE, lambda file: file.write(text.encode()), before_naming=place)


def _link_or_copy(source: Path, target: Path) -> None:
    """Makes ``target``, a new name, the same file as ``source``, or a copy of it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_best(folder: Path) -> BestTeacher | None:
    """Reads ``best.json``; None where there is none, or none that can be read, or its teacher is missing."""
    try:
        values = json.loads((folder / BEST_FILE).read_text(encoding="utf-8"))
        best = BestTeacher(int(values["iteration"]), values["metric"], float(values["score"]), values["teacher"])
        return best if (folder / Path(best.teacher).name).is_file() else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def mend_best(
    folder: Path, records: Iterable[Mapping[str, Any]], metric: str = "", *, before: float = math.inf
) -> BestTeacher | None:
    """The best teacher so far; where its record or file is damaged, missing or void, it is found anew, with loud lines.

    Without that, whatever is evaluated next would be the best. Only the main process may call it.

    Args:
        folder: ``OUT/eval/best``.
        records: of the run's metrics file.
        metric: see `score_of`.
        before: iteration from which on evaluations are void, because the run starts from there again.

    Returns:
        None where there is none, or none that can still be told; the next one that is evaluated is the best then.

    Raises:
        OSError: it cannot be written.
    """
    if not os.path.lexists(folder / BEST_FILE) and not (folder / TEACHER_FILE).is_file():
        return None
    best, scores = read_best(folder), _recorded_scores(records, metric, before)
    is_void = best is not None and best.iteration >= before
    if not is_void:
        fault = _best_fault(folder, best, scores)
        if not fault:
            return best
        logger.error("%s: %s. The best teacher is found anew from %s", folder, fault, METRICS_FILE)
    found, found_second = None, 0.0
    for iteration, scored in sorted(scores.items()):
        if found is not None and (found.score, found_second) > scored[1:]:
            continue
        teacher = evaluation_folder(folder.parents[1], iteration) / TEACHER_FILE
        if fault := shown_fault(teacher) or ("" if teacher.is_file() else "is missing"):
            logger.error("%s %s: it cannot be the best", teacher, fault)
            continue
        found = BestTeacher(iteration, *scored[:2], str(teacher.relative_to(folder.parents[1])))
        found_second = scored[2]
    if found is None:
        (folder / BEST_FILE).unlink(missing_ok=True)
        if not is_void:
            logger.error("which teacher was the best cannot be told: the next one that is evaluated is the best then")
        return None
    _put_best(folder, found)
    logger.warning("best teacher: %s %.4f after iteration %d", found.metric, found.score, found.iteration)
    return found


def _recorded_scores(
    records: Iterable[Mapping[str, Any]], metric: str, before: float
) -> dict[int, tuple[str, float, float]]:
    """Name and value of the metric that decides, and what decides between equals, by iteration, as far as recorded."""
    scores = {}
    for record in records:
        iteration, metrics = record.get("iteration"), record.get("evaluation")
        if isinstance(iteration, int) and iteration < before and isinstance(metrics, Mapping):
            numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            if (scored := score_of(numbers, metric)) is not None:
                scores[iteration] = (*scored, tie_breaker(numbers, scored[0]))
    return scores


def _best_fault(folder: Path, best: BestTeacher | None, scores: Mapping[int, tuple[str, float, float]]) -> str:
    """What is wrong with ``eval/best``; empty when it is good, or nothing tells."""
    if best is None:
        return f"{BEST_FILE} is missing or damaged, or has no teacher"
    name, score, _ = scores.get(best.iteration, (best.metric, best.score, 0.0))
    if name != best.metric:
        return f"{BEST_FILE} is about {best.metric!r:.80}, and {name} decides"
    if not math.isclose(score, best.score):
        return f"{BEST_FILE} says {best.score} after iteration {best.iteration}, measured was {score}"
    if best.teacher != f"eval/training_{best.iteration}/{TEACHER_FILE}":
        return f"{BEST_FILE} names {best.teacher!r:.80} as the teacher of iteration {best.iteration}"
    if fault := shown_fault(folder / TEACHER_FILE):
        return f"{TEACHER_FILE} {fault}"
    return ""
