"""What a run shows people: validation photos after every epoch, and curves, confusion and worst cases at the end."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dinov2.tasks.judging import Case, Verdict
from dinov2.tasks.package import TaskPackage
from dinov2.tasks.plots import draw_confusion_matrix, plot_training
from dinov2.tasks.prediction_grid import draw_grid, draw_worst

EPOCH_FOLDER = "valid_preds"
PLOTS_FOLDER = "plots"
# The pictures that people look for first, under the names that they look for.
TITLES = {"classification": {"image_accuracy": "accuracy"}, "segmentation": {"mean_iou": "miou"}}


def draw_epoch(output_dir: Path, epoch: int, verdict: Verdict, package: TaskPackage) -> None:
    """Writes ``valid_preds/epoch_0003.png``: photos spread over val with truth and prediction."""
    if verdict.shown:
        path = output_dir / EPOCH_FOLDER / f"epoch_{epoch:04d}.png"
        heading = f"after epoch {epoch}"
        draw_grid(*_rows(verdict, verdict.shown), path, classes=package.classes, heading=heading)


def draw_end(
    output_dir: Path,
    records: Iterable[Mapping[str, Any]],
    verdicts: Mapping[str, Verdict],
    package: TaskPackage,
    *,
    steps_per_epoch: int,
    best_epoch: int,
) -> list[Path]:
    """Writes ``plots/``: loss and figures over epochs, confusion and worst cases of every judged set.

    Args:
        output_dir: folder of the run.
        records: of ``metrics.jsonl``.
        verdicts: by set, such as ``val`` and ``test``.
        package: of the model that was judged.
        steps_per_epoch: to find the epoch of a record.
        best_epoch: is marked in the curves.

    Returns:
        The files written.
    """
    folder = output_dir / PLOTS_FOLDER
    epochs = by_epoch(records, steps_per_epoch)
    best = best_epoch if best_epoch > 0 else None
    written = plot_training(epochs, folder, best_epoch=best, titles=TITLES.get(package.task))
    for name, verdict in verdicts.items():
        confusion = verdict.judge.confusion()
        if confusion:
            written.append(folder / f"{name}_confusion_matrix.png")
            draw_confusion_matrix(confusion, package.classes, written[-1])
        if verdict.worst:
            written.append(folder / f"{name}_worst_cases.png")
            wrongness = [case.wrongness for case in verdict.worst]
            draw_worst(*_rows(verdict, verdict.worst), wrongness, written[-1], classes=package.classes)
    return written


def by_epoch(records: Iterable[Mapping[str, Any]], steps_per_epoch: int) -> list[dict[str, Any]]:
    """One record per epoch: the mean of its losses, and the figures of its evaluation.

    Args:
        records: of ``metrics.jsonl``: reports of some steps, and evaluations.
        steps_per_epoch: steps that count as one epoch; step 0 is in epoch 1.
    """
    losses: dict[int, dict[str, list[float]]] = {}
    evaluations: dict[int, Mapping[str, Any]] = {}
    for record in records:
        epoch = math.ceil((record["iteration"] + 1) / steps_per_epoch)
        if "evaluation" in record:
            evaluations[epoch] = record["evaluation"]
            continue
        for name, value in record.items():
            if name.endswith("loss") and value is not None:
                losses.setdefault(epoch, {}).setdefault(name, []).append(value)
    return [
        {
            "epoch": epoch,
            "train": {name: sum(values) / len(values) for name, values in losses.get(epoch, {}).items()},
            "val": dict(evaluations.get(epoch, {})),
        }
        for epoch in sorted(losses.keys() | evaluations.keys())
    ]


def _rows(verdict: Verdict, cases: Sequence[Case]) -> tuple[list[Any], list[Any], list[Any]]:
    """Photos, truths and predictions of some cases."""
    judge = verdict.judge
    return (
        [judge.dataset.get_image(judge.photo_of(case.index)) for case in cases],
        [judge.truth(case.index) for case in cases],
        [case.prediction for case in cases],
    )
