"""Metrics of anomaly maps against slow definitions and scikit-learn."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from dinov2.eval.metrics.anomaly import AnomalyMetrics

IMAGES = 12


def drawn_images(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Maps ``[N, 20, 24]`` of few different scores, which survive the cut, and masks with unknown pixels."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(1, 40, (IMAGES, 20, 24)) / 16
    masks = np.zeros(scores.shape, dtype=np.uint8)
    for number in range(0, IMAGES, 2):
        top, left = generator.integers(0, 12, 2)
        masks[number, top : top + 4, left : left + 5] = 1
        masks[number, top + 4, left + 5] = 2  # touches by a corner
        masks[number, 18:, :3] = 1
    scores += 0.5 * (masks > 0)
    masks[:, :, -2:] = 255
    return scores, masks


def measure(scores: np.ndarray, masks: np.ndarray, *, order: range | None = None, **options) -> AnomalyMetrics:
    metrics = AnomalyMetrics(**options)
    for index in order or range(len(scores)):
        anomalous = bool(((masks[index] > 0) & (masks[index] < 255)).any())
        metrics.update(index, float(scores[index].max()), anomalous, f"part {index // 3}", scores[index], masks[index])
    return metrics


def slow_aupro(scores: np.ndarray, masks: np.ndarray, limit: float) -> float:
    regions = []
    for values, mask in zip(scores, masks, strict=True):
        labelled, count = ndimage.label((mask > 0) & (mask < 255), structure=np.ones((3, 3)))
        regions += [values[labelled == number] for number in range(1, count + 1)]
    good = scores[masks == 0]
    x, y = [0.0], [0.0]
    for threshold in sorted(set(scores.ravel().tolist()), reverse=True):
        x.append(float((good >= threshold).mean()))
        y.append(float(np.mean([(region >= threshold).mean() for region in regions])))
    fine = np.union1d(np.array(x), [limit])
    fine = fine[fine <= limit]
    return float(np.trapezoid(np.interp(fine, x, y), fine) / limit)


def test_pixels_as_scikit_learn_and_the_slow_definition_say() -> None:
    scores, masks = drawn_images()
    found = measure(scores, masks, pixel_threshold=1.75).compute()
    known = masks != 255
    labels, values = masks[known] > 0, scores[known]
    precision, recall, _ = precision_recall_curve(labels, values)
    above = values > 1.75
    expected = {
        "pixel_auroc": roc_auc_score(labels, values),
        "pixel_average_precision": average_precision_score(labels, values),
        "pixel_f1_max": (2 * precision * recall / (precision + recall)).max(),
        "pixel_segf1": 2 * (above & labels).sum() / (above.sum() + labels.sum()),
        **{f"pixel_aupro_{limit}": slow_aupro(scores, masks, limit) for limit in (0.3, 0.05)},
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-9)
    one_by_one = measure(scores, masks, pixel_threshold=1.75, order=range(IMAGES - 1, -1, -1)).compute()
    assert one_by_one == pytest.approx(found, abs=1e-12), "the order of images does not matter"


def test_scores_are_cut_without_harm() -> None:
    """Of scores that all differ, and lie close together, nothing that counts is lost."""
    scores, masks = drawn_images(1)
    scores = 0.9 + 0.1 * scores + np.random.default_rng(0).random(scores.shape) / 20
    found = measure(scores, masks).compute()
    known = masks != 255
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks[known] > 0, scores[known]), abs=1e-3)
    assert found["pixel_aupro_0.3"] == pytest.approx(slow_aupro(scores, masks, 0.3), abs=2e-3)


def test_images_and_parts() -> None:
    metrics = AnomalyMetrics()
    # Part a is good, b has one anomalous image, c is good and scores above it.
    for index, (score, anomalous, part) in enumerate(
        [
            (1.0, False, "a"),
            (3.0, False, "a"),
            (0.5, False, "b"),
            (4.0, True, "b"),
            (5.0, False, "c"),
            (2.0, False, "d"),
        ]
    ):
        metrics.update(index, score, anomalous, part)
    found = metrics.compute()
    assert found["image_auroc"] == 0.8
    assert found["image_false_alarms_at_zero_escapes"] == 0.2
    assert found["part_auroc"] == pytest.approx(2 / 3)
    assert found["part_average_precision"] == 0.5
    assert found["part_false_alarms_at_zero_escapes"] == pytest.approx(1 / 3)
    assert not any(name.startswith("pixel") or "accuracy" in name for name in found)
    levels = metrics.levels(thresholds=(3.5, 4.5), num_resamples=50)
    assert levels["image"].confusion == ((4, 1), (0, 1))
    assert levels["part"].confusion == ((2, 1), (1, 0))
    assert set(levels["part"].resamples) == set(levels["part"].values)


def test_intervals_are_those_of_resampled_parts() -> None:
    scores, masks = drawn_images(2)
    metrics = measure(scores, masks, pixel_threshold=2.0)
    level = metrics.levels(num_resamples=20, seed=3)["image"]
    draws = np.random.default_rng(3).multinomial(4, np.full(4, 1 / 4), size=20)
    for row, drawn in enumerate(draws):
        # The same images as often as their parts are drawn.
        numbers = [
            number for part, times in enumerate(drawn) for number in [part * 3, part * 3 + 1, part * 3 + 2] * times
        ]
        again = measure(scores[numbers], masks[numbers], pixel_threshold=2.0).compute()
        for name in level.values:
            if name.startswith("pixel"):
                assert level.resamples[name][row] == pytest.approx(again[name], abs=1e-9)
        expected = again.get("image_false_alarms_at_zero_escapes", np.nan)
        assert level.resamples["false_alarms_at_zero_escapes"][row] == pytest.approx(expected, nan_ok=True)
    scored = level.scores().metrics["pixel_aupro_0.3"]
    assert scored.low <= scored.value <= scored.high


@pytest.mark.parametrize(
    ("score", "values", "mask", "message"),
    [
        (-1.0, None, None, "image 0: an anomaly score"),
        (1.0, np.ones((2, 2)), np.zeros((2, 3), dtype=np.uint8), "one shape"),
        (1.0, np.full((2, 2), np.nan), np.zeros((2, 2), dtype=np.uint8), "image 0: scores of pixels"),
    ],
)
def test_wrong_scores(score: float, values: np.ndarray | None, mask: np.ndarray | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnomalyMetrics().update(0, score, False, "a", values, mask)
