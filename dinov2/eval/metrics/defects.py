"""How well a map of defect scores finds defects: pixel by pixel, image by image, and part by part."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.eval.metrics.classification import Scores, score_predictions
from dinov2.eval.metrics.streaming import Array, Pixels, StreamedMetric, as_images, check_same_size

LARGEST_LOG_ODDS = 17.0  # float32 numbers below 1 reach log-odds of 16.6
PIXELS_AT_A_TIME = 1 << 24


class PixelDefectMetrics(StreamedMetric):
    """AUROC and average precision over all pixels of a set, in the memory of two histograms.

    Scores fall into bins of equal width in log-odds: most pixels of a good part score next to 0, where bins of equal
    width in the score would put all of them, and the missed defects, into one. Both figures depend on the order of the
    scores alone, so only the order *within* a bin is lost: pixels of one bin count as equal. `bounds` tells how far the
    exact figures can lie from those given; with 16,384 bins and scores of a trained network that is some 0.0002.

    Pixels whose truth is 255 do not count; all other classes but 0 are defects.

    Args:
        num_bins: how many, at least 2; a bin takes 16 bytes.

    Raises:
        ValueError: ``num_bins`` is below 2.
    """

    def __init__(self, *, num_bins: int = 16_384) -> None:
        if num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, found {num_bins}")
        self.num_bins = num_bins
        zeros = np.zeros(num_bins, dtype=np.int64)
        super().__init__(sums={"good_pixels": zeros, "defect_pixels": zeros}, rows={})

    def update(self, scores: Pixels, masks: Pixels) -> None:
        """Adds images.

        Args:
            scores: how likely each pixel is a defect, in [0, 1], ``[H, W]`` or ``[B, H, W]``.
            masks: true classes of the same shape, 255 where there is none.

        Raises:
            ValueError: the shapes differ, or a score is not in [0, 1].
        """
        maps, truth = _checked(scores, masks)
        flat_maps, flat_truth = maps.reshape(-1), truth.reshape(-1)
        for start in range(0, len(flat_maps), PIXELS_AT_A_TIME):
            piece = slice(start, start + PIXELS_AT_A_TIME)
            bins = self._bins(flat_maps[piece])
            for name, counted in (
                ("good_pixels", flat_truth[piece] == 0),
                ("defect_pixels", (flat_truth[piece] != 0) & (flat_truth[piece] != IGNORED)),
            ):
                self.add(name, np.bincount(bins[counted], minlength=self.num_bins))

    def compute(self) -> dict[str, float]:
        """``pixel_auroc`` and ``pixel_average_precision`` in [0, 1], where there are good and defective pixels."""
        good, defect = self.total("good_pixels"), self.total("defect_pixels")
        if not (good.any() and defect.any()):
            return {}
        labels = np.repeat([0, 1], self.num_bins)
        scores = np.tile(np.arange(self.num_bins), 2)
        weights = np.concatenate([good, defect])
        return {
            "pixel_auroc": float(roc_auc_score(labels, scores, sample_weight=weights)),
            "pixel_average_precision": float(average_precision_score(labels, scores, sample_weight=weights)),
        }

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Least and greatest values that the exact figures can have, by the names of `compute`."""
        figures = self.compute()
        if not figures:
            return {}
        # From the highest score down.
        good = self.total("good_pixels")[::-1].astype(np.float64)
        defect = self.total("defect_pixels")[::-1].astype(np.float64)
        found, alarms = defect.cumsum(), good.cumsum()
        undecided = float((good * defect).sum() / (good.sum() * defect.sum()) / 2)
        # At worst a bin's defects come behind its good pixels, one after the other; at best all at once before them.
        worst = _sum_of_precisions(found - defect, defect, alarms)
        best = float((defect * found / np.maximum(found + alarms - good, 1)).sum())
        return {
            "pixel_auroc": (figures["pixel_auroc"] - undecided, figures["pixel_auroc"] + undecided),
            "pixel_average_precision": (worst / float(defect.sum()), best / float(defect.sum())),
        }

    def _bins(self, scores: Array) -> npt.NDArray[np.int64]:
        log_odds = torch.from_numpy(scores.astype(np.float64)).logit().clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
        numbers = ((log_odds + LARGEST_LOG_ODDS) * (self.num_bins / (2 * LARGEST_LOG_ODDS))).long()
        return np.asarray(numbers.clamp_max(self.num_bins - 1).numpy())


