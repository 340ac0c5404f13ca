"""How well predicted classes of pixels agree with the true ones: accuracy, intersection over union, Dice."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.eval.streaming import Array, Pixels, StreamedMetric, as_array, check_same_size

PIXELS_AT_A_TIME = 1 << 24


class SegmentationMetrics(StreamedMetric):
    """Counts how many pixels of each class are taken for each class, over a whole set.

    Pixels of the set are counted together, so large images weigh more, as in the published figures; pixels whose
    truth is 255 do not count. The counts are exact: `numpy.bincount` is a hundred times as fast as scikit-learn's
    confusion matrix, which sorts.

    Args:
        classes: names of the classes by value.
        has_background: whether value 0 is the background, and every other class a defect.

    Raises:
        ValueError: there are no classes, more than 255, or two of one name.
    """

    def __init__(self, classes: Sequence[str], *, has_background: bool = True) -> None:
        if not 1 <= len(classes) <= IGNORED or len(set(classes)) != len(classes):
            raise ValueError(f"there must be 1 to {IGNORED} different classes, found {list(classes)}")
        self.classes = tuple(classes)
        self.has_background = has_background
        super().__init__(sums={"pixels": np.zeros((len(classes), len(classes)), dtype=np.int64)}, rows={})

    def update(self, labels: Pixels, masks: Pixels) -> None:
        """Adds images.

        Args:
            labels: predicted classes, integers of any shape, such as ``[H, W]`` or ``[B, H, W]``.
            masks: true classes of the same shape, 255 where there is none.

        Raises:
            ValueError: the shapes differ, or a value is no class.
        """
        predicted, true = as_array(labels), as_array(masks)
        check_same_size(predicted, true, "labels", "masks")
        predicted, true = predicted.reshape(-1), true.reshape(-1)
        num_classes = len(self.classes)
        check_values(predicted, num_classes, "labels", ignored_allowed=False)
        check_values(true, num_classes, "masks", ignored_allowed=True)
        # In pieces: the pairs are int64, eight times the size of the image.
        for start in range(0, len(true), PIXELS_AT_A_TIME):
            piece = slice(start, start + PIXELS_AT_A_TIME)
            known = true[piece] != IGNORED
            pairs = true[piece][known].astype(np.int64) * num_classes + predicted[piece][known]
            self.add("pixels", np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes))

    def confusion(self) -> npt.NDArray[np.int64]:
        """How many pixels of each class (rows) were taken for each class (columns), ``[C, C]``."""
        return self.total("pixels").copy()

    def compute(self) -> dict[str, float]:
        """Figures in [0, 1] over all pixels so far.

        Returns:
            ``pixel_accuracy``;
            ``mean_iou`` and ``mean_dice`` (the F1 of pixels), over the classes that occur in truth or prediction;
            ``mean_class_accuracy``, over the classes that occur in the truth;
            ``iou/NAME``, ``dice/NAME``, ``accuracy/NAME`` of the classes that these means run over;
            ``defect_iou``, ``defect_dice`` of all classes but the background taken as one, where there is a background,
            and a defect in truth or prediction.
        """
        pixels = self.total("pixels").astype(np.float64)
        if pixels.sum() == 0:
            return {}
        hits, true, predicted = pixels.diagonal(), pixels.sum(axis=1), pixels.sum(axis=0)
        occurs = true + predicted > 0
        iou = _share(hits, true + predicted - hits)
        dice = _share(2 * hits, true + predicted)
        accuracy = _share(hits, true)
        figures = {
            "pixel_accuracy": float(hits.sum() / pixels.sum()),
            "mean_iou": float(iou[occurs].mean()),
            "mean_dice": float(dice[occurs].mean()),
            "mean_class_accuracy": float(accuracy[true > 0].mean()),
        }
        if self.has_background:
            figures |= _defect_figures(pixels)
        for name, values, counted in (("iou", iou, occurs), ("dice", dice, occurs), ("accuracy", accuracy, true > 0)):
            figures |= {f"{name}/{self.classes[number]}": float(values[number]) for number in np.flatnonzero(counted)}
        return figures


def check_values(values: Array, num_classes: int, what: str, *, ignored_allowed: bool) -> None:
    """Raises ValueError for anything but whole numbers below ``num_classes`` (and 255 where that is allowed)."""
    if values.dtype.kind not in "iub":
        raise ValueError(f"{what} must be integers, found {values.dtype}")
    if values.size == 0 or (values.min() >= 0 and values.max() < num_classes):
        return
    wrong = values[((values < 0) | (values >= num_classes)) & ~(ignored_allowed & (values == IGNORED))]
    if wrong.size:
        allowed = f"[0, {num_classes})" + (f" or {IGNORED}" if ignored_allowed else "")
        raise ValueError(f"{what} must be in {allowed}, found {sorted(set(wrong[:1000].tolist()))[:5]}")


def _defect_figures(pixels: npt.NDArray[np.float64]) -> dict[str, float]:
    hits = pixels[1:, 1:].sum()  # a defect of another class is found all the same
    wrong = pixels[0, 1:].sum() + pixels[1:, 0].sum()
    if hits + wrong == 0:
        return {}
    return {"defect_iou": float(hits / (hits + wrong)), "defect_dice": float(2 * hits / (2 * hits + wrong))}


def _share(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``part / whole``, 0 where the whole is 0."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
