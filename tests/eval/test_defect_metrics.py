"""Defect maps: histograms of scores against scikit-learn, images and parts against loops."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from dinov2.eval.metrics import defects as defect_metrics
from dinov2.eval.metrics.classification import classification_metrics
from dinov2.eval.metrics.defects import ImageDefectMetrics, PixelDefectMetrics


def log_odds_to_scores(log_odds: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-log_odds.astype(np.float64)))).astype(np.float32)


def problem(seed: int = 0, apart: float = 3.0, size: tuple[int, ...] = (4, 60, 50)) -> tuple[np.ndarray, np.ndarray]:
    """Scores like those of a trained network: next to 0 on most good pixels, spread out on defects."""
    generator = np.random.default_rng(seed)
    masks = (generator.random(size) < 0.05) * generator.integers(1, 4, size)
    masks[generator.random(size) < 0.1] = 255
    is_defect = (masks > 0) & (masks < 255)
    return log_odds_to_scores(generator.normal(-7 + apart * is_defect, 2.5, size)), masks.astype(np.uint8)


def exact(scores: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    known = masks != 255
    truth, values = masks[known] > 0, scores[known]
    return {
        "pixel_auroc": roc_auc_score(truth, values),
        "pixel_average_precision": average_precision_score(truth, values),
    }


@pytest.mark.parametrize("apart", [0.5, 3.0, 8.0])
def test_default_bins_are_next_to_exact(apart: float) -> None:
    scores, masks = problem(3, apart)
    metric = PixelDefectMetrics()
    metric.update(scores, masks)
    assert metric.compute() == pytest.approx(exact(scores, masks), abs=3e-4)


def test_scores_of_few_values_are_exact() -> None:
    """With every value in a bin of its own nothing is lost, ties included; 0 and 1 have bins of their own."""
    generator = np.random.default_rng(5)
    masks = generator.integers(0, 2, (40, 30))
    scores = generator.choice([0.0, 1e-6, 0.01, 0.3, 0.5, 0.503, 0.99, 1 - 1e-6, 1.0], masks.shape)
    metric = PixelDefectMetrics()
    metric.update(scores, masks)
    assert metric.compute() == pytest.approx(exact(scores, masks), rel=1e-12)


def test_pixels_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, masks = problem()
    whole, pieces = PixelDefectMetrics(num_bins=50), PixelDefectMetrics(num_bins=50)
    whole.update(scores, masks)
    monkeypatch.setattr(defect_metrics, "PIXELS_AT_A_TIME", 999)
    pieces.update(scores, masks)
    assert torch.equal(pieces.good_pixels, whole.good_pixels)
    assert torch.equal(pieces.defect_pixels, whole.defect_pixels)
    assert whole.good_pixels.sum() > 0


def test_pixel_metrics_are_absent_with_one_kind_of_pixel() -> None:
    scores, masks = problem()
    for only in (np.zeros_like(masks), np.ones_like(masks), np.full_like(masks, 255)):
        metric = PixelDefectMetrics()
        metric.update(scores, only)
        assert metric.compute() == {}


def images(seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Twenty images of eight parts; some are good all over, one is unknown all over."""
    scores, masks = problem(seed, size=(20, 6, 5))
    masks[::2] = np.where(masks[::2] == 255, 255, 0)
    masks[7] = 255
    return scores, masks, [f"part {number % 8}" for number in range(20)]


def slow_image_figures(scores: np.ndarray, masks: np.ndarray, parts: list[str]) -> tuple[dict, dict]:
    by_image, by_part = [], {}
    for image_scores, mask, part in zip(scores, masks, parts, strict=True):
        pixels = [(s, m) for s, m in zip(image_scores.flat, mask.flat, strict=True) if m != 255]
        if pixels:
            row = max(float(s) for s, _ in pixels), any(m > 0 for _, m in pixels)
            by_image.append(row)
            so_far = by_part.get(part, (0.0, False))
            by_part[part] = max(row[0], so_far[0]), row[1] or so_far[1]
    return tuple(
        classification_metrics(np.array([[1 - s, s] for s, _ in rows]), np.array([int(d) for _, d in rows]))
        for rows in (by_image, list(by_part.values()))
    )


def test_images_and_parts_agree_with_a_loop_over_pixels() -> None:
    scores, masks, parts = images()
    metric = ImageDefectMetrics()
    metric.update(scores, masks, parts)
    by_image, by_part = slow_image_figures(scores, masks, parts)
    expected = {f"image_{name}": value for name, value in by_image.items()}
    expected |= {f"part_{name}": value for name, value in by_part.items()} | {"images_without_truth": 1.0}
    assert metric.compute() == pytest.approx(expected, rel=1e-9)
    assert {"image_auroc", "part_auroc", "image_f1", "part_escape_rate_at_5"} <= expected.keys()


def test_intervals_come_from_parts_and_a_seed() -> None:
    scores, masks, parts = images()
    metric = ImageDefectMetrics()
    metric.update(scores, masks, parts)
    first, again = metric.scores(num_resamples=50, seed=1), metric.scores(num_resamples=50, seed=1)
    assert first is not None
    assert first == again
    assert first.image.count == 19
    assert first.part.count == 8
    figure = first.image.metrics["auroc"]
    assert figure.low <= figure.value <= figure.high


def test_single_images_and_images_without_labels() -> None:
    scores, masks, parts = images()
    whole, single = ImageDefectMetrics(), ImageDefectMetrics()
    whole.update(scores, masks, parts)
    for one in zip(scores, masks, parts, strict=True):
        single.update(one[0], one[1], [one[2]])
    assert single.compute() == whole.compute()
    metric = ImageDefectMetrics()
    metric.update(np.zeros((2, 3, 3)), np.full((2, 3, 3), 255), ["a", "b"])
    assert metric.compute() == {"images_without_truth": 2.0}
    assert metric.scores() is None


def test_bad_input() -> None:
    zeros, masks = np.zeros((2, 3, 3)), np.zeros((2, 3, 3), np.int64)
    for metric, extra in ((PixelDefectMetrics(), ()), (ImageDefectMetrics(), (["a", "b"],))):
        for scores, truth, message in (
            (zeros[:1], masks, "scores and masks must have one shape"),
            (zeros + 1.5, masks, r"must lie in \[0, 1\], found 1.5 to 1.5"),
            (zeros - 0.5, masks, r"must lie in \[0, 1\]"),
            (zeros + np.nan, masks, r"must lie in \[0, 1\], found nan"),
            (zeros, masks + 0.5, "masks must be integers"),
            (zeros[0, 0], masks[0, 0], r"scores must be \[H, W\] or \[B, H, W\]"),
        ):
            with pytest.raises(ValueError, match=message):
                metric.update(scores, truth, *extra)
    for groups in (["a"], "ab"):
        with pytest.raises(ValueError, match="one group id for each of 2 images"):
            ImageDefectMetrics().update(zeros, masks, groups)
    with pytest.raises(ValueError, match="num_bins must be at least 2, found 1"):
        PixelDefectMetrics(num_bins=1)
