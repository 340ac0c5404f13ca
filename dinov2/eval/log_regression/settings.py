"""Settings of the logistic regression on frozen features."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from dinov2.eval.features import Features
from dinov2.eval.few_shot import check_few_shot
from dinov2.eval.metrics import FloatArray
from dinov2.eval.part_scores import check_aggregation
from dinov2.eval.scoring import Scores, check_num_resamples, score_predictions

ALL = -1  # in place of a number of images per class
C_GRID = tuple(10 ** (-6 + 11 * step / 44) for step in range(45))  # as published
METRICS = ("log_loss", "auroc", "average_precision", "balanced_accuracy", "accuracy")
TWO_CLASS_METRICS = ("auroc", "average_precision")
CLASS_WEIGHTINGS = ("none", "balanced")
TRAIN_DTYPES = ("float64", "float32")


@dataclass(frozen=True, kw_only=True)
class LogRegressionSettings:
    """Everything but the features that decides the figures.

    Attributes:
        cs: inverse strengths of the L2 penalty to choose from, kept from small to large.
        metric: what the held-out parts judge: one of `METRICS`; empty for ``auroc`` with two classes and ``log_loss``
            with more, see `choose_c`.
        hold_out_fraction: of the parts of each class, see `hold_out_parts`.
        hold_out_repeats: how often parts are held out.
        fallback_c: used where no part can be held out. 0.001 was best with 2 to 8 images of each of two classes, whose
            384 features a larger C overfits; a smaller one ranks alike, with probabilities that say nothing.
        class_weighting: ``balanced`` gives each class the same total weight; with ``none`` every image has the same.
        max_iter: of L-BFGS, per fit.
        train_dtype: precision of the fit; ``float32`` needs half the memory and time.
        n_per_class_list: images per class of few-shot training sets; -1 for the whole set.
        n_tries: few-shot training sets per number, drawn with seeds 0, 1, ….
        part_aggregation: how a part joins its photos, see `score_parts`.
        part_top_k: photos that count with ``topk_mean``.
        num_resamples: of the judged parts, behind the intervals; 0 gives none.
        seed: of the parts that are held out, and of the resamples.
    """

    cs: tuple[float, ...] = C_GRID
    metric: str = ""
    hold_out_fraction: float = 0.2
    hold_out_repeats: int = 5
    fallback_c: float = 1e-3
    class_weighting: str = "none"
    max_iter: int = 1000
    train_dtype: str = "float64"
    n_per_class_list: tuple[int, ...] = (ALL,)
    n_tries: int = 5
    part_aggregation: str = "max"
    part_top_k: int = 3
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.cs or not all(_is_strength(c) for c in self.cs):
            raise ValueError(f"cs must be one or more finite numbers above 0, found {self.cs}")
        if not _is_strength(self.fallback_c):
            raise ValueError(f"fallback_c must be finite and above 0, found {self.fallback_c}")
        if not 0 < self.hold_out_fraction < 1:
            raise ValueError(f"hold_out_fraction must be between 0 and 1, found {self.hold_out_fraction}")
        for name in ("hold_out_repeats", "max_iter"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}")
        check_few_shot(self.n_per_class_list, self.n_tries)
        check_aggregation(self.part_aggregation, self.part_top_k)
        check_num_resamples(self.num_resamples)
        object.__setattr__(self, "cs", tuple(sorted(set(self.cs))))

    def metric_for(self, num_classes: int) -> str:
        """The metric that chooses C among so many classes.

        Raises:
            ValueError: for a metric that exists for two classes only.
        """
        if not self.metric:
            return "auroc" if num_classes == 2 else "log_loss"
        if num_classes != 2 and self.metric in TWO_CLASS_METRICS:
            raise ValueError(f"{self.metric} exists for two classes; to choose C among {num_classes}, take log_loss")
        return self.metric

    def score(self, probabilities: FloatArray, features: Features, *, intervals: bool = True) -> Scores:
        """Scores class probabilities ``[N, C]`` of the images."""
        return score_predictions(
            probabilities,
            features.labels.numpy(),
            features.group_ids,
            aggregation=self.part_aggregation,
            top_k=self.part_top_k,
            num_resamples=self.num_resamples if intervals else 0,
            seed=self.seed,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the results."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


ALLOWED = {"metric": ("", *METRICS), "class_weighting": CLASS_WEIGHTINGS, "train_dtype": TRAIN_DTYPES}


def _is_strength(c: float) -> bool:
    return math.isfinite(c) and c > 0
