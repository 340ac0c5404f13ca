"""Metrics of semantic segmentation: pixel accuracy, intersection over union, Dice, boundary F1."""

import math
from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from dinov2.data.datasets.dense_targets import IGNORED
from dinov2.eval.metrics.classification import share_of
from dinov2.eval.metrics.streaming import Array, Pixels, StreamedMetric, as_array, as_images, check_same_size

PIXELS_AT_A_TIME = 1 << 24


class SegmentationMetrics(StreamedMetric):
    """Counts how many pixels of each class are taken for each class, over a whole set.

    Pixels of the set are counted together, so large images weigh more, as in the published metrics; pixels whose label
    is 255 do not count. torchmetrics counts; its IoU, F1 and accuracy are those here (a test compares), but each
    of them would count again, and none has a background.

    Args:
        classes: names of the classes by value.
        has_background: whether value 0 is the background, and every other class a defect.

    Raises:
        ValueError: there are no classes, more than 255, or two of one name.
    """

    pixels: Tensor

    def __init__(self, classes: Sequence[str], *, has_background: bool = True) -> None:
        super().__init__()
        if not 1 <= len(classes) <= IGNORED or len(set(classes)) != len(classes):
            raise ValueError(f"there must be 1 to {IGNORED} different classes, found {list(classes)}")
        self.classes = tuple(classes)
        self.has_background = has_background
        self.add_sum("pixels", len(classes), len(classes))

    def update(self, labels: Pixels, masks: Pixels) -> None:
        """Adds images.

        Args:
            labels: predicted classes, integers of any shape, such as ``[H, W]`` or ``[B, H, W]``.
            masks: ground-truth classes of the same shape, 255 where there is none.

        Raises:
            ValueError: the shapes differ, or a value is no class.
        """
        predicted, actual = as_array(labels), as_array(masks)
        check_same_size(predicted, actual, "labels", "masks")
        check_values(predicted, len(self.classes), "labels", ignored_allowed=False)
        check_values(actual, len(self.classes), "masks", ignored_allowed=True)
        predicted, actual = predicted.reshape(-1), actual.reshape(-1)
        # In pieces: the pairs are int64, eight times the size of the image.
        for start in range(0, len(actual), PIXELS_AT_A_TIME):
            piece = slice(start, start + PIXELS_AT_A_TIME)
            self.pixels += multiclass_confusion_matrix(
                torch.from_numpy(predicted[piece].astype(np.int64)),
                torch.from_numpy(actual[piece].astype(np.int64)),
                len(self.classes),
                ignore_index=IGNORED,
                validate_args=False,
            )

    def confusion(self) -> npt.NDArray[np.int64]:
        """How many pixels of each class (rows) were taken for each class (columns), ``[C, C]``."""
        return np.asarray(self.pixels.numpy()).copy()

    def compute(self) -> dict[str, float]:
        """Values in [0, 1] over all pixels so far.

        Returns:
            ``pixel_accuracy``;
            ``mean_iou`` and ``mean_dice`` (the F1 of pixels), over the classes that occur in masks or predictions;
            ``mean_class_accuracy``, over the classes that occur in the masks;
            ``iou/NAME``, ``dice/NAME``, ``accuracy/NAME`` of the classes that these means run over;
            ``defect_iou``, ``defect_dice`` of all classes but the background taken as one, where there is a background,
            and a defect in masks or predictions.
        """
        pixels = self.pixels.double().numpy()
        if pixels.sum() == 0:
            return {}
        hits, actual, predicted = pixels.diagonal(), pixels.sum(axis=1), pixels.sum(axis=0)
        occurs = actual + predicted > 0
        iou = share_of(hits, actual + predicted - hits)
        dice = share_of(2 * hits, actual + predicted)
        accuracy = share_of(hits, actual)
        values = {
            "pixel_accuracy": float(hits.sum() / pixels.sum()),
            "mean_iou": float(iou[occurs].mean()),
            "mean_dice": float(dice[occurs].mean()),
            "mean_class_accuracy": float(accuracy[actual > 0].mean()),
        }
        if self.has_background:
            found = pixels[1:, 1:].sum()  # a defect of another class is found all the same
            wrong = pixels[0, 1:].sum() + pixels[1:, 0].sum()
            if found + wrong > 0:
                values["defect_iou"] = float(found / (found + wrong))
                values["defect_dice"] = float(2 * found / (2 * found + wrong))
        for name, shares, counted in (("iou", iou, occurs), ("dice", dice, occurs), ("accuracy", accuracy, actual > 0)):
            values |= {f"{name}/{self.classes[number]}": float(shares[number]) for number in np.flatnonzero(counted)}
        return values


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


