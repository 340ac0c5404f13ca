"""A few labelled images per class, drawn several times: what labels an engineer has, and how much luck counts."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from dinov2.eval.metrics import Figure
from dinov2.eval.scoring import LevelScores, Scores


def few_shot_subset(labels: Tensor, n_per_class: int, seed: int) -> Tensor:
    """Draws the same number of images of every class that occurs; the draws are those of upstream.

    Args:
        labels: ``[N]`` int64.
        n_per_class: images per class; all of a class that has no more.
        seed: of the draw.

    Returns:
        Indices of the drawn images, class after class, int64.

    Raises:
        ValueError: for fewer than one image per class.
    """
    if n_per_class < 1:
        raise ValueError(f"the number of images per class must be at least 1, found {n_per_class}")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        drawn.append(members[torch.randperm(len(members), generator=generator)[:n_per_class]])
    return torch.cat(drawn)


def check_few_shot(n_per_class_list: Sequence[int], n_tries: int) -> None:
    """Raises ValueError unless every number of images per class is -1 (all) or from 1 up, and there is a try."""
    wrong = [number for number in n_per_class_list if number != -1 and number < 1]
    if wrong or not n_per_class_list:
        raise ValueError(f"n_per_class_list takes numbers from 1 up, or -1 for all images, found {n_per_class_list}")
    if n_tries < 1:
        raise ValueError(f"n_tries must be at least 1, found {n_tries}")


def mean_scores(tries: Sequence[Scores]) -> Scores:
    """The mean figures of several tries, each over the tries that have it; without intervals and confusion."""
    return Scores(
        image=_mean_level([scores.image for scores in tries]), part=_mean_level([scores.part for scores in tries])
    )


def summarise_tries(tries: Sequence[Scores]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and spread of the figures of several tries.

    Returns:
        Per level (``image``, ``part``) and figure: ``mean``, ``std`` (of a sample; 0 for one try) and the ``values``
        of the tries that have it.
    """
    levels = {"image": [scores.image for scores in tries], "part": [scores.part for scores in tries]}
    return {
        level: {
            name: {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0, "values": values}
            for name, values in _values(scored).items()
        }
        for level, scored in levels.items()
    }


def _mean_level(tries: Sequence[LevelScores]) -> LevelScores:
    figures = {name: Figure(value=fmean(values)) for name, values in _values(tries).items()}
    return LevelScores(count=tries[0].count, figures=figures)


def _values(tries: Sequence[LevelScores]) -> dict[str, list[float]]:
    """By figure, the values of the tries that have it."""
    names = dict.fromkeys(name for scores in tries for name in scores.figures)
    return {name: [scores.figures[name].value for scores in tries if name in scores.figures] for name in names}
