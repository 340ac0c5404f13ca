"""Accuracy, IoU and Dice of pixels against loops, scikit-learn and torchmetrics."""

import math

import cv2
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, jaccard_score

from dinov2.eval.metrics import segmentation as segmentation_metrics
from dinov2.eval.metrics.segmentation import BoundaryMetrics, SegmentationMetrics

CLASSES = ("background", "crack", "pore", "never")


def problem(seed: int = 0, num_classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    masks = generator.integers(0, num_classes, (3, 12, 11)).astype(np.uint8)
    labels = np.where(generator.random(masks.shape) < 0.6, masks, generator.integers(0, num_classes, masks.shape))
    masks[generator.random(masks.shape) < 0.15] = 255
    return labels.astype(np.uint8), masks


def metric_of(labels: np.ndarray, masks: np.ndarray, **options: bool) -> SegmentationMetrics:
    metric = SegmentationMetrics(CLASSES, **options)
    metric.update(labels, masks)
    return metric


def test_metrics_agree_with_scikit_learn() -> None:
    labels, masks = problem()
    figures = metric_of(labels, masks).compute()
    known = masks != 255
    predicted, true = labels[known], masks[known]
    ious = jaccard_score(true, predicted, average=None)
    f1 = f1_score(true, predicted, average=None)
    matrix = confusion_matrix(true, predicted)
    expected = {
        "pixel_accuracy": accuracy_score(true, predicted),
        "mean_iou": ious.mean(),
        "mean_dice": f1.mean(),
        "mean_class_accuracy": balanced_accuracy_score(true, predicted),
        "defect_iou": jaccard_score(true > 0, predicted > 0),
        "defect_dice": f1_score(true > 0, predicted > 0),
    }
    for number, name in enumerate(CLASSES[:3]):
        expected |= {f"iou/{name}": ious[number], f"dice/{name}": f1[number]}
        expected[f"accuracy/{name}"] = matrix[number, number] / matrix[number].sum()
    assert figures == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(metric_of(labels, masks).confusion()[:3, :3], matrix)


def test_a_class_only_predicted_counts_in_the_mean_iou_but_not_in_the_mean_accuracy() -> None:
    figures = metric_of(np.array([[0, 3]]), np.array([[0, 0]])).compute()
    assert figures["iou/never"] == figures["dice/never"] == 0
    assert figures["mean_iou"] == pytest.approx((1 / 2 + 0) / 2)
    assert figures["mean_class_accuracy"] == pytest.approx(1 / 2)
    assert "accuracy/never" not in figures
    assert "iou/crack" not in figures


def test_metrics_are_absent_without_a_background_a_defect_or_known_pixels() -> None:
    labels, masks = problem()
    assert "defect_iou" not in metric_of(labels, masks, has_background=False).compute()
    good = metric_of(np.zeros((2, 3), np.uint8), np.zeros((2, 3), np.uint8)).compute()
    assert good == {
        "pixel_accuracy": 1,
        "mean_iou": 1,
        "mean_dice": 1,
        "mean_class_accuracy": 1,
        "iou/background": 1,
        "dice/background": 1,
        "accuracy/background": 1,
    }
    assert metric_of(np.zeros((2, 3), np.uint8), np.full((2, 3), 255, np.uint8)).compute() == {}


def test_large_images_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, masks = problem()
    whole = metric_of(labels, masks).confusion()
    monkeypatch.setattr(segmentation_metrics, "PIXELS_AT_A_TIME", 50)
    np.testing.assert_array_equal(metric_of(labels, masks).confusion(), whole)


def test_bad_input() -> None:
    metrics = SegmentationMetrics(CLASSES), BoundaryMetrics(CLASSES)
    zeros = np.zeros((2, 2), np.int64)
    for labels, masks, message in (
        (zeros, zeros[:1], r"one shape, found \[.*2, 2\] and \[.*1, 2\]"),
        (zeros + 4, zeros, r"labels must be in \[0, 4\), found \[4\]"),
        (zeros + 255, zeros, r"labels must be in \[0, 4\), found \[255\]"),
        (zeros, zeros - 1, r"masks must be in \[0, 4\) or 255, found \[-1\]"),
        (zeros, zeros + 7, r"masks must be in \[0, 4\) or 255, found \[7\]"),
        (zeros + 0.5, zeros, "labels must be integers, found float64"),
    ):
        for metric in metrics:
            with pytest.raises(ValueError, match=message):
                metric.update(labels, masks)
    assert [metric.compute() for metric in metrics] == [{}, {}]
    for classes in ((), ("a", "a"), tuple(map(str, range(256)))):
        with pytest.raises(ValueError, match="1 to 255 different classes"):
            SegmentationMetrics(classes)


OUTLINED = ("background", "crack", "pore")


def blobs(seed: int, size: tuple[int, int] = (24, 30), num_classes: int = 3) -> np.ndarray:
    """A map of smooth regions."""
    noise = np.random.default_rng(seed).random((5, 6, num_classes)).astype(np.float32)
    return cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC).argmax(axis=2).astype(np.uint8)


