"""How good each of many linear classifiers is on a labelled set, and which is best."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dinov2.eval.features import Features
from dinov2.eval.linear.classifiers import ClassifierSettings, ClassifierStack
from dinov2.eval.metrics import FloatArray, IntArray, classification_figures
from dinov2.eval.scoring import Scores, score_predictions

METRICS = ("accuracy", "balanced_accuracy", "auroc", "average_precision")
ROWS_AT_A_TIME = 8192


@dataclass(frozen=True, eq=False)
class JudgedSet:
    """Features of a labelled set, and what its labels mean to the classifiers.

    Attributes:
        features: with all labels.
        classes: of the labels.
        class_mapping: ``[len(classes)]``, the classifiers' class that stands for each; None where they are the same.
    """

    features: Features
    classes: tuple[str, ...]
    class_mapping: IntArray | None = None

    @property
    def labels(self) -> IntArray:
        """``[N]``."""
        return np.asarray(self.features.labels.numpy(), dtype=np.int64)


def probabilities_of(stack: ClassifierStack, place: int, judged: JudgedSet) -> FloatArray:
    """Class probabilities ``[N, C]`` of one classifier, over the classes of the set; NaN where it has diverged."""
    device = stack.weight.device
    mapping = None if judged.class_mapping is None else torch.from_numpy(judged.class_mapping)
    chunks = []
    for rows in judged.features.embeddings.split(ROWS_AT_A_TIME):
        logits = stack.logits_of(place, rows.to(device)).cpu()
        chunks.append((logits if mapping is None else logits[:, mapping]).double().softmax(dim=1))
    return np.asarray(torch.cat(chunks).numpy())


def judge_all(
    stacks: Sequence[ClassifierStack], judged: JudgedSet
) -> Iterator[tuple[ClassifierSettings, FloatArray | None]]:
    """Every classifier with its probabilities ``[N, C]``; None for one that has diverged."""
    for stack in stacks:
        for place, settings in enumerate(stack.settings):
            probabilities = probabilities_of(stack, place, judged)
            yield settings, probabilities if np.isfinite(probabilities).all() else None


def best_of(stacks: Sequence[ClassifierStack], judged: JudgedSet, metric: str) -> tuple[str, float]:
    """Name and figure of the classifier with the largest metric over images; of equal ones the first.

    Raises:
        ValueError: when all have diverged.
    """
    figures = {
        settings.name: classification_figures(probabilities, judged.labels)[metric]
        for settings, probabilities in judge_all(stacks, judged)
        if probabilities is not None
    }
    best = choose(figures)
    return best, figures[best]


def score_all(
    stacks: Sequence[ClassifierStack], judged: JudgedSet, *, aggregation: str, top_k: int
) -> tuple[dict[str, Scores], list[str]]:
    """Scores of every classifier, without intervals, and the names of those that have diverged and have none."""
    scores, diverged = {}, []
    for settings, probabilities in judge_all(stacks, judged):
        if probabilities is None:
            diverged.append(settings.name)
            continue
        scores[settings.name] = score_predictions(
            probabilities,
            judged.labels,
            judged.features.group_ids,
            aggregation=aggregation,
            top_k=top_k,
            num_resamples=0,
        )
    return scores, diverged


def choose(figures: Mapping[str, float]) -> str:
    """Name of the largest figure; of equal ones the first.

    Raises:
        ValueError: when there is none.
    """
    if not figures:
        raise ValueError("every classifier has diverged: lower the learning rates")
    return max(figures, key=lambda name: figures[name])


def check_metric(metric: str, classes: Sequence[str], labels: IntArray) -> None:
    """Checks that a metric exists on the set by which the best classifier is chosen.

    Raises:
        ValueError: for an unknown metric, or one that needs two classes that both occur.
    """
    if metric not in METRICS:
        raise ValueError(f"the metric {metric!r} is not one of {', '.join(METRICS)}")
    if metric in ("auroc", "average_precision") and (len(classes) != 2 or len(np.unique(labels)) != 2):
        raise ValueError(
            f"{metric} needs two classes that both occur in the validation set; it shows "
            f"{len(np.unique(labels))} of {len(classes)}: choose by accuracy or balanced_accuracy"
        )
