"""How well predicted classes of pixels agree with the true ones: accuracy, intersection over union, Dice."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.eval.metrics.streaming import Array, Pixels, StreamedMetric, as_array, as_images, check_same_size

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


BoolMap = npt.NDArray[np.bool_]
LabelMap = npt.NDArray[np.uint8]


class BoundaryMetrics(StreamedMetric):
    """Boundary F1: precision and recall of the outline of a class, within a tolerance.

    A pixel is on the outline of its class when one of its four neighbours is of another class; the edge of the image is
    no outline. Precision is the share of the predicted outline that lies within the tolerance of the true one, recall
    the share of the true outline within the tolerance of the predicted one. F1 is 0 for a class that only one of the
    two has; a class that neither outlines does not count, so an image without any outline does not either.

    Pixels whose truth is 255 take the class of the nearest pixel that has one, so that an outline drawn as a band of
    unknown pixels (Pascal VOC) lies in the middle of it; what is further than the tolerance from any known pixel is
    judged in neither map.

    Args:
        classes: names of the classes by value.
        tolerance: share of the image's diagonal.

    Raises:
        ValueError: there are no classes, more than 255, or two of one name, or the tolerance is negative.

    Reference:
        Csurka et al., "What is a good evaluation measure for semantic segmentation?" (2013), section 3.2.
    """

    def __init__(self, classes: Sequence[str], *, tolerance: float = 0.0075) -> None:
        if not 1 <= len(classes) <= IGNORED or len(set(classes)) != len(classes):
            raise ValueError(f"there must be 1 to {IGNORED} different classes, found {list(classes)}")
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be 0 or above, found {tolerance}")
        self.classes = tuple(classes)
        self.tolerance = tolerance
        super().__init__(
            sums={
                "class_f1": np.zeros(len(classes)),
                "class_images": np.zeros(len(classes), dtype=np.int64),
                "image_f1": np.zeros(()),
                "images": np.zeros((), dtype=np.int64),
            },
            rows={},
        )

    def update(self, labels: Pixels, masks: Pixels) -> None:
        """Adds images.

        Args:
            labels: predicted classes, integers ``[H, W]`` or ``[B, H, W]``.
            masks: true classes of the same shape, 255 where there is none.

        Raises:
            ValueError: the shapes differ, or a value is no class.
        """
        predicted, truth = as_images(labels, "labels"), as_images(masks, "masks")
        check_same_size(predicted, truth, "labels", "masks")
        check_values(predicted, len(self.classes), "labels", ignored_allowed=False)
        check_values(truth, len(self.classes), "masks", ignored_allowed=True)
        for image_labels, image_mask in zip(predicted.astype(np.uint8), truth.astype(np.uint8), strict=True):
            self._add_image(image_labels, image_mask)

    def compute(self) -> dict[str, float]:
        """Figures in [0, 1].

        Returns:
            ``boundary_f1``: mean over the images of the mean F1 of their classes; and ``boundary_f1/NAME``: mean over
            the images in which that class counts.
        """
        if self.total("images") == 0:
            return {}
        counts = self.total("class_images")
        figures = {"boundary_f1": float(self.total("image_f1") / self.total("images"))}
        for number in np.flatnonzero(counts):
            figures[f"boundary_f1/{self.classes[number]}"] = float(self.total("class_f1")[number] / counts[number])
        return figures

    def _add_image(self, labels: LabelMap, mask: LabelMap) -> None:
        reach = self.tolerance * math.hypot(*mask.shape)
        unknown = mask == IGNORED
        if unknown.all():
            return
        judged = np.ones(mask.shape, dtype=bool)
        if unknown.any():
            judged = _distance_to(~unknown) <= reach
            mask = _filled(mask, unknown)
        scores = {}
        for number in np.union1d(labels, mask):
            f1 = _outline_f1(_outline(labels == number) & judged, _outline(mask == number) & judged, reach)
            if f1 is not None:
                scores[int(number)] = f1
        if not scores:
            return
        numbers, values = np.array(list(scores)), np.array(list(scores.values()))
        size = len(self.classes)
        self.add("class_f1", np.bincount(numbers, weights=values, minlength=size))
        self.add("class_images", np.bincount(numbers, minlength=size))
        self.add("image_f1", values.mean())
        self.add("images", 1)


def _outline(inside: BoolMap) -> BoolMap:
    """The pixels of a region that have a neighbour outside it; beyond the image nothing is outside."""
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    return np.asarray(inside & (cv2.erode(inside.astype(np.uint8), cross) == 0))


def _outline_f1(predicted: BoolMap, true: BoolMap, reach: float) -> float | None:
    """F1 of two outlines; None where there is neither."""
    if not predicted.any() and not true.any():
        return None
    if not predicted.any() or not true.any():
        return 0.0
    precision = float((_distance_to(true)[predicted] <= reach).mean())
    recall = float((_distance_to(predicted)[true] <= reach).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _distance_to(pixels: BoolMap) -> npt.NDArray[np.float32]:
    """Euclidean distance of every pixel to the nearest of the given ones, of which there is at least one."""
    return np.asarray(cv2.distanceTransform((~pixels).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE), np.float32)


def _filled(mask: LabelMap, unknown: BoolMap) -> LabelMap:
    """The mask with each unknown pixel of the class of the nearest known one."""
    _, nearest = cv2.distanceTransformWithLabels(
        unknown.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    class_of_label = np.zeros(int(nearest.max()) + 1, dtype=np.uint8)  # every known pixel has a label of its own
    class_of_label[nearest[~unknown]] = mask[~unknown]
    return np.asarray(class_of_label[nearest])
