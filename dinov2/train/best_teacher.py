"""The best teacher so far by probe k-NN, kept apart: ``eval/best/teacher_checkpoint.pth`` and ``best.json``."""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dinov2.utils.checksums import sidecar
from dinov2.utils.files import write_text_atomically

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