class ImageDefectMetrics(StreamedMetric):
    """Whether images, and the parts that they show, are found to have any defect.

    The score of an image is the highest of its pixels, that of a part the highest of its images; an image is defective
    when any of its pixels is. Pixels whose truth is 255 count in neither, and an image that has no other is left out.
    """

    def __init__(self) -> None:
        super().__init__(
            sums={"images_without_truth": np.zeros((), dtype=np.int64)},
            rows={
                "scores": np.zeros(0),
                "defective": np.zeros(0, dtype=np.int64),
                "group_ids": np.zeros(0, dtype=np.str_),
            },
        )

    def update(self, scores: Pixels, masks: Pixels, group_ids: Sequence[str]) -> None:
        """Adds images.

        Args:
            scores: how likely each pixel is a defect, in [0, 1], ``[H, W]`` or ``[B, H, W]``.
            masks: true classes of the same shape, 255 where there is none.
            group_ids: the part that each of the ``B`` images shows.

        Raises:
            ValueError: the shapes differ, a score is not in [0, 1], or there is not one part per image.
        """
        maps, truth = _checked(scores, masks)
        if len(group_ids) != len(maps) or isinstance(group_ids, str):
            raise ValueError(f"there must be one group id for each of {len(maps)} images, found {group_ids!r}")
        known = truth != IGNORED
        has_truth = known.any(axis=(1, 2))
        self.add("images_without_truth", int((~has_truth).sum()))
        highest = np.where(known, maps, -np.inf).max(axis=(1, 2), initial=-np.inf)
        self.append("scores", highest[has_truth].astype(np.float64))
        self.append("defective", ((truth != 0) & known).any(axis=(1, 2))[has_truth].astype(np.int64))
        self.append("group_ids", np.asarray(group_ids, dtype=np.str_)[has_truth])

    def compute(self) -> dict[str, float]:
        """Figures of `classification_metrics` as ``image_NAME`` and ``part_NAME``; defective from a score above 0.5.

        Beside them ``images_without_truth``, how many were left out.
        """
        figures = {"images_without_truth": float(self.total("images_without_truth"))}
        scores = self.scores(num_resamples=0)
        if scores is None:
            return figures
        for level, level_scores in (("image", scores.image), ("part", scores.part)):
            figures |= {f"{level}_{name}": figure.value for name, figure in level_scores.metrics.items()}
        return figures

    def scores(self, *, num_resamples: int = 1000, seed: int = 0) -> Scores | None:
        """Figures with intervals from resampled parts, see `score_predictions`; None without an image."""
        positive = self.rows("scores")
        if len(positive) == 0:
            return None
        return score_predictions(
            np.stack([1 - positive, positive], axis=1),
            self.rows("defective"),
            self.rows("group_ids").tolist(),
            num_resamples=num_resamples,
            seed=seed,
        )


def _checked(scores: Pixels, masks: Pixels) -> tuple[Array, Array]:
    """Both as ``[B, H, W]``."""
    maps, truth = as_images(scores, "scores"), as_images(masks, "masks")
    check_same_size(maps, truth, "scores", "masks")
    if truth.dtype.kind not in "iub":
        raise ValueError(f"masks must be integers, found {truth.dtype}")
    if maps.size and not (maps.min() >= 0 and maps.max() <= 1):  # also False for NaN
        raise ValueError(f"defect scores must lie in [0, 1], found {maps.min()} to {maps.max()}")
    return maps, truth


def _sum_of_precisions(
    found_before: npt.NDArray[np.float64], defect: npt.NDArray[np.float64], alarms: npt.NDArray[np.float64]
) -> float:
    """Sum over bins and their defects ``i`` of ``(found_before + i) / (found_before + i + alarms)``.

    The sum of the reciprocals of consecutive numbers is a difference of digamma functions.
    """
    first, past_last = torch.from_numpy(found_before + alarms + 1), torch.from_numpy(found_before + defect + alarms + 1)
    reciprocals = (past_last.digamma() - first.digamma()).numpy()
    return float((defect - alarms * reciprocals).sum())
