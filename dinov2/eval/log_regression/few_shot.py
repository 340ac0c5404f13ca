"""Logistic regression with a few labelled images per class, drawn several times."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dinov2.distributed import is_main_process
from dinov2.eval.features import Features
from dinov2.eval.few_shot import few_shot_subset
from dinov2.eval.log_regression.search import FittedLogRegression, fit_log_regression
from dinov2.eval.log_regression.settings import LogRegressionSettings
from dinov2.eval.neighbour_votes import select_rows
from dinov2.eval.progress import report_progress
from dinov2.eval.scoring import Scores

logger = logging.getLogger("dinov2")


@dataclass(frozen=True, eq=False)
class Tries:
    """Fits to several subsets of one size.

    Attributes:
        n_per_class: images per class.
        fits: one per subset.
        scores: per judged set, of every fit.
    """

    n_per_class: int
    fits: tuple[FittedLogRegression, ...]
    scores: Mapping[str, tuple[Scores, ...]]

    @property
    def variant(self) -> str:
        """Name in the results."""
        return f"n={self.n_per_class}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values on the fits."""
        return {
            "c": [fitted.model.c for fitted in self.fits],
            "chosen_by": [fitted.choice.chosen_by for fitted in self.fits],
            "num_fits": sum(fitted.num_fits for fitted in self.fits),
            "num_not_converged": sum(fitted.num_not_converged for fitted in self.fits),
        }


def few_shot_tries(
    train: Features,
    judged: Mapping[str, Features],
    classes: tuple[str, ...],
    n_per_class: int,
    settings: LogRegressionSettings,
) -> Tries:
    """Fits to seeded subsets of the training set, each with its own choice of C, and scores them on the judged sets.

    Parts are held out of the subset alone; where it has too few, as with one image per class, C is the fallback, which
    the log says.

    Args:
        train: labelled features of at least two classes.
        judged: sets by name.
        classes: names.
        n_per_class: images per class, all of a class that has no more.
        settings: of the fits, and how many tries.
    """
    fits = []
    scores: dict[str, list[Scores]] = {name: [] for name in judged}
    name = f"few-shot n={n_per_class}"
    for seed in report_progress(range(settings.n_tries), name, 1, settings.n_tries):
        subset = select_rows(train, few_shot_subset(train.labels, n_per_class, seed))
        fitted = fit_log_regression(subset, classes, settings)
        fits.append(fitted)
        for key, features in judged.items():
            probabilities = fitted.model.probabilities(features.embeddings.numpy())
            scores[key].append(settings.score(probabilities, features, intervals=False))
    tries = Tries(n_per_class, tuple(fits), {key: tuple(scored) for key, scored in scores.items()})
    if is_main_process():
        logger.info("%s", _describe(tries))
    return tries


def _describe(tries: Tries) -> str:
    described = tries.as_dict()
    cs = ", ".join(f"{c:.3g}" for c in described["c"])
    ways = " or ".join(dict.fromkeys(described["chosen_by"]))
    return (
        f"few-shot {tries.variant}: C = {cs} (by {ways}); "
        f"{described['num_not_converged']} of {described['num_fits']} fits did not converge"
    )
