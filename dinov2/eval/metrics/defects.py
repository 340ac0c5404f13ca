"""Metrics of maps of defect scores: pixel by pixel, image by image, and part by part."""

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.eval.metrics.classification import Scores, levels_of, score_predictions
from dinov2.eval.metrics.streaming import Array, Pixels, StreamedMetric, as_images, check_same_size
from dinov2.eval.metrics.thresholds import ThresholdRule

LARGEST_LOG_ODDS = 17.0  # float32 numbers below 1 reach log-odds of 16.6
PIXELS_AT_A_TIME = 1 << 24


class PixelDefectMetrics(StreamedMetric):
    """AUROC and average precision over all pixels of a set, in the memory of two histograms.

    Scores fall into bins of equal width in log-odds: most pixels of a good part score next to 0, where bins of equal
    width in the score would put all of them, and the missed defects, into one. Both metrics depend on the order of the
    scores alone, so only the order *within* a bin is lost: pixels of one bin count as equal. With 16,384 bins and a
    trained network's scores the exact values lie within some 0.0002. torchmetrics' binned AUROC has bins of equal width
    in the score, and loops over them at every update.

    Pixels whose label is 255 do not count; all other classes but 0 are defects.

    Args:
        num_bins: how many, at least 2; a bin takes 16 bytes.

    Raises:
        ValueError: ``num_bins`` is below 2.
    """

    good_pixels: Tensor
    defect_pixels: Tensor

    def __init__(self, *, num_bins: int = 16_384) -> None:
        super().__init__()
        if num_bins < 2:
            raise ValueError(f"num_bins must be at least 2, found {num_bins}")
        self.num_bins = num_bins
        self.add_sum("good_pixels", num_bins)
        self.add_sum("defect_pixels", num_bins)

    def update(self, scores: Pixels, masks: Pixels) -> None:
        """Adds images.

        Args:
            scores: how likely each pixel is a defect, in [0, 1], ``[H, W]`` or ``[B, H, W]``.
            masks: ground-truth classes of the same shape, 255 where there is none.

        Raises:
            ValueError: the shapes differ, or a score is not in [0, 1].
        """
        maps, actual = (array.reshape(-1) for array in _checked(scores, masks))
        for start in range(0, len(maps), PIXELS_AT_A_TIME):
            piece = slice(start, start + PIXELS_AT_A_TIME)
            log_odds = torch.from_numpy(maps[piece].astype(np.float64)).logit()
            log_odds = log_odds.clamp(-LARGEST_LOG_ODDS, LARGEST_LOG_ODDS)
            bins = ((log_odds + LARGEST_LOG_ODDS) * (self.num_bins / (2 * LARGEST_LOG_ODDS))).long()
            bins = bins.clamp_max(self.num_bins - 1)
            good, known = (torch.from_numpy(found) for found in (actual[piece] == 0, actual[piece] != IGNORED))
            self.good_pixels += torch.bincount(bins[good], minlength=self.num_bins)
            self.defect_pixels += torch.bincount(bins[known & ~good], minlength=self.num_bins)

    def compute(self) -> dict[str, float]:
        """``pixel_auroc`` and ``pixel_average_precision`` in [0, 1], where there are good and defective pixels."""
        good, defect = self.good_pixels.numpy(), self.defect_pixels.numpy()
        if not (good.any() and defect.any()):
            return {}
        labels = np.repeat([0, 1], self.num_bins)
        scores = np.tile(np.arange(self.num_bins), 2)
        weights = np.concatenate([good, defect])
        return {
            "pixel_auroc": float(roc_auc_score(labels, scores, sample_weight=weights)),
            "pixel_average_precision": float(average_precision_score(labels, scores, sample_weight=weights)),
        }


