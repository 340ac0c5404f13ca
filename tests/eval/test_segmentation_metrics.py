"""Accuracy, IoU and Dice of pixels against loops, scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, f1_score, jaccard_score
from torchmetrics.functional.classification import multiclass_jaccard_index

from dinov2.eval.metrics import segmentation as segmentation_metrics
from dinov2.eval.metrics.segmentation import SegmentationMetrics

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


def test_figures_agree_with_scikit_learn() -> None:
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


def test_mean_iou_agrees_with_torchmetrics() -> None:
    labels, masks = problem(1)
    tensors = torch.from_numpy(labels).long(), torch.from_numpy(masks).long()
    expected = multiclass_jaccard_index(*tensors, num_classes=4, ignore_index=255)  # leaves out the absent class
    assert metric_of(labels, masks).compute()["mean_iou"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_class_only_predicted_counts_in_the_mean_iou_but_not_in_the_mean_accuracy() -> None:
    figures = metric_of(np.array([[0, 3]]), np.array([[0, 0]])).compute()
    assert figures["iou/never"] == figures["dice/never"] == 0
    assert figures["mean_iou"] == pytest.approx((1 / 2 + 0) / 2)
    assert figures["mean_class_accuracy"] == pytest.approx(1 / 2)
    assert "accuracy/never" not in figures
    assert "iou/crack" not in figures


def test_a_defect_of_another_class_is_found_all_the_same() -> None:
    figures = metric_of(np.array([[1, 1, 0, 0]]), np.array([[2, 1, 0, 1]])).compute()
    assert figures["defect_iou"] == pytest.approx(2 / 3)
    assert figures["defect_dice"] == pytest.approx(4 / 5)
    assert figures["iou/pore"] == 0


def test_defect_figures_are_absent_without_a_background_and_without_a_defect() -> None:
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


def test_no_figures_where_all_is_ignored() -> None:
    assert metric_of(np.zeros((2, 3), np.uint8), np.full((2, 3), 255, np.uint8)).compute() == {}


def test_large_images_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, masks = problem()
    whole = metric_of(labels, masks).confusion()
    monkeypatch.setattr(segmentation_metrics, "PIXELS_AT_A_TIME", 50)
    np.testing.assert_array_equal(metric_of(labels, masks).confusion(), whole)


def test_bad_input() -> None:
    metric = SegmentationMetrics(CLASSES)
    zeros = np.zeros((2, 2), np.int64)
    for labels, masks, message in (
        (zeros, zeros[:1], r"one shape, found \[2, 2\] and \[1, 2\]"),
        (zeros + 4, zeros, r"labels must be in \[0, 4\), found \[4\]"),
        (zeros + 255, zeros, r"labels must be in \[0, 4\), found \[255\]"),
        (zeros, zeros - 1, r"masks must be in \[0, 4\) or 255, found \[-1\]"),
        (zeros, zeros + 7, r"masks must be in \[0, 4\) or 255, found \[7\]"),
        (zeros + 0.5, zeros, "labels must be integers, found float64"),
    ):
        with pytest.raises(ValueError, match=message):
            metric.update(labels, masks)
    assert metric.compute() == {}
    for classes in ((), ("a", "a"), tuple(map(str, range(256)))):
        with pytest.raises(ValueError, match="1 to 255 different classes"):
            SegmentationMetrics(classes)