def slow_outline(labels: np.ndarray, number: int) -> list[tuple[int, int]]:
    height, width = labels.shape
    return [
        (y, x)
        for y in range(height)
        for x in range(width)
        if labels[y, x] == number
        and any(
            0 <= y + dy < height and 0 <= x + dx < width and labels[y + dy, x + dx] != number
            for dy, dx in ((1, 0), (-1, 0), (0, 1), (0, -1))
        )
    ]


def slow_boundary_f1(labels: np.ndarray, mask: np.ndarray, reach: float) -> dict[int, float]:
    """F1 by class, from the distances of all pairs of outline pixels."""
    figures = {}
    for number in range(len(OUTLINED)):
        predicted, true = slow_outline(labels, number), slow_outline(mask, number)
        if not predicted and not true:
            continue
        found = [
            sum(any(math.dist(a, b) <= reach for b in others) for a in ones) / max(len(ones), 1)
            for ones, others in ((predicted, true), (true, predicted))
        ]
        figures[number] = 2 * found[0] * found[1] / sum(found) if sum(found) else 0.0
    return figures


@pytest.mark.parametrize("tolerance", [0.0, 0.03, 0.06])
def test_agrees_with_a_loop_over_pairs(tolerance: float) -> None:
    metric = BoundaryMetrics(OUTLINED, tolerance=tolerance)
    labels, masks = np.stack([blobs(seed) for seed in (0, 1, 2)]), np.stack([blobs(seed) for seed in (10, 11, 12)])
    labels[0] = labels[0].clip(max=1)  # a class that only the truth has
    metric.update(labels, masks)
    reach = tolerance * math.hypot(24, 30)
    slow = [slow_boundary_f1(one, mask, reach) for one, mask in zip(labels, masks, strict=True)]
    expected = {"boundary_f1": np.mean([np.mean(list(figures.values())) for figures in slow])}
    for number, name in enumerate(OUTLINED):
        expected[f"boundary_f1/{name}"] = np.mean([figures[number] for figures in slow if number in figures])
    assert metric.compute() == pytest.approx(expected, rel=1e-9)
    assert 0 < expected["boundary_f1"] < 1


def square(left: int, size: int = 40) -> np.ndarray:
    mask = np.zeros((size, size), np.uint8)
    mask[10:30, left : left + 15] = 1
    return mask


def test_the_edge_is_no_outline_and_images_without_one_do_not_count() -> None:
    metric = BoundaryMetrics(OUTLINED)
    metric.update(np.ones((8, 8), np.uint8), np.ones((8, 8), np.uint8))
    assert metric.compute() == {}
    metric.update(np.ones((8, 8), np.uint8), np.zeros((8, 8), np.uint8))
    assert metric.compute() == {}
    half = np.zeros((8, 8), np.uint8)
    half[:, 4:] = 1
    metric.update(half, np.zeros((8, 8), np.uint8))
    assert metric.compute() == {"boundary_f1": 0, "boundary_f1/background": 0, "boundary_f1/crack": 0}
    metric = BoundaryMetrics(OUTLINED)
    metric.update(square(10), np.full((40, 40), 255))
    assert metric.compute() == {}
    metric.update(square(10), square(10))
    metric.update(np.zeros((40, 40), np.uint8), np.zeros((40, 40), np.uint8))
    assert metric.compute() == {"boundary_f1": 1, "boundary_f1/background": 1, "boundary_f1/crack": 1}


def test_a_band_of_unknown_pixels_holds_the_outline_in_its_middle() -> None:
    """As in Pascal VOC, where five unknown pixels lie around every object."""
    mask = square(10)
    band = cv2.dilate(mask, np.ones((5, 5))) != cv2.erode(mask, np.ones((5, 5)))
    mask_with_band = np.where(band, 255, mask).astype(np.uint8)
    for left, right in ((10, True), (11, True), (15, False)):
        metric = BoundaryMetrics(OUTLINED, tolerance=2.1 / math.hypot(40, 40))
        metric.update(square(left), mask_with_band)
        assert (metric.compute()["boundary_f1"] > 0.95) is right


def test_what_lies_deep_in_unknown_pixels_is_not_evaluated() -> None:
    mask = square(5)
    mask[:, 22:] = 255
    for tolerance in (0.0, 0.03):
        metric = BoundaryMetrics(OUTLINED, tolerance=tolerance)
        labels = square(5)
        labels[5:9, 27:38] = 2
        metric.update(labels, mask)
        assert metric.compute() == {"boundary_f1": 1, "boundary_f1/background": 1, "boundary_f1/crack": 1}
        labels[5:9, 0:4] = 2
        metric.update(labels, mask)
        assert metric.compute()["boundary_f1/pore"] == 0


def test_bad_input_of_outlines() -> None:
    for tolerance in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="tolerance must be 0 or above"):
            BoundaryMetrics(OUTLINED, tolerance=tolerance)
    with pytest.raises(ValueError, match="different classes"):
        BoundaryMetrics(("a", "a"))
