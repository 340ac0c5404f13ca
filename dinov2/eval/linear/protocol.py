"""How linear classifiers are trained and chosen."""

from dataclasses import dataclass
from typing import Any

from dinov2.eval.linear.classifiers import LEARNING_RATES, N_LAST_BLOCKS, ClassifierSettings, classifier_grid
from dinov2.eval.linear.scoring import METRICS
from dinov2.eval.linear.training import CLASS_WEIGHTINGS
from dinov2.eval.part_scores import check_aggregation
from dinov2.eval.scoring import check_num_resamples

LEAST_EPOCH_LENGTH = 400


@dataclass(frozen=True, kw_only=True)
class LinearProtocol:
    """What decides the figures of a linear evaluation, beside the backbone and the images.

    Attributes:
        learning_rates: of the grid, for 256 images per step.
        n_last_blocks: of the grid; every number is tried with and without the mean patch token.
        epochs: how many.
        epoch_length: iterations of an epoch (published: 1250); by default one pass over the training set, at least 400
            iterations, as the few steps of a small set would leave the classifiers near where they started.
        eval_period_iterations: iterations between two looks at the validation set, each with a checkpoint; by default
            an epoch.
        batch_size: images of a step per process.
        class_weighting: ``none``, or ``balanced`` so that rare classes count as much as frequent ones.
        val_metric: by which the best classifier is chosen, see `METRICS`.
        part_aggregation: how a part joins its photos, see `score_parts`.
        part_top_k: photos that count with ``topk_mean``.
        num_resamples: resamples of parts behind the intervals; 0 for none.
        seed: of initial weights, order, augmentation and resamples.

    Raises:
        ValueError: for values out of range.

    Reference: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", section B.3.
    """

    learning_rates: tuple[float, ...] = LEARNING_RATES
    n_last_blocks: tuple[int, ...] = N_LAST_BLOCKS
    epochs: int = 10
    epoch_length: int | None = None
    eval_period_iterations: int | None = None
    batch_size: int = 128
    class_weighting: str = "none"
    val_metric: str = "accuracy"
    part_aggregation: str = "max"
    part_top_k: int = 3
    num_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        classifier_grid(self.learning_rates, self.n_last_blocks)
        check_aggregation(self.part_aggregation, self.part_top_k)
        for name in ("epochs", "epoch_length", "eval_period_iterations", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")
        check_num_resamples(self.num_resamples)
        for name, allowed in (("class_weighting", CLASS_WEIGHTINGS), ("val_metric", METRICS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}")

    @property
    def grid(self) -> tuple[ClassifierSettings, ...]:
        """The classifiers."""
        return classifier_grid(self.learning_rates, self.n_last_blocks)

    def length_of_epoch(self, num_images: int, global_batch_size: int) -> int:
        """Iterations of an epoch over so many images."""
        if self.epoch_length is not None:
            return self.epoch_length
        return max(-(-num_images // global_batch_size), LEAST_EPOCH_LENGTH)

    def judging(self) -> dict[str, Any]:
        """What decides how trained classifiers are chosen and scored, as plain values."""
        names = ("val_metric", "part_aggregation", "part_top_k", "num_resamples", "seed")
        return {name: getattr(self, name) for name in names}
