"""Errors of depth against loops over pixels and scikit-learn; crops, limits and alignment."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

from dinov2.eval.metrics.depth import ALIGNMENTS, CROPS, ERRORS, DepthMetrics, crop_box


def problem(*size: int, seed: int = 0, unknown: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = generator.uniform(0.5, 12, size).astype(np.float32)
    predictions = (targets * generator.uniform(0.6, 1.5, size)).astype(np.float32)
    targets[generator.random(size) < unknown] = np.nan
    return predictions, targets


def slow_errors(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """The definitions, one pixel after the other."""
    count = len(pairs)
    logs = [math.log(p) - math.log(t) for p, t in pairs]
    mean = sum(logs) / count
    return {
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / count,
        "sq_rel": sum((p - t) ** 2 / t for p, t in pairs) / count,
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / count),
        "rmse_log": math.sqrt(sum(g * g for g in logs) / count),
        "log10": sum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / count,
        "silog": 100 * math.sqrt(sum(g * g for g in logs) / count - mean * mean),
    } | {f"delta{k}": sum(max(p / t, t / p) < 1.25**k for p, t in pairs) / count for k in (1, 2, 3)}


def slow_image(prediction: np.ndarray, target: np.ndarray, low: float, high: float) -> dict[str, float]:
    pairs = [
        (min(max(float(p), low), high), float(t))
        for p, t in zip(prediction.flat, target.flat, strict=True)
        if low < t < high
    ]
    return slow_errors(pairs)


def test_images_are_averaged_whatever_they_know() -> None:
    predictions, targets = problem(3, 8, 9)
    targets[1, 2:] = np.nan
    metric = DepthMetrics(min_depth=1.0, max_depth=10.0)
    metric.update(predictions, targets)
    slow = [slow_image(p, t, 1.0, 10.0) for p, t in zip(predictions, targets, strict=True)]
    expected = {name: np.mean([errors[name] for errors in slow]) for name in ERRORS}
    assert metric.compute() == pytest.approx(expected | {"images": 3, "images_without_depth": 0}, rel=1e-9)


def test_limits_themselves_do_not_count() -> None:
    metric = DepthMetrics(min_depth=1.0, max_depth=10.0)
    assert metric.image_errors(np.ones((1, 4)), np.array([[1.0, 10.0, 0.0, np.nan]])) is None
    assert DepthMetrics().image_errors(np.ones((1, 1)), np.array([[1e6]])) is not None
    assert DepthMetrics().image_errors(np.ones((1, 2)), np.array([[np.inf, -np.inf]])) is None


@pytest.mark.parametrize("unknown", [np.nan, 0.0])
def test_images_without_known_depth_are_counted_and_left_out(unknown: float) -> None:
    predictions, targets = problem(3, 5, 5)
    alone = DepthMetrics()
    alone.update(predictions[0], targets[0])
    metric = DepthMetrics()
    targets[1:] = unknown
    metric.update(predictions, targets)
    assert metric.compute() == alone.compute() | {"images_without_depth": 2}
    empty = DepthMetrics()
    empty.update(predictions[1:], targets[1:])
    assert empty.compute() == {"images": 0, "images_without_depth": 2}


def test_crops_are_the_published_ones() -> None:
    assert crop_box("nyu_eigen", 480, 640) == (45, 471, 41, 601)
    assert crop_box("kitti_garg", 375, 1242) == (153, 371, 44, 1197)
    assert crop_box("kitti_eigen", 375, 1242) == (124, 342, 44, 1197)
    assert crop_box("kitti_garg", 352, 1216) == (143, 349, 43, 1172)
    assert crop_box("none", 37, 51) == (0, 37, 0, 51)


@pytest.mark.parametrize("crop", [name for name in CROPS if name != "none"])
def test_only_pixels_inside_the_crop_count(crop: str) -> None:
    predictions, targets = problem(120, 160, unknown=0)
    top, bottom, left, right = crop_box(crop, 120, 160)
    metric, cut = DepthMetrics(crop=crop), DepthMetrics()
    cut.update(predictions[top:bottom, left:right], targets[top:bottom, left:right])
    outside = np.full((120, 160), np.nan, np.float32)
    outside[top:bottom, left:right] = predictions[top:bottom, left:right]
    metric.update(outside, targets)
    assert metric.compute() == cut.compute()
    for row, column in ((top, left), (bottom - 1, right - 1)):  # corners belong to it
        outside[row, column] = np.nan
        with pytest.raises(ValueError, match="1 of"):
            metric.update(outside, targets)
        outside[row, column] = 1


def test_alignments_are_the_ratio_of_medians_and_a_linear_regression() -> None:
    predictions, targets = (maps.astype(np.float64) for maps in problem(8, 8))
    known = np.isfinite(targets)
    ratio = np.median(targets[known]) / np.median(predictions[known])
    line = LinearRegression().fit(predictions[known][:, None], targets[known])
    on_line = line.predict(predictions.reshape(-1, 1)).reshape(8, 8)
    for alignment, changed, aligned in (
        ("median", 3 * predictions, predictions * ratio),
        ("least_squares", 0.02 * predictions - 7, on_line),  # a shift, too, is taken out
        ("least_squares", np.full((8, 8), 3.0), np.full((8, 8), targets[known].mean())),
    ):
        metric = DepthMetrics(alignment=alignment)
        metric.update(changed, targets)
        expected = slow_image(aligned, targets, 1e-3, math.inf)
        assert {name: metric.compute()[name] for name in ERRORS} == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_shapes_are_the_same(alignment: str) -> None:
    predictions, targets = problem(2, 6, 6)
    metrics = [DepthMetrics(alignment=alignment) for _ in range(3)]
    metrics[0].update(predictions, targets)
    metrics[1].update(torch.from_numpy(predictions)[:, None], torch.from_numpy(targets))
    for one in range(2):
        metrics[2].update(predictions[one], targets[one])
    assert metrics[0].compute() == metrics[1].compute() == metrics[2].compute()


def test_bad_input() -> None:
    ones = np.ones((2, 4, 4))
    with pytest.raises(ValueError, match="predictions and targets must have one shape"):
        DepthMetrics().update(ones, ones[:1])
    with pytest.raises(ValueError, match=r"predictions must be .* found shape \[2, 3, 4, 4\]"):
        DepthMetrics().update(np.ones((2, 3, 4, 4)), ones)
    with pytest.raises(ValueError, match="16 of 16 predicted depths that count are NaN or infinite"):
        DepthMetrics().update(ones * np.nan, ones)
    with pytest.raises(ValueError, match="median is 0"):
        DepthMetrics(alignment="median").update(ones * 0, ones)
    with pytest.raises(ValueError, match="crop 'eigen' is not one of none, nyu_eigen, kitti_eigen, kitti_garg"):
        DepthMetrics(crop="eigen")
    with pytest.raises(ValueError, match="alignment 'mean' is not one of none, median, least_squares"):
        DepthMetrics(alignment="mean")
    for low, high in ((0.0, None), (2.0, 1.0), (-1.0, 5.0)):
        with pytest.raises(ValueError, match="0 < min_depth < max_depth"):
            DepthMetrics(min_depth=low, max_depth=high)