BoolMap = npt.NDArray[np.bool_]
LabelMap = npt.NDArray[np.uint8]


class BoundaryMetrics(StreamedMetric):
    """Boundary F1: precision and recall of the outline of a class, within a tolerance.

    A pixel is on the outline of its class when one of its four neighbours is of another class; the edge of the image is
    no outline. Precision is the share of the predicted outline that lies within the tolerance of the true one, recall
    the share of the true outline within the tolerance of the predicted one. F1 is 0 for a class that only one of the
    two has; a class that neither outlines does not count, so an image without any outline does not either.

    Pixels whose label is 255 take the class of the nearest pixel that has one, so that an outline drawn as a band of
    unknown pixels (Pascal VOC) lies in the middle of it; what is further than the tolerance from any known pixel is
    left out of both maps.

    Args:
        classes: names of the classes by value.
        tolerance: share of the image's diagonal.

    Raises:
        ValueError: there are no classes, more than 255, or two of one name, or the tolerance is negative.

    Reference:
        Csurka et al., "What is a good evaluation measure for semantic segmentation?" (2013), section 3.2.
    """

    class_f1: Tensor
    class_images: Tensor
    image_f1: Tensor
    images: Tensor

    def __init__(self, classes: Sequence[str], *, tolerance: float = 0.0075) -> None:
        super().__init__()
        if not 1 <= len(classes) <= IGNORED or len(set(classes)) != len(classes):
            raise ValueError(f"there must be 1 to {IGNORED} different classes, found {list(classes)}")
        if not 0 <= tolerance < math.inf:
            raise ValueError(f"tolerance must be 0 or above, found {tolerance}")
        self.classes = tuple(classes)
        self.tolerance = tolerance
        self.add_sum("class_f1", len(classes), dtype=torch.float64)
        self.add_sum("class_images", len(classes))
        self.add_sum("image_f1", dtype=torch.float64)
        self.add_sum("images")

    def update(self, labels: Pixels, masks: Pixels) -> None:
        """Adds images.

        Args:
            labels: predicted classes, integers ``[H, W]`` or ``[B, H, W]``.
            masks: ground-truth classes of the same shape, 255 where there is none.

        Raises:
            ValueError: the shapes differ, or a value is no class.
        """
        predicted, actual = as_images(labels, "labels"), as_images(masks, "masks")
        check_same_size(predicted, actual, "labels", "masks")
        check_values(predicted, len(self.classes), "labels", ignored_allowed=False)
        check_values(actual, len(self.classes), "masks", ignored_allowed=True)
        for image_labels, image_mask in zip(predicted.astype(np.uint8), actual.astype(np.uint8), strict=True):
            scores = self._image_scores(image_labels, image_mask)
            for number, f1 in scores.items():
                self.class_f1[number] += f1
                self.class_images[number] += 1
            if scores:
                self.image_f1 += float(np.mean(list(scores.values())))
                self.images += 1

    def compute(self) -> dict[str, float]:
        """Values in [0, 1].

        Returns:
            ``boundary_f1``: mean over the images of the mean F1 of their classes; and ``boundary_f1/NAME``: mean over
            the images in which that class counts.
        """
        if self.images == 0:
            return {}
        values = {"boundary_f1": float(self.image_f1 / self.images)}
        for number, name in enumerate(self.classes):
            if self.class_images[number]:
                values[f"boundary_f1/{name}"] = float(self.class_f1[number] / self.class_images[number])
        return values

    def _image_scores(self, labels: LabelMap, mask: LabelMap) -> dict[int, float]:
        """F1 of the classes that have an outline in either map."""
        reach = self.tolerance * math.hypot(*mask.shape)
        unknown = mask == IGNORED
        if unknown.all():
            return {}
        counted = np.ones(mask.shape, dtype=bool)
        if unknown.any():
            counted = _distance_to(~unknown) <= reach
            mask = _filled(mask, unknown)
        scores = {}
        for number in np.union1d(labels, mask):
            f1 = _outline_f1(_outline(labels == number) & counted, _outline(mask == number) & counted, reach)
            if f1 is not None:
                scores[int(number)] = f1
        return scores


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
