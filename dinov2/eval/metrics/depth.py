"""Errors of predicted depth, as they are published."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dinov2.eval.metrics.streaming import Array, Pixels, StreamedMetric, as_array, check_same_size

FloatRow = npt.NDArray[np.float64]

ERRORS = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "delta1", "delta2", "delta3")
ALIGNMENTS = ("none", "median", "least_squares")
# Shares of height and width: top, bottom, left, right. Of NYU Depth V2, whose images are all 640 wide and 480 high,
# the crop is given in pixels; as shares they fit images of another size too.
CROPS = {
    "none": (0.0, 1.0, 0.0, 1.0),
    "nyu_eigen": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
    "kitti_eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "kitti_garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
}


class DepthMetrics(StreamedMetric):
    """Errors of depth, image by image, averaged over images.

    A pixel counts where its depth is known, above ``min_depth`` and below ``max_depth``, and inside the crop. An image
    without such a pixel is counted and left out. Predictions are first aligned, then brought into the same range, as
    is usual. Alignment with the target, image by image, tells how good the *shape* is where nobody can know the scale:
    ``median`` multiplies by the ratio of the medians; ``least_squares`` gives predictions the scale and shift of least
    squared error (a negative scale, which exchanges near and far, included).

    Args:
        min_depth: least depth, above 0, in the unit of the targets. For small units, such as micrometres in metres,
            lower it.
        max_depth: greatest depth: 10 m for NYU Depth V2, 80 m for KITTI; None for no limit.
        crop: ``none``, ``nyu_eigen`` (rows 45 to 471 and columns 41 to 601 of 480 x 640), ``kitti_eigen`` or
            ``kitti_garg``.
        alignment: ``none``, ``median`` or ``least_squares``.

    Raises:
        ValueError: for another crop or alignment, or depths out of order.

    Reference:
        Eigen et al., "Depth Map Prediction from a Single Image using a Multi-Scale Deep Network" (2014), section 4;
        Garg et al., "Unsupervised CNN for Single View Depth Estimation" (2016), section 4; Ranftl et al., "Towards
        Robust Monocular Depth Estimation" (2020), section 6, for the alignment of scale and shift.
    """

    errors: Tensor
    images: Tensor
    images_without_depth: Tensor

    def __init__(
        self,
        *,
        min_depth: float = 1e-3,
        max_depth: float | None = None,
        crop: str = "none",
        alignment: str = "none",
    ) -> None:
        super().__init__()
        if crop not in CROPS:
            raise ValueError(f"crop {crop!r} is not one of {', '.join(CROPS)}")
        if alignment not in ALIGNMENTS:
            raise ValueError(f"alignment {alignment!r} is not one of {', '.join(ALIGNMENTS)}")
        if not 0 < min_depth < (math.inf if max_depth is None else max_depth):
            raise ValueError(f"depths must be 0 < min_depth < max_depth, found {min_depth} and {max_depth}")
        self.min_depth = min_depth
        self.max_depth = math.inf if max_depth is None else max_depth
        self.crop = crop
        self.alignment = alignment
        self.add_sum("errors", len(ERRORS), dtype=torch.float64)
        self.add_sum("images")
        self.add_sum("images_without_depth")

    def update(self, predictions: Pixels, targets: Pixels) -> None:
        """Adds images.

        Args:
            predictions: ``[H, W]``, ``[B, H, W]`` or ``[B, 1, H, W]``.
            targets: depth of the same size, NaN where unknown.

        Raises:
            ValueError: the sizes differ, or a prediction that counts is NaN or infinite.
        """
        predicted, actual = _maps(predictions, "predictions"), _maps(targets, "targets")
        check_same_size(predicted, actual, "predictions", "targets")
        for prediction, target in zip(predicted, actual, strict=True):
            errors = self.image_errors(prediction, target)
            if errors is None:
                self.images_without_depth += 1
            else:
                self.errors += torch.tensor([errors[name] for name in ERRORS], dtype=torch.float64)
                self.images += 1

    def image_errors(self, prediction: Array, target: Array) -> dict[str, float] | None:
        """Errors of one image ``[H, W]``, by the names of `compute`; None when it has no pixel that counts."""
        top, bottom, left, right = crop_box(self.crop, target.shape[0], target.shape[1])
        target, prediction = target[top:bottom, left:right], prediction[top:bottom, left:right]
        # NaN is neither above nor below anything.
        known = (target > self.min_depth) & (target < self.max_depth)
        true, predicted = target[known].astype(np.float64), prediction[known].astype(np.float64)
        if len(true) == 0:
            return None
        num_bad = int((~np.isfinite(predicted)).sum())
        if num_bad:
            raise ValueError(f"{num_bad} of {len(predicted)} predicted depths that count are NaN or infinite")
        aligned = _aligned(predicted, true, self.alignment).clip(self.min_depth, self.max_depth)
        return depth_errors(aligned, true)

    def compute(self) -> dict[str, float]:
        """Means over the images so far, see `depth_errors`, with ``images`` and ``images_without_depth`` beside them.

        Without an image that has known depth, only these counts.
        """
        counts = {"images": float(self.images), "images_without_depth": float(self.images_without_depth)}
        if self.images == 0:
            return counts
        return dict(zip(ERRORS, (self.errors / self.images).tolist(), strict=True)) | counts


def depth_errors(predicted: FloatRow, true: FloatRow) -> dict[str, float]:
    """Errors of the pixels of one image.

    Args:
        predicted: ``[N]``, above 0.
        true: ``[N]``, above 0.

    Returns:
        ``abs_rel``, ``sq_rel`` (in the unit of depth): mean of ``|p - t| / t`` and of ``(p - t)² / t``;
        ``rmse`` (in the unit of depth), ``rmse_log``: root of the mean square of ``p - t`` and of ``ln p - ln t``;
        ``log10``: mean of ``|log10 p - log10 t|``;
        ``silog``: 100 times the standard deviation of ``ln p - ln t``;
        ``delta1``, ``delta2``, ``delta3``: share of pixels with ``max(p / t, t / p)`` below 1.25, 1.25² and 1.25³.
    """
    difference = predicted - true
    log_difference = np.log(predicted) - np.log(true)
    ratio = np.maximum(predicted / true, true / predicted)
    errors = {
        "abs_rel": np.mean(np.abs(difference) / true),
        "sq_rel": np.mean(difference**2 / true),
        "rmse": np.sqrt(np.mean(difference**2)),
        "rmse_log": np.sqrt(np.mean(log_difference**2)),
        "log10": np.mean(np.abs(log_difference)) / math.log(10),
        "silog": 100 * np.std(log_difference),
    }
    errors |= {f"delta{power}": np.mean(ratio < 1.25**power) for power in (1, 2, 3)}
    return {name: float(value) for name, value in errors.items()}


def crop_box(crop: str, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a crop of `CROPS` in an image of that size; bottom and right are outside."""
    top, bottom, left, right = CROPS[crop]
    # The hair keeps 41 / 640 · 640 from becoming 40 for the sake of one rounding.
    rows = [int(share * height + 1e-9) for share in (top, bottom)]
    columns = [int(share * width + 1e-9) for share in (left, right)]
    return rows[0], rows[1], columns[0], columns[1]


def _maps(values: Pixels, what: str) -> Array:
    """``[B, H, W]``."""
    array = as_array(values)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (2, 3):
        raise ValueError(f"{what} must be [H, W], [B, H, W] or [B, 1, H, W], found shape {list(array.shape)}")
    return array if array.ndim == 3 else array[None]


def _aligned(predicted: FloatRow, true: FloatRow, alignment: str) -> FloatRow:
    if alignment == "median":
        median = np.median(predicted)
        if median == 0:
            raise ValueError("predictions whose median is 0 cannot be scaled to the target")
        return np.asarray(predicted * (np.median(true) / median))
    if alignment == "least_squares":
        # Of predictions that are all equal, the solution of least norm is taken, which gives the mean of the target.
        columns = np.stack([predicted, np.ones_like(predicted)], axis=1)
        return np.asarray(columns @ np.linalg.lstsq(columns, true)[0])
    return predicted