class ImageDefectMetrics(StreamedMetric):
    """Whether images, and the parts that they show, are found to have any defect.

    The score of an image is the highest of its pixels, that of a part the highest of its images; an image is defective
    when any of its pixels is. Pixels whose label is 255 count in neither, and an image that has no other is left out.
    """

    images_without_truth: Tensor
    highest: list[Tensor]
    defective: list[Tensor]
    group_ids: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("images_without_truth")
        self.add_rows("highest")
        self.add_rows("defective")
        self.add_rows("group_ids")  # bytes of every name and a 0 behind it: states are tensors

    def update(self, scores: Pixels, masks: Pixels, group_ids: Sequence[str]) -> None:
        """Adds images.

        Args:
            scores: how likely each pixel is a defect, in [0, 1], ``[H, W]`` or ``[B, H, W]``.
            masks: ground-truth classes of the same shape, 255 where there is none.
            group_ids: the part that each of the ``B`` images shows.

        Raises:
            ValueError: the shapes differ, a score is not in [0, 1], or there is not one part per image.
        """
        maps, actual = _checked(scores, masks)
        if len(group_ids) != len(maps) or isinstance(group_ids, str):
            raise ValueError(f"there must be one group id for each of {len(maps)} images, found {group_ids!r}")
        known = actual != IGNORED
        labelled = known.any(axis=(1, 2))
        self.images_without_truth += int((~labelled).sum())
        highest = np.where(known, maps, -np.inf).max(axis=(1, 2), initial=-np.inf)
        self.highest.append(torch.from_numpy(highest[labelled].astype(np.float64)))
        self.defective.append(torch.from_numpy(((actual != 0) & known).any(axis=(1, 2))[labelled].astype(np.int64)))
        names = "".join(f"{name}\0" for name, counts in zip(group_ids, labelled, strict=True) if counts)
        self.group_ids.append(torch.tensor(list(names.encode("utf-8", "surrogatepass")), dtype=torch.uint8))

    def compute(self) -> dict[str, float]:
        """Metrics of `classification_metrics` as ``image_NAME`` and ``part_NAME``; defective from a score above 0.5.

        Beside them ``images_without_truth``, how many were left out.
        """
        values = {"images_without_truth": float(self.images_without_truth)}
        scores = self.scores(num_resamples=0)
        if scores is None:
            return values
        for level, level_scores in (("image", scores.image), ("part", scores.part)):
            values |= {f"{level}_{name}": metric.value for name, metric in level_scores.metrics.items()}
        return values

    def scores(self, *, num_resamples: int = 1000, seed: int = 0) -> Scores | None:
        """Metrics with intervals from resampled parts, see `score_predictions`; None without an image."""
        rows = self._rows()
        return None if rows is None else score_predictions(*rows, num_resamples=num_resamples, seed=seed)

    def threshold(self, rule: ThresholdRule) -> float | None:
        """The score that a rule chooses for images or parts; None where they cannot tell, see `choose_threshold`."""
        rows = self._rows()
        if rows is None:
            return None
        level = levels_of(*rows)[rule.level]
        return rule.choose(level.probabilities[:, 1], level.labels == 1)

    def _rows(self) -> tuple[Array, Array, list[str]] | None:
        """Scores of good and defective ``[N, 2]``, labels ``[N]`` and parts of the images; None without one."""
        positive = torch.cat(self.highest).numpy() if self.highest else np.zeros(0)
        if len(positive) == 0:
            return None
        names = bytes(torch.cat(self.group_ids).tolist()).decode("utf-8", "surrogatepass")
        return np.stack([1 - positive, positive], axis=1), torch.cat(self.defective).numpy(), names.split("\0")[:-1]


def _checked(scores: Pixels, masks: Pixels) -> tuple[Array, Array]:
    """Both as ``[B, H, W]``."""
    maps, actual = as_images(scores, "scores"), as_images(masks, "masks")
    check_same_size(maps, actual, "scores", "masks")
    if actual.dtype.kind not in "iub":
        raise ValueError(f"masks must be integers, found {actual.dtype}")
    if maps.size and not (maps.min() >= 0 and maps.max() <= 1):  # also False for NaN
        raise ValueError(f"defect scores must lie in [0, 1], found {maps.min()} to {maps.max()}")
    return maps, actual
